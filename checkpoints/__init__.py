"""Sharded tensors to files and back, on any layout, surviving a kill at any moment."""

from checkpoints.load import find_checkpoint, load_tensors
from checkpoints.manifest import Checkpoint, CheckpointError, checkpoint_directories
from checkpoints.save import (
    Save,
    begin_save,
    commit_save,
    delete_checkpoints,
    prune_checkpoints,
    sweep_leftovers,
)
from checkpoints.whole import TensorInfo, read_whole, write_tensors, write_whole_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Save",
    "TensorInfo",
    "begin_save",
    "checkpoint_directories",
    "commit_save",
    "delete_checkpoints",
    "find_checkpoint",
    "load_tensors",
    "prune_checkpoints",
    "read_whole",
    "sweep_leftovers",
    "write_tensors",
    "write_whole_checkpoint",
]
