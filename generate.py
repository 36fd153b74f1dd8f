"""Continue a prompt: `python generate.py run=runs/NAME prompt="def " max_new_tokens=100`.

Under torchrun the model is cut over the ranks. Only the text goes to stdout, all else to stderr.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from configs import (
    Config,
    ConfigError,
    Range,
    Text,
    UserError,
    exit_on_config_error,
    load_settings,
    run_config,
)


@dataclass(frozen=True)
class Settings:
    """Continue a prompt with the model of a run, and print both.

    The prompt is fed as it is given, and an empty one as the beginning of a document. Without a
    prompt, each line of stdin is one. The model sees the last model.seq_length tokens.
    """

    run: str  # the folder of a run, such as runs/gpt_debug
    prompt: Text | None = None  # left out: lines are read from stdin
    max_new_tokens: int = 100
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None  # choose among so many of the likeliest tokens; null: all
    top_p: float | None = None  # and of those the fewest that have this probability; null: all
    num_samples: int = 1  # generate_tokens of each prompt, all at once
    seed: int = 1234  # the same seed, the same text
    stop: Text | None = None  # end before this text
    stop_id: int | None = None  # end at this token, beside the tokenizer's end of document
    stop_at_end: bool = True  # false: go on past the end of a document
    step: int | None = None  # of the checkpoint; null: the newest
    # Of weights and computation. bf16 takes half the memory, and is as training computes; but
    # likely tokens are then near enough to change places with the layout.
    precision: Literal["fp32", "bf16"] = "fp32"
    tensor_model_parallel_size: int | None = None  # null: the number of ranks

    RANGES: ClassVar[dict[str, Range]] = {
        "max_new_tokens": Range(0),
        "temperature": Range(0),
        "top_k": Range(1),
        "top_p": Range(0, 1, open_low=True),
        "num_samples": Range(1),
        "seed": Range(0, 2**63 - 1),
        "stop_id": Range(0),
        "step": Range(0),
        "tensor_model_parallel_size": Range(1),
    }

    def __post_init__(self) -> None:
        if self.stop == "":
            raise ConfigError("stop is empty; leave it out to stop at no text", "stop")


def parse(arguments: list[str]) -> tuple[Settings, Config]:
    """The settings and the configuration of the run; or ends the process."""
    settings = load_settings(Settings, arguments)
    with exit_on_config_error():
        config = run_config(
            settings.run,
            settings.tensor_model_parallel_size,
            precision=settings.precision,
        )
    return settings, config


if __name__ == "__main__":
    # Before torch is imported, which takes seconds, so that a mistyped key is answered at once.
    SETTINGS, CONFIG = parse(sys.argv[1:])
    # Weights in huge pages where Linux lends them: each token reads all of them once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from configs import exit_with_error
from model import Sampling, generate_tokens
from model.generation.continuation import Continuation
from parallel import Mesh, close_mesh, gather_json
from tracking.console import printable, set_up_logging
from training.inference import LoadedModel, load_for_inference
from training.signals import StopSignals
from training.state import mesh_from_config

logger = logging.getLogger("microtron")


def prompts(settings: Settings, mesh: Mesh) -> Iterator[str]:
    """The prompt, or those that rank 0 reads from stdin, until it ends; on every rank."""
    if settings.prompt is not None:
        yield settings.prompt
        return
    while (line := gather_json(mesh, read_line() if mesh.world.rank == 0 else None)[0]) is not None:
        yield line


def read_line() -> str | None:
    """The next line of stdin without its end; None: there are no more."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.buffer.readline()
    try:
        return line.decode().rstrip("\r\n") if line else None
    except UnicodeDecodeError as error:
        raise UserError(f"a prompt on stdin is not UTF-8: {error}") from error


@torch.inference_mode()
def write(trained: LoadedModel, settings: Settings, prompt: str) -> None:
    """Print a prompt and its generate_tokens; a single one as it comes."""
    tokenizer, is_writer = trained.tokenizer, trained.mesh.world.rank == 0
    tokens = tokenizer.encode(prompt) or [tokenizer.bos_id]
    end_ids = {settings.stop_id} if settings.stop_id is not None else set()
    end_ids |= {tokenizer.eos_id} if settings.stop_at_end else set()
    texts = [
        Continuation(tokenizer, tokens, end_ids, settings.stop) for _ in range(settings.num_samples)
    ]
    streams = is_writer and len(texts) == 1
    printed = [prompt] * len(texts)
    if streams:
        show(prompt)
    started_at, num_tokens = time.perf_counter(), 0
    for new in generate_tokens(
        trained.model,
        tokens,
        settings.max_new_tokens,
        Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed),
        num_ids=tokenizer.vocab_size,
        num_samples=settings.num_samples,
    ):
        num_tokens += 1
        for number, (text, token) in enumerate(zip(texts, new, strict=True)):
            printed[number] += (piece := text.add(token))
            if streams:
                show(piece)
        if all(text.ended for text in texts):
            break
    rest = [text.finish() for text in texts]
    elapsed_s = time.perf_counter() - started_at
    if streams:
        show(rest[0] + line_end(settings))
    elif is_writer:
        show("".join(f"{text}{end}\n" for text, end in zip(printed, rest, strict=True)))
    logger.info(
        "%d tokens after %d of the prompt%s in %.2f s, %.1f tokens/s",
        num_tokens,
        len(tokens),
        f", {len(texts)} times" if len(texts) > 1 else "",
        elapsed_s,
        num_tokens * len(texts) / elapsed_s,
    )


def show(text: str) -> None:
    """Print a piece of text as it is, now; a terminal is not to do what a model writes."""
    text = printable(text) if sys.stdout.isatty() else text
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def line_end(settings: Settings) -> str:
    """A newline where something else follows: another text, or the prompt of a terminal."""
    return "\n" if settings.prompt is None or sys.stdout.isatty() else ""


@record
def main(settings: Settings, config: Config) -> int:
    """Join the other ranks, load the model, and continue each prompt."""
    StopSignals()
    mesh = mesh_from_config(config, decoding=True)
    set_up_logging(mesh.world.rank)
    try:
        trained = load_for_inference(
            config, Path(os.path.expanduser(settings.run)), mesh, settings.step
        )
        logger.info("continuing with the model of %s", trained.checkpoint.directory)
        for prompt in prompts(settings, mesh):
            write(trained, settings, prompt)
    except UserError as error:
        exit_with_error(str(error))
    except BrokenPipeError:  # nobody reads on, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS, CONFIG))
