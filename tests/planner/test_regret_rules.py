"""What `benchmarks/regret_rules.py` has other tools' rules choose."""

import pytest

from rankwright.cost_model.read_model import read_model
from rankwright.topology.shorthand import parse_cluster
from regret_rules import estimated_weight_bytes, rules_of_thumb, smallest_width
from regret_scenarios import Scenario

TWO_H200 = parse_cluster("2xh200-sxm")
LLAMA_8B, QWEN_32B = "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B"


def test_weights_are_estimated_from_the_shape_alone() -> None:
    # 128,256 x 4,096, and 32 layers of 4 x 4,096^2 + 3 x 4,096 x 14,336 + 4 x 4,096, in bf16.
    assert estimated_weight_bytes(read_model(LLAMA_8B)) == 16_620_978_176
    # 128 experts of 768 columns are all counted, and the router.
    assert estimated_weight_bytes(read_model("Qwen/Qwen3-30B-A3B")) == pytest.approx(60e9, rel=0.05)


@pytest.mark.parametrize(
    ("model", "budget_gb", "tp"),
    [
        (LLAMA_8B, None, 1),
        (LLAMA_8B, 24, 2),  # 1.5 x 16.6 GB is more than 24
        (QWEN_32B, None, 1),  # 1.5 x 65 GB is less than 141
        (QWEN_32B, 80, 2),
        (QWEN_32B, 24, 2),  # wants 8, the machine has 2
    ],
)
def test_the_narrowest_group_holds_one_and_a_half_times_the_weights(
    model: str, budget_gb: float | None, tp: int
) -> None:
    scenario = Scenario(model, 1024, 128, 64, memory_budget_gb=budget_gb)
    pins = smallest_width(scenario, read_model(model), TWO_H200)
    assert (pins.tp, pins.pp, pins.dp, pins.ep) == (tp, 1, 2 // tp, 1)


def test_latent_attention_for_throughput_attends_on_each_rank() -> None:
    machine = parse_cluster("8xh200-sxm")
    model = "deepseek-ai/DeepSeek-V3"
    many = smallest_width(Scenario(model, 1024, 128, 64), read_model(model), machine)
    one = smallest_width(Scenario(model, 1024, 128, 1, "latency"), read_model(model), machine)
    assert (many.tp, many.attention, many.ep) == (8, "dp", 8)
    assert (one.tp, one.attention, one.ep) == (8, "tp", 1)


def test_every_rule_says_what_it_would_run_or_that_it_would_not() -> None:
    scenario = Scenario(LLAMA_8B, 1024, 128, 64, memory_budget_gb=24)
    picks = rules_of_thumb(scenario, read_model(LLAMA_8B), TWO_H200)
    assert {name: pick and pick.label for name, pick in picks.items()} == {
        "TP over all GPUs": "TP2",
        "one GPU if it fits, else TP": "DP2",
        "AIConfigurator: least TP for 1.5 x weights": "TP2",
    }
    small = Scenario(QWEN_32B, 1024, 128, 64, memory_budget_gb=24)
    assert set(rules_of_thumb(small, read_model(QWEN_32B), TWO_H200).values()) == {None}
