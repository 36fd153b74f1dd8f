"""The benchmark: both of our sides do the same work, results are pooled and told as they are."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import network, plain_gpt
from bench.activations import saved_per_layer
from bench.claims import claims
from bench.ours import build_run, count_activations, settings, stepper
from bench.page import TABLES, between_marks, write_page
from bench.pool import Results, pooled
from bench.run import PAGE, make_visit
from bench.sides import OURS, PLAIN, SIDES, Side, Visit, all_visits, scaling_visits
from bench.workload import Workload, parse
from configs import Config, parse_config
from interop.huggingface import from_huggingface
from model import num_parameters
from parallel import Mesh, local_shards
from tests.distributed import ONE_RANK, Layout, distributed
from training.run_folder import RunFolder
from training.state import Run, RunState, training_batches

pytestmark = pytest.mark.slow  # they hold no promise of the README

TINY = Workload(
    precision="fp32",
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    seq_length=24,
    vocab_size=300,
    micro_batch_size=2,
)
MACHINE = {
    "kind": "machine",
    "cores": "2",
    "processor": "P",
    "instructions": "no AMX",
    "memory_gib": "24",
    "torch": "2.13.0",
    "date": "2026-11-24",
}


def config_on(mesh: Mesh, *overrides: str) -> Config:
    config = parse_config([*settings(TINY), *overrides])
    parallel = dataclasses.replace(
        config.parallel,
        tensor_model_parallel_size=mesh.tp.size,
        sequence_parallel=mesh.sequence_parallel,
    )
    return dataclasses.replace(config, parallel=parallel)


def copy_weights(plain: nn.Module, run: Run) -> None:
    """Ours from those of the plain loop, by GPT-2's names of transformers."""
    gpt2 = {
        "attn.c_attn": "attention.qkv",
        "attn.c_proj": "attention.proj",
        "ln_1": "attention_norm",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "up",
        "mlp.c_proj": "down",
        "transformer.wte": "tokens",
        "transformer.wpe": "positions",
        "transformer.ln_f": "norm",
    }
    weights = dict(plain.named_parameters())

    def read(name: str) -> Tensor:
        stem, _, leaf = name.rpartition(".")
        layer = ""
        if stem.startswith("transformer.h."):
            _, _, number, stem = stem.split(".", 3)
            layer = f"blocks.{number}."
        tensor = weights[f"{layer}{gpt2[stem]}.{leaf}"].detach()
        return tensor.t() if ".c_" in name and tensor.ndim > 1 else tensor  # GPT-2's [in, out]

    for name, shard in local_shards(run.model).items():
        full = from_huggingface(name, "gpt2", run.config.model, read)
        shard.tensor.copy_(full[shard.slices])


def rows_of(run: Run, num_steps: int) -> list[list[Tensor]]:
    """The loader's rows, `[b, s + 1]`, in micro-batches, of the first steps."""
    with training_batches(run, RunState(wandb_id="none")) as batches:
        steps = [next(batches).micro_batches for _ in range(num_steps)]
    return [
        [torch.cat([part.tokens, part.targets[:, -1:]], dim=1) for part in parts] for parts in steps
    ]


@distributed(ONE_RANK, Layout(tp=2))
def test_ours_and_the_plain_loop_do_the_same_work(mesh: Mesh, tmp_path: Path) -> None:
    """From the same weights, on the same rows: the same number of parameters and, step for step,
    the same losses, so that shape, clipping, optimizer and decay are alike. float32 rounding grows
    over the steps: 1e-5.
    """
    config = config_on(mesh, f"run.directory={tmp_path}")
    run = build_run(config, mesh, RunFolder(config, mesh))
    torch.manual_seed(3)
    plain = plain_gpt.PlainGPT(TINY)
    count = sum(parameter.numel() for parameter in plain.parameters())
    assert count == num_parameters(config.model, TINY.vocab_size)
    copy_weights(plain, run)
    rows = rows_of(run, 4)
    plain_step = plain_gpt.make_step(plain, TINY, lambda number: rows[number])
    expected = [plain_step(number) for number in range(4)]
    with training_batches(run, RunState(wandb_id="none")) as batches:
        step = stepper(run, batches)
        found = [step(number) for number in range(4)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.2)


@pytest.mark.parametrize("variant", ["micro_batches", "bf16"])
def test_the_plain_loop_learns(variant: str) -> None:
    """Four batches by heart, in the end; in both precisions, however a batch is cut."""
    changes = {"precision": "bf16"} if variant == "bf16" else {"micro_batch_size": 1}
    shape = dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]
    found = plain_gpt.run(parse([*shape.flags(), "--steps=60", "--warmup=1", "--patience_s=0"]), 0)
    assert len(found["step_s"]) == 60
    assert min(found["step_s"]) > 0
    assert found["losses"][-1] < found["losses"][0] - 0.2
    assert found["peak_mb"] > 50


@distributed(ONE_RANK, Layout(tp=2))
def test_with_full_recomputation_a_layer_keeps_its_input_alone(mesh: Mesh, tmp_path: Path) -> None:
    """s/t positions of b h channels in bf16: 2 bytes, of which a rank has its share."""
    config = config_on(
        mesh,
        f"run.directory={tmp_path}",
        "train.precision=bf16",
        "parallel.recompute_granularity=full",
    )
    kept = count_activations(config, mesh, TINY)["bytes_per_sbh"]
    assert kept == pytest.approx(2 / mesh.tp.size, abs=0.1)


def test_activations_are_counted_once_and_weights_not() -> None:
    """tanh keeps its output, which is the next product's input, and in a view at that: 4 bytes."""

    def make(num_layers: int) -> tuple[nn.Module, Any]:
        layers = [m for _ in range(num_layers) for m in (nn.Linear(5, 5), nn.Tanh(), nn.Flatten(1))]
        model = nn.Sequential(*layers)
        return model, lambda: model(torch.ones(TINY.seq_length, 5)).sum()

    kept = saved_per_layer(make, dataclasses.replace(TINY, hidden_size=5, micro_batch_size=1))
    assert kept == {"layer_bytes": 4 * TINY.seq_length * 5, "bytes_per_sbh": 4.0}


class CastLinear(nn.Linear):
    """A layer that casts its weight to the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the cast weight."""
        return nn.functional.linear(x, self.weight.to(x.dtype))


def test_cast_weights_are_not_activations() -> None:
    """Even if an activation has the shape of the weight: tanh keeps its output, 2 bytes."""

    def make(num_layers: int) -> tuple[nn.Module, Any]:
        layers = [m for _ in range(num_layers) for m in (CastLinear(5, 5, bias=False), nn.Tanh())]
        model = nn.Sequential(*layers)
        return model, lambda: model(torch.ones(5, 5, dtype=torch.bfloat16)).sum()

    shape = dataclasses.replace(TINY, seq_length=5, hidden_size=5, micro_batch_size=1)
    assert saved_per_layer(make, shape)["bytes_per_sbh"] == 2.0


def test_a_visit_gives_what_the_side_reports(tmp_path: Path) -> None:
    """Through the command line, with a setting of ours beside the workload."""
    override = ("parallel.recompute_granularity=full",)
    found = make_visit(
        Visit("speed", OURS, TINY, override), ["--warmup=1", "--steps=2", "--patience_s=0"], 300
    )
    assert len(found["step_s"]) == 2, found
    assert found["tokens_per_step"] == 96


def test_what_goes_wrong_is_told_in_a_line() -> None:
    """A peer that is not installed, a side that fails, one that takes too long."""
    missing = dataclasses.replace(PLAIN, environment="nowhere")
    found = make_visit(Visit("speed", missing, TINY), [], 60)
    assert found["error"].startswith("no /")
    assert found["error"].endswith("nowhere/bin/python; make bench-setup makes it")
    broken = Side("broken", "broken", "bench.no_such_module")
    assert "No module named" in make_visit(Visit("speed", broken, TINY), [], 300)["error"]
    found = make_visit(Visit("speed", PLAIN, TINY), [], 0.1)
    assert found == {"error": "no result within 0 s"}


def timed(
    side: Side, shape: Workload, seconds: list[float], **changes: Any
) -> list[dict[str, Any]]:
    """Records of one round for each number of seconds, a step each."""
    return [
        {
            **Visit("speed", side, shape).record,
            "round": number,
            "step_s": [step_s],
            "foreign": [0.0],
            "stolen": [0.0],
            "losses": [9.7],
            "peak_mb": 1000.0 + number,
            "tokens_per_step": 4096,
            "flops_per_token": 10**6,
            **changes,
        }
        for number, step_s in enumerate(seconds)
    ]


def test_disturbed_steps_are_left_out() -> None:
    """Unless all of them are; the largest memory counts from any round."""
    records = timed(OURS, Workload(), [1.0, 2.0, 4.0])
    assert pooled(records).median_s == 2.0
    records[2]["foreign"] = [0.06]
    speed = pooled(records)
    assert (speed.median_s, speed.num_steps, speed.is_disturbed) == (1.5, 3, False)
    assert speed.peak_mb == 1002.0
    for record in records:
        record["stolen"] = [0.5]
    assert (pooled(records).median_s, pooled(records).is_disturbed) == (2.0, True)


def test_the_speed_table(tmp_path: Path) -> None:
    """The fastest first, ours in bold, MFU of the products' rate, what is missing by name."""
    gemm = {
        **Visit("gemm", SIDES[0], Workload()).record,
        "side": "gemm",
        "round": 0,
        "flops_per_second": {"bf16": 4.096e9, "fp32": 8.192e9},
    }
    titan = next(side for side in SIDES if side.key == "titan")
    records = [
        MACHINE,
        gemm,
        *timed(PLAIN, Workload(), [2.0, 4.0]),
        *timed(OURS, Workload(), [1.0, 1.0]),
        {**Visit("speed", titan, Workload()).record, "round": 0, "error": "no titan"},
    ]
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name} -->\n<!-- end of {name} -->\n" for name in TABLES))
    write_page(page, records)
    lines = page.read_text().splitlines()
    place = lines.index("| **ours** | TP=1 | 4096 | 4096 to 4096 | 2 of 2 | 1.00 | 50% | 1001 |")
    assert lines[place + 1 : place + 3] == [
        "| plain PyTorch | TP=1 | 1365 | 1024 to 2048 | 2 of 2 | 3.00 | 17% | 1001 |",
        "| torchtitan 0.3.0 (Llama) | TP=1 | not measured: no titan |  |  |  |  |  |",
    ]
    assert "Products alone: 8 GFLOP/s on one process, - on two." in lines
    claim = "| TP=1, bf16: ours over the best peer | at least 1.15 | 3 (plain) | passed |"
    assert claim in lines
    assert any(line.startswith("2 cores of P, no AMX, 24 GiB; torch 2.13.0") for line in lines)


def test_claims_are_passed_missed_or_not_measured() -> None:
    """The bound itself passes; who the best peer was is told."""
    megatron = next(side for side in SIDES if side.key == "megatron")
    records = [
        *timed(OURS, Workload(), [1.0]),
        *timed(PLAIN, Workload(), [1.1]),
        *timed(OURS, Workload("tp2+sp"), [1.0]),
        *timed(megatron, Workload("tp2+sp"), [1.6], peak_mb=1600.0),
    ]
    found = {claim.what: claim for claim in claims(Results(records))}
    first = found["TP=1, bf16: ours over the best peer"]
    assert (first.verdict, first.beside, first.value) == ("missed", "plain", pytest.approx(1.1))
    assert found["TP=2 + SP, bf16: ours over the best peer with SP"].verdict == "passed"
    memory = found["TP=2 + SP, bf16: peak memory of a rank, ours over megatron-core"]
    assert (memory.verdict, memory.value) == ("passed", 0.625)
    assert found["DP=2, bf16: ours over the best peer"].verdict == "not measured"


def test_what_overlap_hides_of_a_slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its share of what the link costs without; none where that is too little to tell."""
    seconds = {
        (0, "false"): 4.0,
        (0, "true"): 4.1,
        (4000, "false"): 4.1,
        (4000, "true"): 4.0,
        (1000, "false"): 6.0,
        (1000, "true"): 4.5,
    }
    rates: list[int] = []

    def visit(_: str, overrides: list[str], __: list[str]) -> dict[str, Any]:
        value = overrides[0].partition("=")[2]
        return {"step_s": [seconds[rates[-1], value]], "losses": [1.0 if rates[-1] else value]}

    monkeypatch.setattr(network, "limit", rates.append)
    monkeypatch.setattr(network, "visit", visit)
    settings = ["parallel.tp_comm_overlap=false", "parallel.tp_comm_overlap=true"]
    monkeypatch.setattr(network, "_SETTINGS", {"dp2": settings})
    arguments = argparse.Namespace(mbit=[4000, 1000], warmup=1, steps=1, overrides=[])
    assert list(network.measure(arguments))[2:] == [
        "| dp2 | tp_comm_overlap=false | any | 4.00 |  | yes |",
        "| dp2 | tp_comm_overlap=true | any | 4.10 |  | no |",
        "| dp2 | tp_comm_overlap=false | 4000 | 4.10 |  | yes |",
        "| dp2 | tp_comm_overlap=true | 4000 | 4.00 |  | yes |",
        "| dp2 | tp_comm_overlap=false | 1000 | 6.00 |  | yes |",
        "| dp2 | tp_comm_overlap=true | 1000 | 4.50 | 0.75 | yes |",
    ]


def test_the_page_has_a_place_for_every_table() -> None:
    """And no table goes where there is none."""
    text = PAGE.read_text("utf-8")
    for name in TABLES:
        assert f"\n\n{name} is here\n\n" in between_marks(text, name, f"{name} is here")
    with pytest.raises(ValueError, match="no place"):
        between_marks(text, "weather", "")


def test_no_visit_is_made_twice() -> None:
    """A record is found by its visit, so each must be another."""
    for visits in (list(all_visits()), list(scaling_visits())):
        records = [str(visit.record) for visit in visits]
        assert len(set(records)) == len(records)
