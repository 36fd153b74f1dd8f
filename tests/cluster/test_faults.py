"""What a run on two hosts survives, how soon it notices, and what it loses; see docs/clusters.md.

Each test logs its row of that page's table: `make test-cluster` shows them.
"""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import (
    Cluster,
    Process,
    cluster_of,
    exit_report,
    resumed_step,
    wait_until,
)
from tests.runs import rows, settings, steps_done

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

logger = logging.getLogger("cluster")

STEPS, SAVE_INTERVAL, HANG_S = 120, 20, 15
RESTARTS = ("--max-restarts=3",)
# A replaced agent must learn where the store is, see docs/clusters.md.
REPLACEABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

# Preloaded before libc: shifts the wall clock and leaves monotonic clocks alone.
_WRONG_CLOCK = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *t) {
    int code = syscall(SYS_clock_gettime, clock, t);
    if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        t->tv_sec += OFFSET_S;
    return code;
}
int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
"""


def run_settings(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    """A run of some minutes, split over the network in each layer."""
    return settings(
        corpus,
        directory,
        "parallel.tensor_model_parallel_size=2",
        f"train.train_steps={STEPS}",
        f"checkpoint.save_interval={SAVE_INTERVAL}",
        f"run.hang_timeout_s={HANG_S}",
        "evaluate.interval=0",
        "optimizer.lr=1e-3",
        "optimizer.min_lr=1e-4",
        *overrides,
    )


@pytest.fixture
def cluster(namespaces: None, tmp_path: Path) -> Iterator[Cluster]:
    """Two hosts."""
    with cluster_of(tmp_path, 2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(
    namespaces: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The rows of the run that nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    with cluster_of(directory, 2) as cluster:
        for process in start(cluster, run_settings(corpus, directory)):
            process.finish()
    return rows(directory)


def start(cluster: Cluster, arguments: list[str], *flags: str) -> list[Process]:
    """One rank with one thread on each host."""
    return cluster.torchrun(arguments, *flags, ranks=1, **REPLACEABLE)


def reach(directory: Path, step: int, *processes: Process) -> None:
    wait_until(lambda: steps_done(directory) >= step, 400, *processes)


def record(fault: str, detected_s: float | None, lost: int | None, recovery: str) -> None:
    """Log a row of the table of faults."""
    seconds = "-" if detected_s is None else f"{detected_s:.1f}"
    logger.warning("| %s | %s | %s | %s |", fault, seconds, lost, recovery)


def resumed_from(*processes: Process) -> int:
    """The step of the checkpoint that the last attempt resumed from."""
    return resumed_step("".join(process.output for process in processes))


def expect_the_undisturbed_curve(directory: Path, undisturbed: list[dict[str, Any]]) -> None:
    """Bit for bit, and the run says that it is finished."""
    assert rows(directory) == undisturbed
    assert exit_report(directory) == {
        "code": 0,
        "reason": "finished",
        "step": STEPS,
        "resume": None,
    }


def says(process: Process, text: str) -> bool:
    return text in process.output


def test_killed_ranks_on_one_host_are_restarted(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """kill -9 of every rank on one host: torchrun restarts the ranks on both."""
    processes = start(cluster, run_settings(corpus, tmp_path), *RESTARTS)
    reach(tmp_path, 30, *processes)
    at = steps_done(tmp_path)
    for pid in cluster[1].ranks():
        os.kill(pid, signal.SIGKILL)
    detected_s = wait_until(lambda: says(processes[0], "connection"), 60, *processes)
    for process in processes:
        process.finish()
    record("ranks of a host killed", detected_s, at - resumed_from(*processes), "by itself")
    expect_the_undisturbed_curve(tmp_path, undisturbed)


@pytest.mark.parametrize("how", ["killed", "power cut"])
def test_a_lost_host_is_replaced(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]], how: str
) -> None:
    """Every process of a host, torchrun too; the other host waits for it to come back.

    After a power cut no packet tells the other host.
    """
    arguments = run_settings(corpus, tmp_path)
    endpoint = "--rdzv-endpoint=node0:29400"
    first, lost = (
        cluster.torchrun_on(host, arguments, *RESTARTS, endpoint, ranks=1, **REPLACEABLE)
        for host in cluster.hosts
    )
    reach(tmp_path, 30, first, lost)
    at, killed_at = steps_done(tmp_path), time.monotonic()
    if how == "power cut":
        cluster[1].link("down")
    cluster[1].kill()
    sign = "hang:" if how == "power cut" else "connection"
    detected_s = wait_until(lambda: says(first, sign), 4 * HANG_S, first)
    assert exit_report(tmp_path)["code"] == (75 if how == "power cut" else 1)
    cluster[1].boot()
    cluster[1].link("up")
    new = cluster.torchrun_on(cluster[1], arguments, *RESTARTS, endpoint, ranks=1, **REPLACEABLE)
    for process in (first, new):
        process.finish(limit_s=400)
    logger.warning("%s: %.0f s until the end", how, time.monotonic() - killed_at)
    record(f"host lost ({how})", detected_s, at - resumed_from(first, new), "same command there")
    expect_the_undisturbed_curve(tmp_path, undisturbed)


def test_the_first_host_is_lost(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """The store goes with it, so torchrun ends on the other; the same command resumes."""
    arguments = run_settings(corpus, tmp_path)
    processes = start(cluster, arguments, *RESTARTS)
    reach(tmp_path, 30, *processes)
    at, killed_at = steps_done(tmp_path), time.monotonic()
    cluster[0].kill()
    wait_until((tmp_path / "test" / "exit.json").exists, 60)
    detected_s = time.monotonic() - killed_at
    report = exit_report(tmp_path)
    assert report["code"] == 1
    assert "connection" in report["reason"].lower()
    code = processes[1].wait(200)
    logger.warning("torchrun ended with %d after %.0f s", code, time.monotonic() - killed_at)
    assert code != 0
    cluster[0].boot()
    again = cluster.everywhere(report["resume"])
    for process in again:
        process.finish()
    record("first host lost", detected_s, at - resumed_from(*again), "resume command on all hosts")
    expect_the_undisturbed_curve(tmp_path, undisturbed)


@pytest.mark.parametrize("seconds", [10])
def test_a_stalled_network(
    cluster: Cluster,
    corpus: Path,
    tmp_path: Path,
    undisturbed: list[dict[str, Any]],
    seconds: int,
) -> None:
    """Shorter than run.hang_timeout_s: training waits and goes on."""
    arguments = run_settings(corpus, tmp_path, f"run.hang_timeout_s={4 * seconds}")
    processes = start(cluster, arguments)
    reach(tmp_path, 30, *processes)
    cluster[1].drop(1)
    time.sleep(seconds)
    stopped_at = steps_done(tmp_path)
    cluster[1].drop(0)
    waited_s = wait_until(lambda: steps_done(tmp_path) > stopped_at + 2, 60, *processes)
    for process in processes:
        process.finish()
    record(f"network stalls for {seconds} s", None, 0, f"by itself, {waited_s:.0f} s later")
    expect_the_undisturbed_curve(tmp_path, undisturbed)


def test_the_network_is_down_for_a_minute(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Longer than run.hang_timeout_s: the ranks end with code 75; torchrun may not recover."""
    processes = start(cluster, run_settings(corpus, tmp_path), *RESTARTS)
    reach(tmp_path, 30, *processes)
    at, down_at = steps_done(tmp_path), time.monotonic()
    cluster[1].link("down")
    wait_until(lambda: says(processes[0], "hang:"), 4 * HANG_S)
    detected_s = time.monotonic() - down_at
    report = exit_report(tmp_path)
    assert report["code"] == 75
    assert "rank 1 (host node1" in report["reason"]
    time.sleep(max(0.0, 60 - (time.monotonic() - down_at)))
    cluster[1].link("up")
    up_at = time.monotonic()
    codes = [process.wait(500) for process in processes]
    ended_s = time.monotonic() - up_at
    logger.warning("exit codes %s, %.0f s after the network came back", codes, ended_s)
    recovery = "by itself"
    if codes != [0, 0]:
        recovery = "resume command on all hosts"
        processes = cluster.everywhere(report["resume"])
        for process in processes:
            process.finish()
    record("network down for 60 s", detected_s, at - resumed_from(*processes), recovery)
    expect_the_undisturbed_curve(tmp_path, undisturbed)


def test_lost_packets(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """One percent of them: slower, and the same losses."""
    cluster[1].drop(0.01)
    started_at = time.monotonic()
    for process in start(cluster, run_settings(corpus, tmp_path)):
        process.finish(limit_s=600)
    record("1 % of packets lost", None, 0, f"{time.monotonic() - started_at:.0f} s for the run")
    expect_the_undisturbed_curve(tmp_path, undisturbed)


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
@pytest.mark.parametrize("offset_s", [86400, -3600])
def test_a_wrong_clock(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]], offset_s: int
) -> None:
    """On the second host; monotonic clocks are right, as on a real host.

    With the static rendezvous: c10d compares the hosts' clocks, see docs/clusters.md.
    """
    source, library = tmp_path / "clock.c", tmp_path / "clock.so"
    source.write_text(_WRONG_CLOCK)
    compiler = ("cc", "-shared", "-fPIC", f"-DOFFSET_S={offset_s}", "-o", library, source)
    subprocess.run(compiler, check=True)
    clock = {"LD_PRELOAD": str(library)}
    say = ("-c", "import time; print(time.time())")
    wrong = float(cluster[1].run("env", f"LD_PRELOAD={library}", sys.executable, *say))
    assert wrong - time.time() == pytest.approx(offset_s, abs=60)
    arguments = run_settings(corpus, tmp_path)
    static = ("--rdzv-backend=static", "--rdzv-endpoint=node0:29400")
    processes = [
        cluster.torchrun_on(host, arguments, *static, f"--node-rank={n}", ranks=1, **environment)
        for n, (host, environment) in enumerate(zip(cluster.hosts, ({}, clock), strict=True))
    ]
    started_at = time.monotonic()
    for process in processes:
        process.finish(limit_s=400)
    record(
        f"clock wrong by {offset_s} s", None, 0, f"{time.monotonic() - started_at:.0f} s for all"
    )
    expect_the_undisturbed_curve(tmp_path, undisturbed)


def test_a_slow_host(
    cluster: Cluster, corpus: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    """Its ranks run for a fifth of the time: no false alarm."""
    processes = start(cluster, run_settings(corpus, tmp_path))
    reach(tmp_path, 30, *processes)
    before = steps_done(tmp_path)
    slow_until = time.monotonic() + 2 * HANG_S
    ranks = cluster[1].ranks()
    while time.monotonic() < slow_until and steps_done(tmp_path) < STEPS - 20:
        for number, seconds in ((signal.SIGSTOP, 0.4), (signal.SIGCONT, 0.1)):
            for pid in ranks:
                os.kill(pid, number)
            time.sleep(seconds)
    assert steps_done(tmp_path) > before
    for process in processes:
        process.finish()
    record("host at a fifth of its speed", None, 0, "trains on, slower")
    expect_the_undisturbed_curve(tmp_path, undisturbed)
