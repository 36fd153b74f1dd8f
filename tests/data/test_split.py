"""Held-out text: the same in every source, and always something left to train on."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs import ConfigError, UserError, WeightedSource, parse_config
from configs.schema import DataConfig
from data import Corpus, find_text
from data.corpus.split import END_HELD_OUT, HELD_OUT, TRAINED_ON, Documents, divide, split_by_hash
from data.corpus.spool import Record, Spool, open_spool, write_spool
from data.evaluation import EvaluationSet
from tests.data.test_prepare import documents
from tests.data_corpora import prepare_corpus, random_text, small_tokenizer


def sources(*hashes: list[int], size: int = 10) -> list[Documents]:
    """Return sources of documents with these hashes, all of the same size."""
    return [Documents(np.array(each, dtype=np.uint64), np.full(len(each), size)) for each in hashes]


def split(fraction: float, *hashes: list[int], size: int = 10) -> list[list[int]]:
    """Split such sources."""
    return [each.tolist() for each in split_by_hash(sources(*hashes, size=size), fraction)]


def test_documents_are_held_out_by_their_hash() -> None:
    """By its last six digits, independent of other documents, if there are enough of them."""
    assert split(0.4, [500_000, 300_000, 900_000]) == [[0, 1, 0]]
    assert split(0.4, [500_000, 7_000_300_000, 300_000]) == [[0, 1, 1]]
    assert split(0, [1, 2]) == [[0, 0]]


def test_a_source_has_both_splits_if_it_has_two_documents() -> None:
    """For any fraction: the smallest hash is held out, the largest is trained on."""
    assert split(1e-6, [500_000, 300_000, 900_000]) == [[0, 1, 0]]
    assert split(0.99, [500_000, 300_000, 900_000]) == [[1, 1, 0]]
    assert split(0.01, [500_000, 300_000], [1, 900_000]) == [[0, 1], [1, 0]]


def test_exceptions_hold_in_every_source() -> None:
    """A text that one source needs is trained on everywhere; one that it spares is held out."""
    assert split(0.01, [500_000], [500_000, 600_000]) == [[0], [0, 1]]
    assert split(0.01, [600_000], [500_000, 600_000]) == [[0], [1, 0]]
    assert split(0.01, [5], [5, 600_000, 7]) == [[0], [0, 0, 1]]
    assert split(0.01, [500_000, 600_000], [500_000, 3, 600_000]) == [[1, 0], [1, 1, 0]]


def test_ends_are_held_out_if_no_document_can_be() -> None:
    """For sources of one document, and for documents too large to be held out."""
    assert split(0.01, [5]) == split(0.01, [500_000]) == [[END_HELD_OUT]]
    assert split(0.01, [5], [5], [7]) == [[END_HELD_OUT]] * 3
    assert split(0.01, [500_000, 600_000], size=2 << 20) == [[END_HELD_OUT] * 2]
    assert split(0.4, [600_000, 800_000], size=2 << 20) == [[END_HELD_OUT] * 2]
    assert split(0.6, [600_000, 800_000], size=2 << 20) == [[1, 0]]
    assert split(0.01, [500_000, 5_000], size=2 << 20) == [[0, 1]]


def test_no_text_is_in_both_splits_of_any_mixture() -> None:
    """In random mixtures of few documents, many of them in several sources."""
    rng = random.Random(0)
    for _ in range(2000):
        fraction = rng.choice([0.01, 0.3, 0.9])
        texts = [rng.randrange(10**6) for _ in range(rng.randint(1, 6))]
        mixture = [rng.sample(texts, rng.randint(1, len(texts))) for _ in range(rng.randint(1, 4))]
        splits = split(fraction, *mixture)
        found: dict[int, set[int]] = {}
        for hashes, each in zip(mixture, splits, strict=True):
            assert set(each) != {HELD_OUT}
            for text, value in zip(hashes, each, strict=True):
                found.setdefault(text, set()).add(value)
        assert all(len(values) == 1 for values in found.values())
        assert set.union(*found.values()) != {TRAINED_ON}


def spool_of(folder: Path, *texts: str) -> Spool:
    """Return a spool of these texts."""
    folder.mkdir()
    write_spool(folder, lambda _: [Record([text], None) for text in texts])
    return open_spool([folder])


@pytest.mark.parametrize(
    ("text", "fraction", "end"),
    [
        ("a " * 30 + "\n\nb b\nc\nd d", 0.1, "b b\nc\nd d"),
        ("a " * 30 + "\nb b\nc\nd d", 0.05, "c\nd d"),
        ("a" * 90 + " " + "b" * 9, 0.05, "b" * 9),
        ("a" * 90 + " " + "b" * 11, 0.05, "b" * 5),
        ("漢" * 30, 0.1, "漢" * 3),
        ("漢" * 30, 0.12, "漢" * 4),
        ("ab", 0.01, "b"),
    ],
)
def test_an_end_begins_where_text_may_be_cut(
    tmp_path: Path, text: str, fraction: float, end: str
) -> None:
    """At a blank line, a line, a word or a character; up to twice the requested length."""
    spool = spool_of(tmp_path / "spool", "first", text)
    division = divide(spool, np.array([0, END_HELD_OUT], dtype=np.uint8), fraction)
    train = [division.spool.document(int(i)) for i in division.train]
    assert train == ["first", text[: len(text) - len(end)]]
    assert [division.spool.document(int(i)) for i in division.validation] == [end]
    assert division.num_ends == 1


def test_text_of_one_character_has_no_end(tmp_path: Path) -> None:
    """It is not cut."""
    spool = spool_of(tmp_path / "spool", "漢")
    division = divide(spool, np.array([END_HELD_OUT], dtype=np.uint8), 0.5)
    assert (division.train.tolist(), division.validation.tolist()) == ([0], [])


def mixture(folder: Path, *texts: list[str], given: int | None = None) -> DataConfig:
    """Return sources of these texts; source `given` gets the last one as its held-out text."""
    folder.mkdir(exist_ok=True)
    model = folder / "given.model"
    model.write_bytes(small_tokenizer().content)
    found = []
    for number, each in enumerate(texts):
        place = folder / f"source{number}"
        place.mkdir(parents=True)
        for index, text in enumerate(each):
            (place / f"{index}.txt").write_text(text)
        found.append(WeightedSource("text", str(place)))
    if given is not None:
        held_out = found.pop().path
        found[given] = replace(found[given], validation_path=held_out)
    return DataConfig(
        sources=tuple(found),
        tokenizer=str(model),
        vocab_size=320,
        cache_directory=str(folder / "cache"),
    )


def texts_of(corpus: Corpus) -> tuple[list[str], list[str]]:
    """Return the training texts and the held-out texts, in order."""
    return documents(corpus, corpus.train), documents(corpus, corpus.validation)


def test_a_text_held_out_in_one_source_is_held_out_in_all(tmp_path: Path) -> None:
    """Sources {X} and {X, Y}: Y is held out, whichever has the smaller hash."""
    x, y = random_text(1, 30), random_text(2, 30)
    for name, (first, second) in {"a": (x, y), "b": (y, x)}.items():
        config = mixture(tmp_path / name, [first], [first, second])
        assert texts_of(prepare_corpus(config, 16, 0)) == ([first, first], [second])
    several = mixture(tmp_path / "c", [x], [x], [x])
    train, held_out = texts_of(prepare_corpus(several, 16, 0))
    assert len(set(train)) == len(set(held_out)) == 1
    assert train[0] + held_out[0] == x


def test_given_text_is_held_out_of_every_source(tmp_path: Path) -> None:
    """Nothing else is held out; the fraction has no effect."""
    a, b, c, d = (random_text(number, 30) for number in range(4))
    config = mixture(tmp_path, [a, b], [b, c], [d, b], given=0)
    corpus = prepare_corpus(config, 16, 0)
    train, held_out = texts_of(corpus)
    assert train == [a, c]
    assert sorted(held_out) == sorted([b, d])
    assert corpus.validation_weights == (1.0,)
    assert corpus.summary["validation"]["documents"] == corpus.summary["excluded"] == 2
    assert corpus.text_fingerprint == find_text(config).fingerprint
    plain = replace(
        config, sources=tuple(replace(each, validation_path=None) for each in config.sources)
    )
    assert find_text(plain).fingerprint != find_text(config).fingerprint
    assert prepare_corpus(plain, 16, 0).fingerprint != corpus.fingerprint
    assert prepare_corpus(config, 16, 1).fingerprint == corpus.fingerprint
    scored = EvaluationSet(
        corpus,
        seq_length=16,
        max_sequences=None,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        tp_size=1,
    )
    assert scored.num_documents == 2
    assert scored.num_bytes == len(b) + len(d)
    assert scored.num_targets == corpus.validation.num_tokens - 2 * 2


def test_a_source_with_only_held_out_text_is_an_error(tmp_path: Path) -> None:
    """The source and its held-out text have the same documents."""
    a, b = random_text(1, 30), random_text(2, 30)
    config = mixture(tmp_path, [a, b], [b, a], given=0)
    with pytest.raises(UserError, match=r"every document of data\.sources\[0\]\.path=.* held out"):
        prepare_corpus(config, 16, 0)


def test_an_unreadable_validation_path_is_named_by_its_own_key(tmp_path: Path) -> None:
    for name in ("train", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "some text"}\n')
    (tmp_path / "held_out.jsonl").write_text("no JSON\n")
    config = DataConfig(
        source="jsonl",
        path=str(tmp_path / "train.jsonl"),
        validation_path=str(tmp_path / "held_out.jsonl"),
        cache_directory=str(tmp_path / "cache"),
    )
    says = r"^data\.validation_path: line 1 .* data\.source=jsonl needs"
    with pytest.raises(UserError, match=says):
        prepare_corpus(config, 16, 0)


def test_a_wrong_validation_path_is_named(tmp_path: Path) -> None:
    """The error names its own key, before anything starts."""
    (tmp_path / "x.txt").write_text("x")
    arguments = ["config=gpt_debug.yaml", "data.source=text", f"data.path={tmp_path / 'x.txt'}"]
    given = "data.validation_path=/nowhere"
    with pytest.raises(ConfigError, match=f"^{given} does not exist; give an existing file"):
        parse_config([*arguments, given])
    with pytest.raises(ConfigError, match=r"data\.validation_path=x has no effect with .*stdlib"):
        parse_config(["config=gpt_debug.yaml", "data.validation_path=x"])
    with pytest.raises(ConfigError, match=r"data\.validation_path=x has no effect together"):
        parse_config(
            [
                "config=gpt_debug.yaml",
                "data.sources=[{source: python_stdlib}]",
                "data.validation_path=x",
            ]
        )
    config = parse_config([*arguments, f"data.validation_path={tmp_path}"])
    assert config.data.mixture["data"].validation_path == str(tmp_path)
