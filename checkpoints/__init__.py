"""Sharded tensors to files and back, on any layout, surviving a kill at any moment.

Programs that handle whole tensors and no model import `checkpoints.full_tensors`.
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
    """Whether a function is of this package, where a wait is one for the file system."""
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
