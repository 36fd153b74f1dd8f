"""Hosts on one machine: Linux namespaces that share a disk and are joined by a network.

Each host has its own name, address, loopback, process numbers, mounts and shared memory, and is
connected to a bridge. A host can lose its network, or be killed with all its processes and started
again. Needs Linux, root, iproute2 and iptables.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.lines import ROOT

_PORT = 29500
# Run by the first process of a host, which then waits for ever.
_BOOT = """
hostname "$1"; ip link set lo up
mount --bind "$2" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
touch "$3"; exec sleep infinity
"""
_numbers = itertools.count()


def missing_for_hosts() -> str | None:
    """Say what this machine lacks for namespaces."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    missing = [tool for tool in ("ip", "iptables", "unshare", "nsenter") if not shutil.which(tool)]
    if missing:
        return f"needs {', '.join(missing)} (iproute2, iptables, util-linux)"
    name = f"mt{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"may not make network namespaces: {made.stderr}" if made.returncode else None


def _do(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True)


class Process:
    """A program on a host; its output goes to a file."""

    def __init__(self, host: "Host", words: Sequence[object], log: Path, **environment: str):
        self.log, self.started_at = log, time.monotonic()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [*host.enter(), *map(str, words)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment,
            )

    @property
    def output(self) -> str:
        """What the program has printed so far."""
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """The exit code; None while the program runs."""
        return self._process.poll()

    def wait(self, limit_s: float = 300) -> int:
        """Wait for the end; return the exit code, 137 after SIGKILL."""
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {limit_s} s:\n{self.output}") from None

    def finish(self, expected: int = 0, limit_s: float = 300) -> str:
        """Wait for this exit code; return the output."""
        code = self.wait(limit_s)
        assert code == expected, f"exit code {code}:\n{self.output}"
        return self.output


class Host:
    """One host; `kill` ends all of its processes at once, and `boot` starts it again."""

    def __init__(self, cluster: "Cluster", name: str, address: str, namespace: str) -> None:
        self.name, self.address, self._namespace = name, address, namespace
        self._cluster = cluster
        self.boot()

    def boot(self) -> None:
        """Start the first process, under which all others run."""
        ready = self._cluster.folder / f"{self.name}.ready"
        ready.unlink(missing_ok=True)
        command = ["nsenter", f"--net=/run/netns/{self._namespace}"]
        command += ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
        command += ["--mount-proc", "sh", "-c", _BOOT, "sh", self.name]
        self._unshare = subprocess.Popen(
            [*command, str(self._cluster.hosts_file), str(ready)], stderr=subprocess.DEVNULL
        )
        wait_until(ready.exists, 20)
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        self._init = int(children.read_text())

    def kill(self) -> None:
        """Send SIGKILL to every process of the host, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._init, signal.SIGKILL)  # the kernel kills all others of its namespace
        self._unshare.wait()

    def enter(self) -> list[str]:
        """The command that runs another one on this host."""
        return ["nsenter", "--target", str(self._init), "--all", "--wd=" + str(ROOT)]

    def run(self, *words: object, limit_s: float = 60) -> str:
        """Run a command that must succeed; return what it prints."""
        ended = subprocess.run(
            [*self.enter(), *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            timeout=limit_s,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    def start(self, *words: object, **environment: str) -> Process:
        """Start a program."""
        log = self._cluster.folder / f"{self.name}.{next(_numbers)}.log"
        return Process(self, words, log, **environment)

    def pids(self, word: str) -> list[int]:
        """The processes of this host whose command line has a word, as numbered outside."""
        own = os.readlink(f"/proc/{self._init}/ns/pid")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_here = os.readlink(process / "ns/pid") == own
                if is_here and word in (process / "cmdline").read_bytes().decode().split("\0"):
                    found.append(int(process.name))
        return found

    def ranks(self) -> list[int]:
        """The processes that train here, without their launcher, as numbered outside."""
        return [pid for pid in self.pids("-u") if pid in self.pids("train.py")]

    def drop(self, fraction: float) -> None:
        """Lose this fraction of the packets that this host receives or sends; 0: none."""
        for chain in ("INPUT", "OUTPUT"):
            filter_ = ("ip", "netns", "exec", self._namespace, "iptables")
            _do(*filter_, "-F", chain)
            if fraction:
                match = ("-m", "statistic", "--mode", "random", "--probability", fraction)
                _do(
                    *filter_,
                    "-A",
                    chain,
                    "!",
                    "-i" if chain == "INPUT" else "-o",
                    "lo",
                    *match,
                    "-j",
                    "DROP",
                )

    def link(self, state: str) -> None:
        """Turn the network of this host `up` or `down`."""
        _do("ip", "-n", self._namespace, "link", "set", "eth0", state)

    def hide(self, folder: Path) -> None:
        """Replace a folder by an empty one of this host alone."""
        self.run("mount", "-t", "tmpfs", "tmpfs", folder)


class Cluster:
    """Hosts `node0`, `node1` and so on, which `with` creates and removes."""

    def __init__(self, folder: Path, num_hosts: int = 2) -> None:
        self.folder, self._num_hosts = folder, num_hosts
        self.hosts_file = folder / "hosts"
        self.hosts: list[Host] = []
        self._prefix = f"mt{os.getpid()}-{next(_numbers)}"
        self._port = itertools.count(_PORT)

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(parents=True, exist_ok=True)
        names = {f"node{number}": f"10.79.0.{number + 1}" for number in range(self._num_hosts)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in names.items())]
        self.hosts_file.write_text("\n".join(lines) + "\n")
        switch = f"{self._prefix}-switch"
        try:
            _do("ip", "netns", "add", switch)
            _do("ip", "-n", switch, "link", "add", "switch", "type", "bridge")
            _do("ip", "-n", switch, "link", "set", "switch", "up")
            for name, address in names.items():
                namespace = f"{self._prefix}-{name}"
                _do("ip", "netns", "add", namespace)
                ends = ("eth0", "netns", namespace, "type", "veth", "peer", name, "netns", switch)
                _do("ip", "link", "add", *ends)
                _do("ip", "-n", switch, "link", "set", name, "master", "switch", "up")
                _do("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
                _do("ip", "-n", namespace, "link", "set", "eth0", "up")
                self.hosts.append(Host(self, name, address, namespace))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        for name in ("switch", *(f"node{number}" for number in range(self._num_hosts))):
            subprocess.run(
                ["ip", "netns", "del", f"{self._prefix}-{name}"], check=False, capture_output=True
            )

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def torchrun(
        self, arguments: Sequence[str], *flags: str, ranks: int = 2, **environment: str
    ) -> list[Process]:
        """Start train.py on all hosts, as docs/clusters.md says, with a new port."""
        flags = (f"--rdzv-endpoint={self[0].name}:{next(self._port)}", *flags)
        return [
            self.torchrun_on(host, arguments, *flags, ranks=ranks, **environment)
            for host in self.hosts
        ]

    def everywhere(self, command: str) -> list[Process]:
        """Run a command line, as printed, on all hosts, from the root with .venv activated."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return [host.start("sh", "-c", command, PATH=path) for host in self.hosts]

    def torchrun_on(
        self,
        host: Host,
        arguments: Sequence[str],
        *flags: str,
        ranks: int = 2,
        **environment: str,
    ) -> Process:
        """Start train.py under torchrun on one host; the flags have the rendezvous endpoint."""
        return host.start(
            Path(sys.executable).with_name("torchrun"),
            f"--nnodes={len(self.hosts)}",
            f"--nproc-per-node={ranks}",
            "--rdzv-backend=c10d",
            "--rdzv-id=test",
            *flags,
            "train.py",
            *arguments,
            **environment,
        )


@contextlib.contextmanager
def cluster_of(folder: Path, num_hosts: int) -> Iterator[Cluster]:
    """Hosts for one test."""
    with Cluster(folder / "cluster", num_hosts) as cluster:
        yield cluster


def wait_until(
    condition: Callable[[], bool], limit_s: float = 120, *processes: Process, poll_s: float = 0.05
) -> float:
    """Poll until a condition holds while the processes run; return the seconds that took."""
    started_at = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - started_at
        ended = next((process for process in processes if process.poll() is not None), None)
        assert ended is None, ended.output  # type: ignore[union-attr]
        outputs = "\n".join(process.output for process in processes)
        assert waited_s < limit_s, f"not within {limit_s} s\n{outputs}"
        time.sleep(poll_s)
    return time.monotonic() - started_at


def exit_report(directory: Path, name: str = "test") -> dict[str, Any]:
    """What exit.json says."""
    report: dict[str, Any] = json.loads((directory / name / "exit.json").read_text())
    return report


def resumed_step(output: str) -> int:
    """The step of the checkpoint that the last attempt resumed from."""
    return int(re.findall(r"resuming from \S+/step_(\d+)", output)[-1])
