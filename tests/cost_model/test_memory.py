"""Bytes of a rank: by hand for known models, and conserved over any split."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.cost_model.configs import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
)

from rankwright.cost_model.memory import (
    RESERVED_BYTES,
    activation_bytes,
    embedding_weight_bytes,
    final_norm_bytes,
    gathered_bytes,
    head_weight_bytes,
    kv_bytes_per_token,
    layer_weight_bytes,
    rank_memory,
    stage_kv_bytes_per_token,
    stage_layers,
    stage_weight_bytes,
)
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.parameters import count_parameters, layer_tensors, tensor_bytes
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.shards import head_ranges, range_size, tp_is_legal
from rankwright.cost_model.split import Split

LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")
DEEPSEEK = read_model("deepseek-ai/DeepSeek-V3")

# Whole on every rank of a stage, as no rank can do without them.
REPLICATED = {
    "norms",
    "q and k norm",
    "q_a",
    "q_a norm",
    "kv_a",
    "kv_a norm",
    "a bias",
    "router",
    "router bias",
    "router correction",
}


def test_llama_8b_by_hand() -> None:
    layer = LLAMA_8B.layers[0]
    attention = (4096 + 1024 + 1024 + 4096) * 4096
    feed_forward = 3 * 4096 * 14336
    norms = 2 * 4096
    assert layer_weight_bytes(LLAMA_8B, layer, tp=1) == 2 * (attention + feed_forward + norms)
    assert layer_weight_bytes(LLAMA_8B, layer, tp=8) == 2 * (
        (attention + feed_forward) // 8 + norms
    )
    # 16 ranks share 8 KV heads: each holds one, not a half.
    kv = 2 * 128 * 4096
    rest = (attention - 2 * 1024 * 4096 + feed_forward) // 16
    assert layer_weight_bytes(LLAMA_8B, layer, tp=16) == 2 * (rest + kv + norms)
    assert embedding_weight_bytes(LLAMA_8B, tp=2) == 128256 // 2 * 4096 * 2
    assert head_weight_bytes(LLAMA_8B, tp=1) == 128256 * 4096 * 2
    assert final_norm_bytes(LLAMA_8B) == 4096 * 2


def test_an_uneven_vocabulary_counts_the_fullest_rank() -> None:
    spec = read_model(LLAMA)
    assert embedding_weight_bytes(spec, tp=2) == 51 * 48 * 2
    assert embedding_weight_bytes(spec, tp=2, tp_rank=1) == 50 * 48 * 2


@pytest.mark.parametrize(("tp", "values"), [(1, 2 * 8 * 128), (8, 2 * 128), (32, 2 * 128)])
def test_kv_bytes_of_llama_stop_shrinking_at_one_head(tp: int, values: int) -> None:
    assert kv_bytes_per_token(LLAMA_8B, LLAMA_8B.layers[0], tp=tp) == 2 * values


@pytest.mark.parametrize("tp", [1, 8, 128])
def test_the_latent_of_deepseek_is_whole_on_every_rank(tp: int) -> None:
    assert kv_bytes_per_token(DEEPSEEK, DEEPSEEK.layers[0], tp=tp) == 2 * (512 + 64)


def test_kv_dtype_halves_the_cache() -> None:
    spec = LLAMA_8B.model_copy(update={"kv_dtype": "float8"})
    assert kv_bytes_per_token(spec, spec.layers[0], tp=1) == 2 * 8 * 128


def test_attention_dp_holds_all_heads_and_their_cache() -> None:
    layer = LLAMA_8B.layers[0]
    attention = (4096 + 1024 + 1024 + 4096) * 4096
    assert layer_weight_bytes(LLAMA_8B, layer, tp=8, attention="dp") == 2 * (
        attention + 3 * 4096 * 14336 // 8 + 2 * 4096
    )
    assert kv_bytes_per_token(LLAMA_8B, layer, tp=8, attention="dp") == 4096


def test_experts_weigh_the_same_by_width_or_by_number() -> None:
    spec = read_model("mistralai/Mixtral-8x7B-v0.1")
    by_width = layer_weight_bytes(spec, spec.layers[0], tp=8, ep=1)
    by_number = layer_weight_bytes(spec, spec.layers[0], tp=8, ep=8)
    assert by_width == by_number == layer_weight_bytes(spec, spec.layers[0], tp=8, ep=2)


def test_uneven_experts_count_the_fullest_rank() -> None:
    spec = read_model(MIXTRAL | {"num_local_experts": 7})
    sizes = [
        layer_weight_bytes(spec, spec.layers[0], tp=2, ep=2, tp_rank=rank) for rank in range(2)
    ]
    assert sizes[0] - sizes[1] == 3 * 48 * 80 * 2  # four experts and three


def test_a_rank_without_an_expert_holds_the_rest() -> None:
    settings = {"quant_method": "fp8"}
    spec = read_model(MIXTRAL | {"num_local_experts": 2, "quantization_config": settings})
    sizes = [layer_weight_bytes(spec, spec.layers[0], tp=6, ep=6, tp_rank=rank) for rank in (0, 5)]
    assert sizes[0] - sizes[1] == 3 * (48 * 80) + 4 * 3


def test_an_ep_that_does_not_divide_is_refused() -> None:
    spec = read_model(MIXTRAL)
    with pytest.raises(ValueError, match="ep=4 does not divide tp=6"):
        layer_weight_bytes(spec, spec.layers[0], tp=6, ep=4)


def test_stages_hold_embedding_first_and_head_last() -> None:
    split = Split(pp=2, stage_layers=(20, 12))
    layer = layer_weight_bytes(LLAMA_8B, LLAMA_8B.layers[0], tp=1)
    table = 128256 * 4096 * 2
    assert stage_weight_bytes(LLAMA_8B, split, stage=0) == 20 * layer + table
    assert stage_weight_bytes(LLAMA_8B, split, stage=1) == 12 * layer + table + 4096 * 2


def test_tied_embeddings_are_one_copy_on_one_stage_and_two_on_two() -> None:
    spec = read_model("Qwen/Qwen3-0.6B")
    one = stage_weight_bytes(spec, Split(stage_layers=(28,)), stage=0)
    assert one == 2 * count_parameters(spec)
    split = Split(pp=2, stage_layers=(14, 14))
    both = sum(stage_weight_bytes(spec, split, stage=stage) for stage in range(2))
    assert both == one + 2 * spec.vocab_size * spec.hidden_size


def test_llama_405b_needs_two_nodes_of_h100() -> None:
    spec = read_model("meta-llama/Llama-3.1-405B")
    whole = stage_weight_bytes(spec, Split(tp=8, stage_layers=(126,)), stage=0)
    assert whole > 80e9
    half = stage_weight_bytes(spec, Split(tp=8, pp=2, stage_layers=(63, 63)), stage=1)
    assert half == pytest.approx(405_853_388_800 * 2 / 16, rel=0.001)


def test_layers_of_a_stage_are_counted_by_kind() -> None:
    split = Split(pp=2, stage_layers=(5, 56))
    kinds = [
        {layer.feed_forward.kind: count for layer, count in stage_layers(DEEPSEEK, split, stage)}
        for stage in range(2)
    ]
    assert kinds == [{"dense": 3, "moe": 2}, {"moe": 56}]


def test_logits_count_where_rows_are_sampled() -> None:
    more = activation_bytes(LLAMA_8B, tp=1, max_batched_tokens=100, max_num_seqs=3)
    less = activation_bytes(LLAMA_8B, tp=1, max_batched_tokens=100, max_num_seqs=2)
    assert more - less == 128256 * (16 + 57)
    # Rows are sampled 32 at a time, so past that only the logits grow.
    more = activation_bytes(LLAMA_8B, tp=1, max_batched_tokens=100, max_num_seqs=200)
    less = activation_bytes(LLAMA_8B, tp=1, max_batched_tokens=100, max_num_seqs=199)
    assert more - less == 128256 * 16


def test_activations_of_llama_8b_by_hand() -> None:
    # Four hidden vectors, then gate, up and their product, which are wider than attention.
    values = 4 * 4096 + 3 * 14336
    assert activation_bytes(LLAMA_8B, tp=1, max_batched_tokens=10, max_num_seqs=0) == 20 * values
    values = 4 * 4096 + 3 * 1792
    assert activation_bytes(LLAMA_8B, tp=8, max_batched_tokens=10, max_num_seqs=0) == 20 * values


def test_a_rank_is_given_part_by_part() -> None:
    split = Split(tp=2, pp=2, stage_layers=(16, 16))
    parts = {
        part.name: part.bytes
        for part in rank_memory(
            LLAMA_8B, split, stage=0, kv_tokens=1000, max_batched_tokens=512, max_num_seqs=8
        )
    }
    assert parts["weights"] == stage_weight_bytes(LLAMA_8B, split, stage=0)
    assert parts["kv cache"] == 1000 * 16 * 2 * 4 * 128 * 2
    assert parts["kv cache"] == 1000 * stage_kv_bytes_per_token(LLAMA_8B, split, stage=0)
    assert parts["reserved"] == RESERVED_BYTES["cuda"]
    # No logits on a stage that is not the last.
    assert parts["activations"] == activation_bytes(
        LLAMA_8B, tp=2, max_batched_tokens=512, max_num_seqs=0
    )


def test_an_unknown_kind_of_device_is_refused() -> None:
    with pytest.raises(ValueError, match="'tpu': expected one of cuda"):
        rank_memory(
            LLAMA_8B,
            Split(stage_layers=(32,)),
            stage=0,
            kv_tokens=1,
            max_batched_tokens=1,
            max_num_seqs=1,
            device="tpu",
        )


@st.composite
def models_and_splits(draw: st.DrawFn) -> tuple[ModelSpec, Split]:
    """Any family with drawn sizes, and any split that it allows."""
    values: dict[str, Any] = draw(
        st.sampled_from(
            [
                LLAMA,
                LLAMA | {"attention_bias": True, "mlp_bias": True},
                QWEN2,
                QWEN3,
                MIXTRAL,
                QWEN3_MOE,
                DEEPSEEK_V2,
                DEEPSEEK_V3,
                GPT_OSS,
            ]
        )
    )
    num_kv_heads = draw(st.integers(1, 4))
    num_layers = draw(st.integers(1, 7))
    values = values | {
        "num_hidden_layers": num_layers,
        "hidden_size": 8 * draw(st.integers(1, 8)),
        "head_dim": 2 * draw(st.integers(1, 8)),
        "num_attention_heads": num_kv_heads * draw(st.integers(1, 4)),
        "num_key_value_heads": num_kv_heads,
        "intermediate_size": draw(st.integers(16, 90)),
        "moe_intermediate_size": draw(st.integers(16, 40)),
        "vocab_size": draw(st.integers(16, 300)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    spec = read_model(values)
    tp = draw(st.sampled_from([tp for tp in range(1, 17) if tp_is_legal(spec, tp) is None]))
    ep = draw(st.sampled_from([ep for ep in range(1, min(tp, 4) + 1) if tp % ep == 0]))
    pp = draw(st.integers(1, num_layers))
    cuts = sorted(draw(st.permutations(range(1, num_layers)))[: pp - 1])
    stages = tuple(b - a for a, b in zip([0, *cuts], [*cuts, num_layers], strict=True))
    return spec, Split(tp=tp, ep=ep, pp=pp, stage_layers=stages)


def extra_copies_bytes(spec: ModelSpec, split: Split) -> int:
    """What all ranks of a replica hold beyond one copy of the model."""
    dtypes, total = spec.weight_dtypes, 0
    for layer in spec.layers:
        heads = layer.attention
        held = sum(range_size(head_ranges(heads, split.tp, rank)[1]) for rank in range(split.tp))
        more = 0 if heads.kind == "mla" else held - heads.num_kv_heads
        kv_bias = 2 * heads.head_dim * 2 if heads.qkv_bias else 0
        for tensor in layer_tensors(layer, spec.hidden_size):
            if tensor.name in REPLICATED:
                total += (split.tp - 1) * tensor_bytes(tensor, dtypes)
            elif tensor.name in ("k", "v"):
                total += more * tensor_bytes(tensor, dtypes) // heads.num_kv_heads
            elif tensor.name == "qkv bias":
                total += more * kv_bias
    total += (split.tp - 1) * final_norm_bytes(spec)
    if spec.tie_embeddings and split.pp > 1:
        total += head_weight_bytes(spec, tp=1)
    return total


@given(models_and_splits())
def test_ranks_hold_the_model_once_and_the_replicated_parts_once_more(
    case: tuple[ModelSpec, Split],
) -> None:
    spec, split = case
    whole = stage_weight_bytes(spec, Split(stage_layers=(spec.num_layers,)), stage=0)
    held = sum(
        stage_weight_bytes(spec, split, stage=stage, tp_rank=rank)
        for stage in range(split.pp)
        for rank in range(split.tp)
    )
    assert held == whole + extra_copies_bytes(spec, split)


@given(models_and_splits())
def test_no_rank_holds_more_than_the_first(case: tuple[ModelSpec, Split]) -> None:
    spec, split = case
    for stage in range(split.pp):
        sizes = [
            stage_weight_bytes(spec, split, stage=stage, tp_rank=rank) for rank in range(split.tp)
        ]
        assert max(sizes) == sizes[0]


@given(models_and_splits())
def test_kv_bytes_are_those_of_the_rank_with_most_heads(case: tuple[ModelSpec, Split]) -> None:
    spec, split = case
    for layer in spec.layers:
        heads = layer.attention
        whole = kv_bytes_per_token(spec, layer, tp=1)
        most = max(range_size(head_ranges(heads, split.tp, rank)[1]) for rank in range(split.tp))
        heads_whole = 1 if heads.kind == "mla" else heads.num_kv_heads
        assert kv_bytes_per_token(spec, layer, tp=split.tp) * heads_whole == most * whole


@given(models_and_splits(), st.integers(1, 500), st.integers(0, 64))
def test_activations_grow_with_tokens_and_never_with_ranks(
    case: tuple[ModelSpec, Split], tokens: int, rows: int
) -> None:
    spec, split = case
    here, more = (
        activation_bytes(
            spec, tp=split.tp, ep=split.ep, max_batched_tokens=count, max_num_seqs=rows
        )
        for count in (tokens, tokens + 1)
    )
    assert here < more
    assert here <= activation_bytes(spec, tp=1, max_batched_tokens=tokens, max_num_seqs=rows)


def test_context_parallelism_counts_what_it_gathers() -> None:
    spec = read_model(LLAMA)
    options: dict[str, Any] = {
        **{"tp": 1, "max_context_tokens": 1000, "max_num_seqs": 8},
        "max_batched_tokens": 100,
    }
    assert gathered_bytes(spec, cp=1, **options) == 0
    token = kv_bytes_per_token(spec, spec.layers[0], tp=1)
    heads = spec.layers[0].attention
    # The context of one prompt and this rank's half of it again; rows of decoding, ours and both.
    rows = 8 * heads.num_heads * (heads.head_dim + 1) * 4 * 3
    assert gathered_bytes(spec, cp=2, **options) == 1500 * token + rows
    # In a ring two halves at a time, and what 50 tokens of this rank found in each.
    found = 100 * heads.num_heads * (heads.head_dim + 1) * 4
    assert gathered_bytes(spec, cp=2, cp_exchange="ring", **options) == 1000 * token + found


def test_latents_in_parts_are_counted_with_the_keys_of_one_head() -> None:
    spec = read_model("deepseek-ai/DeepSeek-V3")
    options: dict[str, Any] = {
        **{"tp": 8, "max_context_tokens": 1000, "max_num_seqs": 8},
        "max_batched_tokens": 100,
    }
    head = 1000 * (3 * 192 + 128) * 2
    assert gathered_bytes(spec, cp=1, **options) == head
    # 16 heads of this rank, each with a row as wide as the latent and its log-sum-exp.
    rows = 8 * 16 * (512 + 1) * 4 * 3
    assert gathered_bytes(spec, cp=2, **options) == head + 1500 * (512 + 64) * 2 + rows
