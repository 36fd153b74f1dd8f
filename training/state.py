"""The progress of a run, which with weights and moments determines its next step."""

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch.optim import AdamW

from configs import Config, exit_with_error
from data import Corpus
from data.loader import BatchLoader
from model import GPT
from ops.matmul import Precision
from ops.sdpa import HEAD_ALIGNMENT
from parallel import DeviceError, Mesh, init_mesh
from training.run_folder import RunFolder

# Versions of functions that tests/test_golden.py pins. Raise one if its function changes by more
# than rounding; older checkpoints are then refused.
RECIPE_VERSIONS = {
    "initial_weights": 1,
    "dropout_masks": 1,
    "sample_order": 1,  # rows and packing included
    "sampled_tokens": 1,
}


@dataclass(frozen=True)
class StepResult:
    """The outcome of one step."""

    loss: float  # nats per target token of the global batch
    z_loss: float  # what train.z_loss_coeff adds to it in training
    grad_norm: float  # before clipping
    learning_rate: float
    num_targets: int  # target tokens of the global batch
    mean_row_length: float  # of rows (documents, if masked), averaged over targets
    elapsed_s: float
    why_skipped: str | None  # None: the update was made
    stop: signal.Signals | None = None  # all ranks stop after this step


@dataclass(frozen=True)
class RunState:
    """Progress of a run."""

    NUM_RECENT: ClassVar[int] = 32

    wandb_id: str
    step: int = 0  # finished steps
    tokens: int = 0  # target tokens so far
    consumed_samples: int = 0  # sequences so far, over all ranks
    skipped_steps: int = 0  # those of `step` whose update was skipped
    skipped_in_a_row: int = 0
    recent_losses: tuple[float, ...] = ()  # of the last NUM_RECENT updates
    # For each rollback: step of the checkpoint, first skipped sample, first sample after those.
    skipped_windows: tuple[tuple[int, int, int], ...] = ()
    # With run.init_from: run, step and tokens of the initial weights; updates of initial moments.
    origin: dict[str, Any] | None = None
    initial_updates: int = 0

    @property
    def num_updates(self) -> int:
        """Updates that the moments have seen, which AdamW counts."""
        return self.initial_updates + self.step - self.skipped_steps

    @property
    def last_good_step(self) -> int:
        """The newest step that was not skipped."""
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
    """The objects that live as long as a launch."""

    config: Config
    mesh: Mesh
    folder: RunFolder
    corpus: Corpus
    model: GPT
    optimizer: AdamW
    precision: Precision | None = None  # see `choose_precision`


def mesh_from_config(config: Config, *, decoding: bool = False) -> Mesh:
    """Join the other ranks in the layout of the configuration.

    Decoding processes one position at a time, so it has no sequence shards and is not compiled.
    """
    parallel = config.parallel
    try:
        mesh = init_mesh(
            parallel.tensor_model_parallel_size,
            parallel.sequence_parallel and not decoding,
            "none" if decoding else parallel.tp_comm_overlap,
            config.train.compile and config.model.has_chains and not decoding,
            parallel.shared_memory,
            # Longer than the watchdog lets a rank wait for a file.
            timeout_s=1.25 * config.run.file_timeout_s,
            device=config.train.device,
            num_threads=config.train.num_threads,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            num_chunks=parallel.virtual_pipeline_model_parallel_size or 1,
            context_parallel_size=parallel.context_parallel_size,
            data_parallel_replicate_size=parallel.data_parallel_replicate_size,
            cp_comm_type=parallel.cp_comm_type,
        )
    except DeviceError as error:
        exit_with_error(str(error))
    if (problem := problem_on(mesh.device.type, config)) is not None:
        exit_with_error(problem)
    return mesh


def problem_on(device_type: str, config: Config) -> str | None:
    """What the kernels of a kind of device cannot compute, in one line, or None."""
    head_dim, cp_size = config.model.head_dim, config.parallel.context_parallel_size
    if device_type == "cpu" or cp_size == 1 or head_dim % HEAD_ALIGNMENT == 0:
        return None
    return (
        f"parallel.context_parallel_size={cp_size} on a GPU needs heads whose channels are a "
        f"multiple of {HEAD_ALIGNMENT}, not {head_dim}; set model.kv_channels="
        f"{head_dim + -head_dim % HEAD_ALIGNMENT}, or parallel.context_parallel_size=1"
    )


def training_batches(run: Run, state: RunState) -> BatchLoader:
    """The batches of this rank that follow a state."""
    mesh = run.mesh
    return BatchLoader(
        run.corpus,
        run.config,
        consumed_samples=state.consumed_samples,
        first_step=state.step,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
        tp_size=mesh.tp.size,
        device_is_cuda=mesh.device.type == "cuda",
        cp_rank=mesh.cp.rank,
        cp_size=mesh.cp.size,
    )


def wandb_id_file(folder: Path) -> Path:
    """Return the file in which rank 0 records the id of the wandb run."""
    return folder / "wandb" / "id"


def recorded_wandb_id(folder: Path) -> str | None:
    """Return the wandb id that an earlier launch in this folder has recorded, if any."""
    file = wandb_id_file(folder)
    return (file.read_text() or None) if file.exists() else None
