"""Check on one GPU what CPUs cannot show: `python bench/gpu_check.py OUTPUT`, at most 8 minutes.

Writes OUTPUT/gpu_check.md, a section at a time. Each section is a process of its own with a time
limit: one that fails or takes too long is reported with what it has found, and the next one runs.
The machine needs Python 3.11 and torch. Other packages that it lacks are installed from wheels/
into a temporary folder; `--download 3.12` fills wheels/ for that version of Python beforehand.
"""

import argparse
import contextlib
import gc
import importlib.util
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from configs import Config
    from training.state import StepResult

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "wheels"
_MODULES = {  # what the checks import besides torch, and the package that has it
    "iniconfig": "iniconfig",
    "numpy": "numpy",
    "omegaconf": "omegaconf",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "pygments": "pygments",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "safetensors": "safetensors",
    "sentencepiece": "sentencepiece",
    "tokenizers": "tokenizers",
    "xxhash": "xxhash",
    "yaml": "pyyaml",
}
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux2014_x86_64")
_TESTS = (  # those of `make test-gpu` without the tests that need transformers
    *("tests/test_gpu.py", "tests/test_golden.py", "tests/ops/test_segments.py", "tests/model"),
    *("tests/parallel", "tests/checkpoints", "tests/training/test_resume.py"),
    "--ignore=tests/model/test_huggingface.py",
)
_TINY = (
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.ffn_hidden_size=64",
    "model.seq_length=32",
    "data.vocab_size=300",
    "train.micro_batch_size=2",
)
_VARIANTS = {
    "as shipped": (),
    "hidden dropout": ("model.hidden_dropout=0.1",),
    "hidden dropout, not compiled": ("model.hidden_dropout=0.1", "train.compile=false"),
    "no recomputation": ("parallel.recompute_granularity=none",),
    "full recomputation": ("parallel.recompute_granularity=full",),
}
_LOSS_STEPS = 100
_SO_FAR = "so far: "  # begins a line of which the page needs the last one, after a time limit
_KILL_S = 10.0  # a process that waits for a driver ends later
_MARKER = "MICROTRON_GPU_CHECK"  # in the environment of all processes of a section
_PATIENCE = {"cuda": 1, "cpu": 10}  # CPUs compile slowly, and tests run on busy ones


@dataclass(frozen=True)
class Options:
    """What the sections need to know."""

    device: str
    tiny: bool

    def settings(self, name: str, *overrides: str, micro_batches: int = 2) -> list[str]:
        """Arguments for a shipped configuration, with few micro-batches and no files."""
        from configs import parse_config

        settings = [
            f"config={name}.yaml",
            f"train.device={self.device}",
            "logging.wandb=disabled",
            *(_TINY if self.tiny else ()),
            *overrides,
        ]
        rows = parse_config(settings).train.micro_batch_size * micro_batches
        return [*settings, f"train.global_batch_size={rows}"]


class Trainer:
    """Steps of train.py on random tokens, from batches that are loaded beforehand."""

    def __init__(self, arguments: Sequence[str], num_steps: int, *, exact: bool = False) -> None:
        """`exact`: use the initial weights of a run, which take seconds per billion."""
        import torch

        from bench.ours import build_run, corpus_of
        from configs import parse_config
        from model import build_meta_model
        from training.optimizer import build_optimizer
        from training.run_folder import RunFolder
        from training.state import Run, RunState, mesh_from_config, training_batches

        self.config: Config = parse_config(list(arguments))
        self.mesh = mesh_from_config(self.config)
        no_folder = cast(RunFolder, None)
        if exact:
            self.run = build_run(self.config, self.mesh, no_folder)
        else:
            model = build_meta_model(self.config, self.mesh)
            model.to_empty(device=self.mesh.device)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0.0, 0.02)
                    else:
                        parameter.fill_(float(name.endswith("weight")))
            optimizer = build_optimizer(model, self.config.optimizer)
            corpus = corpus_of(self.config)
            self.run = Run(self.config, self.mesh, no_folder, corpus, model, optimizer)
        self.state = RunState(wandb_id="none")
        with training_batches(self.run, self.state) as loader:
            self.batches = [next(loader) for _ in range(num_steps)]  # and end its thread
        self.batches.reverse()

    def step(self) -> "StepResult":
        """Run the next step."""
        from training.step import train_step

        result = train_step(self.run, self.state, cast(Any, iter([self.batches.pop()])))
        self.state = self.state.advance(result, self.config.train.global_batch_size)
        return result


@contextlib.contextmanager
def trainer(arguments: Sequence[str], num_steps: int, *, exact: bool = False) -> Iterator[Trainer]:
    """A `Trainer` that leaves the process group at the end."""
    import torch.distributed as dist

    try:
        yield Trainer(arguments, num_steps, exact=exact)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def synchronizations(arguments: Sequence[str]) -> list[str]:
    """The lines of a step, after two steps of warm-up, at which the host implicitly waits."""
    import torch

    with trainer(arguments, 3) as training:
        training.step()
        training.step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                training.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in found]


def check_tests(options: Options) -> Iterator[str]:
    """Tests on this device."""
    tests = ("tests/parallel/test_mappings.py",) if options.tiny else _TESTS
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", *tests]
    command += ["-m", "not drill and not smollm2 and not slow"]
    environment = os.environ | {"MICROTRON_TEST_DEVICE": options.device}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        passed = failed = 0
        for line in process.stdout:
            if " FAILED" in line or " ERROR" in line:
                failed += 1
                yield f"- {line.strip()}"
            elif " PASSED" in line:
                passed += 1
            else:
                continue
            yield f"{_SO_FAR}{passed} passed, {failed} failed"
        if process.wait():
            yield f"- exit code {process.returncode}: {line.strip()}"
    yield f"\n{passed} passed"


def check_synchronizations(options: Options) -> Iterator[str]:
    """Implicit synchronizations in a step; the loader's thread has ended before it."""
    if options.device == "cpu":
        yield "A CPU has none."
    for name in ("gpt_debug", "llama_debug"):
        for overrides in ((), ("train.compile=true",), ("model.attention_dropout=0.1",)):
            text = f"- {name} {' '.join(overrides)}"
            if options.device == "cpu":
                with trainer(options.settings(name, *overrides), 1) as training:
                    yield f"{text}: loss {training.step().loss:.4f}"
                continue
            found = synchronizations(options.settings(name, *overrides))
            yield f"{text}: {len(found)} {', '.join(found)}"


def check_profile(options: Options) -> Iterator[str]:
    """The attention kernel, and how long the device is idle in two steps of gpt_125m."""
    from torch.profiler import ProfilerActivity, profile

    variants = {"": (), "with documents masked": ("data.inter_document_masking=true",)}
    for text, overrides in variants.items():
        with trainer(options.settings("gpt_125m", *overrides, micro_batches=4), 4) as training:
            training.step()
            training.step()
            on_gpu = [ProfilerActivity.CUDA] if options.device == "cuda" else []
            with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiler:
                training.step()
                training.step()
        on_device = "CUDA" if on_gpu else "CPU"
        events = [
            event
            for event in profiler.events() or ()
            if event.device_type.name == on_device and not event.is_user_annotation
        ]
        words = ("attention", "flash", "fmha")
        kernels = {e.name[:90] for e in events if any(word in e.name.lower() for word in words)}
        yield f"Attention {text}:"
        yield from (f"- `{kernel}`" for kernel in sorted(kernels)[:8])
        spans = sorted((event.time_range.start, event.time_range.end) for event in events)
        busy, until = 0.0, spans[0][0]
        for start, end in spans:
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
        yield f"\nIdle share {text}: {100 * (1 - busy / (until - spans[0][0])):.1f}%\n"


def _free_memory() -> None:
    """Free what earlier models on the GPU have left, also in cycles of references."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def check_memory(options: Options) -> Iterator[str]:
    """Peak memory of a step, and what plan.py says."""
    import torch

    from configs import parse_config
    from planning.dry_run import dry_run
    from training.hardware import peak_memory_gib

    yield "| config | measured GiB | plan.py GiB | |\n|---|---|---|---|"
    for name in ("gpt_125m", "gpt_1b"):
        arguments = options.settings(name, "train.compile=false")
        planned = dry_run(parse_config(arguments), 1).peak_bytes / 2**30
        if options.device == "cuda":
            _free_memory()
            torch.cuda.reset_peak_memory_stats()
        with trainer(arguments, 2) as training:
            training.step()
            training.step()
            measured = peak_memory_gib(training.mesh.device)
            del training
        more = f"{100 * (measured / planned - 1):+.1f}%"
        yield f"| {name} | {measured:.3f} | {planned:.3f} | {more} |"


def check_speed(options: Options) -> Iterator[str]:
    """Tokens per second and MFU."""
    from model import flops_per_token
    from training.hardware import peak_flops_per_second

    warm_up, timed = (1, 1) if options.tiny else (2, 3)
    yield "| config | variant | tokens/s | MFU |\n|---|---|---|---|"
    for name in ("gpt_125m", "gpt_1b"):
        rows = () if options.tiny or name != "gpt_1b" else ("train.micro_batch_size=8",)
        for variant, overrides in _VARIANTS.items():
            arguments = options.settings(name, *rows, *overrides, micro_batches=4)
            with trainer(arguments, warm_up + timed) as training:
                for _ in range(warm_up):
                    training.step()
                started_at = time.perf_counter()
                tokens = sum(training.step().num_targets for _ in range(timed))
                rate = tokens / (time.perf_counter() - started_at)
                config, device = training.config, training.mesh.device
                flops = rate * flops_per_token(config.model, config.data.padded_vocab_size)
                mfu = flops / peak_flops_per_second(device, config.train.precision)
                del training
            if options.device == "cuda":
                _free_memory()
            yield f"| {name} {' '.join(rows)} | {variant} | {rate:,.0f} | {100 * mfu:.1f}% |"


def check_losses(options: Options) -> Iterator[str]:
    """Losses of a small model with dropout, against float32 on the CPU."""

    def losses(device: str, precision: str) -> list[float]:
        steps = 3 if options.tiny else _LOSS_STEPS
        overrides = (f"train.precision={precision}", f"train.train_steps={steps}")
        arguments = Options(device, options.tiny).settings("gpt_debug", *overrides)
        warm_up = f"optimizer.lr_warmup_steps={steps // 10}"
        with trainer([*arguments, warm_up], steps, exact=True) as training:
            return [training.step().loss for _ in range(steps)]

    golden = losses("cpu", "fp32")
    yield f"CPU, fp32: {golden[0]:.6f} to {golden[-1]:.6f} in {len(golden)} steps\n"
    yield "| precision | last loss | largest difference | mean difference |\n|---|---|---|---|"
    for precision in ("fp32", "bf16"):
        mine = losses(options.device, precision)
        apart = [abs(a - b) for a, b in zip(mine, golden, strict=True)]
        yield f"| {precision} | {mine[-1]:.6f} | {max(apart):.2e} | {sum(apart) / len(apart):.2e} |"


SECTIONS = {  # the title of each, and its time limit in seconds; 450 in all
    "synchronizations": ("Implicit synchronizations per step", 60, check_synchronizations),
    "profile": ("Attention kernel and idle share", 50, check_profile),
    "memory": ("Peak memory", 60, check_memory),
    "speed": ("Speed", 110, check_speed),
    "losses": ("Losses", 60, check_losses),
    "tests": ("Tests", 110, check_tests),
}


def install_missing(folder: str) -> str:
    """Install what this machine lacks from wheels/; returns what happened, for the page."""
    missing = [p for module, p in _MODULES.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return "Installed from wheels: nothing."
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--find-links", str(WHEELS), "--target", folder, *missing]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    problem = f" FAILED: {result.stderr.strip()}" if result.returncode else ""
    return f"Installed from wheels: {', '.join(missing)}.{problem}"


def download(python_version: str) -> int:
    """Fill wheels/ for a Linux machine with this version of Python; about 30 MB."""
    platforms = [flag for platform in _PLATFORMS for flag in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    for package in _MODULES.values():  # one at a time, as each matches another platform
        command = [*pip, "--python-version", python_version, *platforms, "-d", str(WHEELS), package]
        subprocess.run(command, check=True)
    return 0


def run_section(name: str, options: Options, site: str) -> str:
    """Run a section in a process of its own; returns its part of the page."""
    title, limit_s, _ = SECTIONS[name]
    limit_s *= _PATIENCE[options.device]
    command = [
        sys.executable,
        "-m",
        "bench.gpu_check",
        "--device",
        options.device,
        "--section",
        name,
    ]
    command += ["--tiny"] if options.tiny else []
    paths = [str(ROOT), site, os.environ.get("PYTHONPATH", "")]
    marker = secrets.token_hex(8)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), _MARKER: marker}
    started_at = time.perf_counter()
    with tempfile.TemporaryFile("w+") as found, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=found, stderr=errors)
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
        kill_marked(marker)
        process.wait()
        found.seek(0)
        errors.seek(0)
        ending = ""
        results, progress = split_progress(found.readlines())
        if code is None and progress:
            ending = f"\n{progress}, when the time of {limit_s} s was over\n"
        elif code != 0:
            problem = f"not done after {limit_s} s" if code is None else f"exit code {code}"
            ending = f"\nFAILED: {problem}\n\n```\n{''.join(errors.readlines()[-25:])}```\n"
        took = f"({time.perf_counter() - started_at:.0f} s of {limit_s})"
        return f"\n## {title} {took}\n\n{results}{ending}"


def split_progress(lines: Sequence[str]) -> tuple[str, str]:
    """The results among the lines of a section, and how far it had come, if it says so."""
    results = "".join(line for line in lines if not line.startswith(_SO_FAR))
    so_far = [line.removeprefix(_SO_FAR).strip() for line in lines if line.startswith(_SO_FAR)]
    if not so_far:
        return results, ""
    failed = "" if so_far[-1].endswith(" 0 failed") else "FAILED: "
    return results, f"{failed}stopped after {so_far[-1]}"


def kill_marked(marker: str) -> None:
    """Kill all processes with this marker in their environment, whatever their session is."""
    found, deadline = True, time.monotonic() + _KILL_S
    while found and time.monotonic() < deadline:
        found = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # another user's, or it has just ended
                if f"{_MARKER}={marker}".encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)
                    found = True


def heading(options: Options) -> str:
    """The machine and the software."""
    code = (
        "import torch, platform; gpu = torch.cuda.is_available(); "
        "print(torch.cuda.get_device_name() if gpu else platform.machine(), '; torch', "
        "torch.__version__, '; Python', platform.python_version())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    sizes = ", tiny sizes" if options.tiny else ""
    return f"# GPU check\n\n{result.stdout.strip()}; device {options.device}{sizes}\n"


def main() -> int:
    """Write the page, or run one section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", nargs="?", default="gpu_check")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small models and few steps")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", choices=SECTIONS, help="run this one here, for the page")
    parser.add_argument("--download", metavar="PYTHON_VERSION", help="only fill wheels/")
    arguments = parser.parse_args()
    options = Options(arguments.device, arguments.tiny)
    if arguments.download:
        return download(arguments.download)
    if arguments.section:
        for line in SECTIONS[arguments.section][2](options):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        return 0
    page = Path(arguments.output, "gpu_check.md")
    page.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        text = f"{heading(options)}{install_missing(site)}\n"
        for name in arguments.only:
            text += run_section(name, options, site)
            page.write_text(text)
    sys.stdout.write(text)
    return int("FAILED" in text)


if __name__ == "__main__":
    sys.exit(main())
