"""A Hugging Face tokenizer.json, encoded by the library `tokenizers`.

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

import itertools
import operator
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import UserError
from configs.launch import usable_cores
from configs.tokenizer_files import TokenizerFile

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # see [Note: threads]

from tokenizers import Tokenizer as Backend

_PART_LENGTH = 20_000  # characters of a part, and of what a thread encodes in one call
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


class HuggingFaceTokenizer:
    """A loaded tokenizer.json. Its post-processor, truncation, padding and dropout are ignored."""

    file_name = "tokenizer.json"

    def __init__(self, file: TokenizerFile, origin: str) -> None:
        """Load a file whose bos and eos are known; `origin` names it in errors."""
        assert file.spec is not None, "the file is a tokenizer.json"
        assert file.bos_token is not None, "read_tokenizer has found it"
        assert file.eos_token is not None, "read_tokenizer has found it"
        try:
            self._backend = backend = Backend.from_buffer(file.content)
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

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without bos and eos; special tokens in it are plain text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: list[str]) -> list[npt.NDArray[np.int32]]:
        """Return the ids of each text, without bos and eos, using all cores."""
        parts_of_texts = [cut_before_spaces(t) if self.can_cut else [t] for t in texts]
        parts = list(itertools.chain(*parts_of_texts))
        numbers = (end // _PART_LENGTH for end in itertools.accumulate(map(len, parts)))
        numbered = zip(numbers, parts, strict=True)
        calls = itertools.groupby(numbered, operator.itemgetter(0))
        batches = [[part for _, part in call] for _, call in calls]
        with ThreadPoolExecutor(self._num_threads) as executor:
            encoded = itertools.chain.from_iterable(executor.map(self._encode_parts, batches))
            return [np.concatenate([*itertools.islice(encoded, len(p))]) for p in parts_of_texts]

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; bos, eos and other special tokens have none."""
        return str(self._backend.decode(ids, skip_special_tokens=True))

    def _encode_parts(self, parts: list[str]) -> list[npt.NDArray[np.int32]]:
        encodings = self._backend.encode_batch_fast(parts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]


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
