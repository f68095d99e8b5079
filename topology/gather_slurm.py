"""Runs a command on every machine of a Slurm job, once each, and reads what they print."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from threading import Thread
from typing import IO

from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.probe_message import parse_message

# Prints the name that Slurm has for the machine: its host name may be another. The command says all
# else on one stream, so that srun can label its lines.
_TASK = 'printf "%s\\n" "$SLURMD_NODENAME"; exec "$@"'

# What the job asked for its own tasks; ours is one task a node and wants all of it.
_JOB_ONLY = {
    *("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"),
    *("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_GPUS_PER_TASK", "SLURM_DISTRIBUTION"),
    *("SLURM_CPU_BIND", "SLURM_GPU_BIND", "SLURM_EXACT"),
}


def num_nodes_of_job(environment: Mapping[str, str]) -> int:
    """Return how many machines the job has.

    Raises:
        ValueError: This is no Slurm job.
    """
    if "SLURM_JOB_ID" not in environment:
        raise ValueError(
            "this is no Slurm job: SLURM_JOB_ID is not set; call it from a batch script or within "
            "`salloc --nodes 2 ...`"
        )
    text = environment.get("SLURM_JOB_NUM_NODES", "")
    return int(text) if text.isdecimal() else 1


def probes_of_job(
    environment: Mapping[str, str], *, require_gpu: bool, timeout_s: float
) -> list[Cluster]:
    """Return what the probe on each machine of the job read, in Slurm's order and names.

    Raises:
        ProbeError: A machine could not be read or did not answer.
        ValueError: This is no Slurm job.
    """
    count = num_nodes_of_job(environment)
    command = ["probe", "--json", "--gather", "none", *(["--require-gpu"] if require_gpu else [])]
    output, errors = run_on_each(environment, ["rankwright", *command], timeout_s)
    return read_labelled(output, count, errors)


def run_on_each(
    environment: Mapping[str, str],
    module: Sequence[str],
    timeout_s: float,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[str, str]:
    """Return what a Python module prints on each machine, `srun --label` before each line.

    Args:
        environment: Of the job.
        module: Its name and arguments.
        timeout_s: Until all must have ended.
        tell: Gets each line on standard error, with its label.

    Returns:
        Standard output, the name of the machine being each task's first line, and standard error.

    Raises:
        ProbeError: srun is missing or does not end in time.
        ValueError: This is no Slurm job.
    """
    count = num_nodes_of_job(environment)
    command = [
        *("srun", "--label", "--overlap", "--export=ALL", "--input=none"),
        *("--nodes", str(count), "--ntasks", str(count), "--ntasks-per-node=1", "--cpu-bind=none"),
        *("sh", "-c", _TASK, "sh", sys.executable, "-m", *module),
    ]
    ours = {name: value for name, value in environment.items() if name not in _JOB_ONLY}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=ours,
        )
    except FileNotFoundError:
        raise ProbeError(
            "tool_not_found", "srun is not installed here; call it where Slurm's commands are"
        ) from None
    assert process.stdout is not None
    assert process.stderr is not None
    said: list[str] = []
    read: list[str] = []

    def hear(line: str) -> None:
        said.append(line)
        tell(line)

    readers = [
        Thread(target=_read, args=(process.stdout, read.append), daemon=True),
        Thread(target=_read, args=(process.stderr, hear), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise ProbeError(
            "gather_failed",
            f"srun did not end within {timeout_s:g} s; see `squeue --steps` and whether a node of "
            "the job is down",
        ) from None
    finally:
        if process.poll() is None:
            process.terminate()  # srun ends its tasks
            process.wait()
        for reader in readers:
            reader.join()
    return "".join(read), "".join(said)


def _read(stream: IO[str], take: Callable[[str], object]) -> None:
    with stream:
        for line in stream:
            take(line)


def labelled_lines(text: str) -> dict[int, list[str]]:
    r"""Return the lines of each task of `srun --label`.

    >>> labelled_lines(" 0: a\n10: b\n 0:\n")
    {0: ['a', ''], 10: ['b']}
    """
    lines: dict[int, list[str]] = {}
    for line in text.splitlines():
        match = re.match(r"\s*(\d+): ?(.*)", line)
        if match is not None:
            lines.setdefault(int(match[1]), []).append(match[2])
    return lines


def read_labelled(text: str, count: int, said: str = "") -> list[Cluster]:
    """Return what `srun --label` printed: of each of `count` tasks a name, then its probe as JSON.

    Args:
        text: Its standard output.
        count: Tasks.
        said: Its standard error, for the message.

    Raises:
        ProbeError: A task is missing, or could not read its machine.
    """
    lines = labelled_lines(text)
    clusters: list[Cluster] = []
    for task in range(count):
        name, *rest = lines.get(task, [""])
        clusters.append(parse_message("\n".join(rest), name or f"node {task} of {count}", said))
    return clusters


def address_of(node: str) -> str:
    """Return the address that Slurm has for one of its nodes, else its name."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "node", "--oneliner", node],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=os.environ,
        )
    except (OSError, subprocess.TimeoutExpired):
        return node
    match = re.search(r" NodeAddr=(\S+)", done.stdout)
    return match[1] if match is not None else node
