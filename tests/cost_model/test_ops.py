from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwright.cost_model.efficiency import ENGINES, find_efficiency
from rankwright.cost_model.layer_ops import (
    LayerModel,
    expected_experts,
    expert_imbalance,
    logits_op,
)
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.ops import Op, Rates, StepTokens, find_rates
from rankwright.cost_model.parameters import count_parameters
from rankwright.cost_model.read_model import read_model
from rankwright.topology.shorthand import parse_cluster

LLAMA = read_model("meta-llama/Llama-3.1-8B")
H100 = parse_cluster("1xh100-sxm").nodes[0].gpus[0]


def ops_of(model: ModelSpec, tokens: StepTokens, tp: int = 1, ep: int = 1) -> dict[str, Op]:
    layer = model.layer_runs[-1].layer
    return {op.name: op for op in LayerModel(model, layer, tp=tp, ep=ep).ops(tokens)}


def test_products_of_a_llama_layer_by_hand() -> None:
    ops = ops_of(LLAMA, StepTokens(decode=1, decode_context=1000))
    # Hidden 4096; 32 query and 8 KV heads of 128; FFN 14336. Two FLOPs a weight.
    assert ops["qkv projection"].flops == 2 * 4096 * (32 + 2 * 8) * 128
    assert ops["o projection"].flops == 2 * 4096 * 4096
    assert ops["mlp"].flops == 2 * 3 * 4096 * 14336
    # Each weight is read once, 2 bytes each; activations of one token are less than 1 %.
    assert ops["mlp"].bytes == pytest.approx(2 * 3 * 4096 * 14336, rel=0.01)


def test_decode_attention_reads_the_cache_once() -> None:
    ops = ops_of(LLAMA, StepTokens(decode=4, decode_context=1000))
    # Keys and values of 8 heads of 128, 2 bytes, for 4 sequences of 1,000 tokens.
    assert ops["attention decode"].bytes == 4 * 1000 * 2 * 8 * 128 * 2
    assert ops["attention decode"].flops == 4 * 1000 * 32 * 128 * 4


def test_prefill_attention_grows_with_the_square() -> None:
    short = ops_of(LLAMA, StepTokens(prefill=1000, prefill_context=500))["attention prefill"]
    long = ops_of(LLAMA, StepTokens(prefill=2000, prefill_context=1000))["attention prefill"]
    assert long.flops == 4 * short.flops


def test_a_sliding_window_bounds_the_context() -> None:
    model = read_model("openai/gpt-oss-20b")
    tokens = StepTokens(decode=1, decode_context=10_000)
    found = set()
    for run in model.layer_runs:
        ops = {op.name: op for op in LayerModel(model, run.layer, tp=1).ops(tokens)}
        window = run.layer.attention.sliding_window
        heads = run.layer.attention
        size = min(10_000, window or 10_000) * heads.num_kv_heads * 2 * heads.head_dim * 2
        assert ops["attention decode"].bytes == size
        found.add(window)
    assert found == {None, 128}


def test_two_ranks_do_half_of_every_product() -> None:
    tokens = StepTokens(decode=8, decode_context=100)
    one, two = ops_of(LLAMA, tokens), ops_of(LLAMA, tokens, tp=2)
    for name in ("qkv projection", "o projection", "mlp", "attention decode"):
        assert two[name].flops == one[name].flops / 2


def test_products_of_all_layers_are_two_flops_a_parameter() -> None:
    tokens = StepTokens(decode=1, decode_context=0)
    in_layers = sum(
        run.count * op.flops
        for run in LLAMA.layer_runs
        for op in LayerModel(LLAMA, run.layer, tp=1).ops(tokens)
    )
    total = in_layers + logits_op(LLAMA, tokens, tp=1).flops
    embedding = LLAMA.vocab_size * LLAMA.hidden_size
    assert total == pytest.approx(2 * (count_parameters(LLAMA) - embedding), rel=1e-3)


def test_a_token_of_mixtral_touches_two_experts() -> None:
    model = read_model("mistralai/Mixtral-8x7B-v0.1")
    one_expert = 3 * 4096 * 14336
    ops = ops_of(model, StepTokens(decode=1, decode_context=1))
    assert ops["experts"].flops == 2 * 2 * one_expert
    assert ops["experts"].bytes == pytest.approx(2 * 2 * one_expert, rel=0.01)


def test_many_tokens_touch_every_expert_once() -> None:
    assert expected_experts(8, 2, 1) == pytest.approx(2)
    assert expected_experts(8, 2, 1000) == pytest.approx(8)
    model = read_model("mistralai/Mixtral-8x7B-v0.1")
    ops = ops_of(model, StepTokens(decode=500, decode_context=1))
    assert ops["experts"].bytes == pytest.approx(8 * 2 * 3 * 4096 * 14336, rel=0.1)


def test_expert_groups_are_less_even_the_more_there_are() -> None:
    loads = [expert_imbalance(ep) for ep in (1, 2, 4, 8, 16, 32)]
    assert loads == sorted(loads)
    assert loads[0] == 1
    assert loads[-1] == pytest.approx(2.56)


def test_latent_attention_keeps_576_values_a_token_on_every_rank() -> None:
    model = read_model("deepseek-ai/DeepSeek-V3")
    tokens = StepTokens(decode=1, decode_context=1000)
    for tp in (1, 8):
        ops = ops_of(model, tokens, tp=tp)
        assert ops["attention decode"].bytes == 1000 * 576 * 2


def test_the_roofline_names_its_bound() -> None:
    rates = find_rates(H100, "vllm")
    assert rates.cost(Op("a", "gemm", 1e15, 1e6, 1, "bfloat16")).bound == "compute"
    assert rates.cost(Op("a", "gemm", 1e9, 1e9, 1, "bfloat16")).bound == "memory"
    assert rates.cost(Op("a", "elementwise", 1e3, 1e3, 1, "bfloat16")).bound == "launch"


def test_a_roofline_by_hand() -> None:
    rates = find_rates(H100, "vllm")
    # 989 TFLOP/s at 0.72, and 3.35 TB/s at 0.86; a launch is 2.5 us.
    cost = rates.cost(Op("a", "gemm", 989e12 * 0.72, 1.0, 0, "bfloat16"))
    assert cost.seconds == pytest.approx(1, rel=0.01)
    cost = rates.cost(Op("a", "gemm", 1.0, 3.35e12 * 0.86, 2, "bfloat16"))
    assert cost.seconds == pytest.approx(1 + 5e-6, rel=0.01)


def test_a_cpu_is_taken_at_the_rates_it_was_measured_at() -> None:
    gpu = parse_cluster("1xcpu").nodes[0].gpus[0]
    measured = gpu.model_copy(update={"memory_bytes_per_s": 7e9, "flops_per_s": {"float32": 50e9}})
    rates = find_rates(measured, "rankwright")
    assert rates.memory_bytes_per_s == 7e9
    assert rates.flops_per_s["bfloat16"] == 50e9
    assert rates.efficiency.gemm_memory == 1


def test_an_unknown_engine_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'vlm' is unknown; expected one of rankwright, vllm"):
        find_efficiency("vlm", H100)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("device", ["h100-sxm", "mi300x", "cpu", "rtx4090"])
def test_every_share_is_a_share_and_has_a_source(engine: str, device: str) -> None:
    row = find_efficiency(engine, parse_cluster(f"1x{device}").nodes[0].gpus[0])
    for name in row.__slots__:
        if name.endswith(("_compute", "_memory", "_float8")):
            assert 0 < getattr(row, name) <= 1, name
    assert row.source


tokens_strategy = st.builds(
    StepTokens,
    decode=st.floats(0, 512),
    decode_context=st.floats(1, 100_000),
    prefill=st.floats(0, 8192),
    prefill_context=st.floats(1, 100_000),
    prompts=st.floats(0, 8),
)


@given(tokens_strategy, st.floats(1, 10), st.sampled_from([1, 2, 4, 8]))
def test_a_faster_gpu_is_never_slower(tokens: StepTokens, factor: float, tp: int) -> None:
    rates = find_rates(H100, "rankwright")
    ops = LayerModel(LLAMA, LLAMA.layer_runs[0].layer, tp=tp).ops(tokens)
    more_bytes = replace(rates, memory_bytes_per_s=rates.memory_bytes_per_s * factor)
    more_flops = Rates(
        {dtype: rate * factor for dtype, rate in rates.flops_per_s.items()},
        rates.memory_bytes_per_s,
        rates.efficiency,
    )
    assert more_bytes.seconds(ops) <= rates.seconds(ops)
    assert more_flops.seconds(ops) <= rates.seconds(ops)
    assert rates.seconds(ops) == pytest.approx(sum(rates.cost(op).seconds for op in ops))


def test_a_rank_with_sequences_of_its_own_norms_those_alone() -> None:
    model = read_model("Qwen/Qwen3-30B-A3B")
    layer = model.layer_runs[-1].layer
    own = LayerModel(model, layer, tp=4, ep=4, attention="dp")
    # One of the prompts that share a step ends in it; ranks share all of them out.
    assert own.rows(StepTokens(0, 0, 1000, 500, prompts=1, sequences=4)) == 250
    assert own.rows(StepTokens(0, 0, 1000, 500, prompts=1)) == 1000
    decode = StepTokens(decode=64, decode_context=500)
    norms = {op.name: op for op in own.ops(decode)}["norms"]
    whole = {op.name: op for op in LayerModel(model, layer, tp=4, ep=4).ops(decode)}["norms"]
    # Of 16 sequences instead of 64: 48 rows fewer are read and written by two norms.
    assert whole.bytes - norms.bytes == pytest.approx(48 * 8 * 2048 * 2)


def test_weights_of_4_bits_multiply_like_8_where_a_gpu_has_arithmetic_for_them() -> None:
    product = Op("experts", "moe", 1e15, 0.0, 0, "mxfp4")
    seconds = {
        name: find_rates(parse_cluster(f"1x{name}").nodes[0].gpus[0], "trtllm").seconds([product])
        for name in ("b200-sxm", "h200-sxm", "a100-sxm")
    }
    shares = find_efficiency("trtllm", H100)
    float8 = 4.5e15 * shares.moe_compute * shares.gemm_compute_float8 / shares.gemm_compute
    assert seconds["b200-sxm"] == pytest.approx(1e15 / float8)
    # Hopper widens them and multiplies by the older instructions; Ampere has no others.
    assert seconds["h200-sxm"] == pytest.approx(1e15 / (0.6 * 989e12 * shares.moe_compute))
    assert seconds["a100-sxm"] == pytest.approx(1e15 / (312e12 * shares.moe_compute))


def test_latents_that_are_expanded_by_heads_take_a_kernel_for_every_group_of_them() -> None:
    model = read_model("deepseek-ai/DeepSeek-V2-Lite")
    layer = model.layer_runs[-1].layer
    last = StepTokens(prefill=2048, prefill_context=7 * 1024, prompts=1)
    one_kernel, by_heads = (
        LayerModel(model, layer, tp=2, expands_by_heads=expands).attention_ops(last)
        for expands in (False, True)
    )
    # The last 2,048 of 8,192 tokens: eight heads, one at a time, with seven kernels each.
    more = sum(op.launches for op in by_heads) - sum(op.launches for op in one_kernel)
    assert more == 2 + 7 * 8
