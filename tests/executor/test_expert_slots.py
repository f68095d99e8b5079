"""Wide expert parallelism: replicas, moves between steps, and placements that follow the load."""

import random
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.executor.conftest import COMMON, Reference, make_reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.memory import stage_kv_bytes_per_token
from rankwright.cost_model.read_model import read_model
from rankwright.executor.expert_slots import LayerSlots, Slots, imbalance, keep_in_place
from rankwright.executor.preflight import make_options
from rankwright.executor.run_options import worker_arguments
from rankwright.planner.expert_load import read_expert_loads
from rankwright.planner.expert_slots import with_expert_slots
from rankwright.planner.plan import ExpertSlots, Plan

CASES = "tests.executor.cases"
NUM_EXPERTS = 12


def skew(model: Any) -> None:
    """Make every token choose expert 0 or 1, then 2 or 3, then any other.

    Two experts whose router rows are opposite: one of them always scores high.
    """
    for layer in model.model.layers:
        weight = layer.mlp.gate.weight
        for pair, size in ((0, 40.0), (1, 20.0)):
            row = torch.randn(weight.shape[1]) * size / weight.shape[1] ** 0.5
            weight[2 * pair], weight[2 * pair + 1] = row, -row


@pytest.fixture(scope="module")
def skewed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    options = COMMON | {
        "model_type": "qwen3_moe",
        "vocab_size": 128,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "moe_intermediate_size": 22,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
    }
    return make_reference(tmp_path_factory.mktemp("skewed"), 3, options, change=skew)


def a_plan(reference: Reference, **options: Any) -> Plan:
    return cpu_plan(read_model(reference.folder), **options)


def test_the_table_lists_the_slots_of_each_expert() -> None:
    slots = LayerSlots(((0, 1), (2, 0)), 3, torch.device("cpu"))
    assert slots.table.replicas.tolist() == [2, 1, 1]
    assert slots.table.slots[:, 0].tolist() == [0, 1, 2]
    assert slots.table.slots[0].tolist() == [0, 3]
    table = slots.table.slots
    slots.set(((2, 1), (0, 1)))
    assert slots.table.slots is table, "a captured graph reads the old address"
    assert table[:, 0].tolist() == [2, 1, 0]
    assert table[1].tolist() == [1, 3]


@given(
    st.integers(1, 5).flatmap(
        lambda ranks: st.tuples(
            *[
                st.lists(
                    st.lists(st.integers(0, 6), min_size=3, max_size=3),
                    min_size=ranks,
                    max_size=ranks,
                )
            ]
            * 2
        )
    )
)
def test_staying_in_place_changes_no_placement(both: tuple[list[list[int]], ...]) -> None:
    old, new = (tuple(tuple(rank) for rank in slots) for slots in both)
    kept = keep_in_place(old, new)
    assert sorted(sorted(rank) for rank in kept) == sorted(sorted(rank) for rank in new)
    assert keep_in_place(new, new) == new


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    assert imbalance([6, 1, 1], ((0,), (1,), (2,))) == pytest.approx(6 / (8 / 3))
    # Two replicas share expert 0: ranks carry 3 + 1 and 3 + 1.
    assert imbalance([6, 1, 1], ((0, 1), (0, 2))) == 1.0
    assert imbalance([0, 0], ((0,), (1,))) == 1.0


def random_slots(rng: random.Random, ranks: int, per_rank: int, experts: int) -> Slots:
    held = list(range(experts)) + rng.choices(range(experts), k=ranks * per_rank - experts)
    rng.shuffle(held)
    return tuple(tuple(held[i * per_rank : (i + 1) * per_rank]) for i in range(ranks))


@pytest.mark.parametrize(("tp", "ep"), [(4, 4), (4, 2)])
def test_weights_arrive_where_the_placement_says(
    skewed: Reference, pool: Ranks, tp: int, ep: int
) -> None:
    rng = random.Random(tp * ep)
    placements = [random_slots(rng, ep, 20 // ep, NUM_EXPERTS) for _ in range(6)]
    plan = a_plan(skewed, tp=tp, ep=ep)
    results = pool.run(tp, CASES, "moved_experts", plan.model_dump_json(), placements)
    for rank, found in enumerate(results):
        expected = [list(map(float, slots[rank // (tp // ep)])) for slots in placements[1:]]
        assert found == expected


@pytest.mark.parametrize(
    ("tp", "ep", "slots", "attention"),
    [(2, 2, 7, "tp"), (4, 4, 5, "tp"), (4, 2, 12, "tp"), (2, 2, 7, "dp")],
)
def test_logits_with_replicas_equal_transformers(
    skewed: Reference, pool: Ranks, tp: int, ep: int, slots: int, attention: str
) -> None:
    loads = [[float(1 + 10 * (expert < 2)) for expert in range(NUM_EXPERTS)]] * 2
    plan = with_expert_slots(
        a_plan(skewed, tp=tp, ep=ep, attention=attention, num_blocks=200), slots, loads=loads
    )
    sequences = prompts(skewed.vocab_size, (1, 23, 40))
    results = pool.run(tp, CASES, "logits", plan.model_dump_json(), str(skewed.folder), sequences)
    (result,) = (result for result in results if result is not None)
    for ours, tokens in zip(result, sequences, strict=True):
        theirs = skewed.logits(tokens).numpy()
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_experts_move_while_serving_and_the_tokens_stay(skewed: Reference, pool: Ranks) -> None:
    plan = a_plan(skewed, tp=4, ep=4, num_blocks=400, max_num_seqs=8, max_batched_tokens=64)
    # A placement for another load: what is hot now is together on one rank, once.
    stale = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (10, 11, 5, 6, 7), (8, 9, 10, 11, 4))
    plan = plan.model_copy(
        update={"expert_slots": ExpertSlots(layers=(stale, stale), rebalance_steps=32)}
    )
    texts = prompts(
        skewed.vocab_size, (40, 17, 60, 25, 52, 41, 33, 48, 21, 60, 18, 44, 50, 37, 29, 58, 46, 35)
    )
    requests = [
        (f"r{i}", text, {"temperature": 0.0, "max_tokens": 48}) for i, text in enumerate(texts)
    ]
    results = pool.run(
        4, CASES, "serve_and_rebalance", plan.model_dump_json(), str(skewed.folder), requests
    )
    tokens, imbalances, loads = results[0]
    for name, text, _ in requests:
        assert tokens[name] == skewed.greedy(text, 48, tokens[name])
    # The first interval is counted under the old slots, and placed during the second.
    assert min(imbalances[0]) > 2.0
    assert mean(mean(row) for row in imbalances[2:]) < 1.15
    # What was counted, given to a new plan, makes a start that needs no moves.
    placed = with_expert_slots(a_plan(skewed, tp=4, ep=4, num_blocks=400), 5, loads=loads)
    assert placed.expert_slots is not None
    for load, slots in zip(loads, placed.expert_slots.layers, strict=True):
        assert imbalance(load, stale) > 2.0
        assert imbalance(load, slots) < 1.05


def test_slots_are_paid_for_with_blocks_of_the_cache(skewed: Reference) -> None:
    plan = a_plan(skewed, tp=2, ep=2, num_blocks=200)
    wide = with_expert_slots(plan, 8)
    # Two experts more a layer, two layers, three matrices of 48 x 22 values in float32.
    extra = 2 * 2 * 3 * 48 * 22 * 4
    block = 16 * stage_kv_bytes_per_token(plan.model, plan.split, stage=0)
    assert plan.kv_cache.num_blocks - wide.kv_cache.num_blocks == -(-extra // block)
    assert Plan.model_validate_json(wide.model_dump_json()) == wide


def test_slots_that_cannot_be_are_refused(skewed: Reference) -> None:
    plan = a_plan(skewed, tp=2, ep=2, num_blocks=200)
    with pytest.raises(ValueError, match=r"ep of 2 or more; .* runs as TP2"):
        with_expert_slots(a_plan(skewed, tp=2), 8)
    with pytest.raises(ValueError, match=r"loads of 1 layers with \[12\] experts"):
        with_expert_slots(plan, 8, loads=[[1.0] * 12])
    with pytest.raises(ValueError, match=r"one request may take 16; use fewer slots"):
        with_expert_slots(a_plan(skewed, tp=2, ep=2, num_blocks=17), 12)
    wide = with_expert_slots(plan, 7).model_dump()
    for layers, message in (
        (wide["expert_slots"]["layers"][:1], "has 1 layers"),
        ([((0,) * 7, tuple(range(5, 12)))] * 2, "every expert from 0 to 11"),
        ([(tuple(range(12)),)] * 2, "expected 2 ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            Plan.model_validate(wide | {"expert_slots": {"layers": layers}})


def test_what_was_chosen_is_written_alike_by_every_split(
    skewed: Reference, pool: Ranks, tmp_path: Path
) -> None:
    sequences = prompts(skewed.vocab_size, (1, 23, 40))
    splits: list[dict[str, Any]] = [
        {},
        {"tp": 2, "ep": 2, "attention": "dp"},
        {"tp": 2, "ep": 1, "pp": 2},
    ]
    loads = []
    for number, split in enumerate(splits):
        plan = a_plan(skewed, num_blocks=200, **split)
        path = tmp_path / f"load-{number}.json"
        pool.run(
            plan.num_gpus,
            "tests.executor.dispatch_cases",
            "recorded",
            plan.model_dump_json(),
            str(skewed.folder),
            sequences,
            str(path),
        )
        loads.append(read_expert_loads([path], plan.model.name))
    assert loads[0] == loads[1] == loads[2]
    assert [sum(layer) for layer in loads[0]] == [3 * 64] * 2
    # Nearly every token takes expert 0 or 1, and 2 or 3.
    assert min(min(sum(layer[:2]), sum(layer[2:4])) for layer in loads[0]) >= 60
    wide = with_expert_slots(a_plan(skewed, tp=4, ep=4, num_blocks=400), 5, loads=loads[0])
    assert wide.expert_slots is not None
    for load, slots in zip(loads[0], wide.expert_slots.layers, strict=True):
        assert imbalance(load, slots) < 1.15


def test_loads_are_recorded_of_experts_only(tmp_path: Path, skewed: Reference) -> None:
    dense = cpu_plan(read_model("meta-llama/Llama-3.2-1B"))
    with pytest.raises(ValueError, match=r"--record-expert-load: .*Llama-3\.2-1B has no experts"):
        make_options(dense, record_expert_load=tmp_path / "load.json")
    with pytest.raises(ValueError, match="is no file that can be written"):
        make_options(a_plan(skewed), record_expert_load=tmp_path / "nowhere" / "load.json")
    options = make_options(a_plan(skewed), record_expert_load=tmp_path / "load.json")
    arguments = worker_arguments(options, tmp_path / "plan.json")
    assert arguments[arguments.index("--record-expert-load") + 1] == str(tmp_path / "load.json")
