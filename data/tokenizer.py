"""The sentencepiece tokenizer: training a lossless one, loading one, encoding and decoding.

[Note: cutting texts]
Encoding one long string is slower than linear in its length and uses one core. When no piece has a
newline inside, and no normalisation or dummy prefix is applied, nothing merges across a newline;
then a text may be cut after newlines and its parts encoded apart, with the same ids. `Tokenizer`
finds out by trying.

[Note: the block character]
sentencepiece writes spaces as U+2581 inside pieces, so a U+2581 in the text comes back as a space.
Where texts may be cut, it is cut out and written as its three byte pieces, which decode to itself.
"""

import functools
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
import xxhash

from configs.errors import UserError

# Part of the cache key: a change of the recipe below must not find old tokenizers.
RECIPE_VERSION = 1
_RECIPE: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "user_defined_symbols": ["\n"],
    "split_digits": True,
    "pad_id": -1,
    "num_threads": 8,  # written into the model file, so not the number of cores
    "minloglevel": 3,
}
_NUM_FIXED_PIECES = 260  # unknown, bos, eos, newline and 256 bytes
_TRAINING_ATTEMPTS = 3  # the second nearly always has the right number of characters
_MIN_COVERAGE = 0.98  # the least that sentencepiece takes
_BLOCK = "\u2581"
# Characters. Measured on 2 cores in million tokens a second: 10^3 5.8, 10^4 6.8, 10^5 5.1, all 0.9.
_PART_LENGTH = 20_000
_CUT_PROBES = ("a\n", "\n", " \n", "  a", "\tA\n", "\n\n", "é ")
_LOSSLESS_PROBE = "  a\t\tb \n\n c\r\n\x00 é ﬁ 漢 \U0001f600  "


class Tokenizer:
    """A loaded sentencepiece model with a begin and an end symbol."""

    def __init__(self, model: bytes, origin: str) -> None:
        """Loads a serialized model; `origin` names it in errors."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{origin} is not a readable sentencepiece model") from error
        self.vocab_size: int = processor.get_piece_size()
        if self.vocab_size == 0:  # sentencepiece accepts an empty file
            raise UserError(f"{origin} is not a readable sentencepiece model: it has no pieces")
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        self.unk_id: int = processor.unk_id()  # of text that no piece stands for
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{origin} has bos_id={self.bos_id} and eos_id={self.eos_id}; both must be "
                "defined, since documents begin with bos and end with eos"
            )
        self.model = model
        self.fingerprint = xxhash.xxh3_128_hexdigest(model)
        self._processor = processor
        self._num_threads = len(os.sched_getaffinity(0))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without bos and eos."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Returns the ids of each text, without bos and eos; uses all cores."""
        parts: list[str] = []
        ends = [0]
        for text in texts:
            parts.extend(self._parts(text))
            ends.append(len(parts))
        encoded: list[npt.NDArray[np.int32]] = self._processor.encode(
            parts, out_type="numpy", num_threads=self._num_threads
        )
        if self.can_cut:
            encoded = [
                self._block_ids if part == _BLOCK else ids
                for part, ids in zip(parts, encoded, strict=True)
            ]
        return [
            np.concatenate(encoded[start:end]) if end > start else np.empty(0, np.int32)
            for start, end in itertools.pairwise(ends)
        ]

    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids; bos and eos have none."""
        return str(self._processor.decode(ids))

    @functools.cached_property
    def can_cut(self) -> bool:
        """True if texts may be encoded in parts, see [Note: cutting texts]."""
        pieces = (self._processor.id_to_piece(i) for i in range(self.vocab_size))
        if any("\n" in piece and piece != "\n" for piece in pieces):
            return False
        encode = self._processor.encode
        if -1 in self._block_ids or self.decode(encode(_LOSSLESS_PROBE)) != _LOSSLESS_PROBE:
            return False
        return all(
            encode(first + second) == encode(first) + encode(second)
            for first in _CUT_PROBES
            if first.endswith("\n")
            for second in _CUT_PROBES
        )

    @functools.cached_property
    def _block_ids(self) -> npt.NDArray[np.int32]:
        """The byte pieces of U+2581; -1 in place of those there are not."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]
        return np.array([i if self._processor.is_byte(i) else -1 for i in ids], dtype=np.int32)

    def _parts(self, text: str) -> list[str]:
        if not self.can_cut:
            return [text]
        return [
            part
            for stretch in re.split(f"({_BLOCK})", text)
            if stretch
            for part in cut_after_newlines(stretch)
        ]


def cut_after_newlines(text: str, part_length: int = _PART_LENGTH) -> list[str]:
    """Cuts after newlines into parts of at most `part_length` characters, or of one long line."""
    parts = []
    start = 0
    while len(text) - start > part_length:
        newline = text.rfind("\n", start, start + part_length)
        if newline < 0:
            newline = text.find("\n", start + part_length)
        if newline < 0:
            break
        parts.append(text[start : newline + 1])
        start = newline + 1
    if start < len(text):
        parts.append(text[start:])
    return parts


def load_tokenizer(path: Path, key: str = "data.tokenizer") -> Tokenizer:
    """Reads a sentencepiece model file; `key` is the setting that named it, for errors."""
    if not path.is_file():
        raise UserError(f"{key}={str(path)!r} is not a file; give a sentencepiece model file")
    return Tokenizer(path.read_bytes(), f"{key}={str(path)!r}")


def train_tokenizer(sentences: Sequence[str], vocab_size: int) -> bytes:
    """Trains the lossless BPE tokenizer; returns the model, of exactly `vocab_size` pieces.

    Sentences must not contain newlines: the newline is a symbol of its own.
    """
    counts = [count for _, count in Counter("".join(sentences)).most_common()]
    if not counts:
        raise UserError(
            "no tokenizer can be trained: the training text has no characters besides newlines; "
            "use more text, or give data.tokenizer"
        )
    # Characters get half of the free pieces at most; rarer ones are written as bytes.
    num_characters = max(0, vocab_size - _NUM_FIXED_PIECES) // 2
    for attempt in range(_TRAINING_ATTEMPTS):
        coverage = sum(counts[:num_characters]) / max(1, sum(counts))
        try:
            return _train(sentences, vocab_size, max(_MIN_COVERAGE, coverage))
        except RuntimeError as error:
            missing = vocab_size - _largest_vocab_size(str(error), vocab_size)
            all_tried = attempt == _TRAINING_ATTEMPTS - 1 or num_characters >= len(counts)
            if missing == 0 or all_tried:
                raise UserError(_explain(str(error), vocab_size)) from error
            # Where there are too few merges to learn, more characters take their place.
            num_characters += missing
    raise AssertionError("every attempt returns or raises")


def _train(sentences: Sequence[str], vocab_size: int, character_coverage: float) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        **_RECIPE,
    )
    return model.getvalue()


def _largest_vocab_size(message: str, otherwise: int) -> int:
    """Returns the number of pieces that sentencepiece says it could learn at most."""
    largest = re.search(r"value <= (\d+)", message)
    return int(largest[1]) if largest else otherwise


def _explain(message: str, vocab_size: int) -> str:
    """Turns sentencepiece's message about the number of pieces into one about our key."""
    given = f"data.vocab_size={vocab_size}"
    largest = _largest_vocab_size(message, vocab_size)
    if largest < vocab_size:
        return (
            f"{given} is too large for this corpus, from which at most {largest} pieces can be "
            f"learned; set data.vocab_size={largest} or less, or use more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"{given} is too small: bytes and the frequent characters of this corpus take "
            f"{smallest[1]} pieces; set data.vocab_size to more than that"
        )
    return f"no tokenizer of {given} pieces could be trained: {message}"
