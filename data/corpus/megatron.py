"""Megatron's indexed datasets, as Megatron-LM, NeMo and nanotron read them.

    PREFIX.bin  the tokens of all sequences
    PREFIX.idx  9 bytes  b"MMIDIDX\\0\\0"
                uint64   version, 1
                uint8    code of the dtype of tokens
                uint64   number of sequences, n
                uint64   number of document bounds, d
                int32    [n], tokens of each sequence
                int64    [n], byte of the .bin where each sequence begins
                int64    [d], first sequence of each document, and n

All numbers are little-endian. GPT's documents have one sequence each; BERT's have one per sentence,
which are joined here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data.corpus.spool import START, ReadCursor, Record
from data.source_files import SourceKeys
from data.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\0\0"
HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("n", "<u8"), ("d", "<u8")])
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
MAX_DOCUMENT_TOKENS = 4 << 20  # longer documents are cut, like texts of more than 16 MiB

IntArray = npt.NDArray[np.integer]


class Dataset(NamedTuple):
    """An indexed dataset, mapped from disk."""

    tokens: IntArray  # of the whole .bin
    starts: npt.NDArray[np.int64]  # [n], first token of each sequence
    lengths: npt.NDArray[np.int32]  # [n], tokens of each sequence
    documents: npt.NDArray[np.int64]  # [d], first sequence of each document, and n

    def document(self, number: int) -> IntArray:
        """Return the tokens of a document."""
        first, end = self.documents[number : number + 2].tolist()
        spans = zip(self.starts[first:end].tolist(), self.lengths[first:end].tolist(), strict=True)
        sequences = [self.tokens[start : start + length] for start, length in spans]
        return np.concatenate([self.tokens[:0], *sequences])


def open_dataset(file: Path, key: str) -> Dataset:
    """Map the dataset of a .bin file. UserError, which names `key`, if it is not a whole one."""
    index = file.with_suffix(".idx")

    def error(problem: str) -> UserError:
        return UserError(f"{key}: {index} {problem}")

    content = np.fromfile(index, np.uint8)
    header = content[: HEADER.itemsize].tobytes()
    if len(header) < HEADER.itemsize or not header.startswith(MAGIC):
        raise error("is not the index of a Megatron dataset, which begins with MMIDIDX")
    _, version, code, n, d = np.frombuffer(header, HEADER)[0].tolist()
    if version != 1:
        raise error(f"has version {version}; only version 1 is known")
    dtype = np.dtype(DTYPES.get(code, "<f8"))
    if dtype.kind == "f":
        raise error(f"has dtype code {code}, which is no integer; tokens have 1 to 5 or 8")
    extra = len(content) - HEADER.itemsize - 12 * n - 8 * d
    if extra == n > 0:
        raise error("is of a multimodal dataset; only text is supported")
    size = file.stat().st_size
    if extra or d < 1 or size % dtype.itemsize:
        raise error(f"does not fit its own size or that of {file.name}; copy both files again")
    tokens = np.memmap(file, dtype, mode="r") if size else np.empty(0, dtype)
    parts = np.split(content[HEADER.itemsize :], [4 * n, 12 * n])
    lengths, pointers = parts[0].view(np.dtype("<i4")), parts[1].view(np.dtype("<i8"))
    documents = parts[2].view(np.dtype("<i8"))
    starts = pointers // dtype.itemsize
    is_whole = (
        (lengths >= 0).all()
        and (pointers >= 0).all()
        and not (pointers % dtype.itemsize).any()
        and (starts + lengths <= len(tokens)).all()
        and (documents[0], documents[-1]) == (0, n)
        and (np.diff(documents) >= 0).all()
    )
    if not is_whole:
        raise error(f"does not fit {file.name} ({len(tokens)} tokens); copy both files again")
    return Dataset(np.asarray(tokens), starts, lengths, documents)


def read_tokenized(
    files: list[Path], keys: SourceKeys, tokenizer: Tokenizer, start: ReadCursor = START
) -> Iterator[Record]:
    """Yield the documents of .bin files, with their text and their tokens without bos and eos."""
    for number in range(start.file, len(files)):
        dataset = open_dataset(files[number], keys.path)
        first = start.record if number == start.file else 0
        for document in range(first, len(dataset.documents) - 1):
            tokens = dataset.document(document)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
                worst = tokens.min() if tokens.min() < 0 else tokens.max()
                raise UserError(
                    f"{keys.path}: document {document} of {files[number]} has the token {worst}, "
                    f"but the ids of data.tokenizer are 0 to {tokenizer.vocab_size - 1}; give the "
                    "tokenizer that the file was made with"
                )
            tokens = _without_ends(tokens, tokenizer)
            cuts = list(range(MAX_DOCUMENT_TOKENS, len(tokens), MAX_DOCUMENT_TOKENS))
            parts = [(tokenizer.decode(part.tolist()), part) for part in np.split(tokens, cuts)]
            parts = [(text, part) for text, part in parts if text]
            yield Record(
                [text for text, _ in parts],
                None if parts else "empty",
                ReadCursor(number, document + 1),
                [part for _, part in parts],
            )


def _without_ends(tokens: IntArray, tokenizer: Tokenizer) -> IntArray:
    """Drop eos at the end and bos at the beginning, if they are there."""
    if len(tokens) and tokens[-1] == tokenizer.eos_id:
        tokens = tokens[:-1]
    return tokens[1:] if len(tokens) and tokens[0] == tokenizer.bos_id else tokens
