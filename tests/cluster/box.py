"""A two-node Slurm on this machine, in a folder of its own: started for the tests, stopped after them.

Both nodes, n1 and n2, are daemons on this machine with CPUs and GPUs that are only numbers to Slurm. Nothing of an
installed Slurm's configuration is read or written, and no munge is needed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")

CONFIGURATION = """
ClusterName=kdtest
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CryptoType=crypto/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=10
SlurmdParameters=config_overrides
MinJobAge=600
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=8 RealMemory=8000 Gres=gpu:4
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why a Slurm cannot be started here, None where it can."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if absent:
        return f"no Slurm here ({', '.join(absent)} missing); run tests/cluster/setup.sh as root"
    if os.getuid() != 0:
        return "Slurm's daemons need root; run the tests as root"
    hosts = Path("/etc/hosts").read_text(encoding="utf-8").split()
    if not set(NODES) <= set(hosts):
        return "the names n1 and n2 do not resolve; run tests/cluster/setup.sh as root"
    return None


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class SlurmBox:
    """The running Slurm: its environment, its nodes, its jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf), "PATH": _path()}
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SLURM_STEP", "SBATCH_"))]:
            del self.environment[name]

    def start(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        self.conf.write_text(CONFIGURATION.format(folder=self.folder), encoding="utf-8")
        for number in range(4):  # a GPU without a device file is no GPU to slurmd; any file will do
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-3]\n", encoding="utf-8")
        self.run("slurmctld", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.node_states() == ["idle", "idle"], 30, lambda: f"the nodes are {self.node_states()}")

    def stop(self) -> None:
        self.run("scancel", "--signal=KILL", "--user=root", check=False)
        self.run("scontrol", "shutdown", check=False)
        for name in ("slurmctld.pid", *(f"slurmd-{node}.pid" for node in NODES)):
            pid = self._pid(name)
            wait_for(
                lambda pid=pid: pid is None or not Path(f"/proc/{pid}").exists(),
                30,
                lambda name=name: f"{name} lives on",
            )

    def start_node(self, node: str) -> None:
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self.run("slurmd", "-N", node)

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def node_pid(self, node: str) -> int:
        pid = self._pid(f"slurmd-{node}.pid")
        if pid is None:
            raise RuntimeError(f"slurmd of {node} is not running")
        return pid

    def kill_node(self, node: str) -> None:
        """Let a node die without a word: its daemon and all that runs in its jobs, killed, and its spool lost."""
        tasks = {pid for pid in _pids() if f"SLURMD_NODENAME={node}".encode() in _words(pid, "environ")}
        steps = {_parent(pid) for pid in tasks} - tasks  # the slurmstepds, which carry no mark of their node
        for pid in (self.node_pid(node), *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder / f"spool-{node}")

    def processes(self, text: str) -> list[int]:
        """Processes of kd_dist whose command line holds this text."""
        return [
            pid for pid in _pids() if any(text.encode() in word for word in _words(pid, "cmdline")) and _is_rank(pid)
        ]

    def rank_pid(self, run: str, rank: int) -> int:
        """The process of one rank of a run."""
        found = [pid for pid in self.processes(run) if f"RANK={rank}".encode() in _words(pid, "environ")]
        return found[0]

    def node_states(self) -> list[str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
        return [line.rstrip("*") for line in lines]

    def run(self, *command: str, check: bool = True, **more) -> str:
        """What a command prints; CalledProcessError with its words where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, **more)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    # ---- jobs

    def facts(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        words = self.run("scontrol", "-o", "show", "job", job, check=False).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job).get("JobState", "GONE")

    def wait_state(self, job: str, *states: str, seconds: float = 120) -> str:
        wait_for(lambda: self.state(job) in states, seconds, lambda: f"job {job} is {self.facts(job)}, not {states}")
        return self.state(job)

    def release(self, job: str) -> None:
        """Let a requeued job start now instead of in two minutes."""
        wait_for(lambda: self.state(job) == "PENDING", 60, lambda: f"job {job} is {self.facts(job)}")
        time.sleep(
            3
        )  # a requeued batch script's own end must be known before the next start, or it counts as that one's
        wait_for(lambda: self._start_now(job), 60, lambda: f"job {job} cannot be released: {self.facts(job)}")

    def _start_now(self, job: str) -> bool:
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return self.state(job) != "PENDING" or self.facts(job).get("Reason") != "BeginTime"


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _words(pid: int, name: str) -> list[bytes]:
    """The words of a process's command line or environment; none once it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    except OSError:
        return [b""]


def _is_rank(pid: int) -> bool:
    words = _words(pid, "cmdline")
    return (
        b"-m" in words and any(word.startswith(b"kd_dist.") for word in words) and b"torchrun" not in b" ".join(words)
    )


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    except OSError:
        return 0


def wait_for(holds: Callable[[], object], seconds: float, reason: Callable[[], str]) -> None:
    """Poll until something holds; AssertionError with the reason where it does not in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {reason()}")
        time.sleep(0.3)
