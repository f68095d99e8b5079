"""Writes how often each expert was chosen while a replica served, for `plan --expert-load`."""

from pathlib import Path

import torch.distributed as dist

from rankwright.executor.mesh import Mesh
from rankwright.executor.runner import Runner
from rankwright.planner.expert_load import ExpertLoad, path_of_replica, write_expert_load


def record_load(mesh: Mesh, runner: Runner, path: Path) -> None:
    """Write what was counted since the warm-up; all ranks of the replica must call this together.

    The leader writes, `path` if it is of replica 0. Under context parallelism a rank counts the
    tokens that it computes, and those of its first rank are written.
    """
    mine = runner.expert_loads()
    group = mesh.control.process_group
    gathered: list[list[list[int]]] = [mine]
    if group is not None:
        gathered = [[] for _ in mesh.control.ranks]
        dist.all_gather_object(gathered, mine, group=group)
    if not mesh.is_leader:
        return
    stage_ranks = mesh.split.tp * mesh.split.cp
    layers = [tuple(layer) for stage in gathered[::stage_ranks] for layer in stage]
    found = ExpertLoad(model=mesh.plan.model.name, layers=tuple(layers))
    write_expert_load(found, path_of_replica(path, mesh.place.replica))
