"""tokenizer.json: the ids of transformers, plain special tokens, exact cutting, bos and eos."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers

from configs import UserError
from data import SentencePieceTokenizer, load_tokenizer
from data.tokenizer import HuggingFaceTokenizer, can_cut, cut_before_spaces
from interop.check import unusual_texts
from tests.data.test_tokenizer import ODD_TEXTS, random_strings
from tests.data_corpora import JSON_KINDS, random_text, small_tokenizer, write_json_tokenizer

SPECIALS = ["<s>", "</s>", "<unk>", "<|end|>", "<0x0A>", " ", "a\n", "\n\n", "é", "x'll", "\u00a0"]


def load(path: Path, **tokens: str) -> HuggingFaceTokenizer:
    tokenizer = load_tokenizer(path, **tokens)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def change(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    return path


def texts_for(tokenizer: HuggingFaceTokenizer) -> list[str]:
    rng = random.Random(5)
    specials = ["".join(rng.choices(SPECIALS, k=12)) for _ in range(300)]
    return [*ODD_TEXTS, *unusual_texts(tokenizer, 1000), *random_strings(700, 60), *specials]


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_ids_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    """For 2,000 unusual texts; special tokens in them are plain text."""
    path = write_json_tokenizer(tmp_path, kind)
    ours = load(path)
    texts = texts_for(ours)
    assert len(texts) > 2000
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    expected = theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    batch = [ids.tolist() for ids in ours.encode_batch(texts)]
    assert batch == expected
    assert batch[:50] == [ours.encode(text) for text in texts[:50]]
    ends = {ours.bos_id, ours.eos_id}
    assert not any(ends.intersection(ids) for ids in batch)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1 == 400
    assert ours.content == path.read_bytes()
    assert ours.encode_batch([]) == []
    if kind != "metaspace":
        assert [ours.decode(ids) for ids in batch] == texts
    assert ours.decode([ours.bos_id, *ours.encode("self"), ours.eos_id]) == "self"


@pytest.mark.slow
def test_cutting_texts_changes_no_id(tmp_path: Path) -> None:
    """Parts of any length give the ids of the whole text."""
    for kind in ("gpt2", "llama3"):
        tokenizer = load(write_json_tokenizer(tmp_path / kind, kind))
        assert tokenizer.can_cut
        plain = tokenizers.Tokenizer.from_buffer(tokenizer.content)
        plain.no_truncation()
        plain.encode_special_tokens = True
        long = random_text(9, 3000)
        assert len(cut_before_spaces(long)) > 1
        for text in [long, *texts_for(tokenizer)]:
            whole = plain.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text) == whole
            for part_length in (1, 7, 50) if text != long else (1000,):
                parts = cut_before_spaces(text, part_length)
                assert "".join(parts) == text
                assert np.concatenate(tokenizer._encode_parts(parts)).tolist() == whole


def test_texts_are_not_cut_where_that_could_change_ids(tmp_path: Path) -> None:
    """An unknown expression, a normalizer, tokens with spaces, no pre-tokenizer."""
    spec = json.loads(write_json_tokenizer(tmp_path, "llama3").read_text("utf-8"))
    token = {"id": 9, "content": "x", "special": False}
    token |= dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    split, byte_level = spec["pre_tokenizer"]["pretokenizers"]
    assert can_cut(spec)
    assert can_cut(spec | {"normalizer": {"type": "NFC"}, "added_tokens": [token]})
    assert not can_cut(spec | {"normalizer": {"type": "NFKC"}})
    assert not can_cut(spec | {"added_tokens": [token | {"content": "a b"}]})
    assert not can_cut(spec | {"added_tokens": [token | {"rstrip": True}]})
    assert not can_cut(spec | {"pre_tokenizer": None})
    assert not can_cut(spec | {"pre_tokenizer": byte_level})  # without its expression
    pattern = {"Regex": split["pattern"]["Regex"] + "|a b"}
    other = {"type": "Sequence", "pretokenizers": [split | {"pattern": pattern}, byte_level]}
    assert not can_cut(spec | {"pre_tokenizer": other})
    assert not load(write_json_tokenizer(tmp_path / "other", "metaspace")).can_cut


def test_a_forked_process_encodes_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """After threads have encoded in the parent, whatever the environment says."""
    tokenizer = load(write_json_tokenizer(tmp_path, "gpt2"))
    texts = [random_text(seed, 30) for seed in range(200)]
    expected = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    if (child := os.fork()) == 0:
        equal = [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected
        os._exit(0 if equal else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""


BESIDE = {
    "tokenizer_config": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}},
    "added tokens": {
        "tokenizer_config.json": {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}
    },
    "ids in config.json": {"config.json": {"bos_token_id": 0, "eos_token_id": [1, 5]}},
    "generation_config.json": {
        "tokenizer_config.json": {"model_max_length": 5, "bos_token": None, "eos_token": "<none>"},
        "config.json": {"bos_token_id": 0},
        "generation_config.json": {"bos_token_id": 7, "eos_token_id": 1},
    },
}


@pytest.mark.parametrize("files", BESIDE.values(), ids=BESIDE)
def test_bos_and_eos_come_from_the_files_beside(tmp_path: Path, files: dict[str, Any]) -> None:
    """The first file that says it, as a token or as an id; a folder means its tokenizer.json."""
    write_json_tokenizer(tmp_path, "llama3")
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_token, tokenizer.bos_id) == ("<s>", 0)
    assert (tokenizer.eos_token, tokenizer.eos_id) == ("</s>", 1)
    assert load(tmp_path, eos_token="</s>").fingerprint == tokenizer.fingerprint
    message = r"^data\.bos_token=</s>, but .*json says bos is <s>; set data\.bos_token=null to use"
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path, bos_token="</s>")


def test_bos_and_eos_come_from_the_settings(tmp_path: Path) -> None:
    """Where files say nothing; another eos is another fingerprint; one token may be both."""
    path = write_json_tokenizer(tmp_path, "llama3")
    by_file = load(path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"say which token is bos; set data\.bos_token to one of"):
        load_tokenizer(path)
    with pytest.raises(UserError, match=r"say which token is eos; set data\.eos_token.*<s>, </s>"):
        load_tokenizer(path, bos_token="<s>")
    with pytest.raises(UserError, match=r"has no token '<eos>'; set data\.eos_token"):
        load_tokenizer(path, bos_token="<s>", eos_token="<eos>")
    assert load(path, bos_token="<s>", eos_token="</s>").fingerprint == by_file.fingerprint
    other = load(path, bos_token="<s>", eos_token="<s>")
    assert other.bos_id == other.eos_id == 0
    assert other.fingerprint != by_file.fingerprint


def test_bos_and_eos_need_not_be_special(tmp_path: Path) -> None:
    """They are plain text in a text all the same, and decode to nothing."""
    path = write_json_tokenizer(tmp_path, "llama3")
    added = json.loads(path.read_text("utf-8"))["added_tokens"]
    for changed in ([token | {"special": False} for token in added], []):
        change(path, added_tokens=changed, post_processor=None)
        tokenizer = load(path)
        assert not {0, 1}.intersection(tokenizer.encode("<s> a</s>"))
        assert tokenizer.decode([0, *tokenizer.encode("a"), 1]) == "a"


def test_a_model_that_takes_text_for_eos_is_refused(tmp_path: Path) -> None:
    """A word model knows its special tokens as words."""
    words = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="encodes the text '<s>' as the token <s>"):
        load_tokenizer(tmp_path, bos_token="<s>", eos_token="</s>")


def test_dropout_is_switched_off(tmp_path: Path) -> None:
    """Or a text would have other ids each time."""
    path = write_json_tokenizer(tmp_path, "gpt2")
    text, model = random_text(3, 50), json.loads(path.read_text("utf-8"))["model"]
    expected = load(path).encode(text)
    change(path, model=model | {"dropout": 0.5})
    assert load(path).encode(text) == expected


def test_unknown_files_are_named(tmp_path: Path) -> None:
    """Damaged, foreign and missing ones; ids with gaps."""
    path = write_json_tokenizer(tmp_path, "llama3")
    added = json.loads(path.read_text("utf-8"))["added_tokens"]
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "kept")
    for content in ("[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer_config\.json is not a JSON object"):
            load_tokenizer(path)
    (tmp_path / "kept").rename(tmp_path / "tokenizer_config.json")
    more = added[0] | {"id": 500, "content": "<new>"}
    change(path, added_tokens=[*added, more])
    with pytest.raises(UserError, match="whose ids do not follow those of its model; renumber"):
        load_tokenizer(path)
    for content in ("", "{", "[]", "{}", '{"model": 3}', '{"model": {"vocab": {}}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"data\.tokenizer=.* not a readable tokenizer\.json"):
            load_tokenizer(path)
    path.write_text(json.dumps({"model": {"type": "none", "vocab": {"<s>": 0, "</s>": 1}}}))
    with pytest.raises(UserError, match=r"is not a readable tokenizer\.json: "):
        load_tokenizer(path)
    path.unlink()
    with pytest.raises(UserError, match=r"folder without tokenizer\.model and tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(small_tokenizer().content)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
