"""A real Slurm on one machine: munged, slurmctld and a slurmd for each pretended node, as root.

No systemd, no cgroups, no database. Nodes claim more CPUs, memory and GPUs than there are; a GPU is
a twin of /dev/null, since slurmd exports CUDA_VISIBLE_DEVICES for device files only. All daemons
are children of this process, run in the foreground, write below one folder and listen on loopback.
"""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
PAPER_NODES = 16  # of each kind
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}

_CONF = """\
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
MpiDefault=none
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=5
ReturnToService=2
PropagateResourceLimits=NONE
"""


def why_not() -> str | None:
    """The reason why no rig can run here, with its remedy; None if it can."""
    if os.geteuid() != 0:
        return "a Slurm of our own needs root: run the tests as root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return (
            f"no {', '.join(missing)} here: "
            "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    return None


@dataclass(frozen=True)
class Job:
    """A job that ended."""

    state: str
    exit_code: int
    output: str


@dataclass
class SlurmRig:
    """`with SlurmRig(folder) as rig:` has all nodes idle inside the block."""

    root: Path
    num_nodes: int = 2
    gpus_per_node: int = 8
    cpus_per_node: int = 32
    paper_kinds: tuple[str, ...] = ()  # of GPUs, with 8 of which the partition `paper` has nodes
    _daemons: ExitStack = field(default_factory=ExitStack)

    @property
    def environment(self) -> dict[str, str]:
        """What the client programs need: the configuration, and no settings of an outer job."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return outer | {"SLURM_CONF": str(self.root / "slurm.conf")}

    def __enter__(self) -> "SlurmRig":
        self.root.mkdir(parents=True)
        try:
            self._start_munge()
            self._configure()
            self._start("slurmctld", "-D", "-f", str(self.root / "slurm.conf"))
            for node in self._nodes():
                self._start("slurmd", "-D", "-N", node, "-f", str(self.root / "slurm.conf"))
            self._wait_until_idle()
        except BaseException:
            self._daemons.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.run("scancel", "--full", "--user=root")
        self._daemons.close()

    def run(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """The finished `command`, run against this Slurm."""
        return subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )

    def submit(self, script: Path, environment: dict[str, str] | None = None) -> str:
        """The id of the job that `script` became."""
        done = subprocess.run(
            ["sbatch", "--parsable", script.name],
            env=self.environment | (environment or {}),
            cwd=script.parent,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().partition(";")[0]

    def wait(self, job: str, timeout_s: float = 60) -> Job:
        """The job once it has ended. `sbatch --wait` would look every 2 to 10 s only."""
        end = time.monotonic() + timeout_s
        while True:
            record = self.run("scontrol", "show", "job", "--oneliner", job).stdout
            fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", record))
            if fields.get("JobState") in FINAL:
                break
            if time.monotonic() > end:
                self.run("scancel", "--full", job)
                raise TimeoutError(f"job {job} still {fields.get('JobState')}: {record}")
            time.sleep(0.1)
        output = Path(fields["StdOut"])
        text = output.read_text() if output.exists() else ""
        return Job(fields["JobState"], int(fields["ExitCode"].partition(":")[0]), text)

    def _nodes(self) -> list[str]:
        return [f"rig{index}" for index in range(1, self.num_nodes + 1)]

    def _start(self, *command: str) -> None:
        log = self._daemons.enter_context(
            (self.root / f"{command[0]}-{len(list(self.root.glob('*.log')))}.log").open("wb")
        )
        daemon = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        self._daemons.callback(_stop, daemon)

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        socket_path = self.root / "munge.socket"
        self._start(
            "munged",
            "--foreground",
            "--force",  # pytest's folders are closed to other users, who have no business here
            f"--key-file={key}",
            f"--seed-file={self.root / 'munge.seed'}",
            f"--pid-file={self.root / 'munged.pid'}",
            f"--socket={socket_path}",
            "--num-threads=2",
        )
        self._poll("munged does not answer", socket_path.exists)

    def _configure(self) -> None:
        ports = [free_port() for _ in range(1 + self.num_nodes)]
        host = socket.gethostname().partition(".")[0]
        conf = _CONF.format(host=host, root=self.root, ports=ports)
        gres = "AutoDetect=off\n"
        gpu_files = self._make_gpus()
        for index, node in enumerate(self._nodes(), start=1):
            conf += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.100.{index} "
                f"Port={ports[index]} CPUs={self.cpus_per_node} RealMemory=512000 "
                f"Gres=gpu:{self.gpus_per_node}\n"
            )
            gres += f"NodeName={node} Name=gpu {gpu_files} Flags=nvidia_gpu_env\n"
        conf += f"PartitionName=gpu Nodes={','.join(self._nodes())} Default=YES MaxTime=60\n"
        conf += self._paper_nodes()
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "gres.conf").write_text(gres)
        # slurmd loads a cgroup plugin that nothing uses, and picking one fails where no cgroup tree
        # is mounted: name the one that needs none, called otherwise before Slurm 23.11.
        version = tuple(map(int, re.findall(r"\d+", self.run("slurmd", "-V").stdout)[:2]))
        plugin = "disabled" if version >= (23, 11) else "cgroup/v1"
        (self.root / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self.root / "state").mkdir()

    def _paper_nodes(self) -> str:
        """Nodes that no daemon stands behind: Slurm counts them, and would start them for a job."""
        conf = "".join(
            f"NodeName={kind}-[1-{PAPER_NODES}] CPUs=128 RealMemory=2048000 Gres=gpu:{kind}:8 "
            "Feature=paper State=CLOUD\n"
            for kind in self.paper_kinds
        )
        nodes = ",".join(f"{kind}-[1-{PAPER_NODES}]" for kind in self.paper_kinds)
        return conf + f"PartitionName=paper Nodes={nodes} MaxTime=60\n" * bool(nodes)

    def _make_gpus(self) -> str:
        null = os.stat("/dev/null")
        try:
            for index in range(self.gpus_per_node):
                os.mknod(self.root / f"gpu{index}", null.st_mode, null.st_rdev)
        except PermissionError:
            return f"Count={self.gpus_per_node}"
        return f"File={self.root}/gpu[0-{self.gpus_per_node - 1}]"

    @property
    def has_gpu_files(self) -> bool:
        """Whether this machine let us make device files; else no job sees GPU numbers."""
        return (self.root / "gpu0").exists()

    def _wait_until_idle(self) -> None:
        def idle() -> bool:
            command = ("sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%T")
            states = self.run(*command).stdout.split()
            return states == ["idle"] * self.num_nodes

        self._poll("not all nodes are idle", idle)

    def _poll(self, what: str, done: Callable[[], bool], timeout_s: float = 30) -> None:
        end = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > end:
                logs = "\n".join(log.read_text()[-2000:] for log in self.root.glob("*.log"))
                raise TimeoutError(f"{what}\n{logs}")
            time.sleep(0.05)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
