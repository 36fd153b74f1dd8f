"""What a run takes over from `run.init_from`: the model and the tokenizer. No torch here.

Once the run has a checkpoint of its own, they come from that, and the source is no longer read.
"""

import glob
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, bad_setting, format_value
from configs.launch import num_restarts
from configs.schema import RENAMED, Config, DataConfig, ModelConfig
from configs.tokenizer_files import TOKENIZER_FILES, expand_path, read_tokenizer

_GIVE = "give a run folder, such as runs/gpt_debug, or one of its checkpoints/step_*"
_OF_THE_TOKENIZER = ("vocab_size", "bos_token", "eos_token")
_MAY_DIFFER = ("seq_length", "hidden_dropout", "attention_dropout")  # no weight depends on these


@dataclass(frozen=True)
class _Source:
    """A checkpoint whose manifest has been read; train.py verifies the tensors."""

    directory: Path
    settings: dict[str, Any]  # of its run, by key
    model: ModelConfig
    num_updates: int  # of the stored moments; 0: there are none


def source_checkpoints(init_from: str) -> tuple[Path, int | None]:
    """Return the folder of checkpoints that `run.init_from` means, and the step if it names one."""
    path = Path(expand_path("run.init_from", init_from))
    if step := re.fullmatch(r"step_(\d{8})", path.name):
        return path.parent, int(step[1])
    return path / "checkpoints", None


def saved_model(settings: Mapping[str, Any]) -> ModelConfig:
    """Return the model in the settings of a checkpoint; keys newer than it have their defaults."""
    named = {RENAMED.get(key, key): value for key, value in settings.items()}
    return ModelConfig(
        **{key.partition(".")[2]: named[key] for key in named if key.startswith("model.")}
    )


def config_of_source(overrides: dict[str, Any]) -> str:
    """Return the file for a launch without config=: of the run itself, else of its source.

    Names the run after the source unless it has a name: runs/base_2 for run.init_from=runs/base.
    """
    folder, step = source_checkpoints(overrides["run.init_from"])
    source = folder.parent
    directory = overrides.setdefault("run.directory", str(source.parent))
    directory = expand_path("run.directory", directory)
    own = Path(directory, overrides.setdefault("run.name", f"{source.name}_2"))
    if _resumes(own, overrides.get("run.resume")):
        return str(own / "config.yaml")
    _newest(folder, step, overrides["run.init_from"])  # a mistyped folder is not a missing file
    return str(source / "config.yaml")


def inherit(config: Config, given: Collection[str]) -> Config:
    """Fill in the model and the tokenizer of `run.init_from`.

    Raises ConfigError if there is none to start from, or if one of the keys in `given`, those that
    the file or the command line sets, has another value.
    """
    run = config.run
    if run.init_from is None:
        if run.init_optimizer:
            fix = "set run.init_from, or run.init_optimizer=false"
            raise bad_setting("run.init_optimizer", True, f"has no effect alone; {fix}")
        return config
    own = Path(run.directory, run.name or "")
    folder, step = source_checkpoints(run.init_from)
    if folder.parent.resolve() == own.resolve():
        fix = "choose another run.name, or leave run.init_from out to resume"
        raise bad_setting("run.init_from", run.init_from, f"is the folder of this run; {fix}")
    resumes = _resumes(own, run.resume)
    folder, step = (own / "checkpoints", None) if resumes else (folder, step)
    source = _newest(folder, step, run.init_from)
    if run.init_optimizer and not resumes and source.num_updates == 0:
        problem = f"needs optimizer state, but {source.directory} has none (no update yet)"
        raise bad_setting("run.init_optimizer", True, f"{problem}; leave it out")
    its_optimizer = source.settings.get("optimizer.name", "adamw")
    if run.init_optimizer and not resumes and its_optimizer != config.optimizer.name:
        problem = f"needs optimizer.name={its_optimizer}, as in {source.directory}, instead of "
        problem += f"{config.optimizer.name}; change that, or set run.init_optimizer=false"
        raise bad_setting("run.init_optimizer", True, problem)
    changed = [leaf for leaf in _MAY_DIFFER if f"model.{leaf}" in given]
    source = replace(source, model=model_of_stage(source.model, config.model, changed))
    _require_equal(config, given, source)
    theirs: dict[str, Any] = {k: source.settings.get(f"data.{k}") for k in _OF_THE_TOKENIZER}
    data = replace(config.data, **theirs)
    data = replace(data, tokenizer=_tokenizer(data, source.directory))
    run = replace(run, init_from=str(Path(run.init_from)))
    return replace(config, run=run, model=source.model, data=data)


def _resumes(own: Path, resume: str | None) -> bool:
    """Whether the run has a checkpoint, and does not start over."""
    # A restart continues the work of a launch with run.resume=never.
    return (resume != "never" or num_restarts() > 0) and bool(_directories(own / "checkpoints"))


def _directories(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of a folder by step, the newest first."""
    names = sorted(glob.glob(f"step_{'[0-9]' * 8}", root_dir=folder), reverse=True)
    return {int(name[5:]): folder / name for name in names if (folder / name).is_dir()}


def _newest(folder: Path, step: int | None, init_from: str) -> _Source:
    """Return the newest checkpoint of a folder with a readable manifest, or that of `step`."""
    found, problem = _directories(folder), ""
    for number, directory in found.items():
        try:
            if step in (None, number):
                return _read(directory)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{directory}/manifest.json: {type(error).__name__}: {error}"
            problem = problem or f"cannot be read: {reason}; restore it, or move it away"
    if found and not problem:
        problem = f"does not exist; {folder} has steps {', '.join(map(str, found))}"
    problem = problem or f"has no checkpoint: there is none in {folder}; {_GIVE}"
    raise bad_setting("run.init_from", init_from, problem)


def _read(directory: Path) -> _Source:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    settings, progress = manifest["state"]["config"], manifest["state"]["progress"]
    num_updates = progress["step"] - progress.get("skipped_steps", 0)
    num_updates += progress.get("initial_updates", 0)
    if all(name.startswith("parameters.") for name in manifest["tensors"]):
        num_updates = 0
    return _Source(directory, settings, saved_model(settings), num_updates)


def _require_equal(config: Config, given: Collection[str], source: _Source) -> None:
    """Raise ConfigError if a given setting of the model or the tokenizer differs."""
    theirs, pairs = source.model, []
    stated = {k: v for k, v in asdict(config.model).items() if f"model.{k}" in given}
    sizes, their_sizes = _sizes(replace(theirs, **stated)), _sizes(theirs)
    for leaf, value in stated.items():
        its = getattr(theirs, leaf)
        if value != its and sizes[leaf] != their_sizes[leaf]:
            pairs.append((f"model.{leaf}", value, its))
    for leaf in _OF_THE_TOKENIZER:
        value, its = getattr(config.data, leaf), source.settings.get(f"data.{leaf}")
        if value not in (None, its):
            pairs.append((f"data.{leaf}", value, its))
    if pairs:
        changed = (f"{key}={format_value(v)} (was {format_value(its)})" for key, v, its in pairs)
        problem = f"cannot continue from {source.directory} with {', '.join(changed)}"
        raise ConfigError(f"{problem}; leave that out, or use another run.init_from", pairs[0][0])


def model_of_stage(
    theirs: ModelConfig, given: ModelConfig, changed: Collection[str] = _MAY_DIFFER
) -> ModelConfig:
    """Return the model of a source with those settings of `given` that a later stage may change."""
    if theirs.position_embedding_type == "learned_absolute":  # its table has a row per position
        changed = set(changed) - {"seq_length"}
    return replace(theirs, **{leaf: getattr(given, leaf) for leaf in changed})


def _sizes(model: ModelConfig) -> dict[str, Any]:
    """Return the settings with the values that null stands for."""
    named = {
        "num_query_groups": model.num_groups,
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_dim,
    }
    return asdict(model) | named


def _tokenizer(data: DataConfig, directory: Path) -> str:
    """Return the tokenizer in the run folder of a checkpoint, or the one given if it is equal."""
    folder = directory.parent.parent
    found = next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)
    if found is None and data.tokenizer is None:
        problem = f"null, but {folder} has no {' or '.join(TOKENIZER_FILES)}"
        raise ConfigError(f"data.tokenizer={problem}; give the tokenizer of {directory}")
    if found is None or data.tokenizer is None:
        return data.tokenizer or str(found)
    given, theirs = (
        read_tokenizer(path, "data.tokenizer", data.bos_token, data.eos_token)
        for path in (Path(expand_path("data.tokenizer", data.tokenizer)), found)
    )
    if replace(given, path=found) != theirs:
        fix = "leave it out, or start from another run"
        raise bad_setting("data.tokenizer", data.tokenizer, f"is not the tokenizer {found}; {fix}")
    return data.tokenizer
