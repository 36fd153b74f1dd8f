"""The exported chat template gives the text and the tokens of training and of generate.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from data import SentencePieceTokenizer, Tokenizer, load_tokenizer
from data.corpus.encoding import encode_chat, encode_segments
from data.corpus.segments import CHAT_TEMPLATE, conversation_segments
from interop.tokenizer_json import encodes_chats_alike, tokenizer_config, tokenizer_json
from tests.data.test_tokenizer import train_any
from tests.data_chats import CHATS, messages_of, write_byte_tokenizer
from tests.data_corpora import random_text, small_tokenizer, write_json_tokenizer

# Messages whose text neither contains special tokens nor begins with white space, which tokenizers
# may merge with the newline before it.
PLAIN = [
    *(messages_of(turns) for turns, *_ in CHATS if turns and "</s>" not in turns[0]),
    [
        {"role": "system", "content": random_text(1, 3).strip()},
        {"role": "user", "content": random_text(2, 5).strip()},
        {"role": "assistant", "content": random_text(3, 9).strip()},
        {"role": "user", "content": "def é"},
        {"role": "assistant", "content": "return 漢"},
    ],
]


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    """Write the files of an export, except for the model; return our tokenizer."""
    if kind == "sentencepiece":
        tokenizer: Tokenizer = small_tokenizer()
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(small_tokenizer())))
    elif kind == "bytes":
        tokenizer = load_tokenizer(write_byte_tokenizer(folder))
    else:
        tokenizer = load_tokenizer(write_json_tokenizer(folder, kind))
    options = tokenizer_config(tokenizer, 64, CHAT_TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "gpt2", "llama3"])
def test_transformers_renders_and_encodes_alike(tmp_path: Path, kind: str) -> None:
    """Whole conversations, and those that the assistant is to continue."""
    import transformers  # noqa: PLC0415  takes seconds

    ours = tokenizer_of(kind, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert encodes_chats_alike(ours, (tmp_path / "tokenizer.json").read_bytes())
    for messages in PLAIN:
        is_plain = all(m["content"] == m["content"].strip() for m in messages)
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        prompt = encode_chat(messages, ours)
        assert theirs.decode(ids) == rendered
        assert not is_plain or prompt == ids
        segments, reason = conversation_segments(messages)
        if reason is not None or messages[-1]["role"] != "assistant":
            continue
        assert rendered.removesuffix("[assistant]\n") == ours.bos_token + "".join(
            text + ours.eos_token * (number % 2) for number, text in enumerate(segments)
        )
        ((tokens, _),) = encode_segments([segments], ours, np.dtype("<u2"))
        whole = theirs.apply_chat_template(messages)["input_ids"]
        assert not is_plain or tokens.tolist() == whole


@pytest.mark.parametrize("kind", ["sentencepiece", "metaspace"])
def test_spaces_before_each_text_leave_out_the_template(tmp_path: Path, kind: str) -> None:
    """As Llama 2's tokenizer adds them: transformers adds one only before the conversation."""
    import transformers  # noqa: PLC0415  takes seconds

    if kind == "metaspace":
        ours = load_tokenizer(write_json_tokenizer(tmp_path, kind))
        spec = ours.content
    else:
        options = {"byte_fallback": True, "normalization_rule_name": "identity"}
        ours = SentencePieceTokenizer(train_any(model_type="bpe", **options), kind)
        spec = json.dumps(tokenizer_json(ours)).encode()
        (tmp_path / "tokenizer.json").write_bytes(spec)
    files = tokenizer_config(ours, 64, CHAT_TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(files))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    messages = messages_of(["u:Hi", "a:Yo", "u:Ok"])
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert encode_chat(messages, ours) != ids
    assert not encodes_chats_alike(ours, spec)


def test_without_a_template_text_has_no_special_tokens() -> None:
    """As in training on text; a template writes them as text, so the tokenizer must find them."""
    options = tokenizer_config(small_tokenizer(), 64)
    assert "chat_template" not in options
    assert options["split_special_tokens"] is True
    options = tokenizer_config(small_tokenizer(), 64, CHAT_TEMPLATE)
    assert options["split_special_tokens"] is False
