"""Tokens that go only where their experts are: logits and tokens as when all are gathered."""

from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.read_model import read_model
from rankwright.planner.expert_slots import with_expert_slots

CASES = "tests.executor.dispatch_cases"


@pytest.mark.parametrize(("ranks", "moe_tp"), [(3, 1), (4, 2)])
def test_a_token_goes_where_its_experts_are_and_comes_back(
    pool: Ranks, ranks: int, moe_tp: int
) -> None:
    seeds = list(range(24))
    results = pool.run(ranks, CASES, "round_trips", moe_tp, seeds)
    for rank, trips in enumerate(results):
        for seed, (error, is_needed, _) in zip(seeds, trips, strict=True):
            # Parts are rounded once, and so is their sum.
            assert error <= 4, (rank, seed)
            assert is_needed, "a row without an expert here"
    assert sum(rows for trips in results for _, _, rows in trips) > 0


@pytest.mark.parametrize(
    ("model", "split"),
    [
        # 6 experts over 4 ranks; shared experts, and experts cut over two ranks each.
        ("mixtral", {"tp": 4, "ep": 4}),
        ("deepseek_v3", {"tp": 4, "ep": 2}),
        ("gpt_oss", {"tp": 2, "ep": 2, "pp": 2}),
    ],
)
def test_logits_equal_transformers(
    moe_references: dict[str, Reference],
    pool: Ranks,
    model: str,
    split: dict[str, Any],
) -> None:
    reference = moe_references[model]
    plan = cpu_plan(read_model(reference.folder), attention="dp", **split)
    check_logits(pool, reference, plan.num_gpus, plan.model_dump_json(), "dispatch")


def test_padding_of_a_rank_without_tokens_goes_to_no_expert(
    moe_references: dict[str, Reference], pool: Ranks
) -> None:
    reference = moe_references["qwen3_moe"]
    spec = read_model(reference.folder)
    plan = cpu_plan(spec, tp=2, ep=2, attention="dp")
    sequences = prompts(reference.vocab_size, (31,))
    rows = pool.run(
        2, CASES, "expert_rows", plan.model_dump_json(), str(reference.folder), sequences
    )
    layers = [layer.feed_forward for layer in spec.layers if layer.feed_forward.kind == "moe"]
    assert sum(rows) == 31 * sum(block.experts_per_token for block in layers)


def check_logits(
    pool: Ranks, reference: Reference, num_ranks: int, plan_json: str, exchange: str
) -> list[list[list[int]]]:
    """Hold logits to transformers'; return what each rank counted."""
    sequences = prompts(reference.vocab_size, (1, 23, 40))
    results = pool.run(
        num_ranks, CASES, "logits", plan_json, str(reference.folder), sequences, exchange
    )
    (result,) = (found for found, _ in results if found is not None)
    for ours, tokens in zip(result, sequences, strict=True):
        theirs = reference.logits(tokens).numpy()
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    return [counted for _, counted in results]


def test_slots_are_found_and_every_choice_is_counted_once(
    moe_references: dict[str, Reference],
    pool: Ranks,
) -> None:
    reference = moe_references["qwen3_moe"]
    spec = read_model(reference.folder)
    found = []
    ways: tuple[tuple[str, Literal["tp", "dp"]], ...] = (
        ("dispatch", "dp"),
        ("gather", "dp"),
        ("gather", "tp"),
    )
    for exchange, attention in ways:
        plan = cpu_plan(spec, tp=2, ep=2, attention=attention, num_blocks=200)
        plan = with_expert_slots(plan, 8, rebalance_steps=1000)
        counted = check_logits(pool, reference, 2, plan.model_dump_json(), exchange)
        assert counted[0] == counted[1], "ranks of a stage must agree"
        found.append(counted[0])
    assert found[0] == found[1] == found[2]
    # Three experts a token, of 64 tokens.
    assert {sum(load) for load in found[0]} == {3 * 64}


# Unset: the cost model's choice.
@pytest.mark.parametrize(
    ("model", "exchange"),
    [
        *product(("mixtral", "qwen3_moe"), ("", "gather", "dispatch")),
        ("deepseek_v2", "dispatch"),
    ],
)
def test_tokens_equal_transformers_while_requests_come_and_go(
    moe_references: dict[str, Reference], pool: Ranks, model: str, exchange: str
) -> None:
    reference = moe_references[model]
    plan = cpu_plan(
        read_model(reference.folder),
        tp=2,
        ep=2,
        attention="dp",
        # Odd: two ranks share neither out evenly. Two long sequences do not fit on one rank.
        max_num_seqs=5,
        max_batched_tokens=15,
        num_blocks=6,
    )
    texts = prompts(reference.vocab_size, (1, 40, 17, 40, 5))
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": 48}) for i, text in enumerate(texts)
    ]
    results = pool.run(
        2, CASES, "tokens", plan.model_dump_json(), str(reference.folder), requests, exchange
    )
    answered = {name: found for result, _ in results for name, found in result.items()}
    for name, text, _ in requests:
        assert answered[name] == reference.greedy(text, 48, answered[name])
    assert set.union(*(met for _, met in results)) == {
        "a prompt in chunks",
        "a sequence sent back",
        "an idle rank",
        "prompts beside decodes",
        "unequal shares",
    }
