"""Continue a prompt: `python generate.py run=runs/NAME prompt="def " max_new_tokens=100`.

Under torchrun the model is split over the ranks. Text goes to stdout, all messages to stderr.
"""

import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from configs import Config, ConfigError, Range, Text, UserError, exit_on_config_error
from configs.program_settings import load_settings, run_config


@dataclass(frozen=True)
class Settings:
    """Continue a prompt with the model of a run, and print both.

    Without prompt=, each line of stdin is a prompt. The model sees at most the last
    model.seq_length tokens. With chat=true a prompt is the message of a user, only the answer is
    printed, and the lines of stdin belong to one conversation. Of prompt= a file or a pipe gets
    exactly the text, without a newline after it.
    """

    run: str  # the folder of a run, such as runs/gpt_debug
    prompt: Text | None = None  # the text to continue; omitted: lines are read from stdin
    # Start the prompt with bos, as training documents do; an empty prompt always starts with it.
    bos: bool = True
    chat: bool = False  # use the chat template of data.format=messages
    max_new_tokens: int = 100
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None  # sample from the k most likely tokens; null: all
    top_p: float | None = None  # sample from the smallest set with this probability; null: all
    num_samples: int = 1  # samples per prompt, generated as one batch
    seed: int = 1234  # the same seed gives the same text
    stop: Text | None = None  # stop before this text
    stop_id: int | None = None  # stop at this token, in addition to the tokenizer's eos
    stop_at_end: bool = True  # false: continue after eos
    step: int | None = None  # step of the checkpoint; null: the newest
    # Precision of weights and computation. bf16 takes half the memory, but the chosen tokens then
    # depend more on the layout.
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
            raise ConfigError("stop is empty; omit it to stop at no text", "stop")
        if self.chat and not self.bos:
            raise ConfigError("bos=false has no effect with chat=true; omit one of them", "bos")
        if self.chat and self.prompt is None and self.num_samples > 1:
            fix = "give prompt=, or omit num_samples"
            raise ConfigError(
                f"num_samples={self.num_samples} answers cannot continue one conversation; {fix}",
                "num_samples",
            )


def parse(arguments: list[str]) -> tuple[Settings, Config]:
    """Return the settings and the configuration of the run, or exit."""
    settings = load_settings(Settings, arguments)
    with exit_on_config_error():
        config = run_config(
            settings.run,
            settings.tensor_model_parallel_size,
            precision=settings.precision,
        )
        num_ids = config.data.padded_vocab_size
        if settings.stop_id is not None and settings.stop_id >= num_ids:
            raise ConfigError(
                f"stop_id={settings.stop_id} is not in the vocabulary; choose 0 to {num_ids - 1}",
                "stop_id",
            )
    return settings, config


if __name__ == "__main__":
    # Importing torch takes seconds; report a mistyped key before that.
    SETTINGS, CONFIG = parse(sys.argv[1:])
    # Put the weights in huge pages where Linux has them: each token reads all weights once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from data.corpus.encoding import encode_chat
from model import Sampling, generate_tokens
from model.generation.continuation import Continuation
from parallel import Mesh, close_mesh, gather_json
from tracking.console import printable, set_up_logging
from training.inference import LoadedModel, load_for_inference
from training.run_folder import exit_on_error
from training.signals import StopSignals
from training.state import mesh_from_config

logger = logging.getLogger("microtron")

Messages = list[dict[str, str]]  # each with role and content


def prompts(settings: Settings, mesh: Mesh) -> Iterator[str]:
    """Yield the prompts on every rank: the given one, or the lines of rank 0's stdin."""
    if settings.prompt is not None:
        yield settings.prompt
        return
    while (line := gather_json(mesh, read_line() if mesh.world.rank == 0 else None)[0]) is not None:
        yield line


def read_line() -> str | None:
    """Read a line of stdin without its line end; None at the end of stdin."""
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.buffer.readline()
    try:
        return line.decode().rstrip("\r\n") if line else None
    except UnicodeDecodeError as error:
        raise UserError(f"a prompt on stdin is not UTF-8 text: {error}") from error


def encode(trained: LoadedModel, settings: Settings, prompt: str, messages: Messages) -> list[int]:
    """Return the tokens of a prompt, or of a conversation that it continues.

    Logs how many of them the model sees if not all.
    """
    longest = trained.config.model.seq_length
    if settings.chat:
        messages.append({"role": "user", "content": prompt})
        tokens = encode_chat(messages, trained.tokenizer)
    else:
        tokens = trained.tokenizer.encode(prompt)
        if settings.bos or not tokens:
            tokens = [trained.tokenizer.bos_id, *tokens]
    if len(tokens) > longest:
        text = "the prompt has %d tokens; the model sees only the last %d (model.seq_length)"
        logger.warning(text, len(tokens), longest)
    return tokens


@torch.inference_mode()
def write(trained: LoadedModel, settings: Settings, prompt: str, messages: Messages) -> None:
    """Print a prompt and its continuations; a single one while it is generated.

    In a chat, print only the answers, and add prompt and answer to the messages.
    """
    tokenizer, is_writer = trained.tokenizer, trained.mesh.world.rank == 0
    tokens = encode(trained, settings, prompt, messages)
    prompt = "" if settings.chat else prompt
    ends = (settings.stop_id, tokenizer.eos_id if settings.stop_at_end else None)
    end_ids = {end for end in ends if end is not None}
    samples = [
        Continuation(tokenizer, tokens, end_ids, settings.stop) for _ in range(settings.num_samples)
    ]
    texts = [[prompt] for _ in samples]
    show_now = show if is_writer and len(samples) == 1 else lambda _: None
    show_now(prompt)
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
        for sample, text, token in zip(samples, texts, new, strict=True):
            text.append(sample.add(token))
        show_now(texts[0][-1])
        if all(sample.ended for sample in samples):
            break
    elapsed_s = time.perf_counter() - started_at
    for number, (sample, text) in enumerate(zip(samples, texts, strict=True), start=1):
        text.append(sample.finish())
        if is_writer and len(samples) > 1:
            show(f"--- sample {number} of {len(samples)} ---\n{''.join(text)}\n")
    # A newline where more follows: another text, or the prompt of a terminal.
    has_more = settings.prompt is None or sys.stdout.isatty()
    show_now(texts[0][-1] + "\n" * has_more)
    if settings.chat:
        messages.append({"role": "assistant", "content": samples[0].message})
    logger.info(
        "generated %s%d tokens after a prompt of %d in %.2f s, %.1f tokens/s",
        f"{len(samples)} x " if len(samples) > 1 else "",
        num_tokens,
        len(tokens),
        elapsed_s,
        num_tokens * len(samples) / elapsed_s,
    )


def show(text: str) -> None:
    """Print a piece of text at once, unchanged except for control characters on a terminal."""
    text = printable(text) if sys.stdout.isatty() else text
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


@record
def main(settings: Settings, config: Config) -> int:
    """Join the other ranks, load the model, and continue each prompt."""
    StopSignals()
    mesh = mesh_from_config(config, decoding=True)
    set_up_logging(mesh.world.rank)
    try:
        with exit_on_error():
            trained = load_for_inference(
                config, Path(settings.run).expanduser(), mesh, settings.step
            )
            logger.info("using the model of %s", trained.checkpoint.directory)
            formats = {source.format for source in config.data.mixture.values()}
            if settings.chat and "messages" not in formats:
                logger.warning("chat=true, but the run was not trained on data.format=messages")
            messages: Messages = []
            for prompt in prompts(settings, mesh):
                write(trained, settings, prompt, messages)
    except BrokenPipeError:  # the reader has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS, CONFIG))
