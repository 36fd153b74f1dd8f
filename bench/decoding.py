"""Decoding speed in tokens per second, ours beside transformers', in turn in one process.

    python export.py run=runs/NAME output=DIR
    OMP_NUM_THREADS=1 THP_MEM_ALLOC_ENABLE=1 python -m bench.decoding run=runs/NAME exported=DIR

Both decode greedily in float32, with a KV cache and the same number of threads, and must give the
same tokens. The time includes the prefill. generate.py sets the second variable itself; here both
benefit from it. Seconds are CPU time, as others may use the machine.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import transformers

from configs import Config, Range, exit_on_config_error
from configs.program_settings import load_settings, run_config
from model import Sampling, generate_tokens
from parallel import close_mesh
from training.inference import load_for_inference
from training.state import mesh_from_config


@dataclass(frozen=True)
class Settings:
    """Time decoding, ours and transformers', with a run and what export.py has made of it."""

    run: str  # the folder of a run
    exported: str  # folder written by export.py
    prompt_tokens: int = 32
    new_tokens: int = 64
    rounds: int = 7  # of both in turn, after one that is not counted
    RANGES: ClassVar[dict[str, Range]] = {
        "prompt_tokens": Range(1),
        "new_tokens": Range(1),
        "rounds": Range(1),
    }


def timed(decode: Callable[[], list[int]]) -> tuple[float, list[int]]:
    """Return CPU seconds and the tokens."""
    started_at = time.process_time()
    tokens = decode()
    return time.process_time() - started_at, tokens


def main(settings: Settings, config: Config) -> int:
    """Take both in turn; print the median rate of each, and of the ratios of a round."""
    mesh = mesh_from_config(config, decoding=True)
    trained = load_for_inference(config, Path(os.path.expanduser(settings.run)), mesh, None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.expanduser(settings.exported), dtype=torch.float32, local_files_only=True
    )
    theirs.generation_config.eos_token_id = None  # so that neither stops early
    num_ids, n = trained.tokenizer.vocab_size, settings.new_tokens
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(num_ids, (1, settings.prompt_tokens), generator=generator)

    def decode() -> list[int]:
        greedy = Sampling(temperature=0.0)
        with torch.inference_mode():
            decoded = generate_tokens(trained.model, prompt[0].tolist(), n, greedy, num_ids=num_ids)
            return [token for (token,) in decoded]

    def decode_theirs() -> list[int]:
        with torch.inference_mode():
            whole = theirs.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, do_sample=False
            )
        tokens: list[int] = whole[0, prompt.shape[1] :].tolist()
        return tokens

    rates: list[tuple[float, float]] = []
    for number in range(settings.rounds + 1):
        (ours_s, tokens), (theirs_s, their_tokens) = timed(decode), timed(decode_theirs)
        if tokens != their_tokens:
            sys.stderr.write(f"the tokens differ:\n{tokens}\n{their_tokens}\n")
            return 1
        if number > 0:
            rates.append((n / ours_s, n / theirs_s))
    ours, of_theirs = zip(*rates, strict=True)
    ratios = [mine / their for mine, their in rates]
    for who, values in (("ours", ours), ("transformers", of_theirs), ("ratio", ratios)):
        sys.stdout.write(
            f"{who:<12}  {statistics.median(values):8.2f}  "
            f"({min(values):.2f} to {max(values):.2f}){'' if who == 'ratio' else ' tokens/s'}\n"
        )
    close_mesh()
    return 0


if __name__ == "__main__":
    SETTINGS = load_settings(Settings, sys.argv[1:])
    with exit_on_config_error():
        CONFIG = run_config(SETTINGS.run, precision="fp32")
    sys.exit(main(SETTINGS, CONFIG))
