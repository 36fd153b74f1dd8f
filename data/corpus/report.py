"""What went into a corpus: counts that add up, and how they are told."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.spool import Spool, SpoolProgress
from data.token_file import TokenFile
from data.tokenizer import Tokenizer

Texts = Callable[[int], str]  # the text of a document, by its number in a split

_SHORTEST_BIN = 6  # the first bin of lengths ends at 2^6 tokens
_LONGEST_BIN = 16
_TOKENS_AT_ONCE = 1 << 24
# As many are decoded to be compared with their text, and about as many bytes of them.
_COMPARED_DOCUMENTS, _COMPARED_BYTES = 1000, 16 << 20
_FEW_BYTES = 10_000  # of held-out text; the loss of so little is uncertain by some hundredths

logger = logging.getLogger("microtron")


def read_summary(read: SpoolProgress, spool: Spool) -> dict[str, Any]:
    """What reading a source gave: records, documents cut out of longer ones, what was skipped."""
    skipped = Counter(read.skipped)
    skipped["duplicate"] += read.num_documents - len(spool)
    return {
        "records": read.num_records,
        "added_by_cutting": read.num_added,
        "with_nul": read.num_with_nul,
        "skipped": {reason: count for reason, count in sorted(skipped.items()) if count},
    }


def split_summary(tokens: TokenFile, texts: Texts, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a split has in it; `lengths`: documents of at most 2^6, 2^7, ... 2^16, more tokens."""
    lengths = np.diff(tokens.document_offsets)
    bins = np.clip(np.ceil(np.log2(np.maximum(1, lengths))), _SHORTEST_BIN, _LONGEST_BIN + 1)
    counts = np.bincount(
        bins.astype(int) - _SHORTEST_BIN, minlength=_LONGEST_BIN + 2 - _SHORTEST_BIN
    )
    return {
        "documents": tokens.num_documents,
        "bytes": int(tokens.document_bytes.sum()),
        "tokens": tokens.num_tokens,
        "lengths": counts.tolist(),
        **_encoding_summary(tokens, texts, tokenizer),
    }


def _encoding_summary(tokens: TokenFile, texts: Texts, tokenizer: Tokenizer) -> dict[str, int]:
    """How much text its tokens do not tell: of `compared` documents, evenly spread, `lossy` decode
    to another text."""
    pieces = (
        tokens.tokens[start : start + _TOKENS_AT_ONCE]
        for start in range(0, tokens.num_tokens, _TOKENS_AT_ONCE)
    )
    unknown = sum(int(np.count_nonzero(piece == tokenizer.unk_id)) for piece in pieces)
    compared = lossy = num_bytes = 0
    for index in range(0, tokens.num_documents, 1 + tokens.num_documents // _COMPARED_DOCUMENTS):
        start, end = tokens.document_offsets[index : index + 2].tolist()
        text, ids = texts(index), tokens.tokens[start + 1 : end - 1].tolist()
        lossy += tokenizer.decode(ids) != text
        compared += 1
        num_bytes += int(tokens.document_bytes[index])
        if num_bytes > _COMPARED_BYTES:
            break
    return {"unknown": unknown, "lossy": lossy, "compared": compared}


def require_all_accounted_for(entry: Path, summary: dict[str, Any]) -> None:
    """Raises RuntimeError if records, documents and tokens do not add up to what is on the disk."""
    fix = "delete the folder and start again"
    splits = [summary["train"], summary["validation"]]
    documents = sum(split["documents"] for split in splits)
    added = summary["added_by_cutting"] + summary["ends_held_out"]
    expected = summary["records"] + added - sum(summary["skipped"].values())
    if documents != expected:
        raise RuntimeError(f"{entry} has {documents} documents, but {expected} were read; {fix}")
    for name in ("train", "validation"):
        offsets = np.fromfile(entry / f"{name}.offsets", "<i8")
        if (len(offsets) - 1, offsets[-1]) != (summary[name]["documents"], summary[name]["tokens"]):
            raise RuntimeError(f"{entry}: {name}.offsets does not fit its documents; {fix}")


def joined_summary(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sums over all sources of a mixture, and each of them under `sources`."""
    parts = list(summaries.values())
    if len(parts) == 1:
        return parts[0]
    joined = {key: _sum([part[key] for part in parts]) for key in parts[0]}
    return {**joined, "sources": summaries}


def _sum(values: list[Any]) -> Any:
    """Sums numbers, lists item by item, and mappings key by key."""
    if isinstance(values[0], dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _sum([value[key] for value in values if key in value]) for key in keys}
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values)


def all_warnings(summary: dict[str, Any], *, is_evaluated: bool) -> Iterator[str]:
    """What to say of a corpus whenever it is used."""
    yield from encoding_warnings(summary)
    if is_evaluated:
        yield from evaluation_warnings(summary)


def evaluation_warnings(summary: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the held-out text of a run that should have some."""
    num_bytes = summary["validation"]["bytes"]
    fix = "use more text or a larger data.validation_fraction, or give data.validation_path"
    if not num_bytes:
        yield f"there is no held-out text, and so no evaluation; {fix}"
    elif num_bytes < _FEW_BYTES:
        yield f"only {num_bytes:,} bytes of text are held out, so eval/* says little; {fix}"


def encoding_warnings(summary: dict[str, Any]) -> Iterator[str]:
    """What the tokens of a run's splits do not tell of their texts."""
    for name in ("train", "validation"):
        split = summary[name]
        if split["unknown"]:
            yield unknown_warning(
                split["unknown"], split["tokens"] - 2 * split["documents"], f"{name} tokens"
            )
        if split["lossy"]:
            yield lossy_warning(split, f"{name} documents")


def unknown_warning(unknown: int, total: int, what: str) -> str:
    """Says how many tokens are unknown, and why it matters."""
    return (
        f"{unknown:,} of {total:,} {what} ({unknown / total:.1%}) are unknown to the tokenizer: "
        "bits per byte counts the text that they hide as if it were predicted, and is too low; use "
        "a tokenizer with byte fallback (data.tokenizer=null trains one)"
    )


def lossy_warning(split: dict[str, Any], what: str) -> str:
    """Says how many documents the tokenizer does not give back."""
    return (
        f"{split['lossy']:,} of {split['compared']:,} {what} that were compared decode to another "
        "text; bits per byte counts the bytes of the original"
    )


def describe(summary: dict[str, Any]) -> str:
    """A summary in a few lines."""
    documents = summary["train"]["documents"] + summary["validation"]["documents"]
    if "excluded" in summary:
        documents = summary["train"]["documents"] + summary["excluded"]
    documents -= summary["ends_held_out"]
    lines = [f"{summary['records']:,} records gave {documents:,} documents"]
    for count, what in (
        (summary["added_by_cutting"], "more by cutting long ones"),
        (summary["with_nul"], "of them with NUL characters, which are kept"),
        (summary["ends_held_out"], "of them with their end held out"),
        (summary.get("excluded", 0), "of them held out by validation_path"),
    ):
        if count:
            lines[0] += f", {count:,} {what}"
    if summary["skipped"]:
        lines[0] += f"; skipped {describe_counts(summary['skipped'])}"
    for name in ("train", "validation"):
        split = summary[name]
        per_token = split["bytes"] / max(1, split["tokens"])
        lines.append(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, "
            f"{split['tokens']:,} tokens, {per_token:.2f} bytes a token"
        )
    for key, part in summary.get("sources", {}).items():
        training = part["train"]
        counts = f"{training['documents']:,} documents, {training['tokens']:,} tokens"
        lines.append(f"train, of {key}: {counts}")
    lengths = summary["train"]["lengths"]
    total = max(1, sum(lengths))
    names = [f"to {2**n}" for n in range(_SHORTEST_BIN, _LONGEST_BIN + 1)] + ["more"]
    shares = [f"{name}: {n / total:.0%}" for name, n in zip(names, lengths, strict=True) if n]
    return "\n  ".join([*lines, f"tokens of a training document: {', '.join(shares)}"])


def describe_counts(counts: dict[str, int]) -> str:
    """Counts with their reasons, in a line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
