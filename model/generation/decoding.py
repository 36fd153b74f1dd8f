"""Text from a model, one token at a time: what was read is kept, and only the new token is read."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.generation.cache import KeyValueCache
from model.generation.sampling import Sampling, choose, draw
from model.gpt import GPT
from parallel import move_to, sum_over


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    *,
    num_ids: int,
    num_samples: int = 1,
) -> Iterator[list[int]]:
    """Yields the next token of each of `num_samples` continuations of a prompt.

    Every rank calls this with the same arguments, gets the same tokens, and must stop at the same
    one. Only the first `num_ids` ids are chosen: a vocabulary may have more rows than the tokenizer
    has pieces. A sample does not depend on how many others there are.

    The context is the last `seq_length` tokens. Once there are more, the first of them leaves at
    each token and all positions change, so that the whole context is read anew.
    """
    mesh, longest = model.mesh, model.config.seq_length
    # With sequence parallelism what is read is padded to a multiple of t.
    cache = KeyValueCache(min(len(prompt) + num_tokens, longest) + mesh.tp.size - 1, num_samples)
    texts = [list(prompt) for _ in range(num_samples)]
    unread = [list(prompt)[-longest:]]  # a single row while all samples have the same
    for number in range(num_tokens):
        logits = move_to(_read(model, unread, cache)[:, :num_ids], "cpu").expand(num_samples, -1)
        chosen = torch.zeros(num_samples, dtype=torch.int64)
        # Rank 0 decides for all: dp groups compute apart, and a last bit that differed would have
        # them part ways here.
        if mesh.world.rank == 0:
            draws = [draw(sampling, sample, number) for sample in range(num_samples)]
            chosen.copy_(choose(logits, sampling, draws))
        tokens = move_to(sum_over(mesh.world, move_to(chosen, mesh.device)), "cpu").tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        yield tokens
        unread = [[token] for token in tokens]
        if cache.length == longest:
            cache.length, unread = 0, [text[-longest:] for text in texts]


def generate(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    *,
    num_ids: int,
    end_id: int | None = None,
) -> list[int]:
    """The prompt continued by up to `num_tokens` tokens, ending early after `end_id`.

    Every rank calls this with the same arguments and gets the same tokens.
    """
    tokens = list(prompt)
    for (token,) in generate_tokens(model, prompt, num_tokens, sampling, num_ids=num_ids):
        tokens.append(token)
        if token == end_id:
            break
    return tokens


def _read(model: GPT, rows: list[list[int]], cache: KeyValueCache) -> Tensor:
    """The logits after the last token of rows of equal length, `[b, v]`; they follow the cache."""
    n, t = len(rows[0]), model.mesh.tp.size if model.mesh.sequence_parallel else 1
    # At the end, where causal attention cannot see it; the next tokens are written over it.
    padding = [0] * (-n % t)
    device = model.mesh.device
    tokens = move_to(torch.tensor([row + padding for row in rows]), device)
    places = [*range(cache.length, cache.length + n), *padding]
    positions = move_to(torch.tensor(places), device).expand(len(rows), -1)
    logits = model(tokens, positions, cache=cache, logits_to_keep=slice(n - 1, n))
    cache.length += n
    return logits[:, 0]
