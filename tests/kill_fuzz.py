"""Kill runs at random moments and check that nothing is lost; the longest of `make drills`.

    python -m tests.kill_fuzz 200        two hundred kills; the last line has the result

Two tensor-parallel ranks train in float32 with dropout and save at every step in the background.
One of them, or both, get kill -9: half of the time at any moment, half of the time during a save.
Then the run is restarted, and killed again, at most eight times; after that it finishes. Every loss
must equal that of an uninterrupted run bit for bit.

torch is imported once, in this process, which computes nothing; ranks are forks of it.
"""

import dataclasses
import functools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import torch.distributed as dist

from configs import Config, parse_config
from parallel.mesh import make_mesh
from parallel.transport.backend import cpu_backend
from tests.plugin import write_corpus
from tests.runs import rows, settings
from train import train
from training.run_folder import RunFolder
from training.signals import StopSignals

RANKS = 2
_KILLS_OF_A_RUN = 8
_LONGEST_LIFE_S = 300.0  # other tests may share the machine
_GRACE_S = 2.0  # torchrun gives 30 s; a peer may be waiting for the dead one's first word
_POLL_S = 0.0002


@dataclass
class Tally:
    """The kills so far."""

    kills: int = 0
    kills_in_a_save: int = 0
    runs: int = 0
    kills_of_this_run: int = 0


def main(num_kills: int, seed: int = 1) -> int:
    """Kill `num_kills` times; return 1 if a run has other losses than the uninterrupted one."""
    choose, tally, started_at = random.Random(seed), Tally(), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_corpus(folder / "corpus")
        unbroken = run_to_its_end(configuration(folder, "unbroken"), lambda _: None)
        expected = rows(folder, "unbroken")
        assert unbroken == 0
        while tally.kills < num_kills:
            tally.runs += 1
            tally.kills_of_this_run = 0
            config = configuration(folder, f"run_{tally.runs}")
            harm = functools.partial(
                kill, config=config, choose=choose, tally=tally, num_kills=num_kills
            )
            run_to_its_end(config, harm)
            if rows(folder, str(config.run.name)) != expected:
                sys.stdout.write(f"run {tally.runs} has other losses (seed {seed})\n")
                return 1
            shutil.rmtree(folder / str(config.run.name))
    sys.stdout.write(
        f"{tally.kills} of {tally.kills} kills survived bit for bit, {tally.kills_in_a_save} of "
        f"them inside a save, in {tally.runs} runs and {time.perf_counter() - started_at:.0f} s\n"
    )
    return 0


def configuration(folder: Path, name: str) -> Config:
    """A run of thirty small steps that saves at every step."""
    overrides = (
        f"run.name={name}",
        "train.train_steps=30",
        "evaluate.interval=10",
        "checkpoint.save_interval=1",
    )
    config = parse_config(settings(folder / "corpus", folder, *overrides))
    parallel = dataclasses.replace(config.parallel, tensor_model_parallel_size=RANKS)
    return dataclasses.replace(config, parallel=parallel)


def run_to_its_end(config: Config, harm: Callable[[list[ForkProcess]], None]) -> int:
    """Restart the run, each time with `harm`, until it finishes; return how often it died."""
    for deaths in range(10**6):
        with tempfile.TemporaryDirectory() as rendezvous:
            context = multiprocessing.get_context("fork")
            ranks = [
                context.Process(target=_rank, args=(rank, config, rendezvous))
                for rank in range(RANKS)
            ]
            for process in ranks:
                process.start()
            harm(ranks)
            _wait_for_the_end(ranks)
            if all(process.exitcode == 0 for process in ranks):
                return deaths
    raise AssertionError("unreachable")


def _wait_for_the_end(ranks: list[ForkProcess]) -> None:
    """Like torchrun: once a rank is dead, terminate its peers, and soon kill them."""
    deadline = time.monotonic() + _LONGEST_LIFE_S
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.terminate()
            for process in ranks:
                process.join(_GRACE_S)
                process.kill()
        assert time.monotonic() < deadline, "a run that nobody killed hangs"
        time.sleep(0.01)


def kill(
    ranks: list[ForkProcess], config: Config, choose: random.Random, tally: Tally, num_kills: int
) -> None:
    """Kill one rank or both at a random moment, unless there were enough kills."""
    if tally.kills >= num_kills or tally.kills_of_this_run >= _KILLS_OF_A_RUN:
        return
    checkpoints = Path(config.run.directory, str(config.run.name), "checkpoints")
    if tally.kills % 2:
        for _ in range(choose.randrange(1, 8)):  # not always the first save
            _wait_for_a_save(ranks, checkpoints)
            time.sleep(choose.uniform(0.0, 0.003))
    elif tally.kills % 4:
        _wait_for_a_save(ranks, checkpoints)
        time.sleep(choose.uniform(0.0, 1.0))
    else:
        time.sleep(choose.uniform(0.0, 1.0))
    victims = choose.choice([[0], [1], [0, 1], [1, 0]])
    in_a_save = any(checkpoints.glob(".tmp-*"))
    alive = all(ranks[rank].is_alive() for rank in victims)
    for rank in victims:
        if ranks[rank].is_alive():
            os.kill(ranks[rank].pid or 0, signal.SIGKILL)
    if alive:  # it may have just finished
        tally.kills += 1
        tally.kills_of_this_run += 1
        tally.kills_in_a_save += in_a_save


def _wait_for_a_save(ranks: list[ForkProcess], checkpoints: Path) -> None:
    while all(process.is_alive() for process in ranks) and not any(checkpoints.glob(".tmp-*")):
        time.sleep(_POLL_S)


def _rank(rank: int, config: Config, rendezvous: str) -> None:
    """Run one rank as train.py's main does."""
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    signals = StopSignals()
    dist.init_process_group(
        cpu_backend(config.parallel.shared_memory),
        init_method=f"file://{rendezvous}/store",
        rank=rank,
        world_size=RANKS,
    )
    mesh = make_mesh(RANKS, True, torch.device("cpu"), rank)
    with RunFolder(config, mesh) as folder:
        code = train(config, mesh, folder, signals)
    sys.exit(code)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
