"""The interface of tokenizers, and sentencepiece: encoding, decoding, training a lossless one.

[Note: cutting texts]
Encoding time grows faster than the length of a string, and one string uses one core. Where no piece
contains a newline among other characters, and the model neither normalises nor adds a dummy prefix,
a text may be cut after newlines without changing any id. `Tokenizer` probes the model for this.

[Note: the block character]
sentencepiece writes spaces as U+2581 inside pieces, so a U+2581 in a text decodes to a space. Where
texts may be cut, it is cut out and encoded as its three byte pieces, which decode to itself.
"""

import functools
import io
import itertools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import xxhash

from configs.errors import UserError
from configs.launch import usable_cores
from configs.tokenizer_files import load_sentencepiece, read_tokenizer
from data.huggingface_tokenizer import HuggingFaceTokenizer

RECIPE_VERSION = 1  # part of the cache key; raise it when the recipe below changes
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
    "num_threads": 8,  # fixed, because it is written into the model file
    "minloglevel": 3,
}
_NUM_FIXED_PIECES = 260  # unknown, bos, eos, newline and 256 bytes
_TRAINING_ATTEMPTS = 3  # the second nearly always has the right number of characters
_MIN_COVERAGE = 0.98  # the least that sentencepiece accepts
_BLOCK = "\u2581"
# Characters. Million tokens per second on 2 cores: 10^3 5.8, 10^4 6.8, 10^5 5.1, uncut 0.9.
_PART_LENGTH = 20_000
_CUT_PROBES = ("a\n", "\n", " \n", "\tA\n", "\n\n", "  a", "é ")
_LOSSLESS_PROBE = "  a\t\tb \n\n c\r\n\x00 é ﬁ 漢 \U0001f600  "


class Tokenizer(Protocol):
    """A tokenizer of either kind, with bos and eos."""

    file_name: str  # in caches and run folders
    content: bytes  # of the file
    fingerprint: str  # hex; equal if and only if the ids of every document are
    vocab_size: int  # the largest id + 1
    bos_token: str
    eos_token: str
    bos_id: int
    eos_id: int
    unk_token: str | None
    unk_id: int  # -1: there is none
    adds_bos: bool = False  # whether other libraries put bos before a text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos; special tokens in it are plain text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, without bos and eos, using all cores."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos and eos have none."""
        ...


class SentencePieceTokenizer(Tokenizer):
    """A loaded sentencepiece model."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, origin: str) -> None:
        """Load a serialized model; `origin` names it in errors."""
        self._processor = processor = load_sentencepiece(content, origin)
        self.vocab_size = processor.get_piece_size()
        self.bos_id, self.eos_id = processor.bos_id(), processor.eos_id()
        self.unk_id = processor.unk_id()
        self.bos_token = processor.id_to_piece(self.bos_id)
        self.eos_token = processor.id_to_piece(self.eos_id)
        self.unk_token = processor.id_to_piece(self.unk_id)
        self.content = content
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self._num_threads = usable_cores()

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, without bos and eos, using all cores."""
        parts_of_texts = [self._parts(text) for text in texts]
        parts = list(itertools.chain(*parts_of_texts))
        encoded: list[npt.NDArray[np.int32]] = self._processor.encode(
            parts, out_type="numpy", num_threads=self._num_threads
        )
        if self.can_cut:
            pairs = zip(parts, encoded, strict=True)
            encoded = [self._block_ids if part == _BLOCK else ids for part, ids in pairs]
        rest, none = iter(encoded), np.empty(0, np.int32)
        return [np.concatenate([none, *itertools.islice(rest, len(p))]) for p in parts_of_texts]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos and eos have none."""
        return str(self._processor.decode(ids))

    @functools.cached_property
    def can_cut(self) -> bool:
        """Whether texts may be encoded in parts; see [Note: cutting texts]."""
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
        """The byte pieces of U+2581; -1 for a missing one."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]
        return np.array([i if self._processor.is_byte(i) else -1 for i in ids], dtype=np.int32)

    def _parts(self, text: str) -> list[str]:
        if not self.can_cut:
            return [text]
        stretches = re.split(f"({_BLOCK})", text)
        return [part for stretch in stretches for part in cut_after_newlines(stretch)]


def cut_after_newlines(text: str, part_length: int = _PART_LENGTH) -> list[str]:
    """Cut after newlines into parts of at most `part_length` characters, or of one longer line."""
    parts = re.findall(rf"(?s:.{{0,{part_length - 1}}})(?:\n|\Z)|[^\n]+\n?", text)
    return [part for part in parts if part]  # the end of the text also matches as an empty part


def load_tokenizer(
    path: Path,
    key: str = "data.tokenizer",
    bos_token: str | None = None,
    eos_token: str | None = None,
) -> Tokenizer:
    """Load a tokenizer's file, or that of a folder; `key` names the setting in errors."""
    file = read_tokenizer(path, key, bos_token, eos_token)
    origin = f"{key}={file.path}"
    if file.spec is None:
        return SentencePieceTokenizer(file.content, origin)
    return HuggingFaceTokenizer(file, origin)


def train_tokenizer(sentences: Sequence[str], vocab_size: int) -> bytes:
    """Train the lossless BPE tokenizer and return a model of exactly `vocab_size` pieces.

    Sentences must not contain newlines: the newline is a symbol of its own.
    """
    counts = [count for _, count in Counter("".join(sentences)).most_common()]
    if not counts:
        raise UserError(
            "no tokenizer can be trained: the training text has no characters besides newlines; "
            "use more text, or give data.tokenizer"
        )
    # Characters get at most half of the free pieces; rarer ones are written as bytes.
    num_characters = max(0, vocab_size - _NUM_FIXED_PIECES) // 2
    for attempt in itertools.count(1):
        coverage = sum(counts[:num_characters]) / sum(counts)
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                vocab_size=vocab_size,
                character_coverage=max(_MIN_COVERAGE, coverage),
                **_RECIPE,
            )
            break
        except RuntimeError as error:
            found = re.search(r"value <= (\d+)", str(error))
            missing = vocab_size - int(found[1]) if found else 0
            if not missing or attempt == _TRAINING_ATTEMPTS or num_characters >= len(counts):
                raise UserError(_explain(str(error), vocab_size, missing)) from error
            num_characters += missing  # where there are too few merges to learn
    return model.getvalue()


def _explain(message: str, vocab_size: int, missing: int) -> str:
    """Turn sentencepiece's message about the number of pieces into one about our setting."""
    given = f"data.vocab_size={vocab_size}"
    if missing > 0:
        return (
            f"{given} is too large for this corpus, from which at most {vocab_size - missing} "
            f"pieces can be learned; set data.vocab_size={vocab_size - missing} or less, or use "
            "more text"
        )
    if smallest := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return (
            f"{given} is too small: bytes and the frequent characters of this corpus take "
            f"{smallest[1]} pieces; set data.vocab_size to more than that"
        )
    return f"no tokenizer of {given} pieces could be trained: {message}"
