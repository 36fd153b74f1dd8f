"""Where a run is, and how it is taken up again.

Randomness and the order of samples are functions of these numbers, so they, the weights and the
optimizer's moments are all that decides the next step.
"""

import logging
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch.optim import AdamW

from checkpoints import Checkpoint, CheckpointError, find_checkpoint, load_tensors
from configs import RENAMED, Config, OptimizerConfig, exit_with_error, flatten
from data import BatchLoader, Corpus, load_tokenizer
from model import GPT
from parallel import DeviceError, Mesh, gather_json, init_mesh
from training.optimizer import learning_rate, set_num_updates, training_tensors
from training.run_folder import RunFolder

logger = logging.getLogger("microtron")

# Versions of the functions that define a run, whose values tests/test_golden.py pins. Raise one if
# its function changes, not only its rounding: its older checkpoints are then refused.
RECIPE_VERSIONS = {
    "initial_weights": 1,
    "dropout_masks": 1,
    "sample_order": 1,  # rows and packing included
    "sampled_tokens": 1,
}
_DECIDE_THE_NEXT_STEP = ("dropout_masks", "sample_order")
# Where text comes from. Fingerprints tell whether it is the same text.
_PLACES_OF_TEXT = (
    "data.source",
    "data.path",
    "data.text_field",
    "data.hub_config",
    "data.hub_split",
    "data.hub_revision",
    "data.validation_path",
)
# What may differ between a checkpoint and the run that continues it. All else would make it another
# run.
_MAY_CHANGE = ("parallel.", "run.", "logging.", "evaluate.", "checkpoint.", "optimizer.", "debug.")
_MAY_CHANGE_KEYS = (
    "train.micro_batch_size",
    "train.compile",
    "train.device",
    "train.num_threads",
    "train.train_steps",
    "train.precision",
    "train.max_consecutive_skips",
    "train.max_rollbacks",
    "train.loss_spike_threshold_nats",
    "data.cache_directory",
    "data.tokenizer",  # what is in it is compared by its fingerprint
    *_PLACES_OF_TEXT,
)
# Of an imported model, which has read no text yet, all else is still to be chosen.
_OF_THE_MODEL = ("model.", "data.vocab_size")


@dataclass(frozen=True)
class StepResult:
    """What one step was."""

    loss: float  # nats per target token, over the whole global batch
    z_loss: float  # what train.z_loss_coeff adds to it in training
    grad_norm: float  # before clipping
    learning_rate: float
    num_targets: int  # target tokens of the whole global batch
    mean_row_length: float  # over targets, of their row, or document if those are kept apart
    elapsed_s: float
    why_skipped: str | None  # why its update was left out; None if it was not


@dataclass(frozen=True)
class RunState:
    """Progress of a run."""

    NUM_RECENT: ClassVar[int] = 32

    wandb_id: str
    step: int = 0  # finished steps
    tokens: int = 0  # target tokens so far
    consumed_samples: int = 0  # sequences so far, over all ranks
    skipped_steps: int = 0  # those of `step` whose update was left out
    skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()  # of the last NUM_RECENT updates
    # What going back to a checkpoint has passed over: its step, and samples from .. before.
    skipped_windows: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_updates(self) -> int:
        """Updates of the weights, which AdamW counts."""
        return self.step - self.skipped_steps

    @property
    def last_good_step(self) -> int:
        """The step before those that were skipped last; `step` itself if it was not skipped."""
        return self.step - self.skipped_in_a_row

    def advance(self, result: StepResult, num_samples: int) -> "RunState":
        """The state after one more step."""
        skipped = result.why_skipped is not None
        losses = (*self.recent_losses, result.loss)[-self.NUM_RECENT :]
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + result.num_targets,
            consumed_samples=self.consumed_samples + num_samples,
            skipped_steps=self.skipped_steps + skipped,
            skipped_in_a_row=self.skipped_in_a_row + 1 if skipped else 0,
            recent_losses=self.recent_losses if skipped else losses,
        )


@dataclass(frozen=True)
class Run:
    """What a run is made of, from start to end."""

    config: Config
    mesh: Mesh
    folder: RunFolder
    corpus: Corpus
    model: GPT
    optimizer: AdamW


def mesh_from_config(config: Config, *, decoding: bool = False) -> Mesh:
    """Join the other ranks, laid out as the configuration says.

    To decode is to read one position at a time, of which there is no sequence shard, and whose
    chains of operations are not worth a kernel.
    """
    parallel = config.parallel
    try:
        return init_mesh(
            parallel.tensor_model_parallel_size,
            parallel.sequence_parallel and not decoding,
            "none" if decoding else parallel.tp_comm_overlap,
            config.train.compile and config.model.has_chains and not decoding,
            parallel.shared_memory,
            # While one rank waits for a file, the others wait for it. The watchdog comes first.
            timeout_s=1.25 * config.run.file_timeout_s,
            device=config.train.device,
        )
    except DeviceError as error:
        exit_with_error(str(error))


def find_own_checkpoint(
    config: Config, text_fingerprint: str, mesh: Mesh, folder: RunFolder
) -> Checkpoint | None:
    """The newest whole checkpoint of the run folder; None if there is none.

    Raises CheckpointError if there is none and `run.resume=must`, or if it is of another run: with
    other settings, text or tokenizer, as far as can be known before the text is tokenized.
    """
    checkpoint = None if folder.starts_over else find_checkpoint(folder.checkpoints, mesh)
    if checkpoint is not None:
        _require_same_settings(checkpoint, config)
        _require_same_recipes(checkpoint)
        found = {"text_fingerprint": text_fingerprint}
        if config.data.tokenizer is not None:
            tokenizer = load_tokenizer(Path(config.data.tokenizer).expanduser())
            found["tokenizer_fingerprint"] = tokenizer.fingerprint
        _require_same_fingerprints(checkpoint, found)
    elif config.run.resume == "must":
        raise CheckpointError(
            f"run.resume=must, but there is no checkpoint in {folder.checkpoints}; "
            "check run.name and run.directory, or use run.resume=auto"
        )
    return checkpoint


def wandb_id_file(folder: Path) -> Path:
    """Return the file in which rank 0 records the id of the wandb run."""
    return folder / "wandb" / "id"


def recorded_wandb_id(folder: Path) -> str | None:
    """Return the wandb id that an earlier launch in this folder has recorded, if any."""
    file = wandb_id_file(folder)
    return (file.read_text() or None) if file.exists() else None


def resume(run: Run, checkpoint: Checkpoint | None) -> RunState:
    """Load the checkpoint that `find_own_checkpoint` has found, or begin.

    Raises CheckpointError if its tokens or its tokenizer are not the run's.
    """
    if checkpoint is None:
        known = None if run.folder.starts_over else recorded_wandb_id(run.folder.path)
        return RunState(wandb_id=gather_json(run.mesh, known or uuid.uuid4().hex[:12])[0])
    corpus = run.corpus
    found = {
        "tokenizer_fingerprint": corpus.tokenizer.fingerprint,
        "data_fingerprint": corpus.fingerprint,
    }
    _require_same_fingerprints(checkpoint, found)
    logger.info("resuming from %s", checkpoint.directory)
    return load(run, checkpoint)


def load(run: Run, checkpoint: Checkpoint) -> RunState:
    """Fill model and optimizer from a checkpoint of this run; returns its state."""
    load_tensors(checkpoint, training_tensors(run.model, run.optimizer), run.mesh)
    progress = checkpoint.state["progress"]
    # JSON has lists only.
    for name in ("recent_losses", "skipped_windows"):
        progress[name] = tuple(
            tuple(item) if isinstance(item, list) else item for item in progress.get(name, ())
        )
    state = RunState(**progress)
    set_num_updates(run.optimizer, state.num_updates)
    return state


def training_batches(run: Run, state: RunState) -> BatchLoader:
    """This rank's batches from the state on."""
    mesh = run.mesh
    return BatchLoader(
        run.corpus,
        run.config,
        consumed_samples=state.consumed_samples,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        tp_size=mesh.tp.size,
        device_is_cuda=mesh.device.type == "cuda",
    )


def _may_change(key: str, is_imported: bool) -> bool:
    if is_imported:
        return not key.startswith(_OF_THE_MODEL)
    return key != "run.seed" and (key.startswith(_MAY_CHANGE) or key in _MAY_CHANGE_KEYS)


def _require_same_settings(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse settings that would make the continued run another one, naming the keys."""
    # A key that came after the checkpoint had, in effect, its default.
    saved = {RENAMED.get(key, key): v for key, v in checkpoint.state["config"].items()}
    stored, now = flatten(Config()) | saved, flatten(config)
    for settings in (stored, now):  # of a mixture, fingerprints tell all but the weights
        settings["data.sources"] = _weights(settings["data.sources"])
    changed = [key for key in sorted(stored.keys() | now.keys()) if stored.get(key) != now.get(key)]
    is_imported = checkpoint.state["data_fingerprint"] is None
    refused = [key for key in changed if not _may_change(key, is_imported)]
    if refused:
        differences = ", ".join(f"{key}={now.get(key)} (was {stored.get(key)})" for key in refused)
        raise CheckpointError(
            f"cannot resume {checkpoint.directory} with {differences}; change it back, or "
            "choose another run.name"
        )
    if is_imported:
        return
    for key in changed:
        if key.startswith(("optimizer.", "train.precision")):
            logger.warning("%s=%s differs from the checkpoint's %s", key, now[key], stored[key])
    _report_learning_rate(checkpoint.state["progress"]["step"], config, stored)


def _report_learning_rate(step: int, config: Config, stored: dict[str, Any]) -> None:
    """Say from where to where a new schedule takes the learning rate."""
    fields = asdict(config.optimizer)
    optimizer = OptimizerConfig(**{name: stored[f"optimizer.{name}"] for name in fields})
    old_steps = stored["train.train_steps"]
    train = replace(config.train, train_steps=old_steps)
    old = replace(config, optimizer=optimizer, train=train)
    if step and learning_rate(step, config) != learning_rate(step, old):
        logger.warning(
            "the schedule has changed (train.train_steps=%d, was %d): the learning rate goes from "
            "%.2e in step %d to %.2e in step %d",
            config.train.train_steps,
            old_steps,
            learning_rate(step - 1, old),
            step,
            learning_rate(step, config),
            step + 1,
        )


def _weights(sources: list[dict[str, Any]]) -> list[float]:
    return [source["weight"] for source in sources] if len(sources) > 1 else []


def _require_same_recipes(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose run would go on with other samples or masks."""
    if checkpoint.state["data_fingerprint"] is None:  # of an imported model, which has begun none
        return
    stored = checkpoint.state.get("recipe_versions", {})
    for name in _DECIDE_THE_NEXT_STEP:
        theirs, ours = stored.get(name, 1), RECIPE_VERSIONS[name]
        if theirs != ours:
            raise CheckpointError(
                f"cannot resume {checkpoint.directory}: its recipe_version of {name} is {theirs}, "
                f"this Microtron has {ours}; resume with the Microtron that wrote it, or choose "
                "another run.name"
            )


_CONTENTS = {
    "text_fingerprint": "the text of data.path or data.sources",
    "tokenizer_fingerprint": "the tokenizer",
    "data_fingerprint": "the tokenized text",
}


def _require_same_fingerprints(checkpoint: Checkpoint, found: dict[str, str]) -> None:
    """Refuse another text or tokenizer; a checkpoint that does not tell is not compared."""
    for key, fingerprint in found.items():
        stored = checkpoint.state.get(key)
        if stored not in (fingerprint, None):
            raise CheckpointError(
                f"cannot resume {checkpoint.directory}: {_CONTENTS[key]} has changed since "
                f"(fingerprint {fingerprint}, was {stored}); restore it, or choose another run.name"
            )
