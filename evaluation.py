"""How good the model is on held-out text, and what it writes."""

import math
import sys
from dataclasses import dataclass

import torch

from data import EvaluationSet, evaluation_batches
from model import generate
from parallel import fold_seed, free_gathered_weights, own_scratch, sum_over
from run_state import Run, RunState


@dataclass(frozen=True)
class Evaluation:
    """Averages over all targets of the held-out documents."""

    loss: float  # nats per target token
    bits_per_byte: float  # bits per UTF-8 byte of the documents' text
    sample: str | None  # a continuation of evaluate.sample_prompt

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that overflows or the loss is no number."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf


def held_out(run: Run) -> EvaluationSet:
    """The documents that every evaluation of this run scores."""
    config = run.config
    return evaluation_batches(
        run.corpus,
        seq_length=config.model.seq_length,
        max_sequences=config.evaluate.max_sequences,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=run.mesh.dp.rank,
        dp_size=run.mesh.dp.size,
        tp_size=run.mesh.tp.size,
    )


@torch.no_grad()
def evaluate(run: Run, state: RunState, documents: EvaluationSet) -> Evaluation:
    """Score the documents and write a sample; every rank calls this and gets the same."""
    device = run.mesh.device
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for batch in documents.batches:
        nats += run.model(**batch.inputs(device)).cross_entropy
    total = sum_over(run.mesh.dp, nats).item()
    # Weights that give no number write nothing either; the next step finds out and acts on it.
    with own_scratch():  # whole logits, which training would keep memory for
        sample = write_sample(run, state) if math.isfinite(total) else None
    free_gathered_weights(run.model)
    return Evaluation(
        loss=total / documents.num_targets,
        bits_per_byte=total / math.log(2) / documents.num_bytes,
        sample=sample,
    )


def write_sample(run: Run, state: RunState) -> str | None:
    """The prompt and what the model makes of it, as the beginning of a document."""
    config, tokenizer = run.config.evaluate, run.corpus.tokenizer
    if config.sample_tokens == 0:
        return None
    tokens = generate(
        run.model,
        [tokenizer.bos_id, *tokenizer.encode(config.sample_prompt)],
        config.sample_tokens,
        num_ids=tokenizer.vocab_size,
        temperature=config.sample_temperature,
        seed=fold_seed(run.config.run.seed, "sample", state.step),
        end_id=tokenizer.eos_id,
    )
    return tokenizer.decode([token for token in tokens if token != tokenizer.eos_id])
