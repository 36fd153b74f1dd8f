"""Megatron's .bin and .idx: bytes by the definition of the format, as a source and as an output."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import ConfigError, UserError, parse_config
from configs.schema import DataConfig, WeightedSource
from data import Corpus
from data.corpus import megatron
from data.corpus.build import build_corpus
from data.corpus.megatron import open_dataset
from data.prepare import require_new, write_dataset
from data.source_files import DATA_KEYS, source_files
from data.tokenizer import load_tokenizer
from tests.data_corpora import (
    prepare_corpus,
    random_text,
    small_tokenizer,
    text_config,
    token_file,
    write_json_tokenizer,
    write_texts,
)

CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # of dtypes, as struct names them


def dataset_bytes(documents: list[list[list[int]]], code: int) -> tuple[bytes, bytes]:
    """Return .bin and .idx of documents, each a list of sequences, by the format's definition."""
    sequences = [sequence for document in documents for sequence in document]
    letter = CODES[code]
    size = struct.calcsize(f"<{letter}")
    data = b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QB", 1, code)
    index += struct.pack("<QQ", len(sequences), len(documents) + 1)
    place, bounds, places = 0, [0], []
    for sequence in sequences:
        places.append(place)
        place += size * len(sequence)
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *places)
    return data, index + struct.pack(f"<{len(bounds)}q", *bounds)


def write(prefix: Path, documents: list[list[list[int]]], code: int = 8) -> str:
    """Write documents, each a list of sequences; return the prefix."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in zip((".bin", ".idx"), dataset_bytes(documents, code), strict=True):
        Path(f"{prefix}{ending}").write_bytes(content)
    return str(prefix)


def source(folder: Path, path: str, **changes: Any) -> DataConfig:
    """Return the settings of a dataset made with the small tokenizer."""
    model = folder / "small.model"
    model.write_bytes(small_tokenizer().content)
    changes = {"source": "megatron", "path": path, "tokenizer": str(model), **changes}
    return text_config(folder, **changes)


def all_documents(corpus: Corpus) -> list[list[list[int]]]:
    """Return the tokens of the documents of both splits."""
    return [
        [
            file.span(*file.document_offsets[i : i + 2].tolist()).tolist()
            for i in range(file.num_documents)
        ]
        for file in (corpus.train, corpus.validation)
    ]


@pytest.mark.parametrize("code", CODES)
def test_every_dtype_is_read_document_by_document(tmp_path: Path, code: int) -> None:
    """A document is all its sequences; it may have none."""
    documents = [[[1, 2, 3]], [[4], [], [5, 6]], [], [[127]]]
    prefix = write(tmp_path / "x", documents, code)
    dataset = open_dataset(Path(f"{prefix}.bin"), "data.path")
    read = [dataset.document(i).tolist() for i in range(len(documents))]
    assert read == [[1, 2, 3], [4, 5, 6], [], [127]]
    assert dataset.tokens.dtype == np.dtype(CODES[code])


def test_documents_are_written_as_the_format_says(tmp_path: Path) -> None:
    """With bos and eos, or with one of them if they are the same token; uint16, or int32."""
    tokens, small = token_file([5, 3, 7]), small_tokenizer()
    ids = tokens.tokens.tolist()
    documents = [ids[:5], ids[5:8], ids[8:]]
    write_dataset(tmp_path / "a.b", tokens, small)
    expected = dataset_bytes([[document] for document in documents], 8)
    found = [(tmp_path / f"a.b.{ending}").read_bytes() for ending in ("bin", "idx")]
    assert found == list(expected)

    same = load_tokenizer(write_json_tokenizer(tmp_path / "gpt2", "gpt2"))
    same.vocab_size = 65_500
    write_dataset(tmp_path / "same", tokens, same)
    expected = dataset_bytes([[document[1:]] for document in documents], 4)
    found = [(tmp_path / f"same.{ending}").read_bytes() for ending in ("bin", "idx")]
    assert found == list(expected)
    with pytest.raises(UserError, match=r"output=.*same: .*same\.bin already exists"):
        write_dataset(tmp_path / "same", tokens, same)
    require_new(tmp_path / "new" / "folder" / "x")
    assert (tmp_path / "new" / "folder").is_dir()
    with pytest.raises(UserError, match="cannot make its parent directory: File exists"):
        require_new(tmp_path / "same.bin" / "x")


@pytest.mark.parametrize("num_documents", [30, 1])
def test_a_dataset_gives_the_corpus_of_its_text(tmp_path: Path, num_documents: int) -> None:
    """Same tokens, bytes and splits, whether or not bos and eos are in a document already."""
    texts, tokenizer = write_texts(tmp_path, num_documents, 60), small_tokenizer()
    encoded = [tokenizer.encode(text) for text in texts]
    bos, eos = [tokenizer.bos_id], [tokenizer.eos_id]
    ends = [([], []), ([], eos), (bos, eos), (bos, [])]
    documents = [[ends[i % 4][0] + ids + ends[i % 4][1]] for i, ids in enumerate(encoded)]
    path = write(tmp_path / "x", [*documents, [[]], [bos + eos], documents[0]])
    found = prepare_corpus(source(tmp_path, path), 16, 0)
    texts_too = source(tmp_path, str(tmp_path / "texts"), source="text")
    expected = prepare_corpus(texts_too, 16, 0)
    assert all_documents(found) == all_documents(expected)
    assert found.fingerprint == expected.fingerprint
    assert found.validation.document_bytes.tolist() == expected.validation.document_bytes.tolist()
    assert found.summary["skipped"] == {"duplicate": 1, "empty": 2}
    assert build_corpus(source(tmp_path, path)) == 0
    assert prepare_corpus(source(tmp_path, path), 16, 0).fingerprint == found.fingerprint


def test_tokens_stay_as_they_are_where_the_tokenizer_would_give_others(tmp_path: Path) -> None:
    """Another program may have split a text differently."""
    letters = [small_tokenizer().encode(letter)[-1] for letter in "selfimport"]
    assert len(small_tokenizer().encode("self import")) < len(letters)
    path = write(tmp_path / "x", [[letters], [letters[:4]]])
    corpus = prepare_corpus(source(tmp_path, path, validation_fraction=0), 2, 0)
    assert [document[1:-1] for document in all_documents(corpus)[0]] == [letters, letters[:4]]
    assert corpus.train.document_bytes.tolist() == [10, 4]


def test_a_text_is_held_out_in_both_kinds_of_sources(tmp_path: Path) -> None:
    """By its text, whatever holds it; both take part in a mixture."""
    texts = write_texts(tmp_path, 30)
    path = write(tmp_path / "x", [[small_tokenizer().encode(text)] for text in texts])
    config = source(tmp_path, path)
    sources = (
        WeightedSource("megatron", path),
        WeightedSource("text", str(tmp_path / "texts")),
    )
    mixture = replace(config, source="python_stdlib", path=None, sources=sources)
    ours, theirs = prepare_corpus(mixture, 16, 0).train.parts
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    given = replace(config, validation_path=write(tmp_path / "v", [[[5, 6]], [[7] * 20]]))
    train, validation = all_documents(prepare_corpus(given, 16, 0))
    assert (len(train), len(validation)) == (30, 2)


def test_every_way_to_name_a_dataset(tmp_path: Path) -> None:
    """A prefix, either file, a folder, and globs; other .bin files beside it do not count."""
    folder = tmp_path / "c"
    write(folder / "a.v1", [[[1, 2]]])
    write(folder / "b", [[[3]]])
    (folder / "pytorch_model.bin").write_bytes(b"x")
    a, b = folder / "a.v1.bin", folder / "b.bin"
    for path, files in (
        ("a.v1", [a]),
        ("a.v1.idx", [a]),
        ("a.v1.bin", [a]),
        ("", [a, b]),
        ("*.idx", [a, b]),
        ("*", [a, b]),
        ("[a-c]*.bin", [a, b]),
    ):
        config = source(tmp_path, str(folder / path))
        assert source_files(config) == files, path
    (folder / "b.bin").unlink()
    with pytest.raises(UserError, match=r"data\.path: .*b\.bin does not exist beside b\.idx"):
        source_files(source(tmp_path, str(folder)))


def test_a_long_document_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are documents."""
    monkeypatch.setattr(megatron, "MAX_DOCUMENT_TOKENS", 100)
    ids = small_tokenizer().encode(random_text(0, 20))
    path = write(tmp_path / "x", [[ids]])
    config = source(tmp_path, path, validation_fraction=0)
    train, _ = all_documents(prepare_corpus(config, 16, 0))
    assert [document[1:-1] for document in train] == [
        ids[start : start + 100] for start in range(0, len(ids), 100)
    ]


def test_the_files_and_the_tokenizer_decide_the_entry(tmp_path: Path) -> None:
    """A change of either file, or another tokenizer, gives another corpus."""
    texts = [random_text(seed, 10) for seed in range(12)]
    path = write(tmp_path / "x", [[small_tokenizer().encode(text)] for text in texts])
    first = prepare_corpus(source(tmp_path, path), 16, 0)
    write(tmp_path / "x", [[small_tokenizer().encode(text)] for text in texts[1:]])
    second = prepare_corpus(source(tmp_path, path), 16, 0)
    assert first.text_fingerprint != second.text_fingerprint
    other = write_json_tokenizer(tmp_path / "other", "llama3")
    third = prepare_corpus(source(tmp_path, path, tokenizer=str(other), vocab_size=400), 16, 0)
    assert third.text_fingerprint == second.text_fingerprint
    assert third.fingerprint != second.fingerprint


GOOD = dataset_bytes([[[1, 2]], [[3]]], 8)


@pytest.mark.parametrize(
    ("data", "index", "message"),
    [
        (GOOD[0], b"TNTIDX\x00\x00", "is not the index of a Megatron dataset"),
        (GOOD[0], GOOD[1][:20], "is not the index of a Megatron dataset"),
        (GOOD[0], GOOD[1][:9] + b"\x02" + GOOD[1][10:], "has version 2; only version 1"),
        (GOOD[0], GOOD[1][:17] + b"\x07" + GOOD[1][18:], "has dtype code 7, which is no integer"),
        (GOOD[0], GOOD[1][:17] + b"\x63" + GOOD[1][18:], "has dtype code 99, which is no integer"),
        (GOOD[0], GOOD[1] + b"\x00\x01", "is of a multimodal dataset"),
        (GOOD[0], GOOD[1][:-1], "does not fit its own size"),
        (GOOD[0][:-1], GOOD[1], "does not fit its own size"),
        (GOOD[0][:-2], GOOD[1], r"does not fit x\.bin \(2 tokens\)"),
        (GOOD[0], GOOD[1][:-8] + b"\x03" + b"\x00" * 7, r"does not fit x\.bin"),
        (b"\xff\xff" * 3, GOOD[1], r"document 0 of .*x\.bin has the token 65535, .* 0 to 319;"),
    ],
)
def test_a_damaged_dataset_is_one_line(
    tmp_path: Path, data: bytes, index: bytes, message: str
) -> None:
    """It names the key, the file and what is wrong."""
    (tmp_path / "x.bin").write_bytes(data)
    (tmp_path / "x.idx").write_bytes(index)
    with pytest.raises(UserError, match=message) as error:
        prepare_corpus(source(tmp_path, str(tmp_path / "x")), 16, 0)
    assert str(error.value).startswith(f"{DATA_KEYS.path}: ")
    assert "\n" not in str(error.value)


def test_a_negative_token_is_an_error(tmp_path: Path) -> None:
    """Signed dtypes have them; they would wrap around."""
    path = write(tmp_path / "x", [[[1, -2]]], 4)
    with pytest.raises(UserError, match=r"has the token -2, but the ids of data\.tokenizer"):
        prepare_corpus(source(tmp_path, path), 16, 0)


def test_settings_must_fit_a_dataset(tmp_path: Path) -> None:
    """It needs its tokenizer, and has no columns; the error comes before anything is read."""
    path = write(tmp_path / "x", [[[1]]])
    (tmp_path / "c.yaml").write_text("model: {num_layers: 1}\n")
    arguments = [f"config={tmp_path / 'c.yaml'}", "data.source=megatron", f"data.path={path}"]
    with pytest.raises(ConfigError, match=r"data\.tokenizer=null, but data\.source=megatron has"):
        parse_config(arguments)
    model = tmp_path / "small.model"
    model.write_bytes(small_tokenizer().content)
    assert parse_config([*arguments, f"data.tokenizer={model}"]).data.path == path
    with pytest.raises(ConfigError, match=r"needs rows with columns, which data\.source=megatron"):
        parse_config([*arguments, f"data.tokenizer={model}", "data.format=messages"])
    with pytest.raises(ConfigError, match=r"data\.path=.* does not exist"):
        parse_config([*arguments, f"data.tokenizer={model}", f"data.path={tmp_path / 'y'}"])
