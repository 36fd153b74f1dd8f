"""The same losses on every layout, and after a resume on another; in the pool of workers."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from configs import Config, parse_config
from parallel import Mesh, randomness
from tests.distributed import EVERY_LAYOUT, ONE_RANK, Layout, distributed
from tests.model.test_gpt import dense_weights, dropout_mask
from tests.reference import reference_losses
from tests.runs import global_batch, rows, settings, train_on
from tests.streams import stream
from tests.weights import full_tensors
from train import start
from training.optimizer import training_tensors
from training.run_folder import RunFolder
from training.state import training_batches
from training.step import train_step

# With two groups, pairs of four ranks share keys and values; rows have several documents.
LLAMA = (
    "config=llama_debug.yaml",
    "model.qk_layernorm=true",
    "model.num_query_groups=2",
    "train.z_loss_coeff=1e-3",
    "data.packing=best_fit",
    "data.inter_document_masking=true",
)


HSDP = (Layout(dp=4, replicas=2), Layout(dp=2, replicas=2), Layout(tp=2, dp=2, replicas=2))


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Config:
    """Micro-batches of two rows with different numbers of targets; gradients are clipped."""
    overrides = (
        "data.sequence_mode=pad",
        "model.seq_length=69",
        "train.micro_batch_size=2",
        "optimizer.clip_grad=0.5",
        "model.init_method_std=0.2",
    )
    return parse_config(settings(corpus, tmp_path, *overrides))


@distributed(*EVERY_LAYOUT, *HSDP)
def test_a_step_equals_the_reference(mesh: Mesh, config: Config) -> None:
    """With dropout masks that are so small that they are stored."""
    require_the_reference(mesh, config)


@distributed(ONE_RANK, Layout(tp=2, dp=2))
def test_a_step_of_a_large_model_equals_the_reference(mesh: Mesh, config: Config) -> None:
    """With dropout masks that backward computes again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randomness, "STORED_ELEMENTS", 0)
        require_the_reference(mesh, config)


def require_the_reference(mesh: Mesh, config: Config) -> None:
    """Loss, norm and every clipped gradient equal those of one dense global batch.

    After the step, the optimizer's first moment is (1 - beta1) times each gradient.
    """
    with RunFolder(config, mesh) as folder:
        run, state = start(config, mesh, folder)
        dense = dense_weights(run.model)
        with training_batches(run, state) as batches:
            result = train_step(run, state, batches)
    whole = global_batch(config, run.corpus)
    mask = partial(dropout_mask, masks=stream(config.run.seed, step=0, samples=range(8)))
    inputs = (whole.tokens, whole.positions, whole.targets)
    loss = reference_losses(dense, config.model, *inputs, mask)[0] / whole.num_targets
    loss.backward()
    norm = torch.stack([weight.grad.norm() for weight in dense.values()]).norm().item()

    of_pairs = (whole.targets >= 0).view(4, -1).sum(1)
    assert len(of_pairs.unique()) > 1, "a mean of means would be right"
    assert result.num_targets == whole.num_targets
    of_rows = (whole.targets >= 0).sum(1)
    assert result.mean_row_length == of_rows.square().sum().item() / whole.num_targets
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm, rel=2e-5)
    assert norm > config.optimizer.clip_grad
    factor = (1 - config.optimizer.adam_beta1) * config.optimizer.clip_grad / norm
    moments = full_tensors(training_tensors(run.model, run.optimizer), mesh)
    for name, weight in dense.items():
        expected = factor * weight.grad
        scale = expected.abs().max().item()
        moment = moments[f"exp_avg.{name}"].double()
        assert_close(moment, expected, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        ("data.sequence_mode=pack",),
        pytest.param(("data.sequence_mode=pad",), marks=pytest.mark.slow),
        pytest.param(LLAMA, marks=pytest.mark.slow),
    ],
    ids=["pack", "pad", "llama"],
)
def test_every_layout_gives_the_same_losses(
    corpus: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """With dropout, and rows and vocabulary that no layout divides: within 2e-6 over six steps."""
    layouts = {
        ONE_RANK: 4,
        Layout(tp=2): 8,
        Layout(tp=2, sp=False): 2,
        Layout(tp=4): 4,
        Layout(dp=2): 4,
        Layout(tp=2, dp=2): 2,
        Layout(dp=4): 1,
    }
    curves = {}
    for layout, micro_batch_size in layouts.items():
        directory = tmp_path / str(layout)
        overrides = (*options, f"train.micro_batch_size={micro_batch_size}")
        train_on(layout, settings(corpus, directory, *overrides))
        curves[layout] = rows(directory)
    reference = curves.pop(ONE_RANK)
    assert [row["step"] for row in reference] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert reference[-2]["train/loss"] < 0.95 * reference[0]["train/loss"]
    for layout, curve in curves.items():
        for row, expected in zip(curve, reference, strict=True):
            assert row.keys() == expected.keys()
            # Gradients are differences, so their norm has larger relative errors.
            for key, value in row.items():
                tolerance = 2e-5 if key == "train/grad_norm" else 2e-6
                assert value == pytest.approx(expected[key], rel=tolerance), (
                    layout,
                    row["step"],
                    key,
                )


@pytest.mark.slow
@pytest.mark.parametrize("gradient_sync", ["step", "micro_batch"])
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(dp=2)], ids=str)
def test_micro_batches_and_recompute_change_nothing(
    corpus: Path, tmp_path: Path, gradient_sync: str, layout: Layout
) -> None:
    """How a global batch is split, synchronised or recomputed only changes memory."""
    curves = []
    for number, (micro_batch_size, recompute) in enumerate([(4, "none"), (2, "full"), (1, "none")]):
        directory = tmp_path / str(number)
        overrides = (
            f"train.micro_batch_size={micro_batch_size}",
            f"parallel.recompute_granularity={recompute}",
            f"parallel.gradient_sync={gradient_sync}",
        )
        train_on(layout, settings(corpus, directory, *overrides))
        curves.append([row["train/loss"] for row in rows(directory) if "train/loss" in row])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "options"),
    [
        (Layout(tp=2), Layout(tp=2), ()),
        (Layout(tp=2), ONE_RANK, ()),
        (ONE_RANK, Layout(tp=2, dp=2), ()),
        (Layout(tp=2, dp=2), Layout(tp=4), ()),
        (Layout(dp=4), Layout(tp=2, sp=False), ()),
        (Layout(tp=4), Layout(tp=2, dp=2), LLAMA),  # kv on every rank, then sharded
    ],
    ids=lambda value: "llama" if value == LLAMA else str(value or ""),
)
def test_resume_continues_the_curve(
    corpus: Path, tmp_path: Path, before: Layout, after: Layout, options: tuple[str, ...]
) -> None:
    """Stopped at step 3 and resumed: equal bits on the same layout, within 1e-5 on another."""
    for layout, name in ((before, "whole"), (before, "parts")):
        stop = ("run.stop_at_step=3",) if name == "parts" else ()
        train_on(layout, settings(corpus, tmp_path, *options, f"run.name={name}", *stop))
    assert [row["step"] for row in rows(tmp_path, "parts")] == [1, 2, 3, 3]
    train_on(after, settings(corpus, tmp_path, *options, "run.name=parts"))
    whole, parts = rows(tmp_path, "whole"), rows(tmp_path, "parts")
    if before == after:
        assert parts == whole
    else:
        for row, expected in zip(parts, whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("options", [(), LLAMA], ids=["gpt", "llama"])
def test_a_run_repeats_bit_for_bit(
    corpus: Path, tmp_path: Path, precision: str, options: tuple[str, ...]
) -> None:
    """The same seed, machine and layout give the same bits, evaluations included."""
    curves = []
    for name in ("first", "second"):
        overrides = (*options, f"run.name={name}", f"train.precision={precision}")
        train_on(Layout(tp=2, dp=2), settings(corpus, tmp_path, *overrides))
        curves.append(rows(tmp_path, name))
    assert curves[0] == curves[1]
    assert curves[0][-2]["train/loss"] < 0.95 * curves[0][0]["train/loss"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("data.sequence_mode=pad",), LLAMA], ids=["gpt", "llama"])
def test_bf16_losses_are_near_on_other_layouts(
    corpus: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """bf16 sums in another order differ: within 1e-3 over six steps."""
    curves = []
    for layout in (ONE_RANK, Layout(tp=2), Layout(tp=2, sp=False), Layout(tp=2, dp=2)):
        directory = tmp_path / str(layout)
        train_on(layout, settings(corpus, directory, *options, "train.precision=bf16"))
        curves.append([row["train/loss"] for row in rows(directory) if "train/loss" in row])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-3)
