"""Plan memory and traffic: `python plan.py config=NAME.yaml section.key=value ...`."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from configs import Config, ConfigError, Range, load_config
from configs.program_settings import load_settings


@dataclass(frozen=True)
class Settings:
    """Report the memory and the traffic of each rank of `torchrun ... train.py ...`.

    Runs one training step on fake tensors: it needs no GPU, no torchrun, and no memory for the
    weights. All settings of train.py are accepted, config=NAME.yaml included; see python train.py
    --help.
    """

    nproc: int | None = None  # ranks on all nodes; null: as few as the parallel sizes need
    # memory of a device in GiB, for the verdict and the advice; null: this machine's GPU's, or 80
    memory_gib: float | None = None

    RANGES: ClassVar = {"nproc": Range(1), "memory_gib": Range(0, open_low=True)}


def parse(arguments: list[str]) -> tuple[Config, int, float | None]:
    """Return the configuration, the number of ranks and a device's memory in GiB, or exit."""
    keys = ("nproc", "memory_gib", "--help", "-h", "help")
    own = [argument for argument in arguments if argument.partition("=")[0] in keys]
    settings = load_settings(Settings, own)
    ranks = partial(num_ranks, settings.nproc)
    config = load_config([argument for argument in arguments if argument not in own], ranks)
    return config, ranks(config), settings.memory_gib


def num_ranks(nproc: int | None, config: Config) -> int:
    """Return nproc, by default the ranks of one replica, if that divides it."""
    key, parallel = "parallel.tensor_model_parallel_size", config.parallel
    needed, n = parallel.ranks_per_replica, nproc or parallel.ranks_per_replica
    if n % needed:
        nearest = n // needed * needed, -(-n // needed) * needed
        others = {
            "context_parallel_size": parallel.context_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        }
        more = "".join(f" x parallel.{name}={n}" for name, n in others.items() if n > 1)
        raise ConfigError(
            f"nproc={nproc} is not divisible by {key}={parallel.tensor_model_parallel_size}{more}; "
            f"choose nproc={' or '.join(str(number) for number in nearest if number)}, or another "
            f"{key}"
        )
    return n


if __name__ == "__main__":
    # Importing torch takes seconds; report a mistyped key before that.
    CONFIG, NUM_RANKS, MEMORY_GIB = parse(sys.argv[1:])

import torch

from planning.dry_run import dry_run
from planning.page import page

_DEFAULT_GIB = 80.0


def gpu_memory_gib() -> float | None:
    """Memory of this machine's first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)


def main(config: Config, num_ranks: int, memory_gib: float | None) -> int:
    """Run one step of each stage on fake tensors, and print the page."""
    memory_gib = memory_gib or gpu_memory_gib() or _DEFAULT_GIB
    num_stages = config.parallel.pipeline_model_parallel_size
    stages = [dry_run(config, num_ranks, stage=stage) for stage in range(num_stages)]
    largest = max(stages, key=lambda report: report.peak_bytes)
    sys.stdout.write(page(config, largest, memory_gib, stages))
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG, NUM_RANKS, MEMORY_GIB))
