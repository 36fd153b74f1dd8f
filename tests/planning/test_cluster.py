"""plan.py on several hosts: who sends how much to other hosts, and the time of a step."""

import functools
import math

import pytest

from configs import Config
from model import flops_per_token
from plan import Settings
from plan import main as plan_main
from planning.cluster import Network, Prediction, predict
from planning.dry_run import StepReport, dry_run
from planning.page import hosts_section
from tests.distributed import Layout
from tests.planning.test_plan import LLAMA, PAGE_WIDTH, small_config

BYTES_PER_S = 1e9 / 8  # of a network of 1 Gbit/s


@functools.cache
def planned(layout: Layout, *overrides: str) -> tuple[Config, list[StepReport]]:
    config = small_config(layout, *overrides)
    return config, [dry_run(config, layout.num_ranks, stage=stage) for stage in range(layout.pp)]


def predicted(
    layout: Layout, hosts: int, *overrides: str, latency_us: float = 0.0
) -> tuple[Prediction, float]:
    """Return the prediction for a local step of one second, and the bytes that a rank sends."""
    config, reports = planned(layout, *overrides)
    network = Network(layout.num_ranks // hosts, gbit=1.0, latency_us=latency_us)
    sent = sum(one.sent_bytes * n for one, n in reports[0].step.items())
    return predict(config, reports, network, local_step_s=1.0), sent


def between(prediction: Prediction) -> float:
    return sum(sent.between for sent in prediction.by_ranks.values())


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(dp=2)], ids=str)
def test_two_hosts_of_one_rank_send_everything(layout: Layout) -> None:
    """Each byte that a rank sends crosses, and each round waits for the latency."""
    prediction, sent = predicted(layout, 2)
    assert between(prediction) == sent
    assert prediction.step_s == pytest.approx(1 + sent / BYTES_PER_S)
    slower, _ = predicted(layout, 2, latency_us=100)
    (report,) = planned(layout)[1]
    step = report.step.items()
    rounds = sum(count * (2 if one.kind == "all_reduce" else 1) for one, count in step)
    assert slower.step_s is not None
    assert slower.step_s - prediction.step_s == pytest.approx(rounds * 100e-6)


@pytest.mark.slow
def test_each_rank_of_a_host_has_its_own_ring() -> None:
    """tp stays within hosts; both dp rings of tp=2 x dp=2 share the link."""
    prediction, sent = predicted(Layout(tp=2, dp=2), 2)
    tp, dp = prediction.by_ranks[0, 1], prediction.by_ranks[0, 2]
    assert (tp.between, dp.within) == (0, 0)
    all_ranks = prediction.by_ranks[0, 1, 2, 3]  # one ring, of which one edge leaves each host
    assert tp.within / 2 + dp.between / 2 + all_ranks.between == pytest.approx(sent)


@pytest.mark.slow
def test_hsdp_sends_less_between_hosts() -> None:
    """Only the all-reduce of half of the gradients in float32: 2 x 1/2 x half, from each rank."""
    (fsdp, _), (hsdp, _) = (predicted(Layout(dp=4, replicas=n), 2) for n in (1, 2))
    assert hsdp.by_ranks[0, 1].between == 0
    (report,) = planned(Layout(dp=4, replicas=2))[1]
    gradients = report.state["gradients"].total
    assert hsdp.by_ranks[0, 2].between == pytest.approx(2 * gradients, rel=0.01)  # padding
    assert between(hsdp) < between(fsdp)
    assert hsdp.step_s < fsdp.step_s


def test_messages_of_a_pipeline_delay_the_schedule() -> None:
    """With two stages each cycle of a forward and a backward waits for one message.

    The first micro-batch crosses twice, each further one adds the time of one more message.
    """
    layout, m = Layout(pp=2), 4
    batch = (f"train.global_batch_size={2 * m}", "model.num_layers=2", "data.vocab_size=300")
    untied = "model.untie_embeddings_and_output_weights=true"
    prediction, _ = predicted(layout, 2, *batch, untied)
    message_s = 128 * 2 * 64 * 2 / BYTES_PER_S
    assert prediction.step_s is not None
    delay = prediction.step_s - 1
    assert 2 * message_s <= delay <= (m + 1) * message_s * (1 + 1e-6)
    sent = prediction.by_ranks[0, 1].between  # the sum of loss and norm is over these ranks too
    assert sent == pytest.approx(m * message_s * BYTES_PER_S, rel=1e-3)


RING = ("parallel.context_parallel_size=2", "parallel.cp_comm_type=p2p")


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [(Layout(dp=2), ("optimizer.name=muon", *LLAMA)), (Layout(cp=2), RING)],
    ids=["muon", "ring"],
)
def test_messages_within_an_axis_cross_hosts_too(
    layout: Layout, overrides: tuple[str, ...]
) -> None:
    """Muon exchanges matrices of all dp ranks; a ring of cp ranks passes keys and values on."""
    prediction, sent = predicted(layout, 2, *overrides)
    assert between(prediction) == sent


@pytest.mark.slow
def test_the_stage_between_others_sends_both_ways() -> None:
    """On three hosts the second one sends activations on and gradients back."""
    (config, reports), m = planned(Layout(pp=3)), 3
    prediction = predict(config, reports, Network(1, gbit=1.0))
    message = 128 * 2 * 64 * 2
    assert prediction.by_ranks[0, 1, 2].between == pytest.approx(2 * m * message, rel=1e-2)


@pytest.mark.slow
def test_the_rate_of_a_rank_replaces_a_measured_step() -> None:
    """One stage: FLOPs of a step / ranks / rate; without rates there is no time."""
    config, reports = planned(Layout(dp=2))
    prediction = predict(config, reports, Network(1, gbit=math.inf), tflops=0.1)
    flops = flops_per_token(config.model, config.data.padded_vocab_size)
    tokens = config.train.global_batch_size * config.model.seq_length
    assert prediction.step_s == prediction.local_s == pytest.approx(flops * tokens / 2 / 0.1e12)
    assert predict(config, reports, Network(1, gbit=1.0)).step_s is None
    assert predict(config, reports, Network(1), local_step_s=1.0).step_s is None


@pytest.mark.parametrize(
    ("hosts", "has_advice"), [(4, True), pytest.param(3, False, marks=pytest.mark.slow)]
)
def test_hsdp_is_advised_if_a_stage_has_whole_hosts(hosts: int, has_advice: bool) -> None:
    """Stages of 6 ranks on hosts of 3 or 4; on the latter no size keeps gathers inside hosts."""
    config, reports = planned(Layout(pp=2, dp=6), f"train.global_batch_size={2 * 6 * 3}")
    network = Network(12 // hosts)
    assert network.crosses(*reports[0].shard)
    text = "".join(hosts_section(reports, network, predict(config, reports, network)))
    assert ("weights are gathered within hosts only" in text) == has_advice


@pytest.mark.slow
def test_the_page_of_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    """A row for each axis, the step time, a warning where tp crosses hosts, and HSDP as advice."""

    def lines(layout: Layout, **settings: float) -> list[str]:
        own = Settings(hosts=2, **settings)  # type: ignore[arg-type]
        assert plan_main(small_config(layout), layout.num_ranks, own) == 0
        found = capsys.readouterr().out.splitlines()
        assert max(map(len, found)) <= PAGE_WIDTH
        (start,) = (n for n, line in enumerate(found) if line.startswith("Hosts of"))
        return found[start : found.index("", start)]

    crossing = lines(Layout(tp=2), network_gbit=1.0, local_step_s=2.0)
    assert any(line.startswith("Step time with the network: 2.000 s + ") for line in crossing)
    assert crossing[-2:] == [
        "Warning: parallel.tensor_model_parallel_size=2 crosses hosts; tp communicates in each "
        "layer.",
        "  Choose 1; between hosts use pipeline or data parallelism.",
    ]
    inside = lines(Layout(tp=2, dp=2))
    assert not any(line.startswith(("Warning", "Step")) for line in inside)
    hsdp = "With parallel.data_parallel_replicate_size=2 weights are gathered within hosts only."
    assert hsdp in lines(Layout(dp=4))
    assert not any(line.startswith("With") for line in lines(Layout(dp=4, replicas=2)))
