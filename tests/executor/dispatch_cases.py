"""What the ranks of a test of dispatch run."""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.executor import cases

from rankwright.executor.groups import Group
from rankwright.executor.layers import moe
from rankwright.executor.layers.dispatch import Dispatch
from rankwright.executor.layers.exchange import VARIABLE
from rankwright.executor.mesh import Mesh
from rankwright.executor.record_load import record_load
from rankwright.executor.runner import Runner
from rankwright.executor.scheduler import Scheduler
from rankwright.executor.sequence import Sequence
from rankwright.executor.step_batch import StepBatch
from rankwright.executor.weights import SafetensorsSource
from rankwright.kernels.moe_experts import run_experts
from rankwright.planner.plan import Plan


def logits(
    rank: int, plan_json: str, folder: str, sequences: list[list[int]], exchange: str
) -> tuple[list[np.ndarray] | None, list[list[int]]]:
    """`cases.logits` with tokens sent one way, and how often each expert was counted."""
    os.environ[VARIABLE] = exchange
    try:
        plan, mesh, runner = cases.make(rank, plan_json, folder)
        found = cases.teacher_logits(plan, mesh, runner, sequences)
    finally:
        del os.environ[VARIABLE]
    counted = []
    if runner.rebalancer is not None:
        counted = runner.expert_loads()
    return found, counted


def tokens(
    rank: int,
    plan_json: str,
    folder: str,
    requests: list[tuple[str, list[int], dict[str, Any]]],
    exchange: str,
) -> tuple[dict[str, list[int]], set[str]]:
    """`cases.serve` with tokens sent one way, and what the leader met meanwhile."""
    met: set[str] = set()
    schedule, preempt = Scheduler.schedule, Scheduler._preempt

    def watched(self: Scheduler) -> tuple[StepBatch, list[Sequence]] | None:
        scheduled = schedule(self)
        if scheduled is not None:
            met.update(_kinds_of(scheduled[0], len(self.room.pools)))
        return scheduled

    def sent_back(self: Scheduler, victim: Sequence) -> None:
        met.add("a sequence sent back")
        preempt(self, victim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, exchange)
        patch.setattr(Scheduler, "schedule", watched)
        patch.setattr(Scheduler, "_preempt", sent_back)
        return cases.serve(rank, plan_json, folder, requests) or {}, met


def _kinds_of(batch: StepBatch, num_parts: int) -> Iterator[str]:
    """Say what is unusual in a batch that ranks share out."""
    counts = np.bincount(batch.parts_S, minlength=num_parts)
    prompts = slice(batch.num_decodes, None)
    if not counts.all():
        yield "an idle rank"
    if len(set(counts.tolist())) > 1:
        yield "unequal shares"
    if (batch.context_lens_S[prompts] > batch.query_lens_S[prompts]).any():
        yield "a prompt in chunks"
    if 0 < batch.num_decodes < batch.num_sequences:
        yield "prompts beside decodes"


def expert_rows(rank: int, plan_json: str, folder: str, sequences: list[list[int]]) -> int:
    """Return how many pairs of token and expert this rank's experts computed."""
    rows = 0

    def counting(x_TD: torch.Tensor, experts: Any, weights: Any, slots: Any, **more: Any) -> Any:
        nonlocal rows
        rows += int((slots >= 0).sum())
        return run_experts(x_TD, experts, weights, slots, **more)

    plan, mesh, runner = cases.make(rank, plan_json, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "run_experts", counting)
        cases.teacher_logits(plan, mesh, runner, sequences)
    return rows


def round_trips(rank: int, moe_tp: int, seeds: list[int]) -> list[tuple[float, bool, int]]:
    """Of each trip: the error of what came back, whether only what is needed came, and how much.

    Slot `s` makes `(s + 1) / moe_tp` times a token on each rank that has a part of it.
    """
    ranks = dist.get_world_size()
    group = Group(tuple(range(ranks)), dist.group.WORLD)
    ep, mine = ranks // moe_tp, rank // moe_tp
    out = []
    for seed in seeds:
        shape = torch.Generator().manual_seed(seed)  # equal on all ranks
        sizes = torch.randint(0, 4, (ep,), generator=shape)
        sizes[int(torch.randint(0, ep, (), generator=shape))] += 1  # one slot at least
        stops = [0, *sizes.cumsum(0).tolist()]
        slots_of_ranks = tuple(pairwise(stops))
        num_tokens, top_k, dim = (
            int(torch.randint(low, high, (), generator=shape))
            for low, high in ((0, 9), (1, min(4, stops[-1] + 1)), (1, 40))
        )
        own = torch.Generator().manual_seed(1000 * seed + rank)
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        x = torch.randn(num_tokens, dim, generator=own).to(dtype)
        weights = torch.rand(num_tokens, top_k, generator=own)
        order = torch.rand(num_tokens, stops[-1], generator=own).argsort(1)
        slots = order[:, :top_k].to(torch.int32)
        counted = torch.randint(0, 2, (num_tokens,), generator=own) if seed % 3 else None
        sent = Dispatch(group, slots_of_ranks, mine, x, weights, slots, counted)
        here = sent.arrived()
        is_mine = here.slots_MK >= 0
        first = slots_of_ranks[mine][0]
        factor = (here.weights_MK * (here.slots_MK + first + 1) * is_mine).sum(1) / moe_tp
        back = sent.combine((here.x_MD.float() * factor[:, None]).to(dtype))
        expected = x.float() * (weights * (slots + 1)).sum(1, keepdim=True)
        if counted is not None:
            expected = expected * (counted > 0)[:, None]
        error = float((back.float() - expected).norm() / expected.norm().clamp(min=1e-6))
        out.append((error / torch.finfo(dtype).eps, bool(is_mine.any(1).all()), len(here.x_MD)))
    return out


def recorded(rank: int, plan_json: str, folder: str, sequences: list[list[int]], path: str) -> None:
    """Write how often each expert was chosen while these tokens were computed."""
    plan = Plan.model_validate_json(plan_json)
    mesh = Mesh(plan, rank, torch.device("cpu"))
    mesh.counts_experts = True
    source = SafetensorsSource(Path(folder), torch.float32, mesh.device)
    runner = Runner(plan, mesh, source, dtype=torch.float32)
    runner.warm_up(plan.limits)  # what it computes does not count
    cases.teacher_logits(plan, mesh, runner, sequences)
    record_load(mesh, runner, Path(path))
