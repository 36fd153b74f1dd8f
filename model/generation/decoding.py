"""Autoregressive decoding with a KV cache."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.generation.cache import KeyValueCache
from model.generation.sampling import Sampling, sample_tokens, uniform_draw
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
    """Yield the next token of each of `num_samples` continuations of a prompt.

    Every rank must call this with the same arguments and stop at the same token; all get the same
    tokens. Only the first `num_ids` ids are sampled, as a vocabulary may have more rows than the
    tokenizer has tokens. A sample does not depend on the number of samples.

    The context is the last `seq_length` tokens. Beyond that length every token shifts all
    positions, so the whole context is computed again for each token.
    """
    mesh, max_context = model.mesh, model.config.seq_length
    # The first rank of the last stage, which alone has logits.
    sampler = mesh.world.size - mesh.world.size // mesh.pp.size
    # With sequence parallelism the prefill is padded to a multiple of t.
    capacity = min(len(prompt) + num_tokens, max_context) + mesh.tp.size - 1
    cache = KeyValueCache(capacity, num_samples)
    texts = [list(prompt) for _ in range(num_samples)]
    pending = [list(prompt)[-max_context:]]  # not yet cached; one row while all rows are equal
    for number in range(num_tokens):
        logits = _prefill_or_decode(model, pending, cache)
        chosen = torch.zeros(num_samples, dtype=torch.int64)
        # One rank samples for all: dp groups compute separately, and a difference in the last bit
        # would make them diverge.
        if mesh.world.rank == sampler:
            logits = move_to(logits[:, :num_ids], "cpu").expand(num_samples, -1)
            draws = [uniform_draw(sampling, sample, number) for sample in range(num_samples)]
            chosen.copy_(sample_tokens(logits, sampling, draws))
        tokens = move_to(sum_over(mesh.world, move_to(chosen, mesh.device)), "cpu").tolist()
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        yield tokens
        pending = [[token] for token in tokens]
        if cache.length == max_context:
            cache.length, pending = 0, [text[-max_context:] for text in texts]


def generate(
    model: GPT,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    *,
    num_ids: int,
    end_id: int | None = None,
) -> list[int]:
    """Return the prompt and up to `num_tokens` more, ending with `end_id`; all ranks call this."""
    tokens = list(prompt)
    for (token,) in generate_tokens(model, prompt, num_tokens, sampling, num_ids=num_ids):
        tokens.append(token)
        if token == end_id:
            break
    return tokens


def _prefill_or_decode(model: GPT, rows: list[list[int]], cache: KeyValueCache) -> Tensor:
    """Append rows of equal length to the cache; return their last tokens' logits, `[b, v]`."""
    n, t = len(rows[0]), model.mesh.tp.size if model.mesh.sequence_parallel else 1
    # At the end, where causal attention does not see it; the next tokens overwrite it.
    padding = [0] * (-n % t)
    device = model.mesh.device
    tokens = move_to(torch.tensor([row + padding for row in rows]), device)
    positions = [*range(cache.length, cache.length + n), *padding]
    logits = model(
        tokens,
        move_to(torch.tensor(positions), device).expand(len(rows), -1),
        cache=cache,
        logits_to_keep=slice(n - 1, n),
    )
    cache.length += n
    return logits[:, 0]
