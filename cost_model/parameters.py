"""The tensors of a model and what part of each a rank holds.

The one list from which parameters are counted and weight bytes are summed. Fused matrices (query,
key and value in one; gate and up in one) are listed as their parts: the bytes are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Literal

from rankwright.cost_model.dtypes import BITS, Dtype, num_bytes
from rankwright.cost_model.model_spec import Attention, FeedForward, Layer, ModelSpec, WeightDtypes
from rankwright.cost_model.shards import (
    Range,
    Shares,
    column_range,
    even_range,
    head_ranges,
    range_size,
)

Group = Literal["attention", "feed_forward", "embedding", "head", "other"]

# Groups whose matrices a quantisation method stores with scales; see families/quantization.py.
_SCALED_GROUPS: frozenset[Group] = frozenset({"attention", "feed_forward"})
_SCALED_DTYPES: frozenset[Dtype] = frozenset({"float8", "int8", "int4"})


@dataclass(frozen=True, slots=True)
class Tensor:
    """`copies` tensors of `rows` outputs by `columns` inputs; `rows == 1` is a vector."""

    name: str
    group: Group
    rows: int
    columns: int
    copies: int = 1
    dtype: Dtype | None = None  # None: that of the group

    @property
    def size(self) -> int:
        """Values in all copies."""
        return self.copies * self.rows * self.columns


def tensor_bytes(tensor: Tensor, dtypes: WeightDtypes) -> int:
    """Return the bytes of `tensor` with its scales and zero points.

    >>> tensor_bytes(Tensor("q", "attention", 64, 32), WeightDtypes())
    4096
    """
    formats: dict[Group, Dtype] = {
        "attention": dtypes.attention,
        "feed_forward": dtypes.feed_forward,
        "embedding": dtypes.embedding,
        "head": dtypes.head,
        "other": dtypes.other,
    }
    dtype = tensor.dtype or formats[tensor.group]
    total = num_bytes(tensor.size, dtype)
    if tensor.size and tensor.group in _SCALED_GROUPS and dtype in _SCALED_DTYPES:
        num_scales = ceil(tensor.rows / (dtypes.scale_rows or tensor.rows)) * ceil(
            tensor.columns / (dtypes.scale_group or tensor.columns)
        )
        bits = BITS[dtypes.scale_dtype] + dtypes.zero_point_bits
        total += ceil(tensor.copies * num_scales * bits / 8)
    return total


def vocab_rows(spec: ModelSpec, tp: int, tp_rank: int, shares: Shares | None) -> int:
    """Return how many rows of embedding and head one of `tp` ranks holds."""
    return range_size(column_range(spec.vocab_size, tp, tp_rank, shares.vocab if shares else None))


def head_tensor(
    spec: ModelSpec, *, tp: int, tp_rank: int = 0, shares: Shares | None = None
) -> Tensor:
    """Return one rank's rows of the head, stored as the embedding is where both are tied."""
    group: Literal["embedding", "head"] = "embedding" if spec.tie_embeddings else "head"
    return Tensor("head", group, vocab_rows(spec, tp, tp_rank, shares), spec.hidden_size)


def layer_tensors(
    layer: Layer,
    hidden_size: int,
    *,
    tp: int = 1,
    ep: int = 1,
    attention: Literal["tp", "dp"] = "tp",
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> Iterator[Tensor]:
    """Yield what one rank holds of `layer`; without `shares` no rank holds more than rank 0.

    Norms and routers are whole on every rank. The bias of a product that is summed over ranks is on
    the first of them only, so that the sum holds it once.

    Args:
        layer: Shapes before any split.
        hidden_size: Of the model.
        tp: Ranks of the stage.
        ep: Groups of ranks that share the experts out; `tp // ep` ranks cut each expert.
        attention: `dp` when every rank holds all heads and the shared experts, for requests of its
            own.
        tp_rank: Ranks `e * moe_tp` to `(e + 1) * moe_tp - 1` hold the experts of group `e`.
        shares: Parts of the ranks where they are unequal; see `legality.shares_are_legal`.
    """
    yield Tensor("norms", "other", 1, hidden_size, copies=2)
    heads_tp, heads_rank = (1, 0) if attention == "dp" else (tp, tp_rank)
    if layer.attention.kind == "mla":
        yield from _mla_tensors(layer.attention, hidden_size, heads_tp, heads_rank, shares)
    else:
        yield from _head_tensors(layer.attention, hidden_size, heads_tp, heads_rank, shares)
    block = layer.feed_forward
    if block.kind == "dense":
        columns = column_range(
            block.intermediate_size, tp, tp_rank, shares.columns if shares else None
        )
        yield from _mlp_tensors("mlp", hidden_size, block, columns, tp_rank)
    else:
        yield from _moe_tensors(
            block, hidden_size, tp, ep, tp_rank, attention=attention, shares=shares
        )


def _head_tensors(
    attention: Attention, hidden: int, tp: int, rank: int, shares: Shares | None
) -> Iterator[Tensor]:
    query, kv = head_ranges(attention, tp, rank, shares)
    q_rows = range_size(query) * attention.head_dim
    k_rows = range_size(kv) * attention.head_dim
    v_rows = range_size(kv) * attention.value_head_dim
    o_columns = range_size(query) * attention.value_head_dim
    yield Tensor("q", "attention", q_rows, hidden)
    yield Tensor("k", "attention", k_rows, hidden)
    yield Tensor("v", "attention", v_rows, hidden)
    yield Tensor("o", "attention", hidden, o_columns)
    if attention.qkv_bias:
        yield Tensor("qkv bias", "other", 1, q_rows + k_rows + v_rows)
    if attention.output_bias and rank == 0:
        yield Tensor("o bias", "other", 1, hidden)
    if attention.qk_norm:
        yield Tensor("q and k norm", "other", 1, attention.head_dim, copies=2)
    if attention.sinks:
        yield Tensor("sinks", "other", 1, range_size(query))


def _mla_tensors(
    attention: Attention, hidden: int, tp: int, rank: int, shares: Shares | None
) -> Iterator[Tensor]:
    """Down-projections are whole on every rank, as the latent they make is; heads are cut."""
    assert attention.kv_lora_rank is not None
    assert attention.rope_head_dim is not None
    query, _ = head_ranges(attention, tp, rank, shares)
    num_heads = range_size(query)
    latent, rotary = attention.kv_lora_rank, attention.rope_head_dim
    no_rotary = attention.head_dim - rotary
    q_rows = num_heads * attention.head_dim
    if attention.q_lora_rank is None:
        yield Tensor("q", "attention", q_rows, hidden)
    else:
        yield Tensor("q_a", "attention", attention.q_lora_rank, hidden)
        yield Tensor("q_a norm", "other", 1, attention.q_lora_rank)
        yield Tensor("q_b", "attention", q_rows, attention.q_lora_rank)
    yield Tensor("kv_a", "attention", latent + rotary, hidden)
    yield Tensor("kv_a norm", "other", 1, latent)
    yield Tensor("kv_b", "attention", num_heads * (no_rotary + attention.value_head_dim), latent)
    yield Tensor("o", "attention", hidden, num_heads * attention.value_head_dim)
    if attention.qkv_bias:
        q_bias = attention.q_lora_rank or 0
        yield Tensor("a bias", "other", 1, q_bias + latent + rotary)
    if attention.output_bias and rank == 0:
        yield Tensor("o bias", "other", 1, hidden)


def _mlp_tensors(
    name: str,
    hidden: int,
    block: FeedForward,
    bounds: Range,
    rank: int,
    copies: int = 1,
) -> Iterator[Tensor]:
    columns = range_size(bounds)
    yield Tensor(f"{name} gate", "feed_forward", columns, hidden, copies)
    yield Tensor(f"{name} up", "feed_forward", columns, hidden, copies)
    yield Tensor(f"{name} down", "feed_forward", hidden, columns, copies)
    if block.bias:
        yield Tensor(f"{name} gate and up bias", "other", 1, 2 * columns, copies)
        if rank == 0:
            yield Tensor(f"{name} down bias", "other", 1, hidden, copies)


def _moe_tensors(
    block: FeedForward,
    hidden: int,
    tp: int,
    ep: int,
    rank: int,
    *,
    attention: Literal["tp", "dp"],
    shares: Shares | None,
) -> Iterator[Tensor]:
    if ep < 1 or tp % ep:
        raise ValueError(f"moe_tp * ep must equal tp: ep={ep} does not divide tp={tp}")
    ep_rank, moe_tp_rank = divmod(rank, tp // ep)
    yield Tensor("router", "other", block.num_experts, hidden)
    if block.router.bias:
        yield Tensor("router bias", "other", 1, block.num_experts)
    if block.router.correction_bias:
        yield Tensor("router correction", "other", 1, block.num_experts, dtype="float32")
    experts = range_size(even_range(block.num_experts, ep, ep_rank))
    columns = column_range(
        block.intermediate_size, tp // ep, moe_tp_rank, shares.columns if shares else None
    )
    yield from _mlp_tensors("expert", hidden, block, columns, moe_tp_rank, experts)
    if block.shared_intermediate_size:
        # Every token takes them: a rank with tokens of its own has them whole.
        cut, part = (1, 0) if attention == "dp" else (tp, rank)
        columns = column_range(block.shared_intermediate_size, cut, part)
        yield from _mlp_tensors("shared", hidden, block, columns, part)


def count_parameters(spec: ModelSpec) -> int:
    """Return the parameters of the whole model; tied embeddings count once.

    >>> from rankwright.cost_model.read_model import read_model
    >>> count_parameters(read_model("meta-llama/Llama-3.1-8B"))
    8030261248
    """
    in_layers = sum(
        run.count * sum(tensor.size for tensor in layer_tensors(run.layer, spec.hidden_size))
        for run in spec.layer_runs
    )
    tables = 1 if spec.tie_embeddings else 2
    return in_layers + tables * spec.vocab_size * spec.hidden_size + spec.hidden_size


def count_active_parameters(spec: ModelSpec) -> int:
    """Return the parameters that one token passes through.

    Counts the chosen and shared experts and the head, and of the embedding nothing: a look-up reads
    one row. The gpt-oss model card counts the same way.
    """
    total = spec.hidden_size + spec.vocab_size * spec.hidden_size
    for run in spec.layer_runs:
        chosen = run.layer.feed_forward.experts_per_token
        for tensor in layer_tensors(run.layer, spec.hidden_size):
            is_expert = tensor.name.startswith("expert ")
            copies = chosen if is_expert else tensor.copies
            total += run.count * copies * tensor.rows * tensor.columns
    return total
