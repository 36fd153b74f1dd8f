"""Targets of prompt-completion pairs and conversations: which tokens, in which rows, their loss."""

import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from configs import Config, ModelConfig, TrainConfig, UserError
from configs.schema import DataConfig, SourceConfig, WeightedSource
from data import Corpus, load_tokenizer
from data.corpus import encoding as encoding_module
from data.corpus.scored_text import load_eval_corpus
from data.evaluation import EvaluationSet
from data.loader import BatchLoader
from data.rows import IGNORED_TARGET, Rows, Spans, count_targets, make_micro_batch
from data.source_files import source_fingerprint
from data.token_file import JoinedTokens, Tokens
from model import build_model
from parallel import Mesh, sum_over
from tests.data.test_kill import Killed, die_at
from tests.data_chats import (
    CHATS,
    SEQ_LENGTH,
    messages_of,
    notation,
    write_byte_tokenizer,
    write_chats,
)
from tests.data_corpora import prepare_corpus, random_text
from tests.distributed import ONE_RANK, Layout, distributed
from tests.model.test_gpt import dense_weights
from tests.reference import reference_losses

KEPT = [chat for chat in CHATS if chat[1].startswith("^")]
IN_ROWS = [chat[-1] for chat in KEPT if chat[-1]]  # without the two that have no target in a row
LOST = 1 + 12 + 23 + 3 + 3 + 3 + 5  # targets of the seven that are too long


def chat_config(folder: Path, **changes: Any) -> DataConfig:
    """Write conversations and tokenizer; return their configuration, with nothing held out."""
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "source": "jsonl",
        "path": str(write_chats(folder / "chats.jsonl")),
        "format": "messages",
        "tokenizer": str(write_byte_tokenizer(folder / "bytes")),
        "validation_fraction": 0.0,
        "cache_directory": str(folder / "cache"),
        **changes,
    }
    return DataConfig(**settings)


def written(file: Tokens) -> list[str]:
    """Return the notation of all documents."""
    assert file.targets is not None
    found = []
    for start, stop in itertools.pairwise(file.document_offsets.tolist()):
        is_target = file.targets.contains(np.arange(start, stop))
        found.append(notation(file.span(start, stop), is_target))
    return found


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_targets_of_fifty_conversations(tmp_path: Path) -> None:
    """Token by token, in the order of the file; what is skipped is counted."""
    assert len(CHATS) == 50
    corpus = prepare_corpus(chat_config(tmp_path), SEQ_LENGTH, 0)
    assert written(corpus.train) == [chat[1] for chat in KEPT]
    reasons = Counter(chat[1] for chat in CHATS if chat not in KEPT)
    assert corpus.summary["skipped"] == reasons
    assert reasons == {"empty assistant turn": 3, "no assistant turn": 3}
    answers = [turn[2:] for chat in KEPT for turn in chat[0] if turn.startswith("a:")]
    assert corpus.summary["train"]["bytes"] == sum(len(text.encode()) for text in answers)
    assert corpus.summary["train"]["targets"] == sum(len(t.encode()) + 1 for t in answers)


@pytest.mark.parametrize(("mode", "packing"), [("pack", "best_fit"), ("pad", "stream")])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_rows_have_whole_conversations(
    tmp_path: Path, mode: Any, packing: Any, multiple_of: int
) -> None:
    """Each is in one row once, truncated to 65 tokens, and no target crosses a boundary."""
    file = prepare_corpus(chat_config(tmp_path), SEQ_LENGTH, 0).train
    rows = Rows(file, SEQ_LENGTH, mode, packing)
    numbers = np.arange(len(rows))
    spans = rows.spans(numbers)
    batch = make_micro_batch(
        file, spans, numbers, multiple_of, 1, keep_documents_apart=mode == "pack"
    )
    found = []
    for start, length, row, column in zip(*(values.tolist() for values in spans), strict=True):
        inputs = batch.tokens[row, column : column + length]
        targets = batch.targets[row, column : column + length]
        last = file.span(start + length, start + length + 1).astype(np.int64)
        is_target = [False, *(targets != IGNORED_TARGET).tolist()]
        found.append(notation(np.append(inputs, last), is_target))
        expected = np.append(inputs, last)[1:]
        assert targets[targets != IGNORED_TARGET].tolist() == expected[is_target[1:]].tolist()
        assert batch.positions[row, column : column + length].tolist() == list(range(length))
    assert sorted(found) == sorted(IN_ROWS)
    assert len(rows) < len(IN_ROWS) or mode == "pad"
    for number in numbers:
        one = rows.spans(numbers[number : number + 1])
        count = int((batch.targets[number] != IGNORED_TARGET).sum())
        assert count == count_targets(file, one, keep_documents_apart=mode == "pack") > 0
    lost = rows.truncation
    assert (int(lost.is_cut.sum()), lost.num_lost, lost.num_empty) == (7, LOST, 2)
    assert batch.num_targets == file.targets.num_targets - LOST  # type: ignore[union-attr]


MODEL = ModelConfig(
    num_layers=2,
    hidden_size=16,
    num_attention_heads=4,
    seq_length=SEQ_LENGTH,
    init_method_std=0.2,
    position_embedding_type="rope",
)


@distributed(ONE_RANK, Layout(tp=2), Layout(cp=2), Layout(cp=2, cp_comm_type="p2p"))
def test_packed_rows_have_the_loss_of_conversations_alone(mesh: Mesh, tmp_path: Path) -> None:
    """The sum over targets equals that of the dense reference, one conversation at a time."""
    corpus = prepare_corpus(chat_config(tmp_path / str(mesh.world.rank)), SEQ_LENGTH, 0)
    file, vocab_size = corpus.train, corpus.tokenizer.vocab_size
    config = Config(
        model=MODEL, data=DataConfig(vocab_size=vocab_size), train=TrainConfig(precision="fp32")
    )
    model = build_model(config, mesh)
    weights = dense_weights(model)  # before forward, after which some are gathered
    rows = Rows(file, SEQ_LENGTH, "pack", "best_fit")
    numbers = np.arange(len(rows))
    multiple_of = mesh.tp.size * (2 * mesh.cp.size if mesh.cp.size > 1 else 1)
    packed = make_micro_batch(
        file, rows.spans(numbers), numbers, multiple_of, 1, keep_documents_apart=True
    ).of_cp_rank(mesh.cp.rank, mesh.cp.size)
    with torch.no_grad():
        loss = model(**packed.to(mesh.device).inputs()).cross_entropy.double()
        loss = sum_over(mesh.dp_cp, loss).item()
    alone, num_targets = 0.0, 0
    for start, stop in itertools.pairwise(file.document_offsets.tolist()):
        length = np.array([min(SEQ_LENGTH, stop - start - 1)])
        zero = np.zeros(1, dtype=np.int64)
        one = make_micro_batch(file, Spans(np.array([start]), length, zero, zero), zero, 1, 1)
        if one.num_targets:
            batch = one.tokens, one.positions, one.targets
            alone += reference_losses(weights, MODEL, *batch)[0].item()
        num_targets += one.num_targets
    assert file.targets is not None
    assert num_targets == file.targets.num_targets - LOST
    assert loss == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("mode", ["pack", "pad"])
def test_every_rank_knows_the_targets_of_a_mixture(
    tmp_path: Path, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Of pairs, conversations and a text, whose targets are all its tokens but bos."""
    pairs = [{"q": f"{n} + 1 = ", "a": str(n + 1)} for n in range(30)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(random_text(1, 20))
    chats = chat_config(tmp_path)
    sources = (
        WeightedSource(
            "jsonl",
            str(tmp_path / "pairs.jsonl"),
            format="prompt_completion",
            prompt_field="q",
            completion_field="a",
        ),
        WeightedSource("jsonl", chats.path, format="messages", weight=2),
        WeightedSource("text", str(tmp_path / "texts")),
    )
    data = chat_config(
        tmp_path, source="python_stdlib", path=None, format="text", sources=sources,
        sequence_mode=mode,
    )  # fmt: skip
    corpus = prepare_corpus(data, SEQ_LENGTH, 0)
    assert isinstance(corpus.train, JoinedTokens)
    texts = written(corpus.train)
    assert texts[:2] == ["^0 + 1 = {1$}", "^1 + 1 = {2$}"]
    assert texts[30 : 30 + len(KEPT)] == [chat[1] for chat in KEPT]
    assert texts[-1] == "^{" + random_text(1, 20).replace("\n", "|") + "$}"
    counts = [text.count("}") for text in texts]
    assert corpus.summary["train"]["documents"] == len(counts)
    config = Config(
        model=MODEL, data=data, train=TrainConfig(global_batch_size=12, micro_batch_size=3)
    )
    layout = {"consumed_samples": 0, "first_step": 0, "tp_size": 1, "device_is_cuda": False}
    with caplog.at_level("INFO"):
        loaders = [
            BatchLoader(corpus, config, dp_rank=rank, dp_size=2, **layout)  # type: ignore[arg-type]
            for rank in range(2)
        ]
    assert f"7 of {30 + len(KEPT)} are longer than model.seq_length=64 and truncated" in caplog.text
    assert f"which loses {LOST} targets; 2 are skipped" in caplog.text
    for _ in range(12):
        of_ranks = [next(each) for each in loaders]
        micro_batches = [micro for step in of_ranks for micro in step.micro_batches]
        counts = [int((micro.targets != IGNORED_TARGET).sum()) for micro in micro_batches]
        assert counts == [micro.num_targets for micro in micro_batches]
        assert [step.num_targets for step in of_ranks] == [sum(counts)] * 2
    for each in loaders:
        each.__exit__()


def scored(corpus: Corpus, **changes: Any) -> tuple[EvaluationSet, int]:
    """Return an evaluation set, and its targets by counting."""
    options: dict[str, Any] = {
        "seq_length": SEQ_LENGTH,
        "max_sequences": None,
        "micro_batch_size": 3,
        "dp_rank": 0,
        "dp_size": 1,
        "tp_size": 1,
        **changes,
    }
    chosen = EvaluationSet(corpus, **options)
    counts = [int((batch.targets != IGNORED_TARGET).sum()) for batch in chosen.batches]
    assert counts == [batch.num_targets for batch in chosen.batches]
    return chosen, sum(counts)


def test_evaluation_scores_the_targets_of_training(tmp_path: Path) -> None:
    """Truncated like rows; bytes are those of the answers in them, and a warning has the counts."""
    config = chat_config(tmp_path)
    tokenizer = load_tokenizer(tmp_path / "bytes")
    corpus = load_eval_corpus(config, tokenizer, Path("unused"))
    assert written(corpus.validation) == [chat[1] for chat in KEPT]
    assert corpus.validation.targets is not None
    for stride in (None, 7):
        chosen, count = scored(corpus, stride=stride)
        assert chosen.num_targets == count == corpus.validation.targets.num_targets - LOST
        inside = [part.partition("}")[0] for text in IN_ROWS for part in text.split("{")[1:]]
        assert chosen.num_bytes == sum(len(text.rstrip("$").encode()) for text in inside)
        (warning,) = chosen.warnings
        assert warning.startswith("of the held-out documents, 7 of 44 are longer than model.seq")
    for dp_size in (2, 5):
        ranks = [scored(corpus, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        assert sum(found for _, found in ranks) == count
    changed = chat_config(tmp_path)
    path = Path(str(changed.path))
    path.write_text(path.read_text().replace("Done", "Gone"))
    assert load_eval_corpus(changed, tokenizer, Path("unused")).fingerprint != corpus.fingerprint


PAIRS: list[tuple[Any, str]] = [
    ({"prompt": "Q: 1?\n", "completion": "one"}, "^Q: 1?|{one$}"),
    ({"prompt": "", "completion": "free"}, "^{free$}"),
    ({"prompt": "a ", "completion": " b\n"}, "^a { b|$}"),
    ({"prompt": "no answer", "completion": ""}, "empty completion"),
    ({"prompt": "no answer", "completion": None}, "null"),
    ({"prompt": "no answer"}, "null"),
    ({"completion": "no prompt"}, "null"),
    ({"prompt": 1, "completion": "x"}, "not a string"),
    ({"prompt": "x", "completion": ["x"]}, "not a string"),
    ({"prompt": "half \ud800", "completion": "x"}, "not UTF-8"),
    ({"prompt": "Q: 1?\n", "completion": "one"}, "duplicate"),
    ({"prompt": "Q: 1?\non", "completion": "e"}, "^Q: 1?|on{e$}"),
]
_SAY = {"role": "user", "content": "Say"}
_WORD = {"role": "assistant", "content": "word"}
ODD_MESSAGES: list[tuple[Any, str]] = [
    ([_SAY, _WORD], "^[user]|Say|[assistant]|{word$}"),
    ([{**_SAY, "name": "x"}, {**_WORD, "tool_calls": None, "n": 1}, _SAY], "duplicate"),
    (None, "null"),
    ("text", "not a list of messages"),
    ({"role": "user"}, "not a list of messages"),
    ([_SAY, "word"], "not a list of messages"),
    ([_SAY, None], "not a list of messages"),
    ([_SAY, {"content": "word"}], "unknown role"),
    ([_SAY, {"role": "gpt", "content": "word"}], "unknown role"),
    ([_SAY, {"role": ["assistant"], "content": "word"}], "unknown role"),
    ([_SAY, {"role": "assistant"}], "empty assistant turn"),
    ([_SAY, {"role": "assistant", "content": None}], "empty assistant turn"),
    ([_SAY, {"role": "assistant", "content": 5}], "content not a string"),
    ([{"role": "user"}, _WORD], "content not a string"),
    ([{"role": "user", "content": [{"text": "Say"}]}, _WORD], "content not a string"),
    ([_SAY, {"role": "assistant", "content": "\udfff"}], "not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize("is_array", [False, True])
@pytest.mark.parametrize("kind", ["prompt_completion", "messages"])
def test_odd_records_are_counted(tmp_path: Path, kind: Any, is_array: bool) -> None:
    """Of both formats, as lines of JSON and as an array."""
    cases = PAIRS if kind == "prompt_completion" else ODD_MESSAGES
    rows = [row if kind == "prompt_completion" else {"messages": row} for row, _ in cases]
    config = chat_config(tmp_path, format=kind)
    path = write_rows(tmp_path / "chats.jsonl", rows)
    if is_array:
        path.write_text(json.dumps(rows))
    corpus = prepare_corpus(config, SEQ_LENGTH, 0)
    assert written(corpus.train) == [found for _, found in cases if found.startswith("^")]
    expected = Counter(reason for _, reason in cases if not reason.startswith("^"))
    assert corpus.summary["skipped"] == expected


def test_tables_are_read_like_lines(tmp_path: Path) -> None:
    """A column of lists of structs, and two columns of strings with others beside them."""
    chats = [messages_of(chat[0]) for chat in CHATS]
    table = pyarrow.table({"id": list(range(len(chats))), "talk": chats})
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    changes = {"source": "parquet", "path": str(tmp_path / "chats.parquet")}
    corpus = prepare_corpus(chat_config(tmp_path, **changes, messages_field="talk"), SEQ_LENGTH, 0)
    assert written(corpus.train) == [chat[1] for chat in KEPT]
    assert corpus.summary["skipped"] == {"empty assistant turn": 3, "no assistant turn": 3}
    pairs = pyarrow.table({"q": ["1", "2"], "n": [5, 6], "a": ["one", None]})
    pyarrow.parquet.write_table(pairs, tmp_path / "pairs.parquet")
    changes = {"path": str(tmp_path / "pairs.parquet"), "source": "parquet"}
    changes |= {"format": "prompt_completion", "prompt_field": "q", "completion_field": "a"}
    corpus = prepare_corpus(chat_config(tmp_path, **changes), SEQ_LENGTH, 0)
    assert written(corpus.train) == ["^1{one$}"]
    assert corpus.summary["skipped"] == {"null": 1}


def test_a_missing_column_and_a_gigantic_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the key, and the columns that exist; a record is not cut."""
    for changes, message in (
        ({"messages_field": "talk"}, r"data\.messages_field='talk' .* columns are: messages"),
        ({"format": "prompt_completion"}, r"data\.prompt_field='prompt' .* columns are: messages"),
    ):
        with pytest.raises(UserError, match=message):
            prepare_corpus(chat_config(tmp_path, **changes), SEQ_LENGTH, 0)
    monkeypatch.setattr("data.corpus.sources.MAX_DOCUMENT_SIZE", 60)
    corpus = prepare_corpus(chat_config(tmp_path), SEQ_LENGTH, 0)
    assert corpus.summary["skipped"]["longer than 0 MiB"] > 5
    assert set(written(corpus.train)) < {chat[1] for chat in KEPT}


def test_conversations_are_held_out_whole(tmp_path: Path) -> None:
    """By hash or by validation_path; the end of a single one is not held out."""
    corpus = prepare_corpus(chat_config(tmp_path, validation_fraction=0.3), SEQ_LENGTH, 0)
    train, held_out = written(corpus.train), written(corpus.validation)
    assert sorted(train + held_out) == sorted(chat[1] for chat in KEPT)
    assert 3 < len(held_out) < 30
    given = write_rows(tmp_path / "given.jsonl", [{"messages": messages_of(CHATS[3][0])}])
    changes: dict[str, Any] = {"validation_path": str(given), "validation_fraction": 0.3}
    corpus = prepare_corpus(chat_config(tmp_path, **changes), SEQ_LENGTH, 0)
    assert written(corpus.validation) == [CHATS[3][1]]
    assert written(corpus.train) == [chat[1] for chat in KEPT if chat != CHATS[3]]
    changes = {"path": str(given), "validation_fraction": 0.3}
    corpus = prepare_corpus(chat_config(tmp_path, **changes), SEQ_LENGTH, 0)
    assert (written(corpus.train), written(corpus.validation)) == ([CHATS[3][1]], [])


def test_format_and_columns_decide_the_fingerprint(tmp_path: Path) -> None:
    """Two formats of one file are two sources; a text has the fingerprint that it always had."""
    path = write_chats(tmp_path / "chats.jsonl")
    configs = [
        SourceConfig("jsonl", str(path), "messages"),
        SourceConfig("jsonl", str(path), format="messages"),
        SourceConfig("jsonl", str(path), format="messages", messages_field="x"),
        SourceConfig("jsonl", str(path), format="prompt_completion"),
        SourceConfig("jsonl", str(path), format="prompt_completion", prompt_field="x"),
    ]
    found = {source_fingerprint(config, [path], tmp_path / "cache") for config in configs}
    assert len(found) == len(configs)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    text = SourceConfig("jsonl", str(tmp_path / "a.jsonl"))
    known = source_fingerprint(text, [tmp_path / "a.jsonl"], tmp_path / "cache")
    assert known == "e363d918c81ba0a0d7ac532b923ab7ec"


@pytest.mark.parametrize("after", [False, True])
def test_a_killed_preparation_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """From its last durable state, tokens and targets alike."""
    monkeypatch.setattr(encoding_module, "_PIECE_BYTES", 150)
    monkeypatch.setattr(encoding_module, "_BATCH_BYTES", 100)
    expected = prepare_corpus(chat_config(tmp_path), SEQ_LENGTH, 0)
    other = chat_config(tmp_path, cache_directory=str(tmp_path / "b"))
    attempts, corpus = 0, None
    while corpus is None and attempts < 40:
        attempts += 1
        die_at(monkeypatch, 3, after=after)
        with contextlib.suppress(Killed):
            corpus = prepare_corpus(other, SEQ_LENGTH, 0)
    assert attempts > 3
    assert corpus is not None
    assert (corpus.fingerprint, corpus.summary) == (expected.fingerprint, expected.summary)
    assert written(corpus.train) == written(expected.train)


def test_a_tokenizer_learns_from_conversations(tmp_path: Path) -> None:
    """From the text with its roles, not from how the cache stores it."""
    turns = [
        [{"role": "user", "content": random_text(n, 3)}, {"role": "assistant", "content": f"{n}é"}]
        for n in range(40)
    ]
    path = write_rows(tmp_path / "more.jsonl", [{"messages": messages} for messages in turns])
    changes: dict[str, Any] = {"path": str(path), "tokenizer": None, "vocab_size": 330}
    corpus = prepare_corpus(chat_config(tmp_path, **changes), 512, 0)
    start, stop = corpus.train.document_offsets[:2].tolist()
    text = corpus.tokenizer.decode(corpus.train.span(start + 1, stop - 1).tolist())
    assert text == f"[user]\n{random_text(0, 3)}\n[assistant]\n0é"
    assert corpus.summary["train"]["lossy"] == 0 < corpus.summary["train"]["compared"]
