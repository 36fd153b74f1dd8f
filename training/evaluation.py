"""How well the model predicts held-out text and chooses answers, and a sample of what it writes."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs import Config
from configs.tasks import read_tasks
from data import Corpus, Tokenizer
from data.evaluation import EvaluationSet
from data.tasks import TaskResult, TaskSet
from model import GPT, Sampling, generate
from ops.scratch import scratch_scope
from parallel import Mesh, fold_seed, free_gathered_weights, move_to, sum_over
from training.run_folder import require_same_on_all_ranks
from training.signals import StopSignals
from training.state import Run, RunState

_BATCHES_PER_CHECK = 4  # of signals; a check waits for all ranks, and so empties a pipeline
_PROMPT_TOKENS = 16  # of a held-out document, if evaluate.sample_prompt is null


class _StoppedError(Exception):
    """Raised on all ranks when a signal ends an evaluation."""


@dataclass(frozen=True)
class EvalResult:
    """How well documents are predicted: nats over all their targets; in a text eos is none."""

    nats: float
    num_targets: int
    num_bytes: int  # UTF-8 bytes of the targets' text
    num_unknown: int = 0  # targets whose text the tokenizer cannot represent
    warnings: tuple[str, ...] = ()  # reasons why the result looks better than it is
    sample: str | None = None  # generated text, if any
    tasks: tuple[TaskResult, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nats / self.num_targets

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the targets' text."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows or the loss is not a number."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf


def validation_set(run: Run) -> EvaluationSet:
    """The documents that every evaluation of this run scores."""
    most = run.config.evaluate.max_sequences
    return eval_batches(run.corpus, run.config, run.mesh, max_sequences=most)


def eval_batches(
    corpus: Corpus,
    config: Config,
    mesh: Mesh,
    *,
    max_sequences: int | None,
    stride: int | None = None,
) -> EvaluationSet:
    """This rank's share of the held-out documents, of at most `max_sequences` rows in total."""
    shape = _shape(config, mesh)
    return EvaluationSet(corpus, stride=stride, max_sequences=max_sequences, **shape)


def task_sets(config: Config, mesh: Mesh, tokenizer: Tokenizer) -> list[TaskSet]:
    """This rank's share of each of `evaluate.tasks`; every rank calls this.

    Raises UserError if a choice does not fit in a row, or ranks have different files.
    """
    files = read_tasks("evaluate.tasks", config.evaluate.tasks)
    shape = _shape(config, mesh)
    tasks = [TaskSet(name, items, tokenizer, **shape) for name, items in files.items()]
    for task in tasks:
        require_same_on_all_ranks(mesh, task.fingerprint, f"the task {task.name}")
    return tasks


def _shape(config: Config, mesh: Mesh) -> dict[str, int]:
    """The shape of rows, and this rank's place among those that share them."""
    return {
        "seq_length": config.model.seq_length,
        "micro_batch_size": config.train.micro_batch_size,
        "dp_rank": mesh.dp.rank,
        "dp_size": mesh.dp.size,
        "tp_size": mesh.tp.size,
        "cp_rank": mesh.cp.rank,
        "cp_size": mesh.cp.size,
    }


@torch.no_grad()
def score(model: GPT, documents: EvaluationSet, signals: StopSignals | None = None) -> EvalResult:
    """Score the documents; every rank calls this and gets the same result."""
    mesh = model.mesh
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for number, batch in enumerate(documents.batches):  # equally many on all ranks
        _raise_at_signal(mesh, signals, number)
        losses = model(**batch.to(mesh.device).inputs())
        if mesh.is_last_stage:
            nats += losses.cross_entropy
    total = move_to(_sum_over_ranks(mesh, nats), "cpu").item()
    counts = documents.num_targets, documents.num_bytes, documents.num_unknown
    return EvalResult(total, *counts, documents.warnings)


@torch.no_grad()
def score_task(model: GPT, task: TaskSet, signals: StopSignals | None = None) -> TaskResult:
    """Score the choices of a task; every rank calls this and gets the same result."""
    mesh = model.mesh
    nats = torch.zeros(task.num_rows, dtype=torch.float64, device=mesh.device)
    for number, batch in enumerate(task.batches):
        _raise_at_signal(mesh, signals, number)
        losses = model(**batch.to(mesh.device).inputs())
        if mesh.is_last_stage:
            rows = move_to(batch.sample_indices, mesh.device)
            nats.index_add_(0, rows, losses.of_rows.double())
    return task.grade(-move_to(_sum_over_ranks(mesh, nats), "cpu").numpy())


def _raise_at_signal(mesh: Mesh, signals: StopSignals | None, batch: int = 0) -> None:
    if signals and batch % _BATCHES_PER_CHECK == 0 and signals.agree_now(mesh):
        raise _StoppedError


def _sum_over_ranks(mesh: Mesh, nats: Tensor) -> Tensor:
    """Sum over all axes but tp, whose ranks have the same losses."""
    return sum_over(mesh.pp, sum_over(mesh.dp_cp, nats))


def evaluate(
    run: Run,
    state: RunState,
    documents: EvaluationSet,
    tasks: Sequence[TaskSet] = (),
    signals: StopSignals | None = None,
) -> EvalResult | None:
    """Score documents and tasks, and generate a sample, or return None on all ranks at a signal."""
    try:
        result = score(run.model, documents, signals)
        # Weights that score NaN cannot be sampled from; the next step finds out and acts on it.
        if math.isfinite(result.nats):
            graded = tuple(score_task(run.model, task, signals) for task in tasks)
            result = replace(result, tasks=graded)
            _raise_at_signal(run.mesh, signals)
            if documents.num_targets:
                with scratch_scope():  # full logits, whose memory training would keep
                    result = replace(result, sample=generate_sample(run, state))
    except _StoppedError:
        return None
    finally:
        free_gathered_weights(run.model)
    return result


def generate_sample(run: Run, state: RunState) -> str | None:
    """The prompt and its continuation, as the beginning of a document."""
    config, tokenizer = run.config.evaluate, run.corpus.tokenizer
    if config.sample_tokens == 0:
        return None
    sampling = Sampling(
        temperature=config.sample_temperature,
        seed=fold_seed(run.config.run.seed, "sample", state.step),
    )
    tokens = generate(
        run.model,
        [tokenizer.bos_id, *sample_prompt(run.corpus, config.sample_prompt)],
        config.sample_tokens,
        sampling,
        num_ids=tokenizer.vocab_size,
        end_id=tokenizer.eos_id,
    )
    return tokenizer.decode([token for token in tokens if token != tokenizer.eos_id])


def sample_prompt(corpus: Corpus, prompt: str | None) -> list[int]:
    """The tokens of a prompt without bos; None: the beginning of the first held-out document.

    That is its first 16 tokens or, if it is a pair or a conversation, all up to its first target.
    """
    if prompt is not None:
        return corpus.tokenizer.encode(prompt)
    file = next(part for part in corpus.validation.parts if part.num_documents)
    stop = min(1 + _PROMPT_TOKENS, int(file.document_offsets[1]) - 1)  # bos ... eos
    if file.targets is not None:
        stop = int(file.targets.bounds[0])
    return [int(token) for token in file.span(1, stop)]
