"""What Slurm has, counted against what a plan asks for, before anything is submitted.

`sbatch` refuses too large a job without a number, or queues it for ever.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rankwright.executor.backends.tools import check_tool
from rankwright.planner.parts_plan import OwnPlan
from rankwright.templates.layout import node_shares
from rankwright.templates.options import SlurmOptions
from rankwright.templates.slurm_job import Component, job_components


def check_offer(plan: OwnPlan, options: SlurmOptions) -> None:
    """Check that Slurm has the machines that `plan` asks for, busy or not.

    Raises:
        ValueError: It has not; with both counts.
        ToolError: Slurm does not answer.
    """
    command = ["sinfo", "--noheader", "--Node", "--format=%N|%c|%G|%P"]
    if options.partition is not None:
        command.append(f"--partition={options.partition}")
    offered: dict[str, dict[str, Machine]] = {}
    for line in check_tool(command).splitlines():
        node, cpus, gres, name = line.strip().split("|")
        offered.setdefault(name, {})[node] = Machine(gpus_of(gres), int(cpus))
    default = [name for name in offered if name.endswith("*")]
    if options.partition is None and default:  # that is where the job would go
        offered = {name: offered[name] for name in default}
    components = job_components(node_shares(plan, told_apart=True), options.gpu_types)
    wanted = [_wanted(component) for component in components for _ in range(component.num_nodes)]
    if any(fits(wanted, list(nodes.values())) for nodes in offered.values()):
        return
    has = "; ".join(
        f"partition {name.rstrip('*')} has {describe(list(nodes.values()))}"
        for name, nodes in offered.items()
    )
    raise ValueError(
        f"the plan asks for {describe(wanted)}, and of Slurm "
        f"{has or f'partition {options.partition} has no machine'}; plan for what it has, or "
        "choose another with --set partition=NAME"
    )


@dataclass(frozen=True, slots=True)
class Machine:
    """GPUs by type ('' where it has no name) and CPUs that a node has, or that a plan wants."""

    gpus: Mapping[str, int]
    num_cpus: int

    @property
    def num_gpus(self) -> int:
        """GPUs of all types."""
        return sum(self.gpus.values())

    def holds(self, wanted: "Machine") -> bool:
        """Whether `wanted` can run here."""
        named = all(self.gpus.get(kind, 0) >= n for kind, n in wanted.gpus.items() if kind)
        enough = self.num_gpus >= wanted.num_gpus and self.num_cpus >= wanted.num_cpus
        return named and enough

    def __str__(self) -> str:
        """Return it in words."""
        gpus = [f"{n} {kind + ' ' if kind else ''}GPU{'s' * (n != 1)}" for kind, n in self._kinds]
        return " and ".join([*gpus, f"{self.num_cpus} CPU{'s' * (self.num_cpus != 1)}"])

    @property
    def _kinds(self) -> list[tuple[str, int]]:
        return sorted((kind, n) for kind, n in self.gpus.items() if n)


def gpus_of(gres: str) -> dict[str, int]:
    """Return the GPUs in a node's list of generic resources, by type.

    >>> gpus_of("gpu:h100:4(S:0-1),gpu:a100:2,shard:8"), gpus_of("gpu:8"), gpus_of("(null)")
    ({'h100': 4, 'a100': 2}, {'': 8}, {})
    """
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", gres)
    return {kind: int(count) for kind, count in found}


def fits(wanted: list[Machine], offered: list[Machine]) -> bool:
    """Return whether each wanted machine gets one of its own.

    The largest choose first, each the smallest that holds it.
    """

    def size(machine: Machine) -> tuple[bool, int, int]:
        return any(machine.gpus), machine.num_gpus, machine.num_cpus

    free = sorted(offered, key=size)
    for machine in sorted(wanted, key=size, reverse=True):
        place = next((i for i, node in enumerate(free) if node.holds(machine)), None)
        if place is None:
            return False
        del free[place]
    return True


def describe(machines: list[Machine]) -> str:
    """Return machines in words.

    >>> describe([Machine({"": 8}, 32), Machine({"": 8}, 32), Machine({"h100": 4}, 1)])
    '2 nodes x (8 GPUs and 32 CPUs) + 1 node x (4 h100 GPUs and 1 CPU)'
    """
    counts = Counter(map(str, machines))
    return " + ".join(
        f"{count} node{'s' * (count != 1)} x ({what})" for what, count in counts.most_common()
    )


def _wanted(component: Component) -> Machine:
    kind, _, count = component.gpus.rpartition(":")
    return Machine({kind: int(count)} if count else {}, component.num_cpus)
