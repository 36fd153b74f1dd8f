"""The tokenizer: lossless text, exact cutting, training, and errors that name the key."""

import io
import random
from pathlib import Path

import pytest
import sentencepiece

from configs import UserError
from data import SentencePieceTokenizer, load_tokenizer
from data.corpus.tokenizer_training import train_tokenizer
from data.tokenizer import cut_after_newlines
from tests.data_corpora import random_text, small_tokenizer

ODD_TEXTS = [
    "",
    "\n",
    "\n\n\n",
    " ",
    "   leading",
    "trailing   ",
    "\tdef f():\n\t\treturn 1\n",
    "a\r\nb\rc\r",
    "nul\x00nul\x00\x00",
    "emoji \U0001f600\U0001f9d1\u200d\U0001f680 done",
    "e\u0301 \u00e9 \ufb01 \u212b \uff21 stay apart",
    "\ufeffbom",
    "blocks \u2581 and \u2581\u2581 \u2581\n\u2581",
    "\u2028\u2029\x85\x0b\x0c\x1c",
    "<s> </s> <unk> <0x0A> are text",
    "x" * 5000,
]
ALPHABET = [
    *"ab1 .",
    "  ",
    "\n",
    "\t",
    "\r",
    "\0",
    "\u2581",
    "\u00e9",
    "\u6f22",
    "\U0001f600",
    "self",
]


def train_any(**options: object) -> bytes:
    """Return a model trained with sentencepiece's defaults and the given options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_text(1, 300).split("\n")),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


def random_strings(number: int, longest: int) -> list[str]:
    """Return strings of all kinds of characters."""
    rng = random.Random(4)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(longest))) for _ in range(number)]


def test_every_text_comes_back_unchanged() -> None:
    """decode(encode(text)) is the text, with any characters."""
    tokenizer = small_tokenizer()
    for text in [*ODD_TEXTS, *random_strings(1000, 40)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_cutting_texts_changes_no_id() -> None:
    """Encoding the parts gives the ids of the whole text."""
    tokenizer = small_tokenizer()
    plain = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    assert tokenizer.can_cut
    # Without U+2581, which is encoded as bytes on purpose.
    texts = [text.replace("\u2581", "_") for text in random_strings(300, 200)]
    texts.append(random_text(9, 3000))  # long enough to be cut by default
    for text in texts:
        whole = plain.encode(text)
        assert tokenizer.encode(text) == whole
        for part_length in (1, 7, 50):
            parts = cut_after_newlines(text, part_length)
            assert "".join(parts) == text
            assert [i for part in parts for i in plain.encode(part)] == whole


def test_a_batch_equals_its_texts_one_by_one() -> None:
    """Texts of a batch keep their order and boundaries, empty ones included."""
    tokenizer = small_tokenizer()
    texts = [*ODD_TEXTS, *random_strings(100, 30), ""]
    batch = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert batch == [tokenizer.encode(text) for text in texts]


def test_training_is_exact_and_repeatable() -> None:
    """A trained model has the requested size, bos and eos, and the same bytes every time."""
    sentences = random_text(2, 300).split("\n")
    model = train_tokenizer(sentences, 350)
    tokenizer = SentencePieceTokenizer(model, "test")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (350, 1, 2)
    assert model == train_tokenizer(sentences, 350)
    assert SentencePieceTokenizer(model, "again").fingerprint == tokenizer.fingerprint


def test_indentation_becomes_pieces() -> None:
    """Eight leading spaces become one or two tokens, and digits stay apart."""
    tokenizer = small_tokenizer()
    assert len(tokenizer.encode(" " * 8)) <= 2
    assert len(tokenizer.encode("1234567")) == 7


def test_many_rare_characters_do_not_fill_the_vocabulary() -> None:
    """With more characters than pieces, rare ones become bytes and nothing is lost."""
    rare = "".join(chr(0x4E00 + i) for i in range(2000))
    sentences = [*random_text(3, 9000).split("\n"), rare[:1000], rare[1000:]]
    for vocab_size in (380, 600):  # 600: too few merges to learn, so rare characters fill up
        tokenizer = SentencePieceTokenizer(train_tokenizer(sentences, vocab_size), "test")
        assert tokenizer.vocab_size == vocab_size
        assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_too_large_vocab_size_names_one_that_works() -> None:
    """The size in the message can be used as it is."""
    sentences = ["abc abd abe", "abc"] * 3
    with pytest.raises(ValueError, match=r"data\.vocab_size=9999 is too large") as error:
        train_tokenizer(sentences, 9999)
    largest = int(str(error.value).split("set data.vocab_size=")[1].split()[0])
    assert SentencePieceTokenizer(train_tokenizer(sentences, largest), "test").vocab_size == largest
    with pytest.raises(ValueError, match=r"data\.vocab_size=100 is too small"):
        train_tokenizer(sentences, 100)


@pytest.mark.parametrize("content", [b"", b"junk", "half"])
def test_a_corrupt_model_is_named(tmp_path: Path, content: bytes | str) -> None:
    """Empty, foreign and truncated files give an error with key and path."""
    path = tmp_path / "broken.model"
    model = small_tokenizer().content
    path.write_bytes(model[: len(model) // 2] if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*broken\.model is not a readable"):
        load_tokenizer(path)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    """The message contains key and path."""
    with pytest.raises(UserError, match=r"data\.tokenizer=.*none\.model does not exist"):
        load_tokenizer(tmp_path / "none.model")


def test_a_model_without_bos_or_eos_is_refused() -> None:
    """Documents need both as boundaries."""
    with pytest.raises(ValueError, match="bos_id=-1"):
        SentencePieceTokenizer(train_any(bos_id=-1), "data.tokenizer='x'")
    with pytest.raises(ValueError, match="eos_id=-1"):
        SentencePieceTokenizer(train_any(eos_id=-1), "data.tokenizer='x'")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"model_type": "bpe", "byte_fallback": True},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    ],
)
def test_texts_are_not_cut_for_other_models(options: dict[str, object]) -> None:
    """If a cut could change ids, texts are encoded whole."""
    model = train_any(**options)
    tokenizer = SentencePieceTokenizer(model, "given")
    plain = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = random_text(5, 2000)
    assert not tokenizer.can_cut
    assert tokenizer.encode(text) == plain.encode(text)


def test_no_texts_give_no_ids() -> None:
    """An empty batch is allowed."""
    assert small_tokenizer().encode_batch([]) == []


@pytest.mark.parametrize("sentences", [[], ["", ""]])
def test_training_text_without_characters_is_refused(sentences: list[str]) -> None:
    """Empty lines give nothing to learn from."""
    with pytest.raises(UserError, match="no characters besides newlines; use more text"):
        train_tokenizer(sentences, 320)
