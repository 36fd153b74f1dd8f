"""Train a GPT: `torchrun train.py config=NAME.yaml section.key=value ...`.

One step is in `training/step.py`, all communication in `parallel/`.
"""

import logging
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace

from configs import Config, load_config, machine_errors_as_user_errors
from configs.launch import print_after_launcher

if __name__ == "__main__":
    # Before importing torch, which takes seconds, so that a mistyped key is reported at once.
    CONFIG = load_config(sys.argv[1:])

from torch.distributed.elastic.multiprocessing.errors import record

from data import find_text, prepare_corpus
from data.evaluation import EvaluationSet
from data.tasks import TaskSet
from model import build_model, num_parameters
from parallel import Mesh, close_mesh
from tracking.console import set_up_logging
from tracking.metrics import RunLog, last_step
from tracking.profiling import Profiler
from tracking.summary import outcome, report_end, report_start
from training.checkpoint_writer import CheckpointWriter
from training.divergence import check_replicas, roll_back, too_many_skipped
from training.evaluation import evaluate, task_sets, validation_set
from training.hardware import choose_precision, set_up_allocator, use_deterministic_kernels
from training.optimizer import build_optimizer
from training.resume import chosen_steps, find_own_checkpoint, find_source, limit_steps, resume
from training.run_folder import RunFolder, exit_on_error, require_same_on_all_ranks
from training.signals import StopSignals
from training.state import Run, RunState, mesh_from_config, training_batches
from training.step import steps_that_fit, train_step
from training.watchdog import Watchdog

logger = logging.getLogger("microtron")


def train(config: Config, mesh: Mesh, folder: RunFolder, signals: StopSignals) -> int:
    """Train from the newest checkpoint, or from scratch, to the last step; return the exit code."""
    run, state = start(config, mesh, folder)
    config = run.config  # train.time_limit_s may have reduced the number of steps
    began, last, stop = state, last_step(config), None
    folder.step = state.step
    check_replicas(run, state)
    if state.step >= last:
        folder.write_exit(*outcome(config, state, stop))
        return report_end(run, began, state, stop)

    report_start(run, state)
    signals.training()
    scored = validation_set(run), task_sets(config, mesh, run.corpus.tokenizer)
    with Watchdog(run) as watchdog:
        while state.step < last and stop is None:
            state, stop = train_until_stop_or_rollback(run, state, scored, signals, watchdog)
            folder.step = state.step  # a rollback goes back
    return report_end(run, began, state, stop)


def start(config: Config, mesh: Mesh, folder: RunFolder) -> tuple[Run, RunState]:
    """Prepare text, model and optimizer, and load the newest checkpoint or `run.init_from`."""
    cache = config.data.cache_directory
    with ExitStack() as files:
        with machine_errors_as_user_errors(f"prepare the corpus in data.cache_directory={cache}"):
            text = find_text(config.data)
            require_same_on_all_ranks(mesh, text.fingerprint, "the text")
            # Refuse a checkpoint of another text before tokenizing, which may take hours.
            checkpoint = find_own_checkpoint(config, text.fingerprint, mesh, folder)
            source = find_source(config, mesh, files) if checkpoint is None else None
            if checkpoint is not None:
                folder.step = folder.saved_step = checkpoint.step
            length = config.model.seq_length
            corpus = prepare_corpus(config.data, length, mesh.local_rank, text)
            require_same_on_all_ranks(mesh, corpus.fingerprint, "the tokenized text")
        precision = choose_precision(config, mesh, checkpoint)
        set_up_allocator(mesh, num_parameters(config.model, config.data.padded_vocab_size))
        model = build_model(config, mesh)
        optimizer = build_optimizer(model, config.optimizer)
        run = Run(config, mesh, folder, corpus, model, optimizer, precision)
        steps = chosen_steps(checkpoint)
        if steps is None and config.train.time_limit_s is not None:
            steps = steps_that_fit(run, config.train.time_limit_s)
        run = replace(run, config=limit_steps(config, steps))
        return run, resume(run, checkpoint, source)


def train_until_stop_or_rollback(
    run: Run,
    state: RunState,
    scored: tuple[EvaluationSet, list[TaskSet]],
    signals: StopSignals,
    watchdog: Watchdog,
) -> tuple[RunState, signal.Signals | None]:
    """Train to the last step, a signal, or a rollback; return the state to continue from."""
    config, folder, last = run.config, run.folder, last_step(run.config)
    documents, tasks = scored
    evaluation_interval = config.evaluate.interval if documents.num_targets or tasks else 0
    batches = training_batches(run, state)
    folder.begin(run.corpus.tokenizer_path)
    stop = signals.agree_now(run.mesh)
    watchdog.begin()
    with (
        batches,
        RunLog(run, state) as log,
        CheckpointWriter(run, state) as saves,
        Profiler(config.logging.profile_steps, folder.profile, run.mesh) as profiler,
        folder.recording_failure(),
    ):
        while stop is None:
            is_due = due(state.step, evaluation_interval, config.train.train_steps)
            if is_due and log.lacks_evaluation:
                saves.commit_if_written(wait=True)  # an evaluation may be long, or fail
                log.evaluation(state, evaluate(run, state, documents, tasks, signals))
                stop = signals.agree_now(run.mesh)
            if stop is not None or state.step >= last:
                break
            with profiler.step(state.step + 1):
                result = train_step(run, state, batches, signals)
            state = state.advance(result, config.train.global_batch_size)
            folder.step, stop = state.step, result.stop
            log.step(state, result)
            if due(state.step, config.debug.audit_interval):
                check_replicas(run, state)
            saves.commit_if_written()
            if too_many_skipped(state, config.train):
                saves.commit_if_written(wait=True)
                return roll_back(run, state), None
            is_last = state.step >= last
            if is_last:
                folder.announce_last_save()
            if is_last or due(state.step, config.checkpoint.save_interval):
                saves.begin(state, background=config.checkpoint.async_save and not is_last)
        folder.announce_last_save()
        saves.end(state)
        folder.write_exit(*outcome(config, state, stop))
        saves.prune()
    return state, stop


def due(step: int, interval: int, at_end: int | None = None) -> bool:
    """Whether `step` is a multiple of `interval`, or `at_end`; an interval of 0 means never."""
    return interval > 0 and (step % interval == 0 or step == at_end)


@record
def main(config: Config) -> int:
    """Join the other ranks, lock the run folder, and train; return the exit code."""
    signals = StopSignals()
    if config.debug.deterministic:
        use_deterministic_kernels()
    mesh = mesh_from_config(config)
    set_up_logging(mesh.world.rank)
    with exit_on_error(), RunFolder(config, mesh) as folder:
        code = train(config, mesh, folder, signals)
    if code and mesh.world.rank == 0:  # stopped by a signal
        print_after_launcher(f"resume with\n  {folder.resume_command()}")
    # Not after an error: closing waits for peers, which may be in a collective.
    close_mesh()
    return code


if __name__ == "__main__":
    sys.exit(main(CONFIG))
