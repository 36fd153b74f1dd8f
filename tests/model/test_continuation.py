"""Incremental detokenization releases whole characters and stops at the right place."""

import pytest

from data import SentencePieceTokenizer
from data.corpus.encoding import encode_chat
from model.generation.continuation import Continuation
from tests.data.test_tokenizer import ALPHABET, train_any
from tests.data_corpora import small_tokenizer

TEXTS = [
    "def f():\n    return 'é', '漢字', '\U0001f600\U0001f9d1\u200d\U0001f680'\n",
    "".join(ALPHABET) * 2,
    "\ufffd is a character too \ufffd\ufffd",
]


def add_all(text: Continuation, tokens: list[int]) -> list[str]:
    """The text released after each token and at the end."""
    return [*(text.add(token) for token in tokens), text.finish()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 1, 5, 20])
def test_pieces_are_the_text(text: str, cut: int) -> None:
    """The pieces add up to the text, wherever the prompt ends; none ends inside a character."""
    tokenizer = small_tokenizer()
    prompt = tokenizer.encode(text[:cut]) or [tokenizer.bos_id]
    pieces = add_all(Continuation(tokenizer, prompt, set(), None), tokenizer.encode(text[cut:]))
    assert "".join(pieces) == text[cut:]
    assert len([piece for piece in pieces if piece]) > 1
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_incomplete_characters_become_replacements() -> None:
    tokenizer = small_tokenizer()
    three_bytes = tokenizer.encode("漢")
    assert len(three_bytes) == 3
    text = Continuation(tokenizer, [tokenizer.bos_id], set(), None)
    pieces = add_all(text, [*three_bytes[:2], *tokenizer.encode("a"), three_bytes[0]])
    assert pieces[:2] == ["", ""]
    assert pieces[2].endswith("a")
    assert "".join(pieces) == tokenizer.decode(
        [*three_bytes[:2], *tokenizer.encode("a"), three_bytes[0]]
    )


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_spaces_between_words_are_kept(kind: str) -> None:
    """sentencepiece adds and removes a space only at the beginning of a text."""
    tokenizer = SentencePieceTokenizer(train_any(model_type=kind), "default")
    prompt, following = tokenizer.encode("def self"), tokenizer.encode("return value")
    pieces = add_all(Continuation(tokenizer, prompt, set(), None), following)
    assert "".join(pieces) == " return value"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_remembered_answer_has_the_tokens_that_were_generated(kind: str) -> None:
    """Also if the tokenizer puts a space before each text, as Llama 2's does."""
    tokenizer = SentencePieceTokenizer(train_any(model_type=kind), "default")
    messages = [{"role": "user", "content": "def self"}]
    prompt, new = encode_chat(messages, tokenizer), tokenizer.encode("return value")
    answer = Continuation(tokenizer, prompt, {tokenizer.eos_id}, " value")
    add_all(answer, new)
    assert answer.message == "return"
    answer = Continuation(tokenizer, prompt, {tokenizer.eos_id}, None)
    add_all(answer, [*new, tokenizer.eos_id])
    messages += [{"role": "assistant", "content": answer.message}, messages[0]]
    history = [*prompt, *new, tokenizer.eos_id]
    assert encode_chat(messages, tokenizer)[: len(history)] == history


@pytest.mark.parametrize("stop", ["\n", "return", "urn '", "n 'é"])
def test_text_ends_before_the_stop(stop: str) -> None:
    """The stop string and the text after it are never released, however they are tokenized."""
    tokenizer, whole = small_tokenizer(), "a r ret\treturn 'é' return\n"
    text = Continuation(tokenizer, [tokenizer.bos_id], set(), stop)
    assert "".join(add_all(text, tokenizer.encode(whole))) == whole[: whole.index(stop)]
    assert text.ended


def test_the_beginning_of_an_incomplete_stop_is_released() -> None:
    tokenizer = small_tokenizer()
    text = Continuation(tokenizer, [tokenizer.bos_id], set(), "returned")
    assert "".join(add_all(text, tokenizer.encode("we return"))) == "we return"


def test_an_end_token_ends_it() -> None:
    """An end token and the tokens after it add no text."""
    tokenizer = small_tokenizer()
    tokens = [*tokenizer.encode("so é"), tokenizer.eos_id, *tokenizer.encode("more")]
    text = Continuation(tokenizer, [tokenizer.bos_id], {tokenizer.eos_id}, None)
    assert "".join(add_all(text, tokens)) == "so é"
    assert text.ended
