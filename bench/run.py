"""Times all sides in turn and writes the tables of docs/benchmarks.md; `make bench`.

    make bench                               three rounds of everything except scaling
    make bench ARGS="--only tp1 bf16"        visits that have all these words; --list shows them
    make bench ARGS="--scaling"              sequence length, micro-batch, model size instead
    make bench ARGS="--results FILE --rounds 0"      the tables of existing results

Raw results go to runs/bench/, one JSON object per line. The tables show one such file, from one run
or from several that appended to it.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.page import write_page
from bench.sides import Visit, all_visits, scaling_visits
from bench.timing import find_report

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
# For all sides: keep freed memory in the process, so that large tensors cost no page faults.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
_LINE_OF_FAILURE = 200  # characters


def make_visit(visit: Visit, steps: list[str], limit_s: float) -> dict[str, Any]:
    """Launches a side; returns what it reports, or {"error": why there is nothing}."""
    if not visit.side.python.exists():
        return {"error": f"no {visit.side.python}; make bench-setup makes it"}
    threads = max(1, len(os.sched_getaffinity(0)) // visit.workload.num_ranks)
    process = subprocess.Popen(
        [*visit.command, *steps],
        cwd=ROOT,
        env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its ranks can be ended with it
    )
    try:
        output, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"no result within {limit_s:.0f} s"}
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    result = find_report(output)
    if result is None:
        return {"error": _why(errors, process.returncode)}
    return result


def _why(errors: str, code: int) -> str:
    """Pick the most informative line of stderr of a failed launch."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    told = [line for line in lines if "rror:" in line and "ChildFailed" not in line]
    return (told[:1] or lines[-1:] or [f"exit code {code}"])[0][:_LINE_OF_FAILURE]


def machine() -> dict[str, str]:
    """Describe what the figures depend on."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "instructions": "AMX" if "amx_bf16" in info else "no AMX",
        "memory_gib": f"{memory_bytes / 2**30:.0f}",
        "system": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """The records of a file of results."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_rounds(visits: list[Visit], arguments: argparse.Namespace) -> Iterator[str]:
    """Makes all visits, writes each down at once; yields a line about each."""
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        file.write(json.dumps({"kind": "machine", **machine()}) + "\n")
        for round_number in range(arguments.rounds):
            for visit in visits:
                started_at = time.perf_counter()
                steps = [f"--warmup={arguments.warmup}", f"--steps={arguments.steps}"]
                result = make_visit(visit, steps, arguments.limit_s)
                taken_s = time.perf_counter() - started_at
                record = {**visit.record, "round": round_number, "taken_s": taken_s, **result}
                file.write(json.dumps(record) + "\n")
                file.flush()
                told = result.get("error") or result.get("step_s") or result
                yield f"round {round_number} {describe(visit)}: {told} ({taken_s:.0f} s)"


def describe(visit: Visit) -> str:
    """A visit in a line: its words, and what differs from the workload bench-gpt."""
    shape = visit.workload
    rest = f"s={shape.seq_length} b={shape.micro_batch} L={shape.num_layers} h={shape.hidden_size}"
    dropout = f"dropout={shape.dropout}/{shape.attention_dropout}"
    words = [visit.kind, visit.side.key, shape.layout, shape.precision, *visit.overrides]
    return " ".join([*words, rest, dropout])


def main() -> int:
    """Visits, then tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=[], help="words that a visit must have")
    parser.add_argument("--scaling", action="store_true", help="the scaling set instead")
    parser.add_argument("--rounds", type=int, help="3 by default; of the scaling set, 1")
    parser.add_argument("--warmup", type=int, default=2, help="steps of a visit before timing")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a visit")
    parser.add_argument("--limit_s", type=float, default=300, help="a visit is given up after it")
    name = f"runs/bench/{time.strftime('%Y-%m-%d_%H-%M-%S')}.jsonl"
    parser.add_argument("--results", type=Path, default=ROOT / name, help="is added to")
    parser.add_argument("--page", type=Path, help="gets the tables; none if --only is given")
    parser.add_argument("--list", action="store_true", help="print the visits of a round")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.scaling else 3
    visits = [
        visit
        for visit in (scaling_visits() if arguments.scaling else all_visits())
        if set(arguments.only) <= visit.words
    ]
    if arguments.list:
        sys.stdout.write("".join(f"{describe(visit)}\n" for visit in visits))
        return 0
    if arguments.rounds and not visits:
        parser.error(f"no visit has all of the words {' '.join(arguments.only)}; see --list")
    for line in run_rounds(visits, arguments) if arguments.rounds else ():
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    # Do not replace a whole run by a part of another.
    page = arguments.page or (None if arguments.only else PAGE)
    told = write_page(page, read_results(arguments.results))
    sys.stdout.write(f"\n{told}\n\nwrote {page}; raw results in {arguments.results}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
