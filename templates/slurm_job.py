"""What every sbatch script has, whatever it starts: what it asks for, where it runs, its files."""

import json
import math
import re
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

from rankwright import __version__
from rankwright.planner.parts_plan import OwnPlan, PartsPlan
from rankwright.templates.fill import fill
from rankwright.templates.layout import (
    DRAIN_S,
    END_S,
    PORTS_OF_A_LAUNCH,
    SHM_BYTES_PER_RANK,
    NodeShare,
    node_shares,
)
from rankwright.templates.options import SLURM_PORTS, SlurmOptions, default_name
from rankwright.templates.plan_text import plan_text

SLURM_FILE = "rankwright.sbatch"

# Slurm refuses larger scripts (slurm.conf(5), SchedulerParameters max_script_size: 4 megabytes).
MAX_SCRIPT_BYTES = 4 * 2**20

# TERM comes this long before the time limit. Slurm may send it up to 60 s early, never late.
TERM_LEAD_S = DRAIN_S + END_S

# For logs and the plan; a full disk loses the lines that say why a run ended.
LEAST_DISK_BYTES = 2**30
# NCCL maps a few MiB for each pair of ranks of a node.
LEAST_SHM_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Component:
    """Nodes that are alike and follow each other: a job has one, a heterogeneous job several."""

    num_nodes: int
    gpus: str  # for --gpus-per-node: '8' or 'h100:8'; '': none
    num_cpus: int
    memory: str


@dataclass(frozen=True, slots=True)
class JobFile:
    """A file that the script carries, and writes where every node reads it."""

    name: str
    function: str
    comment: str
    end: str  # of the heredoc
    text: str


def job_file(name: str, text: str) -> JobFile:
    """Return a file of a job: `disagg_config.yaml` ends with `RANKWRIGHT_DISAGG_CONFIG`."""
    stem = name.partition(".")[0]
    return JobFile(
        name=name,
        function=f"write_{stem}",
        comment=f"{name}, to a file that every node reads.",
        end=f"RANKWRIGHT_{stem.upper()}",
        text=text,
    )


def plan_file(plan: OwnPlan) -> JobFile:
    """Return the plan as a file of a job."""
    return JobFile(
        name="plan.json",
        function="write_plan",
        comment="The plan, to a file that every node reads. Renamed when complete.",
        end="RANKWRIGHT_PLAN",
        text=plan_text(plan),
    )


def fill_job(
    template: str,
    plan: OwnPlan,
    options: SlurmOptions,
    files: tuple[JobFile, ...],
    shares: tuple[NodeShare, ...] | None = None,
    /,
    **values: object,
) -> str:
    """Return the sbatch script that `template`, which extends `job.sbatch.j2`, gives for `plan`.

    Args:
        template: Name of the file.
        plan: What runs.
        options: What was said about the job.
        files: That the script carries.
        shares: What its machines must give; None: what `plan` says.
        values: Of the template, instead of the plan's.

    Raises:
        ValueError: The machines cannot be told apart, or the script is too large.
    """
    shares = shares or node_shares(plan, told_apart=True)
    components = job_components(shares, options.gpu_types)
    variables: dict[str, object] = {
        "version": __version__,
        "model": plan.model.name,
        "split": plan.label(),
        "on_engine": "",
        "notes": (),
        "size": describe_shares(shares),
        "name": options.name or default_name(plan),
        "placement": _placement(options),
        "components": components,
        "num_components": len(components),
        "step_size": _step_size(len(components), len(shares)),
        "num_nodes": len(shares),
        "has_parts": isinstance(plan, PartsPlan),
        "has_gpus": shares[0].num_gpus > 0,
        "exclusive": options.exclusive,
        "requeue": options.requeue,
        "term_lead_s": TERM_LEAD_S,
        "log_dir": options.log_dir,
        "files": files,
        "first_port": SLURM_PORTS.start,
        "ports_of_a_launch": PORTS_OF_A_LAUNCH,
        "num_port_sets": len(SLURM_PORTS) // PORTS_OF_A_LAUNCH,
        "port": options.port,
        "venv": options.venv,
        "runtime": options.container_runtime if options.container_image else None,
        "container_image": options.container_image,
        "model_path": options.model_path,
        "model_mount": _model_mount(plan, options),
        "environment": (),
        "drain_s": DRAIN_S,
        "health_check": options.health_check,
        "least_gpus": min(share.num_gpus for share in shares),
        "least_disk_kib": LEAST_DISK_BYTES // 1024,
        "least_shm_kib": LEAST_SHM_BYTES * max(share.num_gpus for share in shares) // 1024,
        "rdma_ports": _rdma_ports(plan),
    }
    script = fill(template, **(variables | values))
    if len(script.encode()) > MAX_SCRIPT_BYTES:
        raise ValueError(
            f"the script with its plan of {plan.num_gpus} ranks has {len(script.encode())} bytes, "
            f"Slurm takes {MAX_SCRIPT_BYTES}; launch replicas as jobs of their own (a smaller --dp)"
        )
    return script


def job_components(shares: tuple[NodeShare, ...], gpu_types: str | None) -> tuple[Component, ...]:
    """Return what each run of like machines asks for.

    Raises:
        ValueError: Machines hold different GPUs, and `gpu_types` does not name each.
    """
    types = dict(pair.split("=", 1) for pair in gpu_types.split(",")) if gpu_types else {}
    kinds = list(dict.fromkeys(device for share in shares for device in share.devices))
    unnamed = [kind for kind in kinds if kind not in types]
    if unnamed and len({frozenset(share.devices) for share in shares}) > 1:
        raise ValueError(
            f"the plan runs on {' and '.join(kinds)}, and Slurm must be told which nodes have "
            f"which; set gpu_types, such as {','.join(f'{kind}=TYPE' for kind in kinds)}, to what "
            "`sinfo -o %G` calls them, or plan for machines of one kind"
        )
    unknown = sorted(set(types) - set(kinds))
    if unknown:
        raise ValueError(
            f"gpu_types names {', '.join(unknown)}, the plan runs on {', '.join(kinds)}"
        )

    def wants(share: NodeShare) -> tuple[str, int, str]:
        kinds_here = set(share.devices)
        kind = types.get(share.devices[0]) if len(kinds_here) == 1 else None
        count = str(share.num_gpus) if share.num_gpus else ""
        memory = math.ceil((share.memory_bytes + SHM_BYTES_PER_RANK * share.num_ranks) / 2**20)
        return f"{kind}:{count}" if kind and count else count, share.num_cpus, f"{memory}M"

    return tuple(
        Component(len(list(run)), gpus, num_cpus, memory)
        for (gpus, num_cpus, memory), run in groupby(shares, key=wants)
    )


def _step_size(num_components: int, num_nodes: int) -> str:
    if num_components == 1:
        return f"--nodes={num_nodes} --ntasks={num_nodes} --ntasks-per-node=1"
    # What follows would hold for each component by itself; without numbers each is taken whole.
    return f"--het-group=0-{num_components - 1} --ntasks-per-node=1"


def _placement(options: SlurmOptions) -> tuple[tuple[str, str], ...]:
    given = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "reservation": options.reservation,
        "constraint": options.constraint and json.dumps(options.constraint),
        "switches": options.switches,
        "time": options.time_limit,
    }
    return tuple((name, value) for name, value in given.items() if value)


def _model_mount(plan: OwnPlan, options: SlurmOptions) -> str | None:
    local_folder = PurePosixPath(plan.model.name).is_absolute()
    return options.model_path or (plan.model.name if local_folder else None)


def _rdma_ports(plan: OwnPlan) -> tuple[str, ...]:
    """Return the ports that the plan names, if it names whole ones of every node."""
    for variable in plan.environment:
        if variable.name == "NCCL_IB_HCA" and re.fullmatch(r"=\w+(,\w+)*", variable.value):
            return tuple(variable.value[1:].split(","))
    return ()


def describe_shares(shares: tuple[NodeShare, ...]) -> str:
    """Return the size of a job in words."""
    counts = [share.num_ranks for share in shares]
    gpu = shares[0].num_gpus > 0
    if len(set(counts)) == 1:
        return describe_size(len(counts), counts[0], gpu=gpu)
    what = "GPUs" if gpu else "CPU ranks"
    return f"{len(counts)} nodes, {' + '.join(map(str, counts))} {what}"


def describe_size(num_nodes: int, ranks_per_node: int, *, gpu: bool) -> str:
    """Return the size in words.

    >>> describe_size(2, 8, gpu=True)
    '2 nodes x 8 GPUs'
    """
    what = "GPU" if gpu else "CPU rank"
    return (
        f"{num_nodes} node{'s' * (num_nodes != 1)} x "
        f"{ranks_per_node} {what}{'s' * (ranks_per_node != 1)}"
    )
