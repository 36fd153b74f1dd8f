"""Literal values of the functions that define a run, and old checkpoints that must still resume.

Never adapt a value here to the code. To change one, raise its version in `RECIPE_VERSIONS` (for the
format: `FORMAT_VERSION`, and keep the old folder) and note it in CHANGELOG.md first.

golden/version_1 is the third step of the run below, written on 2026-11-29 by one rank, before
manifests had recipe versions. golden/version_2 is the same step in the next format.
golden/tokenizer.model is the tokenizer of that run; its text is the fixture `corpus`.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints.manifest import FORMAT_VERSION, read_manifest
from data.packing import best_fit
from data.sampler import SampleOrder, sample_rows
from model.generation.sampling import Sampling, uniform_draw
from ops.dropout import keep_mask, site_index
from parallel import Mesh, fold_seed, local_shards
from tests.distributed import ONE_RANK, Layout, distributed
from tests.model.test_gpt import tiny_model
from tests.runs import rows, settings, train_on
from tests.streams import stream
from tests.weights import full_tensors
from training.state import RECIPE_VERSIONS

GOLDEN = Path(__file__).parent / "golden"
INITIAL_WEIGHTS = {  # the first two and the last, where the seed is 1234
    "embedding.weight": [-0.005667447112500668, 0.05123823508620262, -0.1712590903043747],
    "positions": [-0.09350405633449554, 0.06935948133468628, -0.18155816197395325],
    "blocks.1.mlp.down.weight": [-0.013137753121554852, -0.10304037481546402, 0.0397379994392395],
}
LOSSES = [
    5.799605395342852,
    5.704496125917177,
    5.438106021365604,
    5.194812156058647,
    5.021334158407675,
    4.916894139470281,
]


def golden_settings(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    return settings(
        corpus,
        directory,
        "model.num_layers=1",
        "model.hidden_size=16",
        "model.num_attention_heads=2",
        "model.ffn_hidden_size=32",
        "evaluate.interval=0",
        f"data.tokenizer={GOLDEN / 'tokenizer.model'}",
        *overrides,
    )


def put_checkpoint(directory: Path, version: int) -> None:
    """Copy the checkpoint of a format version into the run of `golden_settings`."""
    shutil.copytree(GOLDEN / f"version_{version}", directory / "test" / "checkpoints")


def losses(directory: Path) -> list[float]:
    return [row["train/loss"] for row in rows(directory)]


def test_sample_order() -> None:
    """Across an epoch, of a later source with a negative seed, of a mixture, and packed."""
    over_the_end = [5, 10, 34, 86, 35, 4, 59, 16, 63, 24]
    assert sample_rows(np.arange(95, 105), 100, 1234).tolist() == over_the_end
    of_many = [867898, 662192, 677527, 674655, 973363, 372491, 699777, 301868]
    assert sample_rows(np.arange(8), 1000003, -5, 2).tolist() == of_many
    mixed = [10, 6, 5, 2, 11, 0, 2, 6, 8, 5, 1, 3, 9, 0]
    assert SampleOrder([3.0, 1.0], [7, 5], 1234).rows(60, 14).tolist() == mixed
    lengths = np.array([5, 3, 8, 2, 2, 6, 1, 4, 7, 3])
    assert best_fit(lengths, 8).tolist() == [3, 3, 0, 2, 5, 2, 1, 4, 1, 4]


def test_dropout_masks() -> None:
    """Keys, and the mask of two positions of two samples at a rate of 0.3."""
    masks = stream(1234, 5, (6, 7))
    assert masks.keys is not None
    keys = masks.keys[site_index(2, 1)]
    assert keys.tolist() == [[-1990814203, 1698728986], [1298367852, -1980419284]]
    kept = keep_mask(torch.Size((2, 2, 16)), 3, 0.3, keys).int().view(4, 16)
    assert ["".join(map(str, row)) for row in kept.tolist()] == [
        "1111100010011111",
        "0101111111101010",
        "0111011101110111",
        "1110111111111101",
    ]
    assert masks.attention_seed(2, 1) == 2200357419681566379


def test_sampled_tokens() -> None:
    """Draws for two tokens of two samples are 40-bit fractions, so they are exact."""
    draws = [
        uniform_draw(Sampling(seed=1234), sample, number) for sample in (0, 1) for number in (0, 7)
    ]
    assert draws == [0.2578761531331111, 0.8454969594331487, 0.8542635076782972, 0.6253942208322769]


@distributed(ONE_RANK, Layout(tp=2), Layout(dp=2))
def test_initial_weights(mesh: Mesh) -> None:
    """The seeds are exact; weights may differ in the last bit between CPU kernels of torch.

    Measured: with ATEN_CPU_CAPABILITY=default some of 3,072 weights differ from AVX2.
    """
    assert fold_seed(1234, "embedding.weight") == 5654024191081372958
    assert fold_seed(1234, "sample", 7) == 7603754364394056735
    whole = full_tensors(local_shards(tiny_model(mesh)), mesh)
    for name, expected in INITIAL_WEIGHTS.items():
        mine = whole[name].flatten()[[0, 1, -1]]
        torch.testing.assert_close(mine, torch.tensor(expected), rtol=1e-6, atol=0)


def test_a_short_run(corpus: Path, tmp_path: Path) -> None:
    """Tokens, weights, samples, masks, schedule and AdamW together."""
    train_on(ONE_RANK, golden_settings(corpus, tmp_path))
    assert losses(tmp_path) == pytest.approx(LOSSES, abs=1e-5)
    manifest = read_manifest(tmp_path / "test" / "checkpoints" / "step_00000006")
    assert manifest.state["recipe_versions"] == RECIPE_VERSIONS


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
@pytest.mark.parametrize("layout", [ONE_RANK, Layout(tp=2)], ids=str)
def test_checkpoints_of_each_format_resume(
    corpus: Path, tmp_path: Path, layout: Layout, version: int
) -> None:
    put_checkpoint(tmp_path, version)
    train_on(layout, golden_settings(corpus, tmp_path, "run.resume=must"))
    assert losses(tmp_path) == pytest.approx(LOSSES[3:], abs=1e-5)
