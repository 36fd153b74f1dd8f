"""List, verify and describe the checkpoints of a run: `python -m checkpoints run=runs/NAME`."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from checkpoints.manifest import (
    Checkpoint,
    CheckpointError,
    checkpoint_directories,
    read_manifest,
    step_of,
    verify_file,
)
from configs import Range, exit_with_error
from configs.program_settings import load_settings

_ATTEMPTS = 10


@dataclass(frozen=True)
class Settings:
    """List the checkpoints of a run, newest last. Reads only, so the run may be in progress.

    Exit codes: 0; 1 if a checkpoint is damaged; 2 if there is none.
    """

    run: str  # the folder of a run, such as runs/gpt_debug
    verify: bool = False  # read every byte of every file and compare checksums
    step: int | None = None  # show the contents of this checkpoint; null: list all
    RANGES: ClassVar = {"step": Range(0)}


def main(arguments: list[str]) -> int:
    """Run the program; returns the exit code."""
    settings = load_settings(Settings, arguments)
    for _ in range(_ATTEMPTS):
        damaged = []
        for directory in find(settings):
            try:
                text, is_damaged = examine(directory, settings)
                damaged.append(is_damaged)
            except FileNotFoundError:
                text = f"{directory.name}  deleted by the run"
            sys.stdout.write(f"{text}\n")
        if damaged:
            return int(any(damaged))
        time.sleep(0.1)  # all were deleted, so the run has saved newer ones: list again
    return exit_with_error(f"run={settings.run}: every checkpoint was deleted while it was read")


def find(settings: Settings) -> list[Path]:
    """The checkpoints to examine, oldest first."""
    folder = Path(settings.run).expanduser() / "checkpoints"
    found = {step_of(path): path for path in checkpoint_directories(folder)}
    if not found:
        exit_with_error(f"run={settings.run} has no checkpoints in {folder}; check the path")
    if settings.step is None:
        return [*found.values()]
    if settings.step not in found:
        exit_with_error(
            f"step={settings.step} has no checkpoint; there are checkpoints of steps "
            f"{', '.join(map(str, found))}"
        )
    return [found[settings.step]]


def examine(directory: Path, settings: Settings) -> tuple[str, bool]:
    """Describe a checkpoint; returns the text and whether it is damaged.

    Raises FileNotFoundError if it is deleted meanwhile.
    """
    saved_at = directory.stat().st_mtime
    lines, problems = [directory.name], list[str]()
    try:
        checkpoint = read_manifest(directory)
        lines[0] += f"  {_summary(checkpoint, saved_at)}"
        lines += _contents(checkpoint) if settings.step is not None else []
        problems += _problems(checkpoint, settings.verify)
    except CheckpointError as error:
        problems.append(str(error))
    directory.stat()
    state = "verified" if settings.verify else "checksums not verified (verify=true)"
    lines[0] += f"  DAMAGED: {'; '.join(problems)}" if problems else f"  {state}"
    return "\n".join(lines), bool(problems)


def _problems(checkpoint: Checkpoint, verify: bool) -> Iterator[str]:
    for name in sorted(checkpoint.files):
        try:
            if verify:
                verify_file(checkpoint, name)
            else:
                checkpoint.open(name).close()
        except CheckpointError as error:
            yield str(error)


def _summary(checkpoint: Checkpoint, saved_at: float) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at))
    size = sum(file["size"] for file in checkpoint.files.values())
    tokens = checkpoint.state.get("progress", {}).get("tokens", 0)
    files = _count(len(checkpoint.files), "file")
    return f"{when}  {size / 2**20:,.1f} MiB in {files}  {tokens:,} tokens"


def _contents(checkpoint: Checkpoint) -> Iterator[str]:
    """The state of the run, then every tensor."""
    for heading, value in checkpoint.state.items():
        if isinstance(value, dict):
            yield from ("", heading, *(f"  {key}: {item}" for key, item in value.items()))
        else:
            yield from ("", f"{heading}: {value}")
    kinds: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, entry in checkpoint.tensors.items():
        kind, _, rest = name.partition(".")
        kinds[kind][rest] = entry
    for kind, entries in kinds.items():
        num_elements = sum(math.prod(entry["shape"]) for entry in entries.values())
        yield from ("", f"{kind}: {num_elements:,} elements in {_count(len(entries), 'tensor')}")
        for name, entry in entries.items():
            shards = f" in {n} shards" if (n := len(entry["shards"])) > 1 else ""
            yield f"  {name}  {entry['dtype']} {entry['shape']}{shards}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
