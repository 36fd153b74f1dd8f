"""Lists, verifies and describes the checkpoints of a run.

    python -m checkpoints run=runs/NAME                 one line for each, newest last
    python -m checkpoints run=runs/NAME verify=true     read every byte of every file
    python -m checkpoints run=runs/NAME step=1000       what one holds

Exit codes: 0; 1 if one is damaged; 2 if there is nothing to look at. Reads only, so it may be used
while the run goes on.
"""

import math
import sys
import time
from pathlib import Path
from typing import Any

from checkpoints.manifest import (
    Checkpoint,
    CheckpointError,
    checkpoint_directories,
    read_manifest,
    step_directory,
    verify_file,
)

_USAGE = "usage: python -m checkpoints run=RUN_FOLDER [verify=true] [step=N]"
_EXIT_DAMAGED, _EXIT_NOTHING = 1, 2


class UsageError(ValueError):
    """A command line that cannot be followed; the text says what to write."""


def main(arguments: list[str]) -> int:
    """Answer one command line; returns the exit code."""
    try:
        folder, verify, step = parse(arguments)
        directories = [step_directory(folder, step)] if step is not None else find(folder)
    except UsageError as error:
        sys.stderr.write(f"{error}\n{_USAGE}\n")
        return _EXIT_NOTHING
    seen: set[str] = set()
    damages: list[bool] = []
    while directories:
        for directory in directories:
            seen.add(directory.name)
            try:
                text, is_damaged = look(directory, verify, describe_it=step is not None)
            except FileNotFoundError:  # the run goes on and keeps its newest ones only
                text = f"{directory.name}  deleted meanwhile"
            else:
                damages.append(is_damaged)
            sys.stdout.write(f"{text}\n")
        if damages or step is not None:
            break
        directories = [path for path in checkpoint_directories(folder) if path.name not in seen]
    if not damages:
        return _EXIT_NOTHING
    return _EXIT_DAMAGED if any(damages) else 0


def look(directory: Path, verify: bool, *, describe_it: bool) -> tuple[str, bool]:
    """What to print of a checkpoint, and whether it is damaged; FileNotFoundError if it is gone."""
    saved_at = directory.stat().st_mtime
    checkpoint, problems = examine(directory, verify)
    directory.stat()
    lines = [summary(directory, checkpoint, problems, verify, saved_at)]
    if describe_it and checkpoint is not None:
        lines += describe(checkpoint)
    return "\n".join(lines), bool(problems)


def parse(arguments: list[str]) -> tuple[Path, bool, int | None]:
    """The folder of checkpoints, whether to read every file, and the one step asked for."""
    values = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in ("run", "verify", "step") or not value:
            raise UsageError(f"{argument} is not run=FOLDER, verify=true or step=N")
        values[key] = value
    if "run" not in values:
        raise UsageError("run=FOLDER is required: the folder that a run has written")
    folder = Path(values["run"]).expanduser() / "checkpoints"
    if not folder.is_dir():
        raise UsageError(f"run={values['run']} is no run: it has no folder checkpoints")
    if values.get("verify", "false") not in ("true", "false"):
        raise UsageError(f"verify={values['verify']} is not true or false")
    if not values.get("step", "0").isdecimal():
        raise UsageError(f"step={values['step']} is not a whole number")
    step = int(values["step"]) if "step" in values else None
    if step is not None and not step_directory(folder, step).is_dir():
        found = ", ".join(str(int(path.name.removeprefix("step_"))) for path in find(folder))
        raise UsageError(f"step={step} has no checkpoint; there are those of steps {found}")
    return folder, values.get("verify") == "true", step


def find(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    directories = checkpoint_directories(folder)
    if not directories:
        raise UsageError(f"{folder} holds no checkpoint")
    return directories


def examine(directory: Path, verify: bool) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint, if its manifest can be read, and what is wrong with it."""
    try:
        checkpoint = read_manifest(directory)
    except CheckpointError as error:
        return None, [str(error)]
    if verify:
        found = (verify_file(checkpoint, name) for name in sorted(checkpoint.files))
    else:
        found = (
            None if (directory / name).is_file() else f"{name} is missing"
            for name in sorted(checkpoint.files)
        )
    return checkpoint, [problem for problem in found if problem]


def summary(
    directory: Path,
    checkpoint: Checkpoint | None,
    problems: list[str],
    verify: bool,
    saved_at: float,
) -> str:
    """One line: name, when, how large, how far, and whether it is whole."""
    state = "DAMAGED: " + "; ".join(problems) if problems else "verified" if verify else "not read"
    if checkpoint is None:
        return f"{directory.name}  {state}"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at))
    size = sum(file["size"] for file in checkpoint.files.values())
    tokens = checkpoint.state.get("progress", {}).get("tokens", 0)
    files = len(checkpoint.files)
    return (
        f"{directory.name}  {when}  {size / 2**20:,.1f} MiB in {files} file"
        f"{'s' if files > 1 else ''}  {tokens:,} tokens  {state}"
    )


def describe(checkpoint: Checkpoint) -> list[str]:
    """What it holds: the state of the run, and every tensor with its shape and its pieces."""
    lines: list[str] = []
    for heading, value in checkpoint.state.items():
        if isinstance(value, dict):
            lines += ["", heading, *(f"  {key}: {item}" for key, item in value.items())]
        else:
            lines += ["", f"{heading}: {value}"]
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for name, entry in checkpoint.tensors.items():
        kind, _, rest = name.partition(".")
        kinds.setdefault(kind, {})[rest] = entry
    for kind, entries in kinds.items():
        numbers, count = sum(math.prod(entry["shape"]) for entry in entries.values()), len(entries)
        lines += ["", f"{kind}: {numbers:,} numbers in {count} tensor{'s' if count > 1 else ''}"]
        for name, entry in entries.items():
            pieces = len(entry["shards"])
            in_pieces = f" in {pieces} pieces" if pieces > 1 else ""
            lines.append(f"  {name}  {entry['dtype']} {entry['shape']}{in_pieces}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
