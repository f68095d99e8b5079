"""A plan as one sbatch script that needs no other file."""

from pathlib import PurePosixPath

from rankwright import __version__
from rankwright.planner.plan import Plan
from rankwright.templates.fill import fill
from rankwright.templates.layout import (
    DRAIN_S,
    END_S,
    PORTS_OF_A_LAUNCH,
    needs_force,
    node_shares,
    start_budget_s,
)
from rankwright.templates.options import SLURM_PORTS, SlurmOptions, default_name
from rankwright.templates.plan_text import plan_text
from rankwright.templates.variables import checked_environment

SLURM_FILE = "rankwright.sbatch"

# Slurm refuses larger scripts (slurm.conf(5), SchedulerParameters max_script_size: 4 megabytes).
MAX_SCRIPT_BYTES = 4 * 2**20

# TERM comes this long before the time limit. Slurm may send it up to 60 s early, never late.
TERM_LEAD_S = DRAIN_S + END_S


def slurm_files(plan: Plan, options: SlurmOptions) -> dict[str, str]:
    """Return the sbatch script of `plan` by file name.

    Raises:
        ValueError: The machines need different numbers of GPUs, or the plan is too large.
    """
    shares = node_shares(plan)
    counts = [share.num_ranks for share in shares]
    if len(set(counts)) > 1:
        raise ValueError(
            f"the plan puts {' + '.join(map(str, counts))} ranks on its {len(counts)} nodes, and "
            "an sbatch job asks every node for the same; plan with a --dp, --tp and --pp that fill "
            "all nodes alike, or render for kubernetes"
        )
    gpus_per_node = shares[0].num_gpus
    local_folder = PurePosixPath(plan.model.name).is_absolute()
    script = fill(
        "slurm/rankwright.sbatch.j2",
        version=__version__,
        model=plan.model.name,
        split=plan.split.label(),
        size=describe_size(len(shares), counts[0], gpu=gpus_per_node > 0),
        name=options.name or default_name(plan),
        partition=options.partition,
        account=options.account,
        time_limit=options.time_limit,
        num_nodes=len(shares),
        gpus_per_node=gpus_per_node,
        num_cpus=max(share.num_cpus for share in shares),
        term_lead_s=TERM_LEAD_S,
        log_dir=options.log_dir,
        first_port=SLURM_PORTS.start,
        ports_of_a_launch=PORTS_OF_A_LAUNCH,
        num_port_sets=len(SLURM_PORTS) // PORTS_OF_A_LAUNCH,
        drain_s=DRAIN_S,
        start_s=start_budget_s(shares),
        force=needs_force(shares),
        port=options.port,
        venv=options.venv,
        environment=checked_environment(plan),
        plan_text=plan_text(plan),
        container_image=options.container_image,
        model_path=options.model_path,
        model_mount=options.model_path or (plan.model.name if local_folder else None),
    )
    if len(script.encode()) > MAX_SCRIPT_BYTES:
        raise ValueError(
            f"the script with its plan of {plan.num_gpus} ranks has {len(script.encode())} bytes, "
            f"Slurm takes {MAX_SCRIPT_BYTES}; launch replicas as jobs of their own (a smaller --dp)"
        )
    return {SLURM_FILE: script}


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
