"""Resume a run from its newest checkpoint, or start it from another run's (`run.init_from`)."""

import logging
import uuid
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from checkpoints import (
    Checkpoint,
    CheckpointError,
    find_checkpoint,
    load_tensors,
    require_fingerprint,
)
from configs import RENAMED, Config, DataConfig, OptimizerConfig, flatten
from configs.errors import format_value
from configs.init_from import model_of_stage, saved_model, source_checkpoints
from data import Tokenizer, load_tokenizer
from parallel import Mesh, any_rank, gather_json
from training.hardware import report_other_hardware
from training.optimizer import (
    WEIGHTS,
    learning_rate,
    set_num_updates,
    training_names,
    training_tensors,
)
from training.run_folder import RunFolder
from training.state import RECIPE_VERSIONS, Run, RunState, recorded_wandb_id

logger = logging.getLogger("microtron")

# Settings and sections that a resume may change; any other change would make it another run.
_MAY_CHANGE = (
    *("parallel.", "run.", "logging.", "evaluate.", "checkpoint.", "optimizer.", "debug."),
    *("train.micro_batch_size", "train.compile", "train.device", "train.num_threads"),
    *("train.train_steps", "train.precision", "train.loss_spike_threshold_nats"),
    *("train.max_consecutive_skips", "train.max_rollbacks", "data.cache_directory"),
    # Locations of text and tokenizer, whose fingerprints are compared instead.
    *("data.tokenizer", "data.bos_token", "data.eos_token", "data.source", "data.path"),
    *("data.text_field", "data.hub_config", "data.hub_split", "data.hub_revision"),
    *("data.validation_path", "data.sources["),
)
_MAY_CHANGE_SECTIONS = tuple(key for key in _MAY_CHANGE if key.endswith((".", "[")))
# What an imported model fixes; it has no text yet.
_MODEL_KEYS = ("model.", "data.vocab_size")
_INIT_KEYS = ("run.init_from", "run.init_optimizer")
_OPTIMIZER = "optimizer.name"  # decides which moments there are
_RESUME_RECIPES = ("dropout_masks", "sample_order")
_CONTENTS = {
    "text_fingerprint": "the text of data.path or data.sources",
    "tokenizer_fingerprint": "the tokenizer",
    "data_fingerprint": "the tokenized text",
}
# Beginnings of the settings that say where the contents are.
_PLACES = {
    "text_fingerprint": ("data.source", "data.path", "data.text_field", "data.hub_", "data.valid"),
    "tokenizer_fingerprint": ("data.tokenizer", "data.bos_token", "data.eos_token"),
}


def find_own_checkpoint(
    config: Config, text_fingerprint: str, mesh: Mesh, folder: RunFolder
) -> Checkpoint | None:
    """The newest intact checkpoint of the run folder, or None.

    Raises CheckpointError if there is none with `run.resume=must`, or if its settings, text or
    tokenizer differ, as far as known before tokenizing.
    """
    checkpoint = None if folder.starts_over else find_checkpoint(folder.checkpoints, mesh)
    if checkpoint is None:
        if config.run.resume == "must":
            raise CheckpointError(
                f"run.resume=must, but there is no checkpoint in {folder.checkpoints}; "
                "check run.name and run.directory, or use run.resume=auto"
            )
        return None
    is_imported = checkpoint.state["data_fingerprint"] is None
    config = limit_steps(config, chosen_steps(checkpoint))
    _require_same_settings(checkpoint, config, is_imported=is_imported)
    if not is_imported:
        _require_same_recipes(checkpoint)
    found = {"text_fingerprint": text_fingerprint}
    if config.data.tokenizer is not None:
        found["tokenizer_fingerprint"] = _given_tokenizer(config.data).fingerprint
    _require_same_contents(checkpoint, config, found)
    return checkpoint


def chosen_steps(checkpoint: Checkpoint | None) -> int | None:
    """The number of steps that the run chose for `train.time_limit_s` when it began, if any."""
    stored = {} if checkpoint is None else checkpoint.state["config"]
    return stored["train.train_steps"] if stored.get("train.time_limit_s") else None


def limit_steps(config: Config, steps: int | None) -> Config:
    """With at most `steps` steps, if they are known and `train.time_limit_s` is set."""
    if steps is None or config.train.time_limit_s is None:
        return config
    train = replace(config.train, train_steps=min(steps, config.train.train_steps))
    return replace(config, train=train)


def find_source(config: Config, mesh: Mesh, stack: ExitStack) -> Checkpoint | None:
    """The checkpoint of `run.init_from`, readable until `stack` closes; None if that is not set.

    Raises UserError if it is damaged, or of another model or tokenizer.
    """
    if config.run.init_from is None:
        return None
    folder, step = source_checkpoints(config.run.init_from)
    prefix = "" if config.run.init_optimizer else WEIGHTS
    source = find_checkpoint(folder, mesh, step, prefix=prefix, hold_until=stack)
    changed = f"run.init_from={config.run.init_from} has changed since this launch began; try again"
    if source is None:
        raise CheckpointError(changed)
    if model_of_stage(saved_model(source.state["config"]), config.model) != config.model:
        raise CheckpointError(changed)
    require_fingerprint(source, "tokenizer", _given_tokenizer(config.data).fingerprint)
    return source


def _given_tokenizer(data: DataConfig) -> Tokenizer:
    assert data.tokenizer is not None
    path = Path(data.tokenizer).expanduser()
    return load_tokenizer(path, bos_token=data.bos_token, eos_token=data.eos_token)


def resume(run: Run, checkpoint: Checkpoint | None, source: Checkpoint | None = None) -> RunState:
    """Load the checkpoint that `find_own_checkpoint` found, or begin at step 0.

    The first weights are those of `source`, or random. Raises CheckpointError if the checkpoint has
    other tokens or another tokenizer.
    """
    corpus = run.corpus
    if checkpoint is None:
        known = None if run.folder.starts_over else recorded_wandb_id(run.folder.path)
        state = RunState(wandb_id=gather_json(run.mesh, known or uuid.uuid4().hex[:12])[0])
        return state if source is None else _load_source(run, state, source)
    found = {
        "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
        "data_fingerprint": corpus.fingerprint,
    }
    _require_same_contents(checkpoint, run.config, found)
    if checkpoint.state["data_fingerprint"] is not None:  # an import has no schedule yet
        _report_changes(checkpoint, run.config)
    logger.info("resuming from %s", checkpoint.directory)
    report_other_hardware(run.mesh, checkpoint)
    return load(run, checkpoint)


def load(run: Run, checkpoint: Checkpoint) -> RunState:
    """Fill model and optimizer from a checkpoint of this run; return its state."""
    tensors = training_tensors(run.model, run.optimizer)
    load_tensors(checkpoint, tensors, names=training_names(run.config))
    any_rank(run.mesh, flag=False)  # wait here for slow files: other groups time out sooner
    state = _saved_state(checkpoint)
    set_num_updates(run.optimizer, state.num_updates)
    return state


def _saved_state(checkpoint: Checkpoint) -> RunState:
    progress = checkpoint.state["progress"]
    progress["recent_losses"] = tuple(progress.get("recent_losses", ()))
    progress["skipped_windows"] = tuple(map(tuple, progress.get("skipped_windows", ())))
    return RunState(**progress)


def _load_source(run: Run, state: RunState, source: Checkpoint) -> RunState:
    """Fill the model, and with `run.init_optimizer` the optimizer, from another run."""
    with_moments = run.config.run.init_optimizer
    prefix = "" if with_moments else WEIGHTS
    logger.info("starting with the weights of %s", source.directory)
    tensors = training_tensors(run.model, run.optimizer)
    load_tensors(
        source,
        {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        prefix=prefix,
        names=[name for name in training_names(run.config) if name.startswith(prefix)],
    )
    theirs = _saved_state(source)
    updates = theirs.num_updates if with_moments else 0
    set_num_updates(run.optimizer, updates)
    origin = {
        "run": source.state["config"]["run.name"],
        "step": theirs.step,
        "tokens": theirs.tokens,
        "wandb_id": theirs.wandb_id,
        "origin": theirs.origin,
    }
    return replace(state, origin=origin, initial_updates=updates)


def _settings(checkpoint: Checkpoint, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of a checkpoint and of this launch."""
    # Keys that are newer than the checkpoint had their defaults.
    saved = {RENAMED.get(key, key): value for key, value in checkpoint.state["config"].items()}
    stored, now = flatten(Config()) | saved, flatten(config)
    for settings in (stored, now):  # fingerprints cover a mixture, except for its weights
        sources = settings["data.sources"]
        settings |= {f"data.sources[{i}].path": s["path"] for i, s in enumerate(sources)}
        settings["data.sources"] = [s["weight"] for s in sources] if len(sources) > 1 else []
    return stored, now


def _changed(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Describe each setting that differs, by its key."""
    return {
        key: f"{key}={format_value(now.get(key))} (was {format_value(stored.get(key))})"
        for key in sorted(stored.keys() | now.keys())
        if stored.get(key) != now.get(key)
    }


def _require_same_settings(checkpoint: Checkpoint, config: Config, *, is_imported: bool) -> None:
    """Refuse settings that would make this another run."""
    changed = _changed(*_settings(checkpoint, config))
    if config.train.time_limit_s is None:  # another limit would need another number of steps
        changed.pop("train.time_limit_s", None)
    refused = [text for key, text in changed.items() if not _may_change(key, is_imported)]
    if refused:
        raise CheckpointError(
            f"cannot resume {checkpoint.directory} with {', '.join(refused)}; change it back, or "
            "choose another run.name"
        )


def _may_change(key: str, is_imported: bool) -> bool:
    if is_imported:
        return not key.startswith((*_MODEL_KEYS, *_INIT_KEYS, _OPTIMIZER))
    return key not in ("run.seed", _OPTIMIZER, *_INIT_KEYS) and (
        key in _MAY_CHANGE or key.startswith(_MAY_CHANGE_SECTIONS)
    )


def _report_changes(checkpoint: Checkpoint, config: Config) -> None:
    """Warn if optimizer or precision have changed, or the schedule at this step."""
    stored, now = _settings(checkpoint, config)
    step = checkpoint.state["progress"]["step"]
    for key in _changed(stored, now):
        if key.startswith(("optimizer.", "train.precision")):
            logger.warning("%s=%s differs from the checkpoint's %s", key, now[key], stored[key])
    optimizer = {name: stored[f"optimizer.{name}"] for name in asdict(config.optimizer)}
    train = replace(config.train, train_steps=stored["train.train_steps"])
    old = replace(config, optimizer=OptimizerConfig(**optimizer), train=train)
    if step and learning_rate(step, config) != learning_rate(step, old):
        logger.warning(
            "the schedule has changed (train.train_steps=%d, was %d): the learning rate goes from "
            "%.2e in step %d to %.2e in step %d",
            config.train.train_steps,
            train.train_steps,
            learning_rate(step - 1, old),
            step,
            learning_rate(step, config),
            step + 1,
        )


def _require_same_recipes(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of a Microtron that orders samples or draws masks differently."""
    stored = checkpoint.state.get("recipe_versions", {})
    for name in _RESUME_RECIPES:
        theirs, ours = stored.get(name, 1), RECIPE_VERSIONS[name]
        if theirs != ours:
            raise CheckpointError(
                f"cannot resume {checkpoint.directory}: a Microtron with another recipe_version of "
                f"{name} wrote it ({theirs}, here {ours}); resume with that one, or choose another "
                "run.name"
            )


def _require_same_contents(checkpoint: Checkpoint, config: Config, found: dict[str, str]) -> None:
    """Refuse another text or tokenizer; skip what the checkpoint does not record."""
    changed = _changed(*_settings(checkpoint, config))
    for key, fingerprint in found.items():
        stored = checkpoint.state.get(key)
        if stored in (fingerprint, None):
            continue
        problem = f"has changed since (fingerprint {fingerprint}, was {stored}); restore it"
        if moved := [text for text in changed.values() if text.startswith(_PLACES.get(key, ()))]:
            file = checkpoint.directory.parent.parent / "config.yaml"
            problem = f"is another with {', '.join(moved)}; set them as before, use config={file}"
        raise CheckpointError(
            f"cannot resume {checkpoint.directory}: {_CONTENTS[key]} {problem}, or choose another "
            "run.name"
        )
