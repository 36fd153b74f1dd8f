"""Train a GPT: `torchrun train.py config=NAME.yaml section.key=value ...`.

The story of a run. What a step does is in `train_step`; where the ranks talk is in `parallel/`.
"""

import logging
import signal
import sys
import time

from configs import (
    Config,
    UserError,
    exit_with_error,
    load_config,
    machine_errors_as_user_errors,
)

if __name__ == "__main__":
    # Before torch is imported, which takes seconds, so that a mistyped key is answered at once.
    CONFIG = load_config(sys.argv[1:])

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from audit import audit
from bad_numbers import roll_back, too_many_skipped, why_to_skip
from console import set_up_logging
from data import BatchLoader, prepare_corpus, text_fingerprint
from evaluation import evaluate, held_out
from hardware import set_up_allocator, use_deterministic_kernels
from metrics import RunLog, last_step
from model import build_model, num_parameters
from optimizer import apply_update, build_optimizer, learning_rate, leave_out_update
from parallel import (
    DropoutStream,
    Mesh,
    clip_gradients,
    close_mesh,
    lost_connection,
    move_to,
    set_gradient_sync,
    sum_over,
    sum_partial_gradients,
)
from profiling import Profiler
from run_folder import RunFolder, require_same_on_all_ranks
from run_state import (
    Run,
    RunState,
    StepResult,
    find_own_checkpoint,
    join_mesh,
    resume,
    training_batches,
)
from saving import Saving
from stopping import FatalError, StopSignals
from summary import outcome, report_end, report_start
from watchdog import Watchdog

logger = logging.getLogger("microtron")


def train(config: Config, mesh: Mesh, folder: RunFolder, signals: StopSignals) -> int:
    """Train from the newest checkpoint, or the start, to the last step; returns the exit code."""
    run, state = start(config, mesh, folder)
    last, began = last_step(config), state
    folder.step = state.step
    audit(run, state)
    if state.step >= last:
        folder.write_exit(*outcome(config, state, stop=None))
        return report_end(run, began, state, stop=None)

    report_start(run, state)
    signals.training()
    stop: signal.Signals | None = None
    while state.step < last and stop is None:
        state, stop = train_from(run, state, signals)
    return report_end(run, began, state, stop)


def train_from(
    run: Run, state: RunState, signals: StopSignals
) -> tuple[RunState, signal.Signals | None]:
    """Train to the last step, to a signal, or to a rollback, from whose state to train on."""
    config, folder, last = run.config, run.folder, last_step(run.config)
    documents = held_out(run)
    evaluation_interval = config.evaluate.interval if documents.num_targets else 0
    batches = training_batches(run, state)
    folder.begin(run.corpus.tokenizer_path)
    stop: signal.Signals | None = None
    with (
        batches,
        RunLog(run, state) as log,
        Saving(run, state) as saving,
        Profiler(config.logging.profile_steps, folder.profile, run.mesh) as profiler,
        Watchdog(run),
        folder.recording_failure(),
    ):
        while state.step < last and not (stop := signals.agreed(run.mesh)):
            with profiler.step(state.step + 1):
                result = train_step(run, state, batches)
            state = state.advance(result, config.train.global_batch_size)
            folder.step = state.step
            log.step(state, result)
            if due(state.step, evaluation_interval, at_end=config.train.train_steps):
                log.evaluation(state, evaluate(run, state, documents))
            if due(state.step, config.debug.audit_interval):
                audit(run, state)
            saving.settle()
            if due(state.step, config.checkpoint.save_interval):
                saving.begin(state, background=config.checkpoint.async_save)
            if too_many_skipped(state, config.train):
                saving.settle(wait=True)
                return roll_back(run, state), None
        folder.announce_last_save()
        saving.end(state)
        folder.write_exit(*outcome(config, state, stop))
        saving.prune()
    return state, stop


def start(config: Config, mesh: Mesh, folder: RunFolder) -> tuple[Run, RunState]:
    """Prepare text, model and optimizer, and take up the run where it was left."""
    cache = config.data.cache_directory
    with machine_errors_as_user_errors(f"prepare the corpus in data.cache_directory={cache}"):
        text = text_fingerprint(config.data)
        require_same_on_all_ranks(mesh, text, "the text")
        # Compared with the run's before it is tokenized, which may take hours.
        checkpoint = find_own_checkpoint(config, text, mesh, folder)
        corpus = prepare_corpus(config.data, config.model.seq_length, mesh.local_rank)
        require_same_on_all_ranks(mesh, corpus.fingerprint, "the tokenized text")
    set_up_allocator(mesh, num_parameters(config.model, config.data.vocab_size))
    model = build_model(config, mesh)
    optimizer = build_optimizer(model, config.optimizer)
    run = Run(config, mesh, folder, corpus, model, optimizer)
    return run, resume(run, checkpoint)


def train_step(run: Run, state: RunState, batches: BatchLoader) -> StepResult:
    """One update of the weights from the next global batch.

    The loss of a step is the sum over its target tokens divided by their number, over all
    micro-batches and dp ranks: the number is known before the first backward, so every gradient is
    a plain sum.
    """
    started_at = time.perf_counter()
    config, mesh, model = run.config, run.mesh, run.model
    batch = next(batches)
    num_targets = sum_over(mesh.dp, move_to(torch.tensor(batch.num_targets), mesh.device))
    sums = torch.zeros(3, dtype=torch.float64, device=mesh.device)
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        is_last = number == len(batch.micro_batches)
        set_gradient_sync(model, is_last or config.parallel.gradient_sync == "micro_batch")
        masks = DropoutStream(
            config.run.seed, state.step, tuple(micro_batch.sample_indices.tolist())
        )
        losses = model(
            **micro_batch.inputs(mesh.device),
            stream=masks,
            z_loss_coeff=config.train.z_loss_coeff,
        )
        (losses.objective / num_targets).backward()
        sums[:2] += torch.stack([losses.cross_entropy, losses.log_z_squared]).detach()
        sums[2] += micro_batch.sum_of_lengths
    sum_partial_gradients(model, mesh)
    grad_norm = move_to(clip_gradients(model, config.optimizer.clip_grad, mesh), "cpu").item()
    means = move_to(sum_over(mesh.dp, sums) / num_targets, "cpu").tolist()
    mean_loss, mean_log_z_squared, mean_row_length = means
    rate = learning_rate(state.step, config)
    why_skipped = why_to_skip(mean_loss, grad_norm, state, config.train, mesh)
    if why_skipped is None:
        apply_update(run.optimizer, rate)
    else:
        leave_out_update(run.optimizer)
    return StepResult(
        loss=mean_loss,
        z_loss=config.train.z_loss_coeff * mean_log_z_squared,
        grad_norm=grad_norm,
        learning_rate=rate,
        num_targets=int(move_to(num_targets, "cpu")),
        mean_row_length=mean_row_length,
        elapsed_s=time.perf_counter() - started_at,
        why_skipped=why_skipped,
    )


def due(step: int, interval: int, at_end: int | None = None) -> bool:
    """Whether what is done every `interval` steps (0: never), and at the end, is due."""
    return interval > 0 and (step % interval == 0 or step == at_end)


@record
def main(config: Config) -> int:
    """Join the other ranks, lock the run folder, and train."""
    signals = StopSignals()
    if config.debug.deterministic:
        use_deterministic_kernels()
    mesh = join_mesh(config)
    set_up_logging(mesh.world.rank)
    try:
        with RunFolder(config, mesh) as folder:
            code = train(config, mesh, folder, signals)
    except UserError as error:
        exit_with_error(str(error))
    except FatalError as error:
        exit_with_error(str(error), error.exit_code)
    except RuntimeError as error:
        if (loss := lost_connection(error)) is None:
            raise
        exit_with_error(loss, 1, only_here=True)
    # Only here: with an error under way, a peer may be in a collective, and leaving waits for it.
    close_mesh()
    return code


if __name__ == "__main__":
    sys.exit(main(CONFIG))
