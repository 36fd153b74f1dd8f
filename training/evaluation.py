"""How good the model is on held-out text, and what it writes."""

import math
import sys
from dataclasses import dataclass

import torch

from configs import Config
from data import Corpus, EvaluationSet
from model import GPT, Sampling, generate
from ops.scratch import scratch_scope
from parallel import Mesh, fold_seed, free_gathered_weights, move_to, sum_over
from training.state import Run, RunState


@dataclass(frozen=True)
class Score:
    """How well documents are predicted: nats over all their tokens, bos and eos not counted."""

    nats: float
    num_targets: int
    num_bytes: int  # UTF-8 bytes of the documents' text
    num_unknown: int = 0  # of num_targets, those that the tokenizer does not know the text of
    warnings: tuple[str, ...] = ()  # why the score looks better than it is

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nats / self.num_targets

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of the documents' text."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows or the loss is no number."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf


@dataclass(frozen=True)
class Evaluation(Score):
    """The score of the held-out documents while training."""

    sample: str | None = None  # a continuation of evaluate.sample_prompt


def held_out(run: Run) -> EvaluationSet:
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
    """Held-out documents, at most so many rows of them, dealt to the ranks there are."""
    return EvaluationSet(
        corpus,
        seq_length=config.model.seq_length,
        stride=stride,
        max_sequences=max_sequences,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        tp_size=mesh.tp.size,
    )


@torch.no_grad()
def score(model: GPT, documents: EvaluationSet) -> Score:
    """Score the documents; every rank calls this and gets the same."""
    mesh = model.mesh
    nats = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for batch in documents.batches:
        nats += model(**batch.inputs(mesh.device)).cross_entropy
    total = move_to(sum_over(mesh.dp, nats), "cpu").item()
    return Score(
        total,
        documents.num_targets,
        documents.num_bytes,
        documents.num_unknown,
        documents.warnings,
    )


def evaluate(run: Run, state: RunState, documents: EvaluationSet) -> Evaluation:
    """Score the documents and write a sample; every rank calls this and gets the same."""
    of_documents = score(run.model, documents)
    # Weights that give no number write nothing either; the next step finds out and acts on it.
    with scratch_scope():  # whole logits, which training would keep memory for
        sample = generate_sample(run, state) if math.isfinite(of_documents.nats) else None
    free_gathered_weights(run.model)
    return Evaluation(**vars(of_documents), sample=sample)


def generate_sample(run: Run, state: RunState) -> str | None:
    """The prompt and what the model makes of it, as the beginning of a document."""
    config, tokenizer = run.config.evaluate, run.corpus.tokenizer
    if config.sample_tokens == 0:
        return None
    sampling = Sampling(
        temperature=config.sample_temperature,
        seed=fold_seed(run.config.run.seed, "sample", state.step),
    )
    tokens = generate(
        run.model,
        [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt or "")],
        config.sample_tokens,
        sampling,
        num_ids=tokenizer.vocab_size,
        end_id=tokenizer.eos_id,
    )
    return tokenizer.decode([token for token in tokens if token != tokenizer.eos_id])
