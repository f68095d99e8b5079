"""Reads rendered files back and proves that they ask for what the plan says.

Runs after every render. It knows nothing of the templates: it parses what Slurm and Kubernetes will
parse, so that a template that drifts from the plan cannot ship.
"""

import re
import shlex
from collections.abc import Callable
from typing import Any

import yaml

from rankwright.planner.plan import Plan
from rankwright.templates.kubernetes_objects import KUBERNETES_FILE
from rankwright.templates.slurm_script import SLURM_FILE


class ManifestMismatchError(AssertionError):
    """A rendered file does not say what the plan says: a fault of ours, never of the user."""


def check(plan: Plan, target: str, files: dict[str, str]) -> None:
    """Compare `files` with `plan`.

    Raises:
        ManifestMismatchError: They ask for other machines, ranks or GPUs, or carry another plan.
    """
    CHECKS[target](plan, files)


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise ManifestMismatchError(f"{what}: rendered {found!r}, the plan says {expected!r}")


def _expect_plan(plan: Plan, text: str) -> None:
    # Both through JSON: a plan built in Python may hold a subclass or -0.0 that compares otherwise.
    embedded = Plan.model_validate_json(text).model_dump_json()
    if embedded != plan.model_dump_json():
        raise ManifestMismatchError("the embedded plan.json is not the plan")


def _ranks_by_node(plan: Plan) -> list[int]:
    # Machines in the order of their first rank, which is how launchers number them.
    return [len(plan.ranks_of_node(n)) for n in dict.fromkeys(rank.node for rank in plan.ranks)]


def _is_cpu(plan: Plan) -> bool:
    first = plan.ranks[0]
    gpus = {gpu.index: gpu for gpu in plan.cluster.node(first.node).gpus}
    return gpus[first.gpu].device == "cpu"


def slurm_header(script: str) -> dict[str, str]:
    r"""Return the options of a script's #SBATCH lines by long name; a flag's value is ''.

    >>> slurm_header("#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --requeue\necho\n#SBATCH --mem=0")
    {'nodes': '2', 'requeue': ''}

    As `sbatch` does, it stops at the first command.
    """
    header: dict[str, str] = {}
    for line in script.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            for word in shlex.split(line.removeprefix("#SBATCH "), comments=True):
                name, _, value = word.removeprefix("--").partition("=")
                if name in header:
                    raise ManifestMismatchError(f"#SBATCH --{name} is given twice")
                header[name] = value
    return header


def _check_slurm(plan: Plan, files: dict[str, str]) -> None:
    script = files[SLURM_FILE]
    header = slurm_header(script)
    ranks = _ranks_by_node(plan)
    gpus_per_node = 0 if _is_cpu(plan) else ranks[0]
    num_nodes = int(header["nodes"])
    _expect("nodes", num_nodes, len(ranks))
    _expect("launchers a node", header["ntasks-per-node"], "1")
    _expect("GPUs a node", int(header.get("gpus-per-node", "0")), gpus_per_node)
    if gpus_per_node:
        _expect("GPUs of the job", num_nodes * gpus_per_node, plan.num_gpus)
    _expect("launch --nnodes", re.findall(r"--nnodes (\d+)", script), [str(num_nodes)])
    _expect("srun --nodes", re.findall(r"^ +--nodes=(\d+)", script, re.M), [str(num_nodes)])
    _expect_plan(plan, script.split("<<'RANKWRIGHT_PLAN'\n")[1].split("\nRANKWRIGHT_PLAN\n")[0])


# libyaml's reader takes the same YAML and is ten times as fast, where PyYAML was built with it.
_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML file.

    Raises:
        ManifestMismatchError: A mapping has a key twice, of which readers silently keep one.
    """
    for node in yaml.compose_all(text, _LOADER):
        _refuse_double_keys(node)
    return list(yaml.load_all(text, _LOADER))


def _refuse_double_keys(node: yaml.Node | None) -> None:
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ManifestMismatchError(f"the key {key!r} is given twice{node.start_mark}")
        for _, value in node.value:
            _refuse_double_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_double_keys(value)


def _check_kubernetes(plan: Plan, files: dict[str, str]) -> None:
    objects = read_objects(files[KUBERNETES_FILE])
    ranks = _ranks_by_node(plan)
    gpus_by_pod: dict[int, int] = {}
    for workload in objects:
        if workload["kind"] not in ("Deployment", "StatefulSet"):
            continue
        spec = workload["spec"]
        start = spec.get("ordinals", {}).get("start", 0)
        (container,) = spec["template"]["spec"]["containers"]
        resources = container["resources"]
        gpus = [v for k, v in resources.get("limits", {}).items() if k.endswith("/gpu") or "/" in k]
        _expect("GPU resources of a container", len(gpus), 0 if _is_cpu(plan) else 1)
        for ordinal in range(start, start + spec["replicas"]):
            _expect(f"pods numbered {ordinal}", ordinal in gpus_by_pod, False)
            gpus_by_pod[ordinal] = gpus[0] if gpus else 0
        words = " ".join(container["command"] + container["args"])
        nnodes = re.findall(r"--nnodes (\d+)", words)
        _expect("launch --nnodes", nnodes, [str(len(ranks))] if len(ranks) > 1 else [])
    pods = [gpus_by_pod[ordinal] for ordinal in sorted(gpus_by_pod)]
    _expect("pods", sorted(gpus_by_pod), list(range(len(ranks))))
    _expect("GPUs by pod", pods, [0] * len(ranks) if _is_cpu(plan) else ranks)
    (config,) = [item for item in objects if item["kind"] == "ConfigMap"]
    _expect_plan(plan, config["data"]["plan.json"])


CHECKS: dict[str, Callable[[Plan, dict[str, str]], None]] = {
    "slurm": _check_slurm,
    "kubernetes": _check_kubernetes,
}
