"""Score text or tasks with the model of a run: `python evaluate.py run=runs/NAME task=FILE`.

Under torchrun the model is split over tensor-parallel ranks, and rows over data-parallel ones.
"""

import json
import logging
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from configs import (
    Config,
    ConfigError,
    DataConfig,
    Range,
    UserError,
    exit_on_config_error,
    machine_errors_as_user_errors,
)
from configs.errors import bad_setting
from configs.program_settings import load_settings, run_config
from configs.schema import WeightedSource
from configs.tasks import read_tasks
from configs.validate import SOURCE_EXTENSIONS, check_files, check_inputs, check_source

_FORMAT = ("format", "prompt_field", "completion_field", "messages_field")
_OF_A_SOURCE = ("source", "path", "text_field", "hub_config", "hub_split", "hub_revision", *_FORMAT)
_OF_THE_RUN = ("vocab_size", "bos_token", "eos_token")


@dataclass(frozen=True)
class Settings:
    """Report loss, perplexity and bits per byte of text, by the model of a run.

    Each document is scored from its beginning, as lm-evaluation-harness does: bos and eos are not
    scored, and text beyond model.seq_length is read in rolling windows. Of prompt-completion pairs
    and conversations the targets of training are scored, in rows of at most model.seq_length.

    With task=FILE, report the accuracy in multiple-choice questions instead, also as
    lm-evaluation-harness does: by log-likelihood (acc), per character (acc_norm) or byte
    (acc_bytes) of a choice, or relative to that of the choice alone (acc_mutual_info).
    """

    run: str  # the folder of a run, such as runs/gpt_debug
    # held_out: the validation documents of the run.
    source: Literal["held_out", "text", "jsonl", "parquet", "arrow", "hub"] = "held_out"
    path: str | None = None  # file, folder, glob or hub name; required unless source=held_out
    # Multiple-choice file, or a list [FILE, ...]: JSON lines with context, choices and answer.
    task: tuple[str, ...] = ()
    items: str | None = None  # JSON lines file to write the scores of each item of the tasks to
    # Kind of records, as data.format; null: as in training.
    format: Literal["text", "prompt_completion", "messages"] | None = None
    text_field: str = "text"  # name of the text column in jsonl, parquet, arrow and hub rows
    prompt_field: str | None = None  # name of the column of prompts; null: as in training
    completion_field: str | None = None  # name of the column of completions; null: as in training
    messages_field: str | None = None  # name of the column of messages; null: as in training
    hub_config: str | None = None  # configuration of a hub dataset
    hub_split: str = "train"  # split of a hub dataset
    hub_revision: str | None = None  # revision of a hub dataset
    # Tokens scored per window after a document's first. Fewer is slower but gives each token more
    # context. null: model.seq_length.
    stride: int | None = None
    # Score whole documents of at most this many rows in total, and at least one document; null: as
    # in training for held_out, else all.
    max_sequences: int | None = None
    output: str | None = None  # JSON file to write the result to
    step: int | None = None  # step of the checkpoint; null: the newest
    micro_batch_size: int | None = None  # rows per forward pass; null: as in training
    # Precision of computation; null: as in training for held_out text, else fp32, as in an export.
    precision: Literal["fp32", "bf16"] | None = None
    tensor_model_parallel_size: int | None = None  # null: the number of ranks

    RANGES: ClassVar[dict[str, Range]] = {
        "stride": Range(1),
        "max_sequences": Range(1),
        "step": Range(0),
        "micro_batch_size": Range(1),
        "tensor_model_parallel_size": Range(1),
    }

    def __post_init__(self) -> None:
        if self.source == "held_out" and self.path is not None:
            raise ConfigError(
                f"path={self.path} is not used with source=held_out; choose its format: "
                "source=text, jsonl, parquet, arrow or hub",
                "source",
            )
        if self.source != "held_out" and self.path is None:
            what = "the name of a dataset" if self.source == "hub" else "a file, a folder or a glob"
            raise ConfigError(f"path is missing: source={self.source} needs {what}", "path")
        if self.task and self.source != "held_out":
            raise ConfigError(f"source={self.source} is not used with task; omit one", "source")
        self._refuse_unused()
        if self.items is not None and not self.task:
            raise ConfigError(f"items={self.items} is not used without task=FILE", "items")
        for key, path in (("output", self.output), ("items", self.items)):
            file = None if path is None else Path(path).expanduser()
            if file is not None and not file.parent.is_dir():
                raise ConfigError(f"{key}={file}: its parent directory does not exist", key)
            if file is not None and file.is_dir():
                raise ConfigError(f"{key}={file} is a directory; give a file", key)

    def _refuse_unused(self) -> None:
        """Raise ConfigError for a setting that has no effect on what is scored."""
        unused = set(_OF_A_SOURCE[2:] if self.source == "held_out" else ())
        unused |= {"stride", "max_sequences"} if self.task else set()
        other = "task" if self.task else "source=held_out"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in unused and value != field.default:
                raise bad_setting(field.name, value, f"is not used with {other}; omit it")


def parse(arguments: list[str]) -> tuple[Settings, Config]:
    """Return the settings and the run's configuration, changed accordingly, or exit."""
    settings = load_settings(Settings, arguments)
    is_held_out = settings.source == "held_out" and not settings.task
    precision = settings.precision or (None if is_held_out else "fp32")
    changes = {"precision": precision, "micro_batch_size": settings.micro_batch_size}
    train = {key: value for key, value in changes.items() if value is not None}
    with exit_on_config_error():
        config = run_config(settings.run, settings.tensor_model_parallel_size, **train)
        read_tasks("task", settings.task)
        config = replace(config, evaluate=replace(config.evaluate, tasks=settings.task))
        longest = config.model.seq_length
        if settings.stride is not None and settings.stride > longest:
            raise ConfigError(
                f"stride={settings.stride} is more than model.seq_length={longest}, the length of "
                f"a window; choose stride={longest} or less",
                "stride",
            )
        if settings.path is not None:  # a source of its own
            given = {key: getattr(settings, key) for key in _OF_A_SOURCE}
            kept = {key: getattr(config.data, key) for key in _OF_THE_RUN}
            kept |= {key: value for key, value in given.items() if value is not None}
            kept |= kind_of_records(settings, list(config.data.mixture.values()))
            config = replace(config, data=DataConfig(**kept))
            check_source("", config.data.mixture["data"])
            if settings.source in SOURCE_EXTENSIONS:
                check_files("path", settings.path, settings.source)
        elif not settings.task:  # which need no text
            check_inputs(config)
    return settings, config


def kind_of_records(settings: Settings, sources: list[WeightedSource]) -> dict[str, str]:
    """Return format and columns: those given, else those that all sources of the run share."""

    def shared(key: str) -> Any:
        values = sorted({getattr(source, key) for source in sources})
        if len(values) > 1:
            problem = f"the sources of the run differ in it ({', '.join(values)})"
            raise ConfigError(f"{key}=null: {problem}; give {key}=", key)
        return values[0]

    kind: Any = "text" if settings.source == "text" else None
    kind = settings.format or kind or shared("format")
    sources = [s for s in sources if s.format == kind] or [WeightedSource(format=kind)]
    columns = {key: getattr(settings, key) or shared(key) for key in sources[0].columns}
    return {"format": kind, **columns}


if __name__ == "__main__":
    # Importing torch takes seconds; report a mistyped key before that.
    SETTINGS, CONFIG = parse(sys.argv[1:])

from torch.distributed.elastic.multiprocessing.errors import record

from checkpoints import require_fingerprint
from data import Corpus, find_text, prepare_corpus
from data.corpus.report import count_in_words
from data.corpus.scored_text import load_eval_corpus
from data.tasks import TaskResult
from parallel import close_mesh
from tracking.console import set_up_logging
from training.evaluation import EvalResult, eval_batches, score, score_task, task_sets
from training.inference import LoadedModel, load_for_inference
from training.run_folder import exit_on_error, require_same_on_all_ranks
from training.signals import StopSignals
from training.state import mesh_from_config

logger = logging.getLogger("microtron")


def text_to_score(trained: LoadedModel, settings: Settings) -> tuple[Corpus, int | None]:
    """Return the documents as the validation part of a corpus, and the maximum number of rows."""
    config, mesh, tokenizer = trained.config, trained.mesh, trained.tokenizer
    with machine_errors_as_user_errors("read the text"):
        if settings.source != "held_out":
            path = Path(settings.run, tokenizer.file_name)
            corpus = load_eval_corpus(config.data, tokenizer, path)
            require_same_on_all_ranks(mesh, corpus.fingerprint, "the text")
            return corpus, settings.max_sequences
        text = find_text(config.data)
        require_same_on_all_ranks(mesh, text.fingerprint, "the text")
        corpus = prepare_corpus(config.data, config.model.seq_length, mesh.local_rank, text)
    require_same_on_all_ranks(mesh, corpus.fingerprint, "the tokenized text")
    require_fingerprint(trained.checkpoint, "data", corpus.fingerprint)
    if corpus.validation.num_documents == 0:
        raise UserError(
            "the run has no validation text (data.validation_fraction=0, or a text too short to "
            "split); give source= and path="
        )
    return corpus, settings.max_sequences or config.evaluate.max_sequences


def report_tasks(results: list[TaskResult], settings: Settings) -> None:
    """Print the accuracies, and write them and the scores of items to files."""
    for result in results:
        sys.stdout.write(f"{result.name}: {result}\n")
    if settings.output is not None:
        write_numbers(
            {f"{r.name}/{name}": value for r in results for name, value in r.metrics.items()},
            settings.output,
        )
    if settings.items is not None:
        rows = [{"task": result.name, **item} for result in results for item in result.items]
        write_file("items", settings.items, "".join(f"{json.dumps(row)}\n" for row in rows))


def report(result: EvalResult, output: str | None) -> None:
    """Print the result, and write it to a JSON file in full precision."""
    numbers = {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_targets,
        "bytes": result.num_bytes,
    }
    if result.num_unknown:
        numbers["unknown_tokens"] = result.num_unknown
    for warning in result.warnings:
        logger.warning("%s", warning)
    sys.stdout.write(
        f"loss {result.loss:.4f} nats/token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits/byte of {result.num_targets:,} tokens, "
        f"{result.num_bytes:,} bytes\n"
    )
    if output is not None:
        write_numbers(numbers, output)


def write_numbers(numbers: dict[str, float], output: str) -> None:
    """Write a JSON file, with null for what JSON does not have: infinity and NaN."""
    row = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
    write_file("output", output, json.dumps(row, indent=1) + "\n")


def write_file(key: str, path: str, text: str) -> None:
    """Write the file that a setting names."""
    with machine_errors_as_user_errors(f"write {key}={path}"):
        Path(path).expanduser().write_text(text)


def score_text(trained: LoadedModel, settings: Settings) -> EvalResult:
    """Score the documents that the settings name; every rank gets the same result."""
    corpus, most = text_to_score(trained, settings)
    documents = eval_batches(
        corpus, trained.config, trained.mesh, max_sequences=most, stride=settings.stride
    )
    if documents.num_targets == 0:
        raise UserError("the text has no token to score; give more text")
    model = trained.checkpoint.directory
    number = count_in_words(documents.num_documents, "document")
    logger.info("scoring %s with the model of %s", number, model)
    return score(trained.model, documents)


@record
def main(settings: Settings, config: Config) -> int:
    """Join the other ranks, load the model, and score the text or the tasks."""
    StopSignals()
    mesh = mesh_from_config(config)
    set_up_logging(mesh.world.rank)
    with exit_on_error():
        trained = load_for_inference(config, Path(settings.run).expanduser(), mesh, settings.step)
        tasks = task_sets(config, mesh, trained.tokenizer)
        results = [score_task(trained.model, task) for task in tasks]
        result = None if tasks else score_text(trained, settings)
        if mesh.world.rank == 0:
            if result is None:
                report_tasks(results, settings)
            else:
                report(result, settings.output)
    close_mesh()
    return 0


if __name__ == "__main__":
    sys.exit(main(SETTINGS, CONFIG))
