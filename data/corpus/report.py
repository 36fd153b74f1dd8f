"""Summaries of a corpus, and how the log reports them.

A summary has `records`, `skipped` (by reason), `ends_held_out`, and for both splits `documents`,
`bytes`, `tokens`, `lengths`, `unknown`, `lossy` and `compared`; that of a mixture also `sources`.
If only some tokens are targets, `targets` is their number, and `bytes` are those of their text.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.schema import SourceConfig
from data.cached_corpus import lossy_warning, unknown_warning
from data.corpus.encoding import is_lossy
from data.corpus.spool import Spool
from data.token_file import TokenFile, target_bounds
from data.tokenizer import Tokenizer

_BIN_ENDS = [2**n for n in range(6, 17)]  # of document lengths in tokens
_BLOCK_TOKENS = 1 << 24
# What to do about a reason for skipping records, if no document is left.
_ADVICE = {
    "null": "give strings, not null, in {columns}",
    "not a string": "give strings in {columns}",
    "empty": "give text that is not empty",
    "not UTF-8": "give text in UTF-8",
    "empty completion": "give completions that are not empty",
    "not a list of messages": "give lists of objects with role and content in {columns}",
    "unknown role": "give the roles system, user and assistant",
    "content not a string": "give strings as content",
    "empty assistant turn": "give turns of the assistant that are not empty",
    "no assistant turn": "give conversations in which the assistant speaks",
}
# At most so many documents, and about so many bytes of them, are compared with their text.
_COMPARED_DOCUMENTS, _COMPARED_BYTES = 1000, 16 << 20
_FEW_BYTES = 10_000  # of held-out text; the loss of so little is uncertain by some hundredths


def split_summary(
    tokens: TokenFile, spool: Spool, indices: npt.NDArray[np.int64], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Summarise a split: the tokens of the documents of the spool with these numbers.

    `lengths` counts documents of up to 2^6, 2^7, ... 2^16 and more tokens. Of `compared` documents,
    evenly spread, `lossy` decode to another text.
    """
    bins = np.searchsorted(_BIN_ENDS, np.diff(tokens.document_offsets))
    unknown = sum(
        int(np.count_nonzero(tokens.tokens[start : start + _BLOCK_TOKENS] == tokenizer.unk_id))
        for start in range(0, tokens.num_tokens, _BLOCK_TOKENS)
    )
    compared = lossy = num_bytes = 0
    bounds = target_bounds(tokens)
    for index in range(0, tokens.num_documents, 1 + tokens.num_documents // _COMPARED_DOCUMENTS):
        start, end = tokens.document_offsets[index : index + 2].tolist()
        first, last = np.searchsorted(bounds, [start, end], side="right")
        document, inside = tokens.tokens[start:end], bounds[first:last] - start
        lossy += is_lossy(document, inside, spool.segments(int(indices[index])), tokenizer)
        compared += 1
        num_bytes += int(tokens.document_bytes[index])
        if num_bytes > _COMPARED_BYTES:
            break
    summary = {
        "documents": tokens.num_documents,
        "bytes": int(tokens.document_bytes.sum()),
        "tokens": tokens.num_tokens,
        "lengths": np.bincount(bins, minlength=len(_BIN_ENDS) + 1).tolist(),
        "unknown": unknown,
        "lossy": lossy,
        "compared": compared,
    }
    if tokens.targets is not None:
        summary["targets"] = tokens.targets.num_targets
    return summary


def joined_summary(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sum the summaries of a mixture, and keep each of them under `sources`."""
    parts = list(summaries.values())
    if len(parts) == 1:
        return parts[0]
    joined = {**_sum(parts), "sources": summaries}
    for name in ("train", "validation"):
        splits = [part[name] for part in parts]
        if any("targets" in split for split in splits):
            in_text = [split["tokens"] - split["documents"] for split in splits]  # all but bos
            pairs = zip(splits, in_text, strict=True)
            joined[name]["targets"] = sum(split.get("targets", count) for split, count in pairs)
    return joined


def _sum(values: list[Any]) -> Any:
    """Sum numbers, lists item by item, and mappings key by key."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _sum([value[key] for value in values if key in value]) for key in keys}
    return np.sum(values, axis=0).tolist()


def corpus_warnings(summary: dict[str, Any], *, is_evaluated: bool) -> Iterator[str]:
    """Yield warnings about the tokens of a corpus, and about its held-out text if it is used."""
    for name in ("train", "validation"):
        split = summary[name]
        if split["unknown"]:
            num_tokens = split["tokens"] - 2 * split["documents"]
            yield unknown_warning(split["unknown"], num_tokens, f"{name} tokens")
        if split["lossy"]:
            yield lossy_warning(split, f"{name} documents")
    num_bytes = summary["validation"]["bytes"]
    fix = "use more text, a larger data.validation_fraction, or data.validation_path"
    if is_evaluated and not num_bytes:
        yield f"there is no held-out text, so eval/loss is not computed; {fix}"
    elif is_evaluated and num_bytes < _FEW_BYTES:
        held_out = count_in_words(num_bytes, "byte")
        yield f"held-out text is only {held_out}, so eval/* is unreliable; {fix}"


def describe(summary: dict[str, Any]) -> list[str]:
    """Describe a summary in a few lines."""
    train, validation = summary["train"], summary["validation"]
    held_out = summary.get("excluded", validation["documents"])
    num_documents = train["documents"] + held_out - summary["ends_held_out"]
    records = count_in_words(summary["records"], "record")
    first = f"{records} gave {count_in_words(num_documents, 'document')}"
    if summary["ends_held_out"]:
        first += f", {summary['ends_held_out']:,} with their end held out"
    if summary.get("excluded"):
        first += f", {summary['excluded']:,} held out by validation_path"
    if summary["skipped"]:
        first += f"; skipped {describe_counts(summary['skipped'])}"
    lines = [first]
    parts = {f"train, {key}": part["train"] for key, part in summary.get("sources", {}).items()}
    for name, split in {"train": train, "validation": validation, **parts}.items():
        noun = "target" if "targets" in split else "token"
        per_token = split["bytes"] / max(1, split[f"{noun}s"])
        nouns = dict.fromkeys(("document", "byte", "token", noun))
        counts = [count_in_words(split[f"{noun}s"], noun) for noun in nouns]
        lines.append(f"{name}: {', '.join(counts)}, {per_token:.2f} bytes per {noun}")
    first_end, *ends = _BIN_ENDS
    names = [f"<={first_end}", *(f"{end // 2 + 1}-{end}" for end in ends), f">{ends[-1]}"]
    total, counted = max(1, sum(train["lengths"])), zip(names, train["lengths"], strict=True)
    fractions = [f"{name} {n / total:.0%}" for name, n in counted if n]
    return [*lines, f"document lengths in tokens: {', '.join(fractions)}"]


def describe_counts(counts: Mapping[str, int]) -> str:
    """List counts with their reasons."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))


def no_documents(source: SourceConfig, skipped: Mapping[str, int]) -> str:
    """Say that a source has no documents, why, and what to do about it."""
    columns = " and ".join(source.columns.values())
    columns = f"column{'s' * (len(source.columns) > 1)} {columns}"
    known = [
        _ADVICE[reason].format(columns=columns) for reason in sorted(skipped) if reason in _ADVICE
    ]
    fixes = ", ".join(known) or "give non-empty UTF-8 text"
    return f"yields no documents; skipped: {describe_counts(skipped) or 'nothing'}; {fixes}"


def count_in_words(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
