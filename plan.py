"""Will it fit, and what crosses the wire? `python plan.py config=NAME.yaml section.key=value ...`.

Needs no GPU, no other ranks and no memory for the model: one step is rehearsed with tensors that
have shapes and no contents.
"""

import sys
from functools import partial

from configs import Config, ConfigError, exit_with_error, load_config

USAGE = """\
Usage: python plan.py config=NAME.yaml [section.key=value ...] [nproc=N] [memory_gib=N]

What each rank of `torchrun ... train.py config=NAME.yaml ...` would hold and send, per layer and in
all. Needs no GPU and no torchrun.

  nproc       (integer) number of ranks of all nodes; default: parallel.tensor_model_parallel_size
  memory_gib  (number) memory of a device in GiB, to say whether it fits; default: 80

Settings are those of train.py: python train.py --help
"""
DEVICE_GIB = 80.0


def parse(arguments: list[str]) -> tuple[Config, int, float]:
    """The configuration, the number of ranks, a device's memory in GiB; or ends the process."""
    if {"--help", "-h", "help"} & set(arguments):
        sys.stdout.write(USAGE)
        raise SystemExit(0)
    own, settings = {"nproc": "", "memory_gib": ""}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in own:
            own[key] = value
        else:
            settings.append(argument)
    ranks = partial(num_ranks, own["nproc"])
    config = load_config(settings, ranks)
    try:
        return config, ranks(config), device_memory(own["memory_gib"])
    except ConfigError as error:
        exit_with_error(f"config error: {error}")


def num_ranks(text: str, config: Config) -> int:
    """What nproc= says, or as many as tensor parallelism needs."""
    key, t = "parallel.tensor_model_parallel_size", config.parallel.tensor_model_parallel_size
    if not text:
        return t
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"nproc={text} is no number of ranks; choose a multiple of {key}={t}")
    n = int(text)
    if n % t:
        nearest = [multiple for multiple in (n // t * t, n // t * t + t) if multiple]
        raise ConfigError(
            f"nproc={n} is not divisible by {key}={t}; choose nproc="
            f"{' or '.join(map(str, nearest))}, or another {key}"
        )
    return n


def device_memory(text: str) -> float:
    """What memory_gib= says."""
    try:
        gib = float(text or DEVICE_GIB)
    except ValueError:
        gib = 0.0
    if not 0 < gib < float("inf"):
        raise ConfigError(f"memory_gib={text} is no size; give a device's memory in GiB, like 80")
    return gib


if __name__ == "__main__":
    # Before torch is imported, which takes seconds, so that a mistyped key is answered at once.
    CONFIG, NUM_RANKS, MEMORY_GIB = parse(sys.argv[1:])

from planning.accounting import account
from planning.page import page


def main(config: Config, num_ranks: int, memory_gib: float) -> int:
    """Rehearse a step, count, and print the page."""
    sys.stdout.write(page(config, account(config, num_ranks), memory_gib))
    return 0


if __name__ == "__main__":
    sys.exit(main(CONFIG, NUM_RANKS, MEMORY_GIB))
