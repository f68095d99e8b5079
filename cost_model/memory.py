"""Bytes of every rank: weights by shard, KV cache, activations, and what the runtime reserves.

Weights and KV are exact: they are what the executor allocates. Activations are a bound derived
from the buffers that live at once. What CUDA, NCCL and graphs take cannot be derived; it is a row
of `RESERVED_BYTES`, until a calibration of this machine replaces it.
"""

from collections.abc import Iterable

from rankwright.cost_model.dtypes import num_bytes
from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.cost_model.parameters import (
    Tensor,
    head_tensor,
    layer_tensors,
    tensor_bytes,
    vocab_rows,
)
from rankwright.cost_model.prediction import MemoryPart
from rankwright.cost_model.shards import Shares, column_range, head_ranges, range_size
from rankwright.cost_model.split import AttentionSplit, CpExchange, Split

# Bytes of a rank that no term below accounts for, by kind of device. A calibration of the
# machine replaces them.
# cuda: context, cuBLAS workspace, NCCL channels, captured graphs, rotary table. Published figures
#   of vLLM: at TP8 a process ends 1.37 GiB (1.47 GB) above the budget it had profiled
#   (github.com/vllm-project/vllm/pull/51590); graphs of a TP4 engine took 2464 MiB (2.58 GB,
#   github.com/vllm-project/vllm/issues/7553). We take the higher: running out of memory costs a
#   restart, 1 GB of KV cache costs 1 % of an H100.
# rocm: no published figure found; the same until measured.
# cpu: resident bytes of Python with torch 2.13, gloo and tokenizers loaded, measured on Linux
#   x86-64 at 246 MB, rounded up.
RESERVED_BYTES: dict[str, int] = {
    "cuda": 2_600_000_000,
    "rocm": 2_600_000_000,
    "cpu": 300_000_000,
}

# Bytes a logit at the peak of sampling with top-k or top-p, which `kernels/sampling.py` does in
# PyTorch: 4 of the logit, 12 sorted with its index, four int64 steps of the hash that makes the
# noise, and the allocator's rest. Measured: resident bytes of `sample_reference` on 48 rows of
# 128,256, torch 2.13 on a CPU. Gathering the shards before it takes less.
_SAMPLED_LOGIT_BYTES = 57
# Rows that the executor samples at once, so that those bytes do not grow with the batch: 32 rows of
# a vocabulary of 128k fill a GPU, and take 0.23 GB.
SAMPLED_ROWS = 32
# Bytes a logit of every other row: float32, and as computed, padded and gathered over the ranks.
_LOGIT_BYTES = 4 + 3 * 4


def layer_weight_bytes(
    spec: ModelSpec,
    layer: Layer,
    *,
    tp: int,
    ep: int = 1,
    attention: AttentionSplit = "tp",
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> int:
    """Return the weight bytes of one layer on one rank; of equal shares rank 0's is the fullest.

    Args:
        spec: The model that `layer` is of.
        layer: An entry of `spec.layers`.
        tp: Ranks of the stage.
        ep: Groups that share the experts out.
        attention: `dp` when every rank holds all heads.
        tp_rank: Which rank.
        shares: Of the ranks, where they are unequal.

    Raises:
        ValueError: heads or experts cannot be cut so.
    """
    return sum(
        tensor_bytes(tensor, spec.weight_dtypes)
        for tensor in layer_tensors(
            layer,
            spec.hidden_size,
            tp=tp,
            ep=ep,
            attention=attention,
            tp_rank=tp_rank,
            shares=shares,
        )
    )


def embedding_weight_bytes(
    spec: ModelSpec, *, tp: int, tp_rank: int = 0, shares: Shares | None = None
) -> int:
    """Return the bytes of one rank's rows of the embedding, on the first stage."""
    rows = vocab_rows(spec, tp, tp_rank, shares)
    return tensor_bytes(
        Tensor("embedding", "embedding", rows, spec.hidden_size), spec.weight_dtypes
    )


def head_weight_bytes(
    spec: ModelSpec, *, tp: int, tp_rank: int = 0, shares: Shares | None = None
) -> int:
    """Return the bytes of one rank's rows of the head, on the last stage.

    With tied embeddings and one stage these are the embedding's own bytes: count one of the two,
    as `stage_weight_bytes` does.
    """
    head = head_tensor(spec, tp=tp, tp_rank=tp_rank, shares=shares)
    return tensor_bytes(head, spec.weight_dtypes)


def final_norm_bytes(spec: ModelSpec) -> int:
    """Return the bytes of the norm before the head, on every rank of the last stage."""
    return tensor_bytes(Tensor("final norm", "other", 1, spec.hidden_size), spec.weight_dtypes)


def stage_layers(spec: ModelSpec, split: Split, stage: int) -> Iterable[tuple[Layer, int]]:
    """Return each kind of layer in `stage` with how many there are."""
    first = sum(split.stage_layers[:stage])
    stop = first + split.stage_layers[stage]
    counts: dict[Layer, int] = {}
    start = 0
    for run in spec.layer_runs:
        count = min(stop, start + run.count) - max(first, start)
        if count > 0:
            counts[run.layer] = counts.get(run.layer, 0) + count
        start += run.count
    return counts.items()


def stage_weight_bytes(
    spec: ModelSpec,
    split: Split,
    *,
    stage: int,
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> int:
    """Return the weight bytes of one rank of `stage`, with embedding and head where it has them."""
    total = sum(
        count
        * layer_weight_bytes(
            spec,
            layer,
            tp=split.tp,
            ep=split.ep,
            attention=split.attention,
            tp_rank=tp_rank,
            shares=shares,
        )
        for layer, count in stage_layers(spec, split, stage)
    )
    if stage == 0:
        total += embedding_weight_bytes(spec, tp=split.tp, tp_rank=tp_rank, shares=shares)
    if stage == split.pp - 1:
        total += final_norm_bytes(spec)
        if not (spec.tie_embeddings and split.pp == 1):
            total += head_weight_bytes(spec, tp=split.tp, tp_rank=tp_rank, shares=shares)
    return total


def kv_bytes_per_token(
    spec: ModelSpec,
    layer: Layer,
    *,
    tp: int,
    attention: AttentionSplit = "tp",
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> int:
    """Return the KV bytes of one token in one layer on one rank.

    MLA keeps the latent and the rotary key, whole on every rank. Other kinds keep keys and values
    of the rank's KV heads. A sliding window does not shorten it: pages are kept for all tokens.
    """
    heads = layer.attention
    if heads.kind == "mla":
        assert heads.kv_lora_rank is not None
        assert heads.rope_head_dim is not None
        return num_bytes(heads.kv_lora_rank + heads.rope_head_dim, spec.kv_dtype)
    ranks, rank = (1, 0) if attention == "dp" else (tp, tp_rank)
    _, kv = head_ranges(heads, ranks, rank, shares)
    return num_bytes(range_size(kv) * (heads.head_dim + heads.value_head_dim), spec.kv_dtype)


def stage_kv_bytes_per_token(
    spec: ModelSpec,
    split: Split,
    *,
    stage: int,
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> int:
    """Return the KV bytes of one token in all layers of `stage` on one rank."""
    return sum(
        count
        * kv_bytes_per_token(
            spec,
            layer,
            tp=split.tp,
            attention=split.attention,
            tp_rank=tp_rank,
            shares=shares,
        )
        for layer, count in stage_layers(spec, split, stage)
    )


def activation_bytes(
    spec: ModelSpec,
    *,
    tp: int,
    max_batched_tokens: int,
    max_num_seqs: int,
    ep: int = 1,
    attention: AttentionSplit = "tp",
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> int:
    """Return the peak bytes of one step's buffers on one rank, logits included.

    Three terms, summed although they do not all live at once: the allocator keeps the blocks of
    each for itself (sizes differ, and captured graphs have a pool of their own).

    1. `tokens x 4 hidden`: hidden states, residual, the block's output, and one buffer for the
       all-reduce or for what arrives from the stage before.
    2. The widest block of any layer: queries, keys and values, the rotated queries and the output
       of attention; or gate and up with their product; or for experts, one for each expert that a
       token chooses, their product of gate and up and their output (`kernels/moe_experts.py`: room
       for all, as how many are this rank's is known on the device only).
    3. `sequences x vocabulary`: logits (`_LOGIT_BYTES`), and of `SAMPLED_ROWS` of them what the
       sampler makes (`_SAMPLED_LOGIT_BYTES`).
    """
    token_values = 4 * spec.hidden_size + max(
        max(
            _attention_values(layer, tp, attention, tp_rank, shares),
            _feed_forward_values(layer, spec.hidden_size, tp, ep, tp_rank, shares),
        )
        for layer in (run.layer for run in spec.layer_runs)
    )
    return (
        num_bytes(max_batched_tokens * token_values, spec.dtype)
        + max_num_seqs * spec.vocab_size * _LOGIT_BYTES
        + min(max_num_seqs, SAMPLED_ROWS) * spec.vocab_size * _SAMPLED_LOGIT_BYTES
    )


def gathered_bytes(
    spec: ModelSpec,
    *,
    tp: int,
    cp: int,
    max_context_tokens: int,
    max_num_seqs: int,
    max_batched_tokens: int,
    attention: AttentionSplit = "tp",
    cp_exchange: CpExchange = "gather",
) -> int:
    """Return the bytes that a rank makes of a whole context, in one layer at a time.

    With context parallelism, of a prompt the keys and values of its whole context, beside the copy
    of this rank's own part; in a ring two parts, one that leaves and one that arrives, and what was
    found in each. For tokens that decode what every rank found, and its own. What is found is in
    float32 with a log-sum-exp. With latent attention, the keys and values of one head, expanded.
    """
    layers = [run.layer for run in spec.layer_runs]
    expanded = num_bytes(max_context_tokens * max(map(_expanded_values, layers)), spec.dtype)
    if cp == 1:
        return expanded
    per_token = max(kv_bytes_per_token(spec, one, tp=tp, attention=attention) for one in layers)
    heads_tp = 1 if attention == "dp" else tp
    row = max(
        range_size(head_ranges(one.attention, heads_tp, 0)[0])
        * ((one.attention.kv_lora_rank or one.attention.head_dim) + 1)
        for one in layers
    )
    decoding = 4 * max_num_seqs * row * (cp + 1)
    if cp_exchange == "ring":
        found = 4 * max_batched_tokens * row  # of each rank's part of the tokens, in each part
        return -(-(expanded + 2 * max_context_tokens * per_token) // cp) + max(found, decoding)
    return expanded + -(-max_context_tokens * per_token * (cp + 1) // cp) + decoding


def _expanded_values(layer: Layer) -> int:
    """Return the values that latent attention makes of a context's token, of one head."""
    heads = layer.attention
    return 3 * heads.head_dim + heads.value_head_dim if heads.kind == "mla" else 0


def _attention_values(
    layer: Layer, tp: int, attention: AttentionSplit, tp_rank: int, shares: Shares | None
) -> int:
    """Return the values of a token that live at once in attention."""
    heads = layer.attention
    ranks, rank = (1, 0) if attention == "dp" else (tp, tp_rank)
    query, kv = head_ranges(heads, ranks, rank, shares)
    output = range_size(query) * heads.value_head_dim
    queries = range_size(query) * heads.head_dim
    if heads.kind == "mla":
        assert heads.kv_lora_rank is not None
        assert heads.rope_head_dim is not None
        latent = heads.kv_lora_rank + heads.rope_head_dim
        absorbed = range_size(query) * (latent + 2 * heads.kv_lora_rank)
        # Latents of queries come before and after their norm. Then a prompt's tokens meet keys and
        # values of so many heads at a time as take half of these, or one head's
        # (`gathered_bytes`); those that decode have queries as wide as the latent.
        expanded = queries + (3 * queries + output) // 2
        both = queries + 2 * output + max(expanded, absorbed)
        return 2 * (heads.q_lora_rank or 0) + latent + both
    return 2 * queries + range_size(kv) * (heads.head_dim + heads.value_head_dim) + output


def _feed_forward_values(
    layer: Layer, hidden_size: int, tp: int, ep: int, tp_rank: int, shares: Shares | None
) -> int:
    """Return the values of a token that live at once in the feed-forward block."""
    block, sizes = layer.feed_forward, shares.columns if shares else None
    if block.kind == "dense":
        return 3 * range_size(column_range(block.intermediate_size, tp, tp_rank, sizes))
    moe_tp_rank = tp_rank % (tp // ep)
    columns = range_size(column_range(block.intermediate_size, tp // ep, moe_tp_rank, sizes))
    shared = 3 * range_size(column_range(block.shared_intermediate_size, tp, 0))
    # Logits; of each pair of token and expert its weight, slot, place and padding, 4 bytes each.
    routing = block.num_experts + 16 * block.experts_per_token
    return block.experts_per_token * (hidden_size + columns) + hidden_size + routing + shared


def rank_memory(
    spec: ModelSpec,
    split: Split,
    *,
    stage: int,
    kv_tokens: int,
    max_batched_tokens: int,
    max_num_seqs: int,
    device: str = "cuda",
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> tuple[MemoryPart, ...]:
    """Return the bytes of one rank of `stage`, by what they are for.

    Args:
        spec: The model.
        split: Its cut.
        stage: 0 is the first.
        kv_tokens: Tokens that the rank's KV cache has room for.
        max_batched_tokens: Tokens of one step at most.
        max_num_seqs: Sequences that get a token in one step at most.
        device: Row of `RESERVED_BYTES`.
        tp_rank: Which rank; of equal shares rank 0's is the fullest.
        shares: Of the ranks, where they are unequal.
    """
    if device not in RESERVED_BYTES:
        raise ValueError(f"device kind {device!r}: expected one of {', '.join(RESERVED_BYTES)}")
    last = stage == split.pp - 1
    return (
        MemoryPart(
            name="weights",
            bytes=stage_weight_bytes(spec, split, stage=stage, tp_rank=tp_rank, shares=shares),
        ),
        MemoryPart(
            name="kv cache",
            bytes=kv_tokens
            * stage_kv_bytes_per_token(spec, split, stage=stage, tp_rank=tp_rank, shares=shares),
        ),
        MemoryPart(
            name="activations",
            bytes=activation_bytes(
                spec,
                tp=split.tp,
                ep=split.ep,
                attention=split.attention,
                max_batched_tokens=max_batched_tokens,
                max_num_seqs=max_num_seqs if last else 0,
                tp_rank=tp_rank,
                shares=shares,
            )
            + gathered_bytes(
                spec,
                tp=split.tp,
                cp=split.cp,
                attention=split.attention,
                cp_exchange=split.cp_exchange,
                max_context_tokens=min(spec.max_context_tokens, kv_tokens * split.cp),
                max_num_seqs=max_num_seqs,
                max_batched_tokens=max_batched_tokens,
            ),
        ),
        MemoryPart(name="reserved", bytes=RESERVED_BYTES[device]),
    )
