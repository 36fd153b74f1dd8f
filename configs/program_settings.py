"""The settings of the programs other than train.py, and the configuration of the run they read.

A program declares its settings as a flat dataclass, such as `Settings` in generate.py. Comments are
the help, fields without a default are required, `RANGES` maps names to ranges, and `__post_init__`
checks relations.
"""

import dataclasses
import inspect
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from configs.cli import HELP, describe, exit_on_config_error, print_and_exit
from configs.errors import ConfigError, bad_setting
from configs.fields import KEYS, Field, fields_of
from configs.launch import set_up_environment, world_size_from_environment
from configs.load import parse_arguments, read_config
from configs.schema import Config
from configs.validate import validate

_Settings = TypeVar("_Settings")


def load_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """Return the settings of a program, or print help or one line of error and exit."""
    set_up_environment()
    if HELP & set(arguments):
        lines = [f"Usage: python {_program(settings_class)} key=value ...", ""]
        lines += [*(inspect.getdoc(settings_class) or "").splitlines(), ""]
        lines += [line for field in fields_of(settings_class).values() for line in describe(field)]
        print_and_exit("\n".join([*lines, ""]))
    with exit_on_config_error():
        return parse_settings(settings_class, arguments)


def split_settings(
    settings_class: type[_Settings], arguments: list[str]
) -> tuple[_Settings, list[str]]:
    """Return the settings of a program that also takes those of train.py, and the latter."""
    names = fields_of(settings_class)
    if not HELP & set(arguments):
        with exit_on_config_error():  # a mistyped key may resemble one of either kind
            parse_arguments(arguments, {"config": Field("config", str, None), **KEYS, **names})
    own = [argument for argument in arguments if argument.partition("=")[0] in {*names, *HELP}]
    others = [argument for argument in arguments if argument not in own]
    return load_settings(settings_class, own), others


def parse_settings(settings_class: type[_Settings], arguments: list[str]) -> _Settings:
    """Return the settings of a program; ConfigError says what is wrong with them."""
    fields = fields_of(settings_class)
    values = parse_arguments(arguments, fields)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{name}={name.upper()} is required: {field.comment}", name)
    return settings_class(**values)


def _program(settings_class: type[Any]) -> str:
    name, spec = settings_class.__module__, sys.modules["__main__"].__spec__
    if name == "__main__" and spec is not None:  # started by python -m
        return f"-m {spec.name.removesuffix('.__main__')}"
    if name.endswith(".__main__"):
        return f"-m {name.removesuffix('.__main__')}"
    return Path(inspect.getfile(settings_class)).name


def run_config(run: str, tensor_model_parallel_size: int | None = None, **train: Any) -> Config:
    """Return the configuration of a run folder, for inference on the ranks of this launch.

    The tensor-parallel size defaults to the number of ranks; `train` replaces keys of that section.
    The global batch becomes one micro-batch per data-parallel rank, and a given tokenizer the copy
    in the folder.
    """
    path = Path(os.path.expanduser(run), "config.yaml")
    if not path.is_file():
        other = Path("runs", run)
        hint = f"did you mean run={other}? " if (other / "config.yaml").is_file() else ""
        example = "give a folder written by train.py, such as runs/gpt_debug"
        raise bad_setting("run", run, f"is not a run: there is no {path}; {hint}{example}")
    config, num_ranks = read_config(path), world_size_from_environment()
    t = tensor_model_parallel_size or num_ranks
    settings = dataclasses.replace(config.train, device="auto", **train)
    batch = settings.micro_batch_size * max(1, num_ranks // t)
    data = config.data
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(data, tokenizer=data.tokenizer and str(path.parent)),
        parallel=dataclasses.replace(
            config.parallel,
            tensor_model_parallel_size=t,
            context_parallel_size=1,
            data_parallel_replicate_size=1,
            pipeline_model_parallel_size=1,
            virtual_pipeline_model_parallel_size=None,
        ),
        train=dataclasses.replace(settings, global_batch_size=batch),
    )
    validate(config, num_ranks)
    return config
