"""Multiple-choice tasks: the rows to score, and accuracies from their log-likelihoods.

[Note: requests]
As in lm-evaluation-harness, the tokens of a choice are those of the whole text after as many as its
context has alone, and white space at the end of a context belongs to the choice. What does not fit
in a row is cut off at the beginning. bos precedes an empty context, and others if the tokenizer
adds it by itself. Each choice is scored after its context and, for `acc_mutual_info`, after bos.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from configs.tasks import Item
from data.evaluation import deal_rows
from data.rows import MicroBatch, Spans, make_micro_batch
from data.token_file import Targets, TokenFile, token_dtype
from data.tokenizer import Tokenizer
from ops.balance import CPRank, width_multiple

METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # lm-evaluation-harness's names


@dataclass(frozen=True)
class TaskResult:
    """The items of a task with log-likelihoods and, for each metric, 1.0 if it chooses right."""

    name: str
    items: list[dict[str, Any]]

    @property
    def metrics(self) -> dict[str, float]:
        """Each accuracy and, with `_stderr`, its standard error (NaN for a single item)."""
        found, n = {}, len(self.items)
        for metric in METRICS:
            mean = sum(item[metric] for item in self.items) / n
            found[metric] = mean
            found[f"{metric}_stderr"] = (
                math.sqrt(mean * (1 - mean) / (n - 1)) if n > 1 else math.nan
            )
        return found

    def __str__(self) -> str:
        found = self.metrics
        parts = (f"{name} {found[name]:.4f} +- {found[f'{name}_stderr']:.4f}" for name in METRICS)
        return f"{', '.join(parts)} of {len(self.items):,} items"


class TaskSet:
    """The rows of a task that one data-parallel rank scores; see [Note: requests]."""

    def __init__(
        self,
        name: str,
        items: Sequence[Item],
        tokenizer: Tokenizer,
        *,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        tp_size: int,
        **cp: Unpack[CPRank],
    ) -> None:
        self.name, self._items, self._cp = name, items, cp
        self._eos_id = tokenizer.eos_id
        dtype = token_dtype(tokenizer.vocab_size)
        requests = list(_rows(items, tokenizer, seq_length, name, dtype))
        # Requests are equal after an empty context. Scored once, rounding cannot break their tie.
        distinct = {request: number for number, request in enumerate(dict.fromkeys(requests))}
        self._rows_of_requests = [distinct[request] for request in requests]
        rows = [(np.frombuffer(row, dtype), num_targets) for row, num_targets in distinct]
        self.num_rows = len(rows)
        lengths = np.array([len(tokens) for tokens, _ in rows])
        ends = np.cumsum(lengths)
        first_targets = ends - [num_targets for _, num_targets in rows]
        targets = Targets(np.stack([first_targets, ends], axis=1).ravel())
        tokens = np.concatenate([tokens for tokens, _ in rows])
        offsets = np.concatenate([[0], ends])
        self._file = TokenFile(tokens, offsets, np.diff(offsets), targets=targets)
        self.fingerprint = xxhash.xxh3_128_hexdigest(repr((name, items)).encode())
        order = np.argsort(-lengths, kind="stable")  # so that rows of a micro-batch are alike
        spans = np.stack([offsets[order], lengths[order] - 1, order])
        # [3, num_batches, b]; rows without inputs fill up the last batches
        self._spans = deal_rows(spans, micro_batch_size, dp_rank, dp_size)
        self._multiple_of = width_multiple(cp.get("cp_size", 1), tp_size)

    @property
    def batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches; `sample_indices` are the numbers of the rows."""
        for starts, lengths, indices in zip(*self._spans, strict=True):
            rows = np.arange(len(starts))
            spans = Spans(starts, lengths, rows, np.zeros_like(rows))
            batch = make_micro_batch(self._file, spans, indices, self._multiple_of, self._eos_id)
            yield batch.of_cp_rank(**self._cp)

    def grade(self, log_likelihoods: npt.NDArray[np.float64]) -> TaskResult:
        """Return the result for the log-likelihood of each row's targets, `[num_rows]`."""
        log_likelihoods = log_likelihoods[self._rows_of_requests]
        sizes = np.cumsum([len(item.choices) for item in self._items])
        after_context, alone = (np.split(part, sizes[:-1]) for part in np.split(log_likelihoods, 2))
        graded = []
        for item, given, unconditional in zip(self._items, after_context, alone, strict=True):
            scores = {
                "acc": given,
                "acc_norm": given / [len(choice) for choice in item.choices],
                "acc_bytes": given / [len(choice.encode()) for choice in item.choices],
                "acc_mutual_info": given - unconditional,
            }
            chosen = {name: float(scores[name].argmax() == item.answer) for name in METRICS}
            numbers = {"log_likelihoods": given.tolist(), "unconditional": unconditional.tolist()}
            graded.append({"line": item.line, "answer": item.answer, **numbers, **chosen})
        return TaskResult(self.name, graded)


def _rows(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    seq_length: int,
    name: str,
    dtype: npt.DTypeLike,
) -> Iterator[tuple[bytes, int]]:
    """Yield tokens (the bytes of `dtype`) and number of targets of all requests.

    First those of all choices after their contexts, then those of all choices alone.
    """
    choices = [(item, item.delimiter + choice) for item in items for choice in item.choices]
    requests = [(item, item.context, choice) for item, choice in choices]
    requests += [(item, "", choice) for item, choice in choices]
    texts = {
        text for _, context, choice in requests for text in (context.rstrip(), context + choice)
    }
    distinct = sorted(texts - {""})
    encoded = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    encoded[""] = np.empty(0, np.int32)
    for item, context, choice in requests:
        before = encoded[context.rstrip()]
        continuation = encoded[context + choice][len(before) :]
        if not 1 <= len(continuation) <= seq_length:
            problem = f"a choice of {len(continuation)} tokens after its context"
            if len(continuation):
                fix = f"give at most model.seq_length={seq_length}"
            else:
                fix = "end the context where a token ends"
            raise UserError(f"task {name}, line {item.line}: {problem}; {fix}")
        prefix = [tokenizer.bos_id] if tokenizer.adds_bos or not len(before) else []
        tokens = np.concatenate([np.array(prefix, np.int32), before, continuation])
        yield tokens[-seq_length - 1 :].astype(dtype).tobytes(), len(continuation)
