"""What the ranks of a test of memory between pipeline stages run."""

import os
import random
import time
import warnings
from typing import Any
from unittest.mock import patch

import torch
from tests.executor.cases import serve

from rankwright.executor import near_memory
from rankwright.executor.mesh import Mesh
from rankwright.executor.stage_memory import VARIABLE, StageMemory, open_stage_memory
from rankwright.planner.plan import Plan

ROWS, DIM, SEQUENCES = 24, 64, 9


def opened(rank: int, plan_json: str, device: str) -> tuple[Mesh, StageMemory | None]:
    """This rank's groups and its end of the memory."""
    plan = Plan.model_validate_json(plan_json)
    mesh = Mesh(plan, rank, torch.device(device, rank) if device == "cuda" else torch.device("cpu"))
    memory = open_stage_memory(
        mesh, rows=ROWS, dim=DIM, dtype=torch.float32, max_num_seqs=SEQUENCES
    )
    return mesh, memory


def hand_over(rank: int, plan_json: str, repeats: int, device: str = "cpu") -> list[bool]:
    """Whether each message was what the stage before, or the sampler, made of its number.

    Stages add one to what they get. Ranks lag in turn; the first stage is as many steps ahead of
    the tokens as an engine is.
    """
    mesh, memory = opened(rank, plan_json, device)
    assert memory is not None
    rng, right = random.Random(rank), []
    expected: list[tuple[int, int]] = []

    def lag(step: int) -> None:
        if step % mesh.num_stages == mesh.place.stage:
            if device == "cuda":
                torch.cuda._sleep(rng.randrange(1_000_000))
            else:
                time.sleep(rng.random() * 0.002)

    def same(tensor: torch.Tensor, number: int) -> torch.Tensor:
        return (tensor == number).all()

    def take_tokens() -> None:
        step, number = expected.pop(0)
        right.append(same(memory.receive_tokens(number, step % (SEQUENCES + 1)), 3 * step))

    for step in range(repeats):
        rows = 1 + step * 7 % ROWS
        hidden_TD = torch.full((rows, DIM), float(step), device=mesh.device)
        lag(step)
        # As layers do: no rank of a stage is far ahead of another.
        mesh.all_reduce(torch.zeros(1, device=mesh.device))
        if mesh.place.stage:
            hidden_TD = memory.receive(torch.empty_like(hidden_TD))
            right.append(same(hidden_TD, step + mesh.place.stage))
        if not mesh.is_last_stage:
            memory.send(hidden_TD + 1)
        if mesh.is_sampler:
            count = step % (SEQUENCES + 1)
            memory.send_tokens(torch.full((count,), 3 * step, device=mesh.device))
        if mesh.is_first_stage:
            expected.append((step, memory.expect_tokens()))
            if len(expected) > mesh.num_stages:
                take_tokens()
    while expected:
        take_tokens()
    found = [bool(one) for one in right]
    mesh.finish()
    return found


def without_room(rank: int, plan_json: str) -> list[str]:
    """Warnings of this rank where there is no room for the memory, which it then does without."""
    with (
        warnings.catch_warnings(record=True) as caught,
        patch.object(near_memory, "_new_file", lambda num_bytes: None),
    ):
        warnings.simplefilter("always")
        mesh, memory = opened(rank, plan_json, "cpu")
    assert memory is None
    mesh.finish()
    return [str(one.message) for one in caught]


def serve_by_messages(*arguments: Any) -> dict[str, list[int]] | None:
    """Like `cases.serve`, with stages that share no memory."""
    with patch.dict(os.environ, {VARIABLE: "0"}):
        return serve(*arguments)
