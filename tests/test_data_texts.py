"""Text that is scored without a cache: every document, however empty the records around it."""

import json
from pathlib import Path

import pytest

from configs import UserError
from configs.schema import SourceConfig
from data import Corpus, corpus_to_score
from tests.data_corpora import small_tokenizer


def scored(path: Path, content: str) -> Corpus:
    """Write lines of JSON, and read them as text to score."""
    path.write_text(content)
    return corpus_to_score(SourceConfig("jsonl", str(path)), small_tokenizer(), Path("unused"))


def test_batches_without_a_text_are_passed(tmp_path: Path) -> None:
    """256 texts, 256 nulls, one text: the second batch of records has nothing to encode."""
    texts = [f"text {number}" for number in range(256)]
    rows = [*texts, *[None] * 256, "last"]
    corpus = scored(tmp_path / "x.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in rows))
    assert corpus.validation.num_documents == 257
    assert corpus.summary["skipped"] == {"null": 256}
    start, end = corpus.validation.document_offsets[-2:]
    ids = corpus.validation.span(int(start) + 1, int(end) - 1).tolist()
    assert small_tokenizer().decode(ids) == "last"


@pytest.mark.parametrize(
    ("content", "skipped"), [("", "nothing"), ('{"text": null}\n' * 3, "3 null")]
)
def test_a_source_without_a_text_says_what_was_skipped(
    tmp_path: Path, content: str, skipped: str
) -> None:
    """An empty file, and one of null rows only."""
    with pytest.raises(UserError, match=f"yields no documents; skipped: {skipped}; give"):
        scored(tmp_path / "x.jsonl", content)
