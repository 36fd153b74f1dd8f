"""Hugging Face transformers: GPT2LMHeadModel with fused attention, in a plain loop with AdamW.

bf16 is autocast, which is what its Trainer does on a processor. Two ranks are
DistributedDataParallel; GPT-2 has no plan for tensor parallelism.
"""

import sys
import warnings

import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.timing import report_speed
from bench.workload import BETAS, CLIP_GRAD, EPS, LR, WEIGHT_DECAY, Workload, batches, join, parse


def build_model(shape: Workload) -> nn.Module:
    """GPT-2 of the workload's size."""
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.seq_length,
        n_embd=shape.hidden_size,
        n_layer=shape.num_layers,
        n_head=shape.num_attention_heads,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.attention_dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model.train()


def main() -> int:
    """One side of the benchmark."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    arguments = parse()
    shape = arguments.workload
    rank = join(shape)
    model = build_model(shape)
    network = DistributedDataParallel(model) if shape.dp > 1 else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    step_batches = batches(shape, rank)

    def step(number: int) -> float:
        (rows,) = step_batches(number)
        tokens, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=shape.precision == "bf16"):
            loss = network(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    report_speed(step, arguments, sum(parameter.numel() for parameter in model.parameters()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
