"""How a plan is started, beyond what the plan says."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankwright.planner.plan import Plan

LoadFormat = Literal["auto", "dummy"]
DeviceKind = Literal["auto", "cpu", "cuda"]
BackendName = Literal["local", "ray"]

WORKER = (sys.executable, "-m", "rankwright.executor.worker")


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a plan is started.

    Attributes:
        backend: What starts the ranks: torchrun on this machine, or Ray.
        load_format: 'dummy' makes random weights.
        model_path: Folder with the weights; None: found by the model's name.
        device: What the ranks compute on; 'auto': what the plan says.
        nnodes: Machines that this command runs on at once, each with its `node_rank`; 1 with Ray.
        node_rank: Number of this machine, 0 for the one that serves.
        master_addr: Address of machine 0.
        master_port: Port there for torch; None: a free one, or 29500 with several nodes.
        host_interface: Address on which machine 0 listens for leaders; None: `master_addr`.
        start_timeout_s: From the start until every replica is ready.
        worker: Command of a rank.
        ray_address: Of a Ray cluster; None: `RAY_ADDRESS`, or the one that runs here.
        prefix_cache: Share KV blocks of prompts that begin alike.
        record_expert_load: File for how often each expert was chosen; None: not counted.
        force: Run also where a machine is not the one that the plan was made for.
        part: Number of the part, of a plan of several; None: it is the whole plan.
        ranks_beside: Ranks of other parts on this machine, which share its CPUs.
    """

    backend: BackendName = "local"
    load_format: LoadFormat = "auto"
    model_path: Path | None = None
    device: DeviceKind = "auto"
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int | None = None
    host_interface: str | None = None
    start_timeout_s: float = 1800.0
    worker: Sequence[str] = WORKER
    ray_address: str | None = None
    prefix_cache: bool = True
    record_expert_load: Path | None = None
    force: bool = False
    part: int | None = None
    ranks_beside: int = 0


def worker_arguments(options: RunOptions, plan_path: Path) -> list[str]:
    """Return what the command of a rank is followed by."""
    arguments = ["--plan", str(plan_path), "--load-format", options.load_format]
    if options.model_path is not None:
        arguments += ["--model-path", str(options.model_path)]
    if not options.prefix_cache:
        arguments.append("--no-prefix-cache")
    if options.record_expert_load is not None:
        arguments += ["--record-expert-load", str(options.record_expert_load)]
    return [*arguments, "--device", options.device]


def node_order(plan: Plan) -> tuple[int, ...]:
    """Return the machines of the plan in the order of their first rank.

    torchrun numbers ranks along the nodes, so a node's ranks must follow one another.

    Raises:
        ValueError: They do not.
    """
    order: list[int] = []
    for rank in plan.ranks:
        if not order or order[-1] != rank.node:
            order.append(rank.node)
    if len(set(order)) != len(order):
        raise ValueError(
            f"ranks go to nodes {order}: torchrun needs the ranks of a node to follow one another; "
            "plan again, or launch with --backend ray, which does not"
        )
    return tuple(order)
