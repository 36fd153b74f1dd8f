"""litgpt: its GPT with LayerNorm, a GELU MLP and biases, in a plain loop with AdamW; one process.

litgpt has no learned positions, so these are rotary over a quarter of each head, as in Pythia; the
head is tied by assignment, so that as much is computed. bf16 is autocast.
"""

import sys
import warnings

import litgpt
import torch
from torch import nn
from torch.nn import functional as F

from bench.timing import report_speed
from bench.workload import BETAS, CLIP_GRAD, EPS, LR, WEIGHT_DECAY, Workload, batches, join, parse


def build_model(shape: Workload) -> nn.Module:
    """litgpt's model of the workload's size."""
    config = litgpt.Config(
        name="bench-gpt",
        block_size=shape.seq_length,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.num_layers,
        n_head=shape.num_attention_heads,
        n_embd=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        rotary_percentage=0.25,
        parallel_residual=False,
        bias=True,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
    )
    model = litgpt.GPT(config)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def main() -> int:
    """One side of the benchmark."""
    warnings.filterwarnings("ignore")
    arguments = parse()
    shape = arguments.workload
    rank = join(shape)
    model = build_model(shape)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    step_batches = batches(shape, rank)

    def step(number: int) -> float:
        (rows,) = step_batches(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=shape.precision == "bf16"):
            logits = model(rows[:, :-1].contiguous())
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    report_speed(step, arguments, sum(parameter.numel() for parameter in model.parameters()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
