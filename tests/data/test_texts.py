"""Text that is scored without a cache, and warnings about what its tokens hide."""

import json
from pathlib import Path

import pytest

from configs import UserError
from configs.schema import SourceConfig
from data import Corpus, load_tokenizer
from data.corpus.scored_text import load_eval_corpus
from data.evaluation import EvaluationSet
from tests.data_corpora import (
    lossy_model,
    prepare_corpus,
    random_text,
    small_tokenizer,
    text_config,
    write_json_tokenizer,
    write_texts,
)


def scored(path: Path, content: str) -> Corpus:
    """Write lines of JSON and read them as text to score."""
    path.write_text(content)
    return load_eval_corpus(SourceConfig("jsonl", str(path)), small_tokenizer(), Path("unused"))


def test_a_batch_of_records_may_have_no_text(tmp_path: Path) -> None:
    """Of 256 texts, 256 nulls and one text, the second batch has nothing to encode."""
    texts = [f"text {number}" for number in range(256)]
    rows = [*texts, *[None] * 256, "last"]
    corpus = scored(tmp_path / "x.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in rows))
    assert corpus.validation.num_documents == 257
    assert corpus.summary["skipped"] == {"null": 256}
    start, end = corpus.validation.document_offsets[-2:]
    ids = corpus.validation.span(int(start) + 1, int(end) - 1).tolist()
    assert small_tokenizer().decode(ids) == "last"


@pytest.mark.parametrize(
    ("content", "skipped"),
    [
        ("", "nothing; give non-empty UTF-8 text"),
        ('{"text": null}\n' * 3, "3 null; give strings, not null, in column text"),
        (
            '{"text": ""}\n{"text": 5}\n',
            "1 empty, 1 not a string; give text that is not empty, give strings in column text",
        ),
    ],
)
def test_a_source_without_a_text_says_what_was_skipped(
    tmp_path: Path, content: str, skipped: str
) -> None:
    """And what to do about it."""
    with pytest.raises(UserError, match=f"yields no documents; skipped: {skipped}$"):
        scored(tmp_path / "x.jsonl", content)


def test_scored_text_with_unknown_tokens_gives_warnings(tmp_path: Path) -> None:
    """Each of 100 lines of 50 ideographs is a space and one unknown token."""
    model = lossy_model(tmp_path, random_text(1, 50).split("\n"))
    lines = ["".join(chr(0x4E00 + 50 * i + j) for j in range(50)) for i in range(100)]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
    (tmp_path / "x.jsonl").write_text(rows)
    for kind, num_documents in (("text", 1), ("jsonl", 100)):
        source = SourceConfig(kind, str(tmp_path / f"x.{kind}".replace(".text", ".txt")))  # type: ignore[arg-type]
        corpus = load_eval_corpus(source, load_tokenizer(model), Path("unused"))
        found = EvaluationSet(
            corpus,
            seq_length=64,
            max_sequences=None,
            micro_batch_size=4,
            dp_rank=0,
            dp_size=1,
            tp_size=1,
        )
        assert corpus.validation.num_documents == num_documents
        assert (found.num_unknown, found.num_targets) == (100, 200)
        assert found.num_bytes == (15_099 if kind == "text" else 15_000)
        unknown, lossy = found.warnings
        assert unknown.startswith("100 of 200 scored tokens (50.0%) are unknown to the tokenizer:")
        assert lossy.startswith(f"{num_documents} of {num_documents} held-out documents that were")


def test_a_lossless_tokenizer_gives_no_warnings(tmp_path: Path) -> None:
    """Odd characters are neither unknown nor lossy."""
    corpus = scored(tmp_path / "x.jsonl", json.dumps({"text": " \u6f22\u2581\0\n"}))
    assert corpus.summary["validation"] == {"unknown": 0, "lossy": 0, "compared": 1}


def test_every_start_warns_about_lossy_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The warnings also come when the cache exists; texts with a rare character are lossy."""
    texts = write_texts(tmp_path, 30)
    model = lossy_model(tmp_path, "\n".join(texts).split("\n"))
    for number, text in enumerate(texts):
        plain = " ".join(text.split())
        content = plain.replace("self", "\u6f22") if number % 2 else plain
        (tmp_path / "texts" / f"{number:03}.txt").write_text(content)
    config = text_config(tmp_path, tokenizer=str(model))
    for _ in range(2):
        caplog.clear()
        corpus = prepare_corpus(config, 16, 0)
        for name, file in (("train", corpus.train), ("validation", corpus.validation)):
            split = corpus.summary[name]
            ids = file.span(0, file.num_tokens)
            unknown = int((ids == corpus.tokenizer.unk_id).sum())
            assert split["unknown"] == unknown > 0
            assert 0 < split["lossy"] < split["compared"] == file.num_documents
            text_tokens = file.num_tokens - 2 * file.num_documents
            assert f"{unknown:,} of {text_tokens:,} {name} tokens (" in caplog.text
            assert f"{split['lossy']} of {file.num_documents} {name} documents" in caplog.text


def test_bos_and_eos_are_not_unknown_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As in the tokenizer.json of a model with a single special token."""
    write_texts(tmp_path, 10)
    path = write_json_tokenizer(tmp_path / "tokenizer", "gpt2")
    spec = json.loads(path.read_text("utf-8"))
    spec["model"]["unk_token"] = "<|end|>"
    path.write_text(json.dumps(spec), "utf-8")
    corpus = prepare_corpus(text_config(tmp_path, tokenizer=str(path), vocab_size=400), 16, 0)
    assert corpus.summary["train"]["unknown"] == corpus.summary["validation"]["unknown"] == 0
    source = SourceConfig("text", str(tmp_path / "texts"))
    assert (
        load_eval_corpus(source, load_tokenizer(path), path).summary["validation"]["unknown"] == 0
    )
    assert "unknown to the tokenizer" not in caplog.text
