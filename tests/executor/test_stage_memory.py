"""Stages that hand over through memory: every message arrives, once, and tokens are the same."""

from typing import Any

import pytest
import torch
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import SPLITS, prompts

from rankwright.cost_model.read_model import read_model

CASES = "tests.executor.stage_cases"


def plan_of(reference: Reference, split: str, **limits: Any) -> Any:
    return cpu_plan(read_model(reference.folder), **SPLITS[split], **limits)


@pytest.mark.parametrize("split", ["TP2 PP2", "uneven PP3"])
def test_every_message_arrives_whoever_lags(
    references: dict[str, Reference], pool: Ranks, split: str
) -> None:
    plan = plan_of(references["qwen2"], split)
    results = pool.run(plan.num_gpus, CASES, "hand_over", plan.model_dump_json(), 60)
    # The first stage gets tokens, each later one hidden states.
    assert [len(right) for right in results] == [60] * plan.num_gpus
    assert all(all(right) for right in results)


def test_without_room_for_the_memory_stages_send_messages(
    references: dict[str, Reference], pool: Ranks
) -> None:
    plan = plan_of(references["qwen2"], "PP2")
    leader, other = pool.run(2, CASES, "without_room", plan.model_dump_json())
    assert len(leader) == 1
    assert "do not share memory, so they send messages" in leader[0]
    assert "/dev/shm has no room for" in leader[0]
    assert other == []


def served(
    reference: Reference, pool: Ranks, plan: Any, function: str, ahead: int, device: str = "cpu"
) -> None:
    """Requests that come and go, one of them withdrawn, have the tokens of transformers."""
    texts = prompts(reference.vocab_size, (1, 17, 30, 5, 12, 40))
    lengths = [64, 20, 64, 3, 64, 31]
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": length})
        for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    results = pool.run(
        plan.num_gpus,
        "tests.executor.cases" if function == "serve" else CASES,
        function,
        plan.model_dump_json(),
        str(reference.folder),
        requests,
        "r2",
        device,
        torch.float32,
        ahead,
        backend="nccl" if device == "cuda" else "gloo",
    )
    tokens = next(result for result in results if result is not None)
    for (name, text, _), length in zip(requests, lengths, strict=True):
        expected = reference.greedy(text, length)
        if name == "r2":
            assert 3 <= len(tokens[name]) < length
            assert tokens[name] == expected[: len(tokens[name])]
        else:
            assert tokens[name] == expected


SMALL: dict[str, Any] = {"num_blocks": 20, "max_num_seqs": 4, "max_batched_tokens": 16}


@pytest.mark.parametrize("ahead", [0, 1])
def test_stages_that_send_messages_give_the_tokens_of_transformers(
    references: dict[str, Reference], pool: Ranks, ahead: int
) -> None:
    reference = references["qwen2"]
    plan = plan_of(reference, "PP2", **SMALL)
    served(reference, pool, plan, "serve_by_messages", ahead)


def gpu_plan(reference: Reference, split: str) -> Any:
    plan = plan_of(reference, split, device="h100-sxm", **SMALL)
    if torch.cuda.device_count() < plan.num_gpus:
        pytest.skip(f"needs {plan.num_gpus} GPUs, {torch.cuda.device_count()} here")
    return plan


@pytest.mark.gpu
@pytest.mark.parametrize("split", ["PP2", "TP2 PP2"])
def test_every_message_arrives_between_gpus(
    references: dict[str, Reference], pool: Ranks, split: str
) -> None:
    plan = gpu_plan(references["qwen2"], split)
    results = pool.run(
        plan.num_gpus, CASES, "hand_over", plan.model_dump_json(), 200, "cuda", backend="nccl"
    )
    assert [len(right) for right in results] == [200] * plan.num_gpus
    assert all(all(right) for right in results)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("split", ["PP2", "TP2 PP2"])
def test_stages_of_gpus_that_share_memory_give_the_tokens_of_transformers(
    references: dict[str, Reference], pool: Ranks, split: str, ahead: int
) -> None:
    reference = references["qwen2"]
    plan = gpu_plan(reference, split)
    served(reference, pool, plan, "serve", ahead, "cuda")
