"""tokenizer.json gives the ids of sentencepiece for every text, or conversion fails."""

import itertools
import json
import random

import pytest
import tokenizers

from data import SentencePieceTokenizer, Tokenizer
from data.corpus.tokenizer_training import train_tokenizer
from interop.check import unusual_texts
from interop.tokenizer_json import tokenizer_json
from tests.data.test_tokenizer import ODD_TEXTS, random_strings, train_any
from tests.data_corpora import small_tokenizer


def converted(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    other = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    other.encode_special_tokens = True
    return other


def assert_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    other = converted(tokenizer)
    wrong = [text for text in texts if other.encode(text).ids != tokenizer.encode(text)]
    assert wrong == []


def test_trained_tokenizers() -> None:
    """Bytes, spaces, newlines, U+2581, control pieces in the text."""
    tokenizer = small_tokenizer()
    texts = [*ODD_TEXTS, *unusual_texts(tokenizer, 1000), *random_strings(2000, 60)]
    assert_same_ids(tokenizer, texts)
    other = converted(tokenizer)
    assert [other.decode(other.encode(text).ids) for text in texts] == texts


@pytest.mark.slow
def test_ambiguous_merges() -> None:
    """Pieces of two letters overlap: every short text, and long ones."""
    rng = random.Random(7)
    sentences = ["".join(rng.choices("ab ", k=60)) for _ in range(300)]
    tokenizer = SentencePieceTokenizer(train_tokenizer(sentences, 420), "test")
    texts = ["".join(text) for n in range(9) for text in itertools.product("ab ", repeat=n)]
    texts += ["".join(rng.choices("ab ", k=rng.randrange(200))) for _ in range(2000)]
    assert_same_ids(tokenizer, texts)


SPACES = {"normalization_rule_name": "identity", "model_type": "bpe"}


@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True},
        {"byte_fallback": True, "remove_extra_whitespaces": False},  # as Llama's
        {"byte_fallback": True, "add_dummy_prefix": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
        {
            "byte_fallback": True,
            "user_defined_symbols": ["<|im|>", "ab", "\n\n"],
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
        },
    ],
    ids=str,
)
def test_other_sentencepiece_options(options: dict[str, object]) -> None:
    """Dummy prefix, extra spaces removed, no byte fallback, user-defined symbols."""
    tokenizer = SentencePieceTokenizer(train_any(**SPACES, **options), "test")
    texts = [*ODD_TEXTS, *unusual_texts(tokenizer, 500), *random_strings(1000, 40)]
    texts += ["<|im|>ab\n\n\nab", " ", "\u2581", " \u2581 a \u2581 ", "a\u2581", "\u2581  a"]
    assert_same_ids(tokenizer, texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "model_type is not bpe"),
        ({"model_type": "bpe"}, "normalises texts .nmt_nfkc."),
        (SPACES | {"treat_whitespace_as_suffix": True}, "at the ends of pieces"),
        (SPACES | {"user_defined_symbols": ["<|im|>"]}, "user_defined_symbols"),
    ],
)
def test_unsupported_options_are_refused(options: dict[str, object], message: str) -> None:
    """Instead of giving other ids."""
    with pytest.raises(ValueError, match=message):
        tokenizer_json(SentencePieceTokenizer(train_any(**options), "test"))
