"""An sbatch script against its plan."""

import re
import shlex

from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.checks.mismatch import (
    ManifestMismatchError,
    expect,
    expect_plan,
    exported,
    heredoc,
    is_cpu,
    ranks_by_node,
    variables,
)

# What the script itself exports, besides the plan's variables.
_OWN = frozenset({"RANKWRIGHT_AUTHKEY", "RANKWRIGHT_LOG_DIR", "VIRTUAL_ENV", "PATH"})


def slurm_headers(script: str) -> list[dict[str, str]]:
    r"""Return the options of a script's #SBATCH lines by long name, a dict for each component.

    A flag's value is ''. As `sbatch` does, it stops at the first command.

    >>> slurm_headers("#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH hetjob\n#SBATCH --nodes=1\necho")
    [{'nodes': '2'}, {'nodes': '1'}]

    Raises:
        ManifestMismatchError: An option is given twice for a component.
    """
    headers: list[dict[str, str]] = [{}]
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH "), comments=True):
                if word == "hetjob":
                    headers.append({})
                    continue
                name, _, value = word.removeprefix("--").partition("=")
                if name in headers[-1]:
                    raise ManifestMismatchError(f"#SBATCH --{name} is given twice")
                headers[-1][name] = value
    return headers


def slurm_header(script: str) -> dict[str, str]:
    r"""Return the options of a job of one component.

    >>> slurm_header("#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --requeue\necho\n#SBATCH --mem=0")
    {'nodes': '2', 'requeue': ''}
    """
    (header,) = slurm_headers(script)
    return header


def check_job(plan: OwnPlan, script: str) -> None:
    """Compare what a job asks for: nodes, launchers, GPUs by node and by kind, the plan it carries.

    Raises:
        ManifestMismatchError: It is not what the plan says.
    """
    ranks = ranks_by_node(plan)
    gpus: list[int] = []
    types: list[str] = []
    for header in slurm_headers(script):
        expect("launchers a node", header["ntasks-per-node"], "1")
        kind, _, count = header.get("gpus-per-node", "0").rpartition(":")
        gpus += [int(count)] * int(header["nodes"])
        types += [kind] * int(header["nodes"])
    expect("nodes", len(gpus), len(ranks))
    expect("GPUs a node", gpus, [0] * len(ranks) if is_cpu(plan) else ranks)
    if not is_cpu(plan):
        expect("GPUs of the job", sum(gpus), plan.num_gpus)
    _check_types(plan, types)
    expect_plan(plan, heredoc(script, "RANKWRIGHT_PLAN"))


def _check_types(plan: OwnPlan, types: list[str]) -> None:
    """Nodes of one kind are asked for by one name, and those of another kind by another."""
    devices = {
        (rank.node, gpu.device)
        for rank in plan.ranks
        for gpu in plan.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    }
    order = list(dict.fromkeys(rank.node for rank in plan.ranks))
    kinds = [frozenset(device for where, device in devices if where == node) for node in order]
    named = {kind: types[kinds.index(kind)] for kind in kinds}
    expect("GPU types by node", types, [named[kind] for kind in kinds])
    expect("names of GPU types", len(set(named.values())), len(named))


def job_variables(script: str) -> dict[str, str]:
    """Return what a job exports, but for what is its own: where Python is, and where logs go."""
    return {name: value for name, value in exported(script).items() if name not in _OWN}


def check_slurm(plan: OwnPlan, script: str) -> None:
    """Compare a job of ours with its plan.

    Raises:
        ManifestMismatchError: It is not what the plan says.
    """
    check_job(plan, script)
    num_nodes = str(len(ranks_by_node(plan)))
    expect("launch --nnodes", re.findall(r"--nnodes (\d+)", script), [num_nodes])
    if len(slurm_headers(script)) == 1:
        sizes = re.findall(r"^ +--nodes=(\d+)", script, re.MULTILINE)
        expect("srun --nodes", sizes, [num_nodes])
    expect("environment", job_variables(script), variables(plan))
