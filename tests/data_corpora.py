"""Small corpora for the tests of `data`."""

import functools
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from configs.schema import DataConfig
from data import Corpus, TokenFile, Tokenizer
from data.tokenizer import train_tokenizer

_WORDS = ["def", "return", "self", "import", "value", "for", "while", "if", "name", "list", "token"]


def random_text(seed: int, num_lines: int) -> str:
    """Returns indented lines of words and numbers."""
    rng = random.Random(seed)
    return "".join(
        " " * (4 * rng.randrange(3)) + " ".join(rng.choices(_WORDS, k=6)) + f" {rng.random()}\n"
        for _ in range(num_lines)
    )


@functools.cache
def small_tokenizer() -> Tokenizer:
    """Returns a lossless tokenizer of 320 pieces."""
    return Tokenizer(train_tokenizer(random_text(0, 200).split("\n"), 320), "small_tokenizer")


def lossy_model(folder: Path, texts: list[str]) -> Path:
    """Writes a tokenizer by sentencepiece's defaults, without pieces for characters that are rare
    in the texts; returns its file."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=content,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    (folder / "lossy.model").write_bytes(content.getvalue())
    return folder / "lossy.model"


def corpus_of_lengths(train: list[int], validation: tuple[int, ...] = ()) -> Corpus:
    """Returns a corpus in memory whose documents have the given numbers of tokens.

    Tokens inside documents count upwards from 10, so that every one tells where it is from.
    """
    return Corpus(
        tokenizer=small_tokenizer(),
        tokenizer_path=Path("unused"),
        train=token_file(train),
        validation=token_file(validation),
        fingerprint="unused",
        summary={},
    )


def token_file(lengths: list[int] | tuple[int, ...]) -> TokenFile:
    """Returns documents bos, 10, 11, 12, ..., eos of the given lengths, with made-up bytes."""
    tokenizer = small_tokenizer()
    tokens: list[int] = []
    for length in lengths:
        inner = range(10 + len(tokens), 10 + len(tokens) + length - 2)
        document = [tokenizer.bos_id, *inner, tokenizer.eos_id]
        tokens += document[:length]
    return TokenFile(
        np.array(tokens, dtype=np.uint32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.array([3 * length + 1 for length in lengths], dtype=np.int64),
    )


def text_config(folder: Path, **changes: Any) -> DataConfig:
    """Returns a configuration for the texts below folder/texts, with a cache beside them."""
    settings: dict[str, Any] = {
        "source": "text",
        "path": str(folder / "texts"),
        "vocab_size": 320,
        "validation_fraction": 0.2,
        "cache_directory": str(folder / "cache"),
        **changes,
    }
    return DataConfig(**settings)


def write_texts(folder: Path, num_documents: int, num_lines: int = 20) -> list[str]:
    """Writes documents below folder/texts and returns their texts."""
    texts = [random_text(seed, num_lines) for seed in range(num_documents)]
    (folder / "texts").mkdir()
    for number, text in enumerate(texts):
        (folder / "texts" / f"{number:03}.txt").write_bytes(text.encode())
    return texts
