"""Attention of prompts in tiles, experts' products, and what a step with prompts takes at least."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.ops import Op, StepTokens, find_rates
from rankwright.cost_model.predict import StageModels, choose_replicas
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.split import Split
from rankwright.cost_model.step import Pipeline
from rankwright.cost_model.tiles import prefill_flops
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
H200 = parse_cluster("1xh200-sxm").nodes[0].gpus[0]


def pipeline(cluster: str, tp: int = 1) -> Pipeline:
    machine = parse_cluster(cluster)
    split = Split(tp=tp, stage_layers=(LLAMA.num_layers,))
    models = StageModels(LLAMA, machine, "rankwright")
    return models.pipeline(choose_replicas(machine, split)[0], split.stage_layers, split.ep)


def test_few_tiles_take_as_long_as_the_longest() -> None:
    # 128 rows of 8 heads are 8 tiles: 132 processors would do 16 times as many in that time.
    few = prefill_flops(128, 64.5, 128, 8, 512, 400)
    assert few == 132 * 128 * (128 + 400) * 512
    # 32 heads of 8,192 rows are 2,048 tiles, and fill them.
    many = prefill_flops(8192, 4096.5, 8192, 32, 512, 400)
    assert many == 8192 * 32 * (4096.5 + 400) * 512


@given(st.integers(1, 16384), st.integers(0, 16384), st.integers(1, 64))
def test_tiles_never_take_less_than_the_arithmetic(rows: int, before: int, heads: int) -> None:
    context = before + (rows + 1) / 2
    asked = rows * heads * context * 512
    assert prefill_flops(rows, context, before + rows, heads, 512, 400) >= asked


@pytest.mark.parametrize(
    ("shape", "seconds"),
    [
        ((1, 256, 256, 32), 10.9e-6),
        ((1, 2048, 2048, 32), 98.8e-6),
        ((1, 512, 8192, 8), 146.6e-6),
        ((8, 1024, 1024, 32), 256.6e-6),
        ((1, 8192, 8192, 32), 1219e-6),
    ],
)
def test_tiles_explain_what_an_h200_took(shape: tuple[int, int, int, int], seconds: float) -> None:
    prompts, new, reach, heads = shape
    context = reach - (new - 1) / 2
    taken = prefill_flops(prompts * new, context, reach, heads, 512, 400)
    op = Op("it", "attention prefill", 0.0, 0.0, 1, "bfloat16", taken)
    assert find_rates(H200, "rankwright").seconds([op]) == pytest.approx(seconds, rel=0.25)


def test_experts_take_their_arithmetic_and_their_bytes_one_after_the_other() -> None:
    rates = find_rates(H200, "rankwright")
    both = Op("experts", "moe", 1e12, 1e9, 0, "bfloat16")
    parts = [replace_op(both, flops=0.0), replace_op(both, moved=0.0)]
    assert rates.seconds([both]) == pytest.approx(sum(rates.seconds([part]) for part in parts))
    product = Op("product", "gemm", 1e12, 1e9, 0, "bfloat16")
    assert rates.seconds([product]) < rates.seconds([both])


def replace_op(op: Op, flops: float | None = None, moved: float | None = None) -> Op:
    return op._replace(
        flops=op.flops if flops is None else flops, bytes=op.bytes if moved is None else moved
    )


def test_a_short_prompt_takes_as_long_as_its_launches() -> None:
    short = StepTokens(prefill=16, prefill_context=8, prompts=1)
    one, two = pipeline("1xh200-sxm"), pipeline("2xh200-sxm", tp=2)
    # 9 kernels a layer on one GPU, 11 on two, each 40 us of the host.
    assert one.round_s(short) == pytest.approx(32 * 9 * 4.0e-5, rel=0.1)
    assert two.round_s(short) == pytest.approx(32 * 11 * 4.0e-5, rel=0.1)
    # Decoding replays a graph, and long prompts keep the GPU busy.
    assert one.round_s(StepTokens(decode=16, decode_context=8)) < 0.5 * one.round_s(short)
    long = StepTokens(prefill=4096, prefill_context=2048, prompts=1)
    assert one.round_s(long) > 4 * one.round_s(short)
    parts = sum(part.seconds for part in one.parts(0, short))
    assert parts == pytest.approx(one.round_s(short))
