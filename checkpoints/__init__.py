"""Sharded tensors to files and back: on any layout, atomic, and with damage always detected.

Programs that convert full tensors without a model import `checkpoints.full_tensors`.
"""

from pathlib import Path
from types import CodeType

from checkpoints.load import find_checkpoint, held_checkpoint, load_tensors
from checkpoints.manifest import Checkpoint, CheckpointError, checkpoint_directories
from checkpoints.save import (
    Save,
    begin_save,
    commit_save,
    delete_checkpoints,
    prune_checkpoints,
    sweep_leftovers,
)


def is_file_access(code: CodeType) -> bool:
    """Whether a function belongs to this package, so that it may be waiting for the file system."""
    return Path(code.co_filename).parent == Path(__file__).parent


__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Save",
    "begin_save",
    "checkpoint_directories",
    "commit_save",
    "delete_checkpoints",
    "find_checkpoint",
    "held_checkpoint",
    "is_file_access",
    "load_tensors",
    "prune_checkpoints",
    "sweep_leftovers",
]
