"""Runs under Slurm: srun without torchrun, and the shipped batch script through every ending."""

import logging
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import exit_report, resumed_step, wait_until
from tests.cluster.slurm import Slurm
from tests.lines import ROOT
from tests.runs import rows, settings, steps_done

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

logger = logging.getLogger("cluster")

SCRIPT = ROOT / "docs" / "train.sbatch"
TASKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--mem=3000", "--exclusive")
FOREVER, SAVES = "train.train_steps=100000", "checkpoint.save_interval=5"
NUM_CYCLES = 20
# Run by Python at its start: on the second node, take memory once a file exists.
_LEAK = """
import os, socket, threading, time

def leak():
    while not os.path.exists("{start}"):
        time.sleep(0.1)
    os.remove("{start}")  # only once
    taken = b"x" * (1600 << 20)
    time.sleep(60)

if socket.gethostname() == "node1" and "SLURM_PROCID" in os.environ:
    threading.Thread(target=leak, daemon=True).start()
"""


def run_settings(corpus: Path, directory: Path, *overrides: str) -> list[str]:
    """A run over two nodes that saves only when it must."""
    sizes = ("parallel.tensor_model_parallel_size=2", "evaluate.interval=0")
    return settings(corpus, directory, *sizes, *overrides)


def submit(slurm: Slurm, directory: Path, arguments: list[str], *options: str) -> str:
    """Submit the shipped script as its first lines say; return the job's number."""
    output = f"--output={directory}/job-%j.log"
    return slurm.submit(*TASKS, output, *options, SCRIPT, *arguments)


def log_of(directory: Path, job: str) -> str:
    return (directory / f"job-{job}.log").read_text()


def reach(slurm: Slurm, directory: Path, job: str, step: int) -> None:
    """Wait until a job has done so many steps."""
    deadline = time.monotonic() + 150
    while steps_done(directory) < step:
        state = slurm.job(job)["JobState"]
        log = directory / f"job-{job}.log"
        text = log.read_text() if log.exists() else ""
        assert state in ("PENDING", "RUNNING", "COMPLETING"), (state, text)
        assert time.monotonic() < deadline, (state, text)
        time.sleep(0.3)


def preempt(slurm: Slurm, job: str) -> float:
    """Run a short job of higher priority; return the seconds until it started."""
    started_at, restarts = time.monotonic(), int(slurm.job(job)["Restarts"])
    short = "--wrap=sleep 1"
    slurm.submit(*TASKS[:2], "--exclusive", "--partition=urgent", "--output=/dev/null", short)
    wait_until(lambda: int(slurm.job(job)["Restarts"]) > restarts, 120, poll_s=0.3)
    return time.monotonic() - started_at


def test_srun_without_torchrun(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """Each task is a rank, and the resume command works as printed."""
    arguments = run_settings(corpus, tmp_path, "run.stop_at_step=3")
    python = Path(sys.executable)
    four = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    slurm.run("srun", *four, python, "train.py", *arguments, limit_s=200)
    report = exit_report(tmp_path)
    assert (report["code"], report["step"]) == (0, 3)
    resume = report["resume"]
    assert resume.startswith("srun --nodes=2 --ntasks=4 --cpus-per-task=1 python train.py")
    path = f"{python.parent}:{slurm.environment['PATH']}"
    slurm.run("sh", "-c", resume, PATH=path, limit_s=200)
    assert exit_report(tmp_path) == {"code": 0, "reason": "finished", "step": 6, "resume": None}
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_requeued_job_that_starts_over_does_so_once(
    slurm: Slurm, corpus: Path, tmp_path: Path
) -> None:
    """run.resume=never holds for a job's first start; later ones continue its work."""
    job = submit(slurm, tmp_path, run_settings(corpus, tmp_path, FOREVER, "run.resume=never"))
    reach(slurm, tmp_path, job, 5)
    preempt(slurm, job)
    step = exit_report(tmp_path)["step"]
    reach(slurm, tmp_path, job, step + 5)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    assert not list((tmp_path / "test").glob("previous_*"))


@pytest.mark.timeout(3000)
def test_preempted_and_requeued_again_and_again(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """The curve equals that of an undisturbed job bit for bit."""
    arguments = run_settings(corpus, tmp_path, FOREVER)
    job = submit(slurm, tmp_path, arguments)
    for cycle in range(NUM_CYCLES):
        reach(slurm, tmp_path, job, steps_done(tmp_path) + 3)
        seconds = preempt(slurm, job)
        report = exit_report(tmp_path)
        logger.warning("cycle %d: step %d, %.0f s", cycle + 1, report["step"], seconds)
        assert (report["code"], report["step"]) == (143, steps_done(tmp_path))
    reach(slurm, tmp_path, job, steps_done(tmp_path) + 3)
    slurm.run("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    assert log_of(tmp_path, job).count("resuming from") == NUM_CYCLES
    last = exit_report(tmp_path)["step"]
    others = ("run.name=undisturbed", f"run.stop_at_step={last}")
    undisturbed = submit(slurm, tmp_path, [*arguments, *others])
    slurm.wait_for(undisturbed, "COMPLETED", limit_s=900)
    assert len(rows(tmp_path)) == last
    assert rows(tmp_path) == rows(tmp_path, "undisturbed")


def test_an_abrupt_preemption(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """A partition without GraceTime: Slurm's KillWait is enough to save, and Slurm requeues."""
    arguments = run_settings(corpus, tmp_path, FOREVER)
    job = submit(slurm, tmp_path, arguments, "--partition=abrupt")
    reach(slurm, tmp_path, job, 5)
    seconds = preempt(slurm, job)
    slurm.wait_for(job, "PENDING")
    report = exit_report(tmp_path)
    assert report["code"] == 143
    logger.warning("| preempted | %.1f | 0 | Slurm requeues |", seconds)
    reach(slurm, tmp_path, job, report["step"] + 5)
    assert f"resuming from {tmp_path}/test/checkpoints/step_" in log_of(tmp_path, job)


def test_cancelled(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """It saves, and stays cancelled."""
    job = submit(slurm, tmp_path, run_settings(corpus, tmp_path, FOREVER))
    reach(slurm, tmp_path, job, 5)
    slurm.run("scancel", job)
    seconds = slurm.wait_for(job, "CANCELLED")
    time.sleep(8)  # a requeued job would start now
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("CANCELLED", "0")
    report = exit_report(tmp_path)
    assert (report["code"], report["step"]) == (143, steps_done(tmp_path))
    logger.warning("| cancelled | %.1f | 0 | %s |", seconds, report["resume"].split(" config")[0])


def test_out_of_time(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """The signal comes before the limit; the job requeues itself and resumes."""
    options = ("--time=2", "--signal=TERM@30")
    job = submit(slurm, tmp_path, run_settings(corpus, tmp_path, FOREVER), *options)
    reach(slurm, tmp_path, job, 5)
    wait_until(lambda: int(slurm.job(job)["Restarts"]) > 0, 200, poll_s=0.5)
    report = exit_report(tmp_path)
    assert (report["code"], report["step"]) == (143, steps_done(tmp_path))
    logger.warning("| out of time | - | 0 | the script requeues the job |")
    reach(slurm, tmp_path, job, report["step"] + 5)


def test_out_of_memory(
    slurm: Slurm, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm kills the ranks of the node that takes more than it may; the script requeues."""
    (tmp_path / "sitecustomize.py").write_text(_LEAK.format(start=tmp_path / "leak"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = submit(slurm, tmp_path, run_settings(corpus, tmp_path, FOREVER, SAVES), "--mem=1500")
    reach(slurm, tmp_path, job, 12)
    (tmp_path / "leak").touch()
    leaked_at, at = time.monotonic(), steps_done(tmp_path)
    wait_until(lambda: "exceeded memory limit" in log_of(tmp_path, job), 60, poll_s=0.3)
    detected_s = time.monotonic() - leaked_at
    wait_until(lambda: int(slurm.job(job)["Restarts"]) > 0, 120, poll_s=0.3)
    # SIGKILL to all ranks: none can write what happened.
    assert not (tmp_path / "test" / "exit.json").exists()
    reach(slurm, tmp_path, job, at + 10)
    lost = at - resumed_step(log_of(tmp_path, job))
    assert lost <= 10  # the save of every fifth step may be in progress
    logger.warning("| out of memory | %.1f | %d | the script requeues |", detected_s, lost)


def test_a_lost_node(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """Slurm requeues the job, which resumes from the last save once the node is back."""
    job = submit(slurm, tmp_path, run_settings(corpus, tmp_path, FOREVER, SAVES))
    reach(slurm, tmp_path, job, 12)
    at, killed_at = steps_done(tmp_path), time.monotonic()
    slurm.cluster[1].kill()
    wait_until((tmp_path / "test" / "exit.json").exists, 60)
    detected_s = time.monotonic() - killed_at
    report = exit_report(tmp_path)
    assert report["code"] == 1
    slurm.cluster[1].boot()
    slurm.start_node(slurm.cluster[1])
    reach(slurm, tmp_path, job, at + 10)
    lost = at - resumed_step(log_of(tmp_path, job))
    assert lost <= 10  # the save of every fifth step may be in progress
    logger.warning("| node lost | %.1f | %d | the script requeues |", detected_s, lost)


def test_a_refused_launch_is_not_requeued(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """A setting that is found wrong before training ends the job with exit code 2."""
    job = submit(slurm, tmp_path, run_settings(corpus, tmp_path, "model.num_attention_heads=3"))
    slurm.wait_for(job, "FAILED")
    assert (slurm.job(job)["ExitCode"], slurm.job(job)["Restarts"]) == ("2:0", "0")
    assert log_of(tmp_path, job).count("config error:") == 2  # once for each node
