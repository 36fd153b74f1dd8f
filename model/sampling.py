"""Text from a model, one token at a time."""

from collections.abc import Sequence

import torch

from model.gpt import GPT
from parallel import sum_over


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    num_ids: int,
    temperature: float,
    seed: int,
    end_id: int | None = None,
) -> list[int]:
    """The prompt continued by up to `num_tokens` tokens, ending early after `end_id`.

    Every rank calls this with the same arguments and gets the same tokens. Only the first
    `num_ids` ids are drawn: a vocabulary may have more rows than the tokenizer has pieces.
    Temperature 0 takes the likeliest. The last `seq_length` tokens are the context.
    """
    device, t = model.mesh.device, model.mesh.tp.size
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(num_tokens):
        context = tokens[-model.config.seq_length :]
        # Padded to a multiple of t at the end, where causal attention cannot see it.
        padding = [0] * (-len(context) % t)
        positions = torch.tensor([[*range(len(context)), *padding]], device=device)
        logits = model(torch.tensor([context + padding], device=device), positions)
        last = logits[0, len(context) - 1, :num_ids].cpu()
        if temperature == 0.0:
            token = int(last.argmax())
        else:
            probabilities = (last / temperature).softmax(dim=-1)
            token = int(torch.multinomial(probabilities, 1, generator=generator))
        # Rank 0 decides for all: dp groups compute apart, and a last bit that differed would have
        # them part ways here.
        decided = torch.tensor(token if model.mesh.world.rank == 0 else 0, device=device)
        token = int(sum_over(model.mesh.world, decided))
        tokens.append(token)
        if token == end_id:
            break
    return tokens
