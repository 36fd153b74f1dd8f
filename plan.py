"""Plan memory and traffic: `python plan.py config=NAME.yaml section.key=value ...`."""

import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from configs import Config, ConfigError, Range, load_config
from configs.cli import exit_on_config_error
from configs.errors import bad_setting
from configs.layout import multiples
from configs.program_settings import split_settings


@dataclass(frozen=True)
class Settings:
    """Report the memory and the traffic of each rank of `torchrun ... train.py ...`.

    Runs one training step on fake tensors: it needs no GPU, no torchrun, and no memory for the
    weights. The ranks have GPUs, unless train.device=cpu. All settings of train.py are accepted,
    config=NAME.yaml included; see python train.py --help.
    """

    nproc: int | None = None  # ranks on all nodes; null: as few as the parallel sizes need
    # memory of a device in GiB, for the verdict and the advice; null: this machine's GPU's, or 80
    memory_gib: float | None = None
    hosts: int = 1  # each has an equal share of the ranks; several: report the traffic between them
    network_gbit: float | None = None  # rate of a host's network in each direction, in Gbit/s
    network_latency_us: float = 50.0  # from a rank to a rank of another host, in microseconds
    # seconds of a step as measured on one host with as much work per rank; predicts the step time
    local_step_s: float | None = None
    tflops: float | None = None  # TFLOP/s that a rank achieves, instead of local_step_s

    RANGES: ClassVar = {
        "nproc": Range(1),
        "memory_gib": Range(0, open_low=True),
        "hosts": Range(1),
        "network_gbit": Range(0, open_low=True),
        "network_latency_us": Range(0),
        "local_step_s": Range(0, open_low=True),
        "tflops": Range(0, open_low=True),
    }

    def __post_init__(self) -> None:
        for key in ("network_gbit", "local_step_s", "tflops"):
            if (value := getattr(self, key)) is not None and self.hosts == 1:
                raise bad_setting(key, value, "has no effect with hosts=1; set hosts, or omit it")
        if self.tflops is not None and self.local_step_s is not None:
            problem = f"has no effect with local_step_s={self.local_step_s}; omit one of them"
            raise bad_setting("tflops", self.tflops, problem)


def parse(arguments: list[str]) -> tuple[Config, int, Settings]:
    """Return the configuration, the number of ranks and the program's own settings, or exit."""
    settings, others = split_settings(Settings, arguments)
    ranks = partial(num_ranks, settings.nproc)
    config = load_config(others, ranks)
    with exit_on_config_error():
        _check_hosts(settings.hosts, ranks(config))
    return config, ranks(config), settings


def _check_hosts(hosts: int, ranks: int) -> None:
    if ranks % hosts:
        fix = f"choose a divisor of {ranks}, or {multiples('nproc', ranks, hosts)}"
        raise bad_setting("hosts", hosts, f"does not divide nproc={ranks}; {fix}")


def num_ranks(nproc: int | None, config: Config) -> int:
    """Return nproc, by default the smallest world size of the layout, if that divides it."""
    key, parallel = "parallel.tensor_model_parallel_size", config.parallel
    needed, n = parallel.smallest_world_size, nproc or parallel.smallest_world_size
    if n % needed:
        nearest = n // needed * needed, -(-n // needed) * needed
        others = {
            "context_parallel_size": parallel.context_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "data_parallel_replicate_size": parallel.data_parallel_replicate_size,
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
    CONFIG, NUM_RANKS, SETTINGS = parse(sys.argv[1:])

import torch

from planning.cluster import Network, predict
from planning.dry_run import dry_run
from planning.page import hosts_section, page

_DEFAULT_GIB = 80.0


def gpu_memory_gib() -> float | None:
    """Memory of this machine's first GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)


def main(config: Config, num_ranks: int, settings: Settings) -> int:
    """Run one step of each stage on fake tensors, and print the page."""
    memory_gib = settings.memory_gib or gpu_memory_gib() or _DEFAULT_GIB
    num_stages = config.parallel.pipeline_model_parallel_size
    stages = [dry_run(config, num_ranks, stage=stage) for stage in range(num_stages)]
    largest = max(stages, key=lambda report: report.peak_bytes)
    hosts = list[str]()
    if settings.hosts > 1:
        network = Network(
            num_ranks // settings.hosts, settings.network_gbit, settings.network_latency_us
        )
        prediction = predict(config, stages, network, settings.local_step_s, settings.tflops)
        hosts += hosts_section(stages, network, prediction)
    sys.stdout.write(page(config, largest, memory_gib, stages, hosts))
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG, NUM_RANKS, SETTINGS))
