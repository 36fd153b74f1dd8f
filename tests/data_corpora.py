"""Small corpora for the tests of `data`."""

import functools
import io
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from configs.schema import DataConfig
from data import Corpus, SentencePieceTokenizer, TokenFile, cached_corpus
from data.corpus.build import build_corpus
from data.corpus.tokenizer_training import train_tokenizer

_WORDS = ["def", "return", "self", "import", "value", "for", "while", "if", "name", "list", "token"]


def prepare_corpus(
    config: DataConfig, seq_length: int, local_rank: int, *text: cached_corpus.FoundText
) -> Corpus:
    """As `data.prepare_corpus`, but local rank 0 builds in this process what is missing."""
    if local_rank:
        return cached_corpus.prepare_corpus(config, seq_length, local_rank, *text)
    with mock.patch.object(cached_corpus, "_make", build_corpus):
        return cached_corpus.prepare_corpus(config, seq_length, local_rank, *text)


def random_text(seed: int, num_lines: int) -> str:
    """Returns indented lines of words and numbers."""
    rng = random.Random(seed)
    return "".join(
        " " * (4 * rng.randrange(3)) + " ".join(rng.choices(_WORDS, k=6)) + f" {rng.random()}\n"
        for _ in range(num_lines)
    )


def write_task(path: Path, num_items: int) -> Path:
    """Write questions whose answer is a part of the context; returns the file.

    Contexts may be empty, end with white space or fill several rows; lengths in characters, bytes
    and tokens differ.
    """
    rng, lines = random.Random(5), []
    for number in range(num_items):
        words = rng.choices(_WORDS, k=rng.choice((1, 2, 5, 200)))
        context = " ".join(words) + rng.choice(("", "", " ", ":\n    ")) if number % 9 else ""
        choices = [" ".join(rng.choices([*_WORDS, "é", "漢字"], k=rng.randrange(1, 4)))]
        choices += [f"{word} {rng.choice(words)}" for word in rng.sample(_WORDS, number % 4)]
        item = {"context": context, "choices": choices, "answer": rng.randrange(len(choices))}
        lines.append(json.dumps({**item, "id": f"item {number}"}) + "\n")
    path.write_text("".join(lines))
    return path


@functools.cache
def small_tokenizer() -> SentencePieceTokenizer:
    """Returns a lossless tokenizer of 320 pieces."""
    return SentencePieceTokenizer(
        train_tokenizer(random_text(0, 200).split("\n"), 320), "small_tokenizer"
    )


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


# The regular expression of Llama 3.
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
JSON_KINDS = ("gpt2", "llama3", "metaspace")


def write_json_tokenizer(folder: Path, kind: str) -> Path:
    """Writes tokenizer.json, of 400 tokens, and tokenizer_config.json; returns the former.

    Kind `gpt2` has one token for bos and eos; `metaspace` is like Llama 2's.
    """
    specials = {
        "gpt2": ["<|end|>"],
        "llama3": ["<s>", "</s>"],
        "metaspace": ["<s>", "</s>", "<unk>"],
    }
    tokens = specials[kind]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    options: dict[str, Any] = {"special_tokens": tokens}
    if kind == "metaspace":
        tokenizer.model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        options["special_tokens"] = [*tokens, *(f"<0x{byte:02X}>" for byte in range(256))]
        options["limit_alphabet"] = 60
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "llama3":
            split = pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
            to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, **options)
    tokenizer.train_from_iterator(random_text(0, 200).split("\n"), trainer)
    # Neither must change the ids of documents.
    tokenizer.enable_truncation(8)
    if kind != "gpt2":
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] in tokens]
    spec["model"]["ignore_merges"] = kind == "llama3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    beside = {"bos_token": tokens[0], "eos_token": tokens[:2][-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder / "tokenizer.json"
