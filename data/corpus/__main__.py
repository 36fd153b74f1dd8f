"""Prepare a corpus for a training start, which waits; people run `python -m data.prepare`.

Reads a line of JSON from stdin, and ends when stdin is closed, so that it does not outlive the
start. If there is an error for the user, it is written to stdout as JSON, and the exit code is 2.
"""

import json
import logging
import os
import sys
import threading
from typing import Any

from configs.errors import UserError, machine_errors_as_user_errors
from configs.launch import EXIT_BEFORE_TRAINING, is_rank_zero
from configs.schema import DataConfig, WeightedSource
from data.corpus.build import build_corpus


def main() -> int:
    """Do what the line on stdin says; return the exit code."""
    stdout = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not the answer
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    prefix = "" if is_rank_zero() else f"[rank {os.environ['RANK']}] "
    logging.basicConfig(format=f"{prefix}%(message)s", level=logging.WARNING)
    logging.getLogger("microtron").setLevel(task["log_level"])
    config = _from_json(task["data"])
    cache = config.cache_directory
    try:
        with machine_errors_as_user_errors(f"prepare the corpus in data.cache_directory={cache}"):
            build_corpus(config)
    except UserError as error:
        os.write(stdout, json.dumps(str(error)).encode())
        return EXIT_BEFORE_TRAINING
    return 0


def _from_json(settings: dict[str, Any]) -> DataConfig:
    sources = tuple(WeightedSource(**source) for source in settings.pop("sources"))
    return DataConfig(**settings, sources=sources)


def _end_with_stdin() -> None:
    # Not sys.stdin.read(), whose lock the interpreter would wait for at a normal end.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
