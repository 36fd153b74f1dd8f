"""A Slurm cluster on hosts of a test: munge, slurmctld on the first host, slurmd on all of them.

Everything is in one temporary folder. Needs the Debian packages slurm-wlm and munge, and what
hosts.py needs.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.hosts import Cluster, Host, Process, cluster_of, wait_until

# The partition `urgent` preempts jobs of `normal`, which get GRACE_S to save. A requeued job
# waits for as long as a credential lives.
GRACE_S = 60
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=node0
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=5
KillWait=20
SlurmdTimeout=20
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={nodes} CPUs={cpus} RealMemory={memory_mib} State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace_s}
PartitionName=abrupt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""
_CPUS, _MEMORY_MIB = 2, 8000  # of a node, for the scheduler; all share the machine's


def missing_for_slurm() -> str | None:
    tools = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
    missing = [tool for tool in tools if not shutil.which(tool, path=_PATH)]
    return f"needs {', '.join(missing)} (Debian: slurm-wlm, munge)" if missing else None


_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Slurm:
    """The daemons, and the commands of a user on the first host."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        # Short, because it is part of the names of sockets.
        self._folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {"SLURM_CONF": str(self._folder / "slurm.conf"), "PATH": _PATH}
        self._munged: subprocess.Popen[bytes] | None = None
        self._daemons: list[Process] = []

    def __enter__(self) -> "Slurm":
        try:
            self._start_daemons()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_daemons(self) -> None:
        (self._folder / "state").mkdir()
        self._start_munge()
        (self._folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                folder=self._folder,
                nodes=f"node[0-{len(self.cluster.hosts) - 1}]",
                cpus=_CPUS,
                memory_mib=_MEMORY_MIB,
                grace_s=GRACE_S,
            )
        )
        self._daemons.append(self._start(self.cluster[0], "slurmctld", "-D"))
        for host in self.cluster.hosts:
            self.start_node(host)
        wait_until(lambda: self._num_idle() == len(self.cluster.hosts), 60, *self._daemons)

    def __exit__(self, *_: object) -> None:
        if self._munged is not None:  # the other daemons end with their hosts
            self._munged.kill()
            self._munged.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start_munge(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "key-file": key.name, "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{option}={self._folder / name}" for option, name in files.items()]
        self._munged = subprocess.Popen(
            ["munged", "--foreground", "--force", *options],
            env={**os.environ, "PATH": _PATH},
            stderr=subprocess.DEVNULL,
        )
        wait_until((self._folder / "munge.socket").exists, 20)

    def _start(self, host: Host, *words: str) -> Process:
        return host.start(*words, **self.environment)

    def start_node(self, host: Host) -> None:
        """Start the daemon of a host, at first or after it was killed."""
        (self._folder / f"spool.{host.name}").mkdir(exist_ok=True)
        self._daemons.append(self._start(host, "slurmd", "-D", "-N", host.name))

    def _num_idle(self) -> int:
        try:
            return self.run("sinfo", "-h", "-N", "-p", "normal", "-o", "%t").split().count("idle")
        except AssertionError:  # slurmctld is starting
            return 0

    def run(self, *words: object, **environment: str) -> str:
        """Run a command on the first host; return what it prints."""
        settings = [f"{k}={v}" for k, v in (self.environment | environment).items()]
        return self.cluster[0].run("env", *settings, *words)

    def submit(self, *words: object, **environment: str) -> str:
        """Submit a batch job; return its number."""
        return self.run("sbatch", "--parsable", *words, **environment).strip()

    def job(self, number: str) -> Mapping[str, str]:
        """The fields that `scontrol show job` has for a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait_for(self, number: str, *states: str, limit_s: float = 300) -> float:
        """Wait until a job is in one of these states; return the seconds that took."""
        started_at = time.monotonic()
        while (state := self.job(number)["JobState"]) not in states:
            waited_s = time.monotonic() - started_at
            assert waited_s < limit_s, f"job {number} is {state} after {limit_s} s"
            time.sleep(0.5)
        return time.monotonic() - started_at


@contextmanager
def slurm_on(folder: Path, num_hosts: int) -> Iterator[Slurm]:
    """Slurm on new hosts."""
    with cluster_of(folder, num_hosts) as cluster, Slurm(cluster) as slurm:
        yield slurm
