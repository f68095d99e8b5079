from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.collectives import Group
from rankwright.cost_model.efficiency import Exchange
from rankwright.cost_model.expert_exchange import choose_exchange, share_of_ranks
from rankwright.cost_model.model_spec import FeedForward
from rankwright.cost_model.ops import StepTokens, find_rates
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.stage import LayerKinds, StageModel
from rankwright.topology.shorthand import parse_cluster

H100 = Group(8, bytes_per_s=450e9, latency_s=0.8e-6)
BOTH: tuple[Exchange, ...] = ("gather", "dispatch")
MOE = FeedForward(kind="moe", intermediate_size=1, num_experts=64, experts_per_token=6)


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_the_share_is_the_mean_over_all_choices(ep: int, held: int, data: st.DataObject) -> None:
    num_experts = ep * held
    top_k = data.draw(st.integers(1, num_experts))
    choices = list(combinations(range(num_experts), top_k))
    ranks = [len({expert // held for expert in choice}) / ep for choice in choices]
    block = FeedForward(
        kind="moe", intermediate_size=1, num_experts=num_experts, experts_per_token=top_k
    )
    assert share_of_ranks(block, ep) == pytest.approx(sum(ranks) / len(ranks))


def test_groups_keep_a_token_on_fewer_ranks() -> None:
    # 4 of 8 groups of 32 experts, 8 experts: by drawing, over as many ranks as groups, and more.
    rng = Random(1)
    block = read_model("deepseek-ai/DeepSeek-V3").layers[-1].feed_forward
    for ep in (8, 16):
        seen = []
        for _ in range(4000):
            groups = rng.sample(range(8), 4)
            experts = rng.sample([32 * group + one for group in groups for one in range(32)], 8)
            seen.append(len({expert * ep // 256 for expert in experts}) / ep)
        assert share_of_ranks(block, ep) == pytest.approx(sum(seen) / len(seen), rel=0.02)


@given(st.floats(1, 1e10), st.sampled_from([2, 4, 8, 16, 32, 64]))
def test_what_is_chosen_is_never_slower_than_gathering(size_bytes: float, ranks: int) -> None:
    group = Group(ranks, bytes_per_s=450e9, latency_s=0.8e-6)
    _, gathered_s = choose_exchange(MOE, size_bytes, group, ep=ranks, allowed=("gather",))
    way, seconds = choose_exchange(MOE, size_bytes, group, ep=ranks, allowed=BOTH)
    assert seconds <= gathered_s
    assert (way == "dispatch") == (seconds < gathered_s)


def test_few_tokens_are_gathered_and_many_sent() -> None:
    ways = [choose_exchange(MOE, n, H100, ep=8, allowed=BOTH)[0] for n in (1e4, 1e6, 1e8, 1e9)]
    assert ways == sorted(ways, reverse=True)
    assert set(ways) == set(BOTH)


@pytest.mark.parametrize(
    ("block", "ep"), [(FeedForward(kind="dense", intermediate_size=1), 1), (MOE, 1), (None, 8)]
)
def test_columns_on_all_ranks_are_gathered_for(block: FeedForward | None, ep: int) -> None:
    assert choose_exchange(block, 1e9, H100, ep=ep, allowed=BOTH)[0] == "gather"


def test_a_step_names_the_way_its_tokens_take() -> None:
    spec = read_model("deepseek-ai/DeepSeek-V3")
    layers = LayerKinds(spec)
    names = {}
    for shorthand in ("8xh100-sxm", "8xcpu"):
        cluster = parse_cluster(shorthand)
        rates = find_rates(cluster.nodes[0].gpus[0], "rankwright")
        stage = StageModel(spec, layers, rates, H100, ep=8, attention="dp")
        tokens = StepTokens(prefill=65536, prefill_context=500, prompts=64)
        names[shorthand] = [
            [part.name for part in stage.layer_parts(kind, tokens) if part.bound == "link"]
            for kind in range(len(layers.kinds))
        ]
    # Layers of a dense block come first. GPUs gather until dispatch has run on them.
    assert names["8xh100-sxm"] == [["all-gather and reduce-scatter"]] * 2
    assert names["8xcpu"] == [["all-gather and reduce-scatter"], ["dispatch and combine"]]
