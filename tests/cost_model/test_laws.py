"""What every prediction must obey; `benchmarks/bench_laws.py` asks it of a thousand points."""

import random
from dataclasses import replace

import pytest

from bench_laws import broken, draw
from laws import (
    Point,
    active_parameters,
    active_weight_bytes,
    faster,
    faster_is_not_slower,
    hardware_is_not_exceeded,
)
from rankwright.cost_model.read_model import read_model
from rankwright.topology.devices import memory_bytes_per_s
from rankwright.topology.shorthand import parse_cluster

LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")
H100 = parse_cluster("8xh100-sxm")


@pytest.mark.parametrize("case", range(20))
def test_predictions_obey_what_holds_for_all(case: int) -> None:
    random_ = random.Random(f"laws {case}")
    assert list(broken(draw(random_, "rankwright"), random_)) == []


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_predictions_of_other_engines_obey_them_too(engine: str) -> None:
    random_ = random.Random(f"laws of {engine}")
    assert list(broken(draw(random_, engine), random_)) == []


def test_what_does_not_run_at_once_is_held_to_no_law_of_latency() -> None:
    # Weights of half the size leave room for more at once, each of which waits longer for a token.
    point = Point(
        read_model("Qwen/Qwen3-30B-A3B"),
        H100,
        batch_size=256,
        input_tokens=6000,
        output_tokens=128,
        engine="vllm",
    )
    assert not point.all_run_at_once
    assert replace(point, batch_size=2).all_run_at_once
    assert replace(point, engine="rankwright").all_run_at_once


def test_floors_are_those_of_the_published_sizes() -> None:
    # 8.03 G parameters, of which 0.53 G are the embedding, which is looked up, and 0.53 G the head.
    assert active_parameters(LLAMA_8B) == pytest.approx(6.98e9, rel=0.01)
    assert active_weight_bytes(LLAMA_8B) == pytest.approx(2 * 7.5e9, rel=0.01)
    # 30.5 G, 3.3 G of them active.
    assert active_parameters(read_model("Qwen/Qwen3-30B-A3B")) == pytest.approx(2.7e9, rel=0.1)


def test_a_gpu_that_would_exceed_its_peak_is_told() -> None:
    point = Point(LLAMA_8B, H100, batch_size=64)
    assert not list(hardware_is_not_exceeded(point))
    assert not list(faster_is_not_slower(point))
    slow = replace(point, cluster=faster(H100, 0.1, 0.1))
    rate = memory_bytes_per_s(slow.cluster.nodes[0].gpus[0])
    assert rate == pytest.approx(0.1 * memory_bytes_per_s(H100.nodes[0].gpus[0]))
    assert list(faster_is_not_slower(point, 0.1)), "a slower GPU is slower"
