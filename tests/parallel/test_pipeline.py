"""Pipeline parallelism: the schedule, and runs that equal those of one process."""

from pathlib import Path

import pytest

from parallel.pipeline import max_alive, schedule
from tests.distributed import ONE_RANK, Layout
from tests.runs import rows, settings, train_on

UNTIED = ("model.untie_embeddings_and_output_weights=true",)
SHAPES = [
    (m, p, v) for p in (1, 2, 3, 5) for v in (1, 2, 3) for m in (1, 2, 5, 6, 10) if p > 1 or v == 1
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_schedule_is_complete_and_in_order(shape: tuple[int, int, int]) -> None:
    """No deadlock, few micro-batches alive, and backwards in the order of micro-batches.

    Messages are received in the order in which they are sent, and long before `max_pending` more.
    """
    m, p, v = shape
    stages = schedule(m, p, v)
    for stage, actions in enumerate(stages):
        assert sorted(actions) == [
            (f, n, c) for f in (False, True) for n in range(m) for c in range(v)
        ]
        alive = [sum(1 if f else -1 for f, *_ in actions[: end + 1]) for end in range(len(actions))]
        assert max(alive) <= max_alive(p, v, stage)
        if v == 1:
            assert max_alive(p, v, stage) == p - stage
        for chunk in range(v):
            order = [n for f, n, c in actions if not f and c == chunk]
            assert order == list(range(m))
    _replay(stages, m, p, v)


def _replay(stages, m, p, v) -> None:
    """Run all stages with blocking receives and first-in, first-out messages."""
    sent = {}  # (receiver, is_forward, wraps): messages
    done = [0] * p
    num_sent, num_taken = {}, {}
    while any(d < len(actions) for d, actions in zip(done, stages, strict=True)):
        before = list(done)
        for stage, actions in enumerate(stages):
            if done[stage] == len(actions):
                continue
            is_forward, n, chunk = actions[done[stage]]
            step = 1 if is_forward else -1
            piece = chunk * p + stage
            first, last = (0, p * v - 1) if is_forward else (p * v - 1, 0)
            if piece != first:
                channel = (stage, is_forward, (stage == 0) if is_forward else (stage == p - 1))
                queue = sent.setdefault(channel, [])
                if not queue:
                    continue
                assert queue.pop(0) == (n, piece - step)
            elif not is_forward:
                assert (True, n, chunk) in actions[: done[stage]]
            if piece != last:
                receiver = (piece + step) % p
                wraps = (receiver == 0) if is_forward else (receiver == p - 1)
                sent.setdefault((receiver, is_forward, wraps), []).append((n, piece))
            done[stage] += 1
        assert done != before, "no stage can continue"
    assert not any(sent.values())


@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(pp=4)], ids=str)
def test_stages_give_the_same_bits(corpus: Path, tmp_path: Path, layout: Layout) -> None:
    """Losses, norms and evaluations of six steps with dropout have the bits of one process."""
    for each, name in ((layout, "stages"), (ONE_RANK, "one")):
        train_on(
            each, settings(corpus, tmp_path, *UNTIED, "model.num_layers=5", f"run.name={name}")
        )
    assert rows(tmp_path, "stages") == rows(tmp_path, "one")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(pp=2),
        Layout(pp=3),
        Layout(tp=2, pp=2),
        Layout(dp=2, pp=2),
        Layout(pp=2, chunks=2),
        Layout(dp=2, pp=2, chunks=2),
    ],
    ids=str,
)
def test_tied(corpus: Path, tmp_path: Path, layout: Layout) -> None:
    for each, name in ((layout, "stages"), (ONE_RANK, "one")):
        train_on(
            each,
            settings(
                corpus, tmp_path, "data.sequence_mode=pad", "model.num_layers=5", f"run.name={name}"
            ),
        )
    for row, expected in zip(rows(tmp_path, "stages"), rows(tmp_path, "one"), strict=True):
        for key, value in row.items():
            tolerance = 2e-5 if key == "train/grad_norm" else 2e-6
            assert value == pytest.approx(expected[key], rel=tolerance), (row["step"], key)
