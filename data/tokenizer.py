"""Tokenizers of both kinds, sentencepiece and tokenizer.json.

[Note: cutting texts after newlines]
Encoding time grows faster than the length of a string, and one string uses one core. Where no piece
contains a newline among other characters, and the model neither normalises nor adds a dummy prefix,
a text may be cut after newlines without changing any id. `Tokenizer` probes the model for this.

[Note: the block character]
sentencepiece writes spaces as U+2581 inside pieces, so a U+2581 in a text decodes to a space. Where
texts may be cut, it is cut out and encoded as its three byte pieces, which decode to itself.

[Note: threads]
`tokenizers` keeps a pool of threads for batches. A forked child does not have them and would wait
for them forever, so the pool is switched off. Python threads that live for one call encode parts of
the batch instead; the library releases the GIL.

[Note: cutting texts at spaces]
One text uses one core, and the library needs 150 bytes per character of it. GPT-2, Llama 3, Qwen
and GPT-4o split texts into words by a regular expression, and encode each word on its own. In these
expressions no alternative matches a space after another character that is not white space, so words
never cross such a place. None looks behind, and the only look-ahead, `\\s+(?!\\S)`, follows white
space. So the words of a text are those of its parts if it is cut between such a character and a
space. With any other pre-tokenizer texts are encoded whole. NFC changes nothing across a space.
"""

import functools
import itertools
import operator
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from configs.launch import usable_cores
from configs.tokenizer_files import TokenizerFile, load_sentencepiece, read_tokenizer

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # see [Note: threads]

import tokenizers

_BLOCK = "\u2581"
# Characters of a part, and of what a thread encodes in one call. Million tokens per second of
# sentencepiece on 2 cores: 10^3 5.8, 10^4 6.8, 10^5 5.1, uncut 0.9.
_PART_LENGTH = 20_000
_CUT_PROBES = ("a\n", "\n", " \n", "\tA\n", "\n\n", "  a", "é ")
_LOSSLESS_PROBE = "  a\t\tb \n\n c\r\n\x00 é ﬁ 漢 \U0001f600  "
_CUT = re.compile(r"\S(?= )")
# Of cl100k (Llama 3), Qwen and o200k (GPT-4o).
_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
_PATTERNS = {
    rf"{_SUFFIX}|{_FIRST}\p{{L}}+|\p{{N}}{{1,3}}|{_WORDS}",
    rf"{_SUFFIX}|{_FIRST}\p{{L}}+|\p{{N}}|{_WORDS}",
    rf"{_FIRST}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_FIRST}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}|"
    + _WORDS.replace(r"[\r\n]*", r"[\r\n/]*"),
}


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
    unk_id: int  # -1: there is none, or it is bos or eos
    adds_bos: bool = False  # whether other libraries put bos before a text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos; special tokens in it are plain text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, without bos and eos, using all cores."""
        parts_of_texts = [self._cut(text) for text in texts]
        encoded = iter(self._encode_parts([*itertools.chain(*parts_of_texts)]))
        none = np.empty(0, np.int32)
        return [np.concatenate([none, *itertools.islice(encoded, len(p))]) for p in parts_of_texts]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos, eos and other special tokens have none."""
        ...

    def _cut(self, text: str) -> list[str]: ...

    def _encode_parts(self, parts: list[str]) -> list[npt.NDArray[np.int32]]: ...


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

    def _encode_parts(self, parts: list[str]) -> list[npt.NDArray[np.int32]]:
        encoded: list[npt.NDArray[np.int32]] = self._processor.encode(
            parts, out_type="numpy", num_threads=self._num_threads
        )
        if not self.can_cut:
            return encoded
        pairs = zip(parts, encoded, strict=True)
        return [self._block_ids if part == _BLOCK else ids for part, ids in pairs]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos and eos have none."""
        return str(self._processor.decode(ids))

    @functools.cached_property
    def can_cut(self) -> bool:
        """Whether texts may be encoded in parts; see [Note: cutting texts after newlines]."""
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

    def _cut(self, text: str) -> list[str]:
        if not self.can_cut:
            return [text]
        stretches = re.split(f"({_BLOCK})", text)
        return [part for stretch in stretches for part in cut_after_newlines(stretch)]


def cut_after_newlines(text: str, part_length: int = _PART_LENGTH) -> list[str]:
    """Cut after newlines into parts of at most `part_length` characters, or of one longer line."""
    parts = re.findall(rf"(?s:.{{0,{part_length - 1}}})(?:\n|\Z)|[^\n]+\n?", text)
    return [part for part in parts if part]  # the end of the text also matches as an empty part


class HuggingFaceTokenizer(Tokenizer):
    """A loaded tokenizer.json. Its post-processor, truncation, padding and dropout are ignored."""

    file_name = "tokenizer.json"

    def __init__(self, file: TokenizerFile, origin: str) -> None:
        """Load a file whose bos and eos are known; `origin` names it in errors."""
        assert file.spec is not None, "the file is a tokenizer.json"
        assert file.bos_token is not None, "read_tokenizer has found it"
        assert file.eos_token is not None, "read_tokenizer has found it"
        try:
            self._backend = backend = tokenizers.Tokenizer.from_buffer(file.content)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{origin} is not a readable tokenizer.json: {error}") from error
        backend.no_truncation()
        backend.no_padding()
        model = file.spec["model"]
        if model.get("dropout"):
            backend.model.dropout = None
        self.content, self.vocab_size = file.content, file.vocab_size
        self.bos_token, self.eos_token = file.bos_token, file.eos_token
        backend.add_special_tokens([self.bos_token, self.eos_token])  # in case they are not special
        backend.encode_special_tokens = True  # special tokens in a text are plain text
        ids: dict[str, int] = backend.get_vocab()
        if max(ids.values()) + 1 != self.vocab_size:
            raise UserError(
                f"{origin} has added_tokens whose ids do not follow those of its model; renumber "
                "them without gaps"
            )
        self.bos_id, self.eos_id = ids[self.bos_token], ids[self.eos_token]
        self.unk_token: str | None = model.get("unk_token")
        if model.get("unk_id") is not None:  # of a unigram model
            self.unk_token = model["vocab"][model["unk_id"]][0]
        self.unk_id = -1 if self.unk_token is None else ids.get(self.unk_token, -1)
        if self.unk_id in (self.bos_id, self.eos_id):  # which every document has
            self.unk_id = -1
        ends = f" bos {self.bos_id} eos {self.eos_id}"  # documents begin and end with them
        self.fingerprint = xxhash.xxh3_128_hexdigest(file.content + ends.encode())
        self.adds_bos = backend.encode("a").ids[:1] == [self.bos_id]  # by its post-processor
        self.can_cut = can_cut(file.spec)
        self._num_threads = usable_cores()
        for token, token_id in ((self.bos_token, self.bos_id), (self.eos_token, self.eos_id)):
            if token_id in self.encode(token):
                raise UserError(
                    f"{origin} encodes the text {token!r} as the token {token}, so a text could "
                    "end a document; use another tokenizer, such as its sentencepiece model"
                )

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos, eos and other special tokens have none."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def _cut(self, text: str) -> list[str]:
        return cut_before_spaces(text) if self.can_cut else [text]

    def _encode_parts(self, parts: list[str]) -> list[npt.NDArray[np.int32]]:
        numbers = (end // _PART_LENGTH for end in itertools.accumulate(map(len, parts)))
        numbered = zip(numbers, parts, strict=True)
        calls = itertools.groupby(numbered, operator.itemgetter(0))
        batches = [[part for _, part in call] for _, call in calls]

        def encode(batch: list[str]) -> list[npt.NDArray[np.int32]]:
            encodings = self._backend.encode_batch_fast(batch, add_special_tokens=False)
            return [np.array(encoding.ids, np.int32) for encoding in encodings]

        with ThreadPoolExecutor(self._num_threads) as executor:
            return [*itertools.chain.from_iterable(executor.map(encode, batches))]


def can_cut(spec: dict[str, Any]) -> bool:
    """Whether texts may be encoded in parts; see [Note: cutting texts at spaces]."""
    normalizer, pre = spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    first, *others = pre.get("pretokenizers", [pre]) or [{}]
    splits = first.get("pattern", {}).get("Regex") in _PATTERNS and (
        (first["behavior"], first["invert"]) in (("Isolated", False), ("Removed", True))
    )
    splits = splits or (first.get("type") == "ByteLevel" and first.get("use_regex", True))
    return (
        splits
        and all(step["type"] == "ByteLevel" for step in others)
        and normalizer in (None, {"type": "NFC"})
        and not any(
            token["lstrip"] or token["rstrip"] or token["single_word"] or " " in token["content"]
            for token in spec.get("added_tokens") or []
            if not token["special"]
        )
    )


def cut_before_spaces(text: str, part_length: int = _PART_LENGTH) -> list[str]:
    """Cut into parts of at least `part_length` characters, before spaces."""
    parts, start = [], 0
    while start + part_length < len(text) and (cut := _CUT.search(text, start + part_length - 1)):
        parts.append(text[start : cut.end()])
        start = cut.end()
    return [*parts, text[start:]]


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
