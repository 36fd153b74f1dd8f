"""Save and load sharded tensors atomically, on any layout, detecting all damage.

Programs that convert full tensors without a model import `checkpoints.full_tensors`.
"""

from pathlib import Path
from types import CodeType

from checkpoints.load import find_checkpoint as find_checkpoint
from checkpoints.load import held_checkpoint as held_checkpoint
from checkpoints.load import load_tensors as load_tensors
from checkpoints.load import require_fingerprint as require_fingerprint
from checkpoints.manifest import Checkpoint as Checkpoint
from checkpoints.manifest import CheckpointError as CheckpointError
from checkpoints.manifest import checkpoint_directories as checkpoint_directories
from checkpoints.save import Save as Save
from checkpoints.save import begin_save as begin_save
from checkpoints.save import commit_save as commit_save
from checkpoints.save import delete_checkpoints as delete_checkpoints
from checkpoints.save import prune_checkpoints as prune_checkpoints
from checkpoints.save import sweep_leftovers as sweep_leftovers


def is_file_access(code: CodeType) -> bool:
    """Whether a function is of this package, and so may be waiting for the file system."""
    return Path(code.co_filename).parent == Path(__file__).parent
