"""Every tensor that a model's layers ask its checkpoint for, without importing torch.

A test holds this to what the layers really ask for.
"""

from collections.abc import Iterator

from rankwright.cost_model.model_spec import Attention, FeedForward, ModelSpec
from rankwright.executor.models import tensor_names
from rankwright.executor.models.names import ExpertNames, PackedExpertNames

Expected = tuple[str, tuple[int, ...]]  # name, shape


def expected_tensors(spec: ModelSpec) -> Iterator[Expected]:
    """Yield the name and the whole shape of each tensor, as `config.json` has them.

    Raises:
        ValueError: The executor does not know the architecture.
    """
    names, hidden = tensor_names(spec.architecture), spec.hidden_size
    yield names.embedding, (spec.vocab_size, hidden)
    for number, layer in enumerate(spec.layers):
        yield names.attention_norm.format(layer=number), (hidden,)
        yield names.feed_forward_norm.format(layer=number), (hidden,)
        prefix, attention = names.attention.format(layer=number), layer.attention
        found = _latent if attention.kind == "mla" else _heads
        yield from ((f"{prefix}.{name}", shape) for name, shape in found(attention, hidden))
        block = layer.feed_forward
        if block.kind == "dense":
            prefix = names.feed_forward.format(layer=number)
            yield from _gated(prefix, hidden, block.intermediate_size, bias=block.bias)
        else:
            assert names.experts is not None
            yield from _experts(names.experts, block, hidden, number)
    yield names.final_norm, (hidden,)
    if not spec.tie_embeddings:
        yield names.head, (spec.vocab_size, hidden)


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Iterator[Expected]:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _heads(attention: Attention, hidden: int) -> Iterator[Expected]:
    bias = attention.qkv_bias
    queries = attention.num_heads * attention.head_dim
    yield from _linear("q_proj", queries, hidden, bias=bias)
    for name in ("k_proj", "v_proj"):
        yield from _linear(name, attention.num_kv_heads * attention.head_dim, hidden, bias=bias)
    yield from _linear("o_proj", hidden, queries, bias=attention.output_bias)
    if attention.qk_norm:
        yield "q_norm.weight", (attention.head_dim,)
        yield "k_norm.weight", (attention.head_dim,)
    if attention.sinks:
        yield "sinks", (attention.num_heads,)


def _latent(attention: Attention, hidden: int) -> Iterator[Expected]:
    rank, latent, rotary = attention.q_lora_rank, attention.kv_lora_rank, attention.rope_head_dim
    assert latent is not None
    assert rotary is not None
    heads = attention.num_heads
    if rank is None:
        yield from _linear("q_proj", heads * attention.head_dim, hidden, bias=False)
    else:
        yield from _linear("q_a_proj", rank, hidden, bias=attention.qkv_bias)
        yield "q_a_layernorm.weight", (rank,)
        yield from _linear("q_b_proj", heads * attention.head_dim, rank, bias=False)
    yield from _linear("kv_a_proj_with_mqa", latent + rotary, hidden, bias=attention.qkv_bias)
    yield "kv_a_layernorm.weight", (latent,)
    width = attention.head_dim - rotary + attention.value_head_dim
    yield from _linear("kv_b_proj", heads * width, latent, bias=False)
    values = heads * attention.value_head_dim
    yield from _linear("o_proj", hidden, values, bias=attention.output_bias)


def _gated(prefix: str, hidden: int, width: int, *, bias: bool) -> Iterator[Expected]:
    yield from _linear(f"{prefix}.gate_proj", width, hidden, bias=bias)
    yield from _linear(f"{prefix}.up_proj", width, hidden, bias=bias)
    yield from _linear(f"{prefix}.down_proj", hidden, width, bias=bias)


def _experts(
    names: ExpertNames | PackedExpertNames, block: FeedForward, hidden: int, number: int
) -> Iterator[Expected]:
    experts, width = block.num_experts, block.intermediate_size
    router = names.router.format(layer=number)
    yield from _linear(router, experts, hidden, bias=block.router.bias)
    if names.correction is not None and block.router.correction_bias:
        yield names.correction.format(layer=number), (experts,)
    if isinstance(names, PackedExpertNames):
        gate_up, down = (name.format(layer=number) for name in (names.gate_up, names.down))
        yield gate_up, (experts, hidden, 2 * width)
        yield down, (experts, width, hidden)
        if block.bias:
            yield f"{gate_up}_bias", (experts, 2 * width)
            yield f"{down}_bias", (experts, hidden)
        return
    for expert in range(experts):
        at = {"layer": number, "expert": expert}
        yield f"{names.gate.format(**at)}.weight", (width, hidden)
        yield f"{names.up.format(**at)}.weight", (width, hidden)
        yield f"{names.down.format(**at)}.weight", (hidden, width)
    if block.shared_intermediate_size:
        assert names.shared is not None
        prefix = names.shared.format(layer=number)
        yield from _gated(prefix, hidden, block.shared_intermediate_size, bias=False)
