"""Multiple-choice tasks on every layout, against the dense reference."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import UserError
from configs.tasks import Item, read_tasks
from configs.weights import model_weights
from data.tasks import TaskSet
from model import build_model
from parallel import Mesh, local_shards
from tests.data_corpora import small_tokenizer, write_task
from tests.distributed import ONE_RANK, Layout, distributed
from tests.random_runs import LLAMA, VOCAB, run_of, weight
from tests.reference import reference_logits
from tests.runs import rows, settings, train_on
from training.evaluation import score_task, task_sets

LAYOUTS = (
    ONE_RANK,
    Layout(tp=2),
    Layout(tp=2, sp=False),
    Layout(dp=2),
    Layout(cp=2),
    Layout(cp=2, cp_comm_type="p2p"),
    Layout(pp=2),
    Layout(tp=2, dp=2),
)


def reference_score() -> Callable[[str, str], float]:
    """Returns the log-likelihood of a continuation of a context, one token at a time."""
    spec = model_weights(LLAMA, VOCAB)
    weights = {name: weight(name, one.shape).double() for name, one in spec.items()}
    tokenizer = small_tokenizer()

    def score(context: str, continuation: str) -> float:
        before = tokenizer.encode(context.rstrip()) if context.strip() else []
        scored = tokenizer.encode(context + continuation)[len(before) :]
        tokens = [*(before or [tokenizer.bos_id]), *scored][-LLAMA.seq_length - 1 :]
        positions = torch.arange(len(tokens) - 1).unsqueeze(0)
        logits = reference_logits(weights, LLAMA, torch.tensor([tokens[:-1]]), positions)[0]
        log_p = logits.log_softmax(-1)[-len(scored) :]
        return log_p.gather(1, torch.tensor(scored).unsqueeze(1)).sum().item()

    return score


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Twelve questions."""
    return write_task(tmp_path / "items.jsonl", 12)


@distributed(*LAYOUTS)
def test_log_likelihoods_equal_the_reference(mesh: Mesh, path: Path) -> None:
    """Of every choice, after its context and alone; micro-batches of three rows."""
    config = run_of(LLAMA, path.parent / "run")
    evaluation = dataclasses.replace(config.evaluate, tasks=(str(path),))
    train = dataclasses.replace(config.train, micro_batch_size=3)
    config = dataclasses.replace(config, evaluate=evaluation, train=train)
    model = build_model(config, mesh)
    for name, shard in local_shards(model).items():
        shard.tensor.copy_(weight(name, shard.global_shape)[shard.slices])
    (task,) = task_sets(config, mesh, small_tokenizer())
    result, score = score_task(model, task), reference_score()
    for item, graded in zip(read_tasks("", [str(path)])["items"], result.items, strict=True):
        given = [score(item.context, f" {choice}") for choice in item.choices]
        alone = [score("", f" {choice}") for choice in item.choices]
        assert graded["log_likelihoods"] == pytest.approx(given, rel=1e-5)
        assert graded["unconditional"] == pytest.approx(alone, rel=1e-5)
        expected = float(int(np.argmax(given)) == item.answer)
        assert graded["acc"] == expected


def test_accuracies_and_standard_errors() -> None:
    """Each metric normalises in its own way; the error is that of a mean of n numbers, 1/(n-1)."""
    items = [Item(1, "a", ("é", "bbb"), 1, " "), Item(4, "a", ("c", "dd"), 0, " ")]
    task = TaskSet("t", items, small_tokenizer(), **SHAPE)
    assert task.num_rows == 8
    log_likelihoods = np.array([-2.0, -3.9, -1.0, -2.0, -1.0, -2.0, -1.0, -5.0])
    result = task.grade(log_likelihoods)
    first, second = result.items
    assert (first["line"], second["line"]) == (1, 4)
    assert second["log_likelihoods"] == [-1.0, -2.0]
    assert second["unconditional"] == [-1.0, -5.0]
    chosen = [[item[name] for item in result.items] for name in METRICS]
    assert chosen == [[0, 1], [1, 1], [0, 1], [0, 0]]
    assert result.metrics["acc"] == 0.5
    assert result.metrics["acc_stderr"] == pytest.approx(0.5)
    assert result.metrics["acc_norm_stderr"] == 0.0


SHAPE = {"seq_length": 5, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1, "tp_size": 1}
METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (
            Item(7, "a", ("b" * 100,), 0, ""),
            "line 7: a choice of .* give at most model.seq_length=5",
        ),
        (
            Item(8, "retur", ("n",), 0, ""),
            "line 8: a choice of 0 tokens after its context; end the",
        ),
    ],
)
def test_a_choice_that_cannot_be_scored_is_refused(item: Item, problem: str) -> None:
    """Longer than a row, or without a token of its own."""
    with pytest.raises(UserError, match=problem):
        TaskSet("t", [item], small_tokenizer(), **SHAPE)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(cp=2), Layout(pp=2)], ids=str)
def test_accuracies_during_training_are_those_of_one_process(
    corpus: Path, tmp_path: Path, layout: Layout
) -> None:
    """After steps 2 and 3, in the rows of evaluations; also without held-out text."""
    path = write_task(tmp_path / "words.jsonl", 40)
    overrides = (f"evaluate.tasks={path}", "evaluate.interval=2", "train.train_steps=3")
    curves = []
    for one in (ONE_RANK, layout):
        arguments = settings(corpus, tmp_path / str(one), *overrides)
        arguments = [
            a.replace("validation_fraction=0.1", "validation_fraction=0") for a in arguments
        ]
        train_on(one, arguments)
        curves.append([row for row in rows(tmp_path / str(one)) if "eval/words/acc" in row])
    names = [f"eval/words/{name}{ending}" for name in METRICS for ending in ("", "_stderr")]
    assert [list(row) for row in curves[0]] == [["step", *names]] * 2
    assert [row["step"] for row in curves[0]] == [2, 3]
    assert curves[0] == curves[1]
