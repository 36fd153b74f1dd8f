"""What the plain loop learns in the time of `make train`, with nanoGPT's recipe.

    python -m bench.plain_recipe config=gpt_laptop.yaml [section.key=value ...]

trains the model of plain_gpt.py, compiled, in one process on all cores, and scores all held-out
documents. Text, tokenizer, order of samples, layers, channels, heads, rows and time are those of
the configuration; schedule and optimizer are those of nanoGPT's config/train_shakespeare_char.py.
`train.time_limit_s` includes compilation; if it is null, `train.train_steps` counts.
"""

import math
import operator
import os
import statistics
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from bench.plain_gpt import PlainGPT, autocast_loss
from bench.timing import report
from bench.workload import Workload
from configs import Config, parse_config
from data import Corpus, prepare_corpus
from data.evaluation import EvaluationSet
from data.loader import BatchLoader

LR, MIN_LR, WARMUP_STEPS = 1e-3, 1e-4, 100
BETAS, WEIGHT_DECAY, CLIP_GRAD = (0.9, 0.99), 0.1, 1.0
_MEASURED_STEPS = range(3, 10)  # of which the median decides how many fit


def learning_rate(step: int, num_steps: int) -> float:
    """Warm-up, then a cosine to the last step."""
    if step < WARMUP_STEPS:
        return LR * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return MIN_LR + 0.5 * (1 + math.cos(math.pi * progress)) * (LR - MIN_LR)


def train(model: Any, shape: Workload, corpus: Corpus, config: Config) -> list[float]:
    """Train for the time of the configuration; returns when each step ended, the start first."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=LR, betas=BETAS, fused=True)
    num_steps, limit_s = config.train.train_steps, config.train.time_limit_s
    where = {"consumed_samples": 0, "first_step": 0, "dp_rank": 0, "dp_size": 1, "tp_size": 1}
    step, ends = 0, [time.perf_counter()]
    with BatchLoader(corpus, config, device_is_cuda=False, **where) as batches:
        while step < num_steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            (batch,) = next(batches).micro_batches
            last = batch.targets[:, -1:]  # `autocast_loss` takes rows of s + 1 tokens
            loss = autocast_loss(model, torch.cat((batch.tokens, last), dim=1), shape)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP_GRAD)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            ends.append(time.perf_counter())
            if limit_s is not None and step == _MEASURED_STEPS.stop:
                step_s = statistics.median(ends[n + 1] - ends[n] for n in _MEASURED_STEPS)
                num_steps = step + int((limit_s - (ends[-1] - ends[0])) / step_s)
            if step % 50 == 0:
                sys.stderr.write(f"step {step}/{num_steps}: loss {loss.item():.4f}\n")
    return ends


@torch.no_grad()
def bits_per_byte(model: nn.Module, corpus: Corpus, config: Config) -> float:
    """Score all held-out documents, as evaluate.py does."""
    documents = EvaluationSet(
        corpus,
        seq_length=config.model.seq_length,
        max_sequences=None,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=0,
        dp_size=1,
        tp_size=1,
    )
    nats = sum(
        batch.num_targets * model(batch.tokens, batch.targets).item()
        for batch in documents.batches
        if batch.num_targets
    )
    return nats / math.log(2) / documents.num_bytes


def main() -> int:
    """Train, score, and print a line of JSON."""
    config = parse_config(sys.argv[1:])
    torch.set_num_threads(config.train.num_threads or len(os.sched_getaffinity(0)))
    torch.manual_seed(config.run.seed)
    corpus = prepare_corpus(config.data, config.model.seq_length, 0)
    shape = Workload(
        precision=config.train.precision,
        num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size,
        num_attention_heads=config.model.num_attention_heads,
        seq_length=config.model.seq_length,
        vocab_size=config.data.padded_vocab_size,
    )
    model = PlainGPT(shape)
    ends = train(torch.compile(model), shape, corpus, config)
    result = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": len(ends) - 1,
        "seconds": ends[-1] - ends[0],
        "step_s": statistics.median(map(operator.sub, ends[1:], ends)),
        "bits_per_byte": bits_per_byte(model, corpus, config),
    }
    report(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
