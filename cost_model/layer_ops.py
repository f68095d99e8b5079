"""FLOPs and bytes of what one rank computes in one layer, and in embedding and head.

Weights come from `parameters.layer_tensors`, so that what is timed is what is counted in memory.
`ops.Rates` turns ops into seconds.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import log, sqrt

from rankwright.cost_model.dtypes import BITS, Dtype
from rankwright.cost_model.latent_prefill import latent_prefill
from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.cost_model.ops import Op, OpKind, StepTokens
from rankwright.cost_model.parameters import Tensor, head_tensor, layer_tensors, tensor_bytes
from rankwright.cost_model.shards import (
    Shares,
    column_range,
    even_range,
    head_ranges,
    range_size,
)
from rankwright.cost_model.split import AttentionSplit
from rankwright.cost_model.tiles import PRODUCT_ROWS, prefill_flops


def expected_experts(num_experts: int, experts_per_token: int, tokens: float) -> float:
    """Return how many experts get a token, if each token chooses evenly and alone.

    >>> expected_experts(8, 2, 1)
    2.0
    >>> round(expected_experts(128, 8, 64), 1)
    125.9
    """
    missed = float((1 - experts_per_token / num_experts) ** tokens)
    return num_experts * (1 - missed)


def expert_imbalance(ep: int) -> float:
    """Return the load of the fullest rank over the mean, without any balancing.

    DeepSeek-R1 over EP32 was measured at (max - mean) / mean = 1.56. Fewer ranks hold more experts
    each, so the spread shrinks as the square root of the ranks, and so does the expected maximum of
    `ep` draws (as sqrt(log ep)).

    >>> expert_imbalance(1)
    1.0
    >>> expert_imbalance(32)
    2.56
    """
    return 1.0 if ep == 1 else 1 + 1.56 * sqrt(ep / 32 * log(ep) / log(32))


class LayerModel:
    """What one rank computes in one layer, as a function of the step's tokens.

    What does not depend on tokens is worked out once, because the planner asks for thousands of
    steps of the same layer.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layer: Layer,
        *,
        tp: int,
        ep: int = 1,
        cp: int = 1,
        attention: AttentionSplit = "tp",
        fused_norms: bool = False,
        tile_keys: float = 0.0,
        expands_by_heads: bool = False,
        tp_rank: int = 0,
        shares: Shares | None = None,
    ) -> None:
        """Prepare one layer.

        Args:
            spec: The model.
            layer: One of its layers.
            tp: Ranks of the stage.
            ep: Groups that share the experts out.
            cp: Ranks that each have a part of every context.
            attention: `dp` when each rank attends for its own share of the sequences.
            fused_norms: Whether norms cost no kernel of their own.
            tile_keys: Of attention of prompts; see `tiles.prefill_flops`.
            expands_by_heads: How latents of prompts are expanded; see `latent_prefill.py`.
            tp_rank: Whose part; of equal shares rank 0's is the fullest.
            shares: Of the ranks, where they are unequal.
        """
        self._cp = cp
        self._tile_keys = tile_keys
        self._expands_by_heads = expands_by_heads and layer.attention.kind == "mla"
        self._spec = spec
        self._layer = layer
        self._ep = ep
        self._width = BITS[spec.dtype] / 8
        self._attention_ranks = tp if attention == "dp" else 1
        heads_tp, heads_rank = (1, 0) if attention == "dp" else (tp, tp_rank)
        query, kv = head_ranges(layer.attention, heads_tp, heads_rank, shares)
        self._queries, self._kv_heads = range_size(query), range_size(kv)
        tensors = tuple(
            layer_tensors(
                layer,
                spec.hidden_size,
                tp=tp,
                ep=ep,
                attention=attention,
                tp_rank=tp_rank,
                shares=shares,
            )
        )
        heads, block = layer.attention, layer.feed_forward
        launches = 3 if heads.kind == "mla" else 1
        self._qkv = _product(
            spec, "qkv projection", tensors, ("q", "k", "v", "q_a", "q_b", "kv_a"), launches
        )
        self._output = _product(spec, "o projection", tensors, ("o", "kv_b"), launches)
        self._expansion: _Product | None = None
        if heads.kind == "mla":
            self._expansion = _product(spec, "latent projection", tensors, ("kv_b",), 2)
        width = block.intermediate_size if block.kind == "dense" else block.shared_intermediate_size
        # Shared experts of attention DP are whole on each rank, for its own tokens.
        self._mlp_of_own = block.kind == "moe" and attention == "dp"
        cut, part = (1, 0) if self._mlp_of_own else (tp, tp_rank)
        dense_sizes = shares.columns if shares and block.kind == "dense" else None
        self._columns = range_size(column_range(width, cut, part, dense_sizes))
        self._mlp: _Product | None = None
        if self._columns:
            kind = "mlp" if block.kind == "dense" else "shared"
            name = "mlp" if block.kind == "dense" else "shared experts"
            names = (f"{kind} gate", f"{kind} up", f"{kind} down")
            self._mlp = _product(spec, name, tensors, names, 2)
        self._experts: _Product | None = None
        if block.kind == "moe":
            names = ("expert gate", "expert up", "expert down")
            self._experts = _product(spec, "experts", tensors, names, 2)
            ep_rank, moe_tp_rank = divmod(tp_rank, tp // ep)
            self._local_experts = range_size(even_range(block.num_experts, ep, ep_rank))
            self._expert_columns = range_size(
                column_range(
                    block.intermediate_size,
                    tp // ep,
                    moe_tp_rank,
                    shares.columns if shares else None,
                )
            )
        # Rotary and KV write; activation; the two norms; the norm of query and key heads.
        self._launches = 2 + (0 if fused_norms else 2) + (1 if heads.qk_norm else 0)

    def ops(self, tokens: StepTokens) -> tuple[Op, ...]:
        """Return the ops of one layer for `tokens`, which are counted before any split by heads.

        Tokens of a prompt are already this rank's part of it under context parallelism.
        """
        qkv, *others = self.other_ops(tokens)
        return (qkv, *self.attention_ops(tokens), *others)

    def rows(self, tokens: StepTokens) -> float:
        """Return the tokens that the fullest rank projects for attention."""
        decode, prefill = self._attended(tokens)
        return decode + prefill

    def _normed(self, tokens: StepTokens, rows: float) -> float:
        """Return the tokens whose residual this rank keeps: under attention DP its own."""
        return tokens.total if self._attention_ranks == 1 else rows

    def other_ops(self, tokens: StepTokens) -> tuple[Op, ...]:
        """Return the ops but for attention itself: these depend on `tokens.total` and `rows`."""
        rows = self.rows(tokens)
        feed_forward, activated = self._feed_forward(tokens, rows)
        # Two norms read hidden and residual and write both; rotary and KV write pass over the
        # heads; the activation reads gate and up and writes their product.
        values = self._normed(tokens, rows) * 8 * self._spec.hidden_size
        values += self._rotated(rows) + 3 * activated
        norms = self._norms(values, self._launches)
        projections = (self._qkv.op(rows, self._width), self._output.op(rows, self._width))
        return (*projections, *feed_forward, norms)

    def phase_ops(self, tokens: StepTokens) -> tuple[list[Op], list[Op]]:
        """Return the ops before each of the layer's two sums over ranks.

        All of `ops`: attention with its projections, and the feed-forward block, each with its
        norm. In a sum ranks wait for the slowest, so that each half lasts as long as on that one.
        """
        rows = self.rows(tokens)
        feed_forward, activated = self._feed_forward(tokens, rows)
        norm = self._normed(tokens, rows) * 4 * self._spec.hidden_size
        last = self._launches // 2
        attention = [self._qkv.op(rows, self._width), self._output.op(rows, self._width)]
        attention += self.attention_ops(tokens)
        attention.append(self._norms(norm + self._rotated(rows), self._launches - last))
        return attention, [*feed_forward, self._norms(norm + 3 * activated, last)]

    def _norms(self, values: float, launches: int) -> Op:
        return Op("norms", "elementwise", 0, values * self._width, launches, self._spec.dtype)

    def _rotated(self, rows: float) -> float:
        """Return the values that rotary embedding and the write of keys and values pass over."""
        return rows * 3 * (self._queries + 2 * self._kv_heads) * self._layer.attention.head_dim

    def _feed_forward(self, tokens: StepTokens, rows: float) -> tuple[list[Op], float]:
        """Return the products of the feed-forward block, and the values that it activates."""
        ops: list[Op] = []
        activated = 0.0
        if self._mlp is not None:
            taken = rows if self._mlp_of_own else tokens.total
            ops.append(self._mlp.op(taken, self._width))
            activated += taken * self._columns
        if self._experts is not None:
            pairs, expert_op = self._expert_op(self._experts, tokens.total)
            ops += [self._router_op(tokens.total, pairs), expert_op]
            activated += pairs * self._expert_columns
        return ops, activated

    def _attended(self, tokens: StepTokens) -> tuple[float, float]:
        """Return the sequences and the prompt tokens that the fullest rank attends for.

        Under attention DP a sequence is on one rank, so that fewer sequences than ranks, or fewer
        prompts in a step, leave some idle.
        """
        ranks = self._attention_ranks
        if ranks == 1:
            return tokens.decode, tokens.prefill
        decode = max(tokens.decode / ranks, min(1.0, tokens.decode))
        prompts = max(1.0, tokens.prompts, tokens.sequences)
        return decode, tokens.prefill / min(ranks, prompts)

    def attention_ops(self, tokens: StepTokens) -> list[Op]:
        """Return the ops of attention, which depend on contexts too."""
        spec, heads = self._spec, self._layer.attention
        kv_width = BITS[spec.kv_dtype] / 8
        head_values = heads.head_dim + heads.value_head_dim
        expanded_flops = 2 * self._queries * head_values
        if heads.kind == "mla":
            assert heads.kv_lora_rank is not None
            assert heads.rope_head_dim is not None
            # Decode attends in the latent space: keys are latent and rotary, values the latent.
            # Prefill expands the latent to keys and values of its heads.
            key_width = heads.kv_lora_rank + heads.rope_head_dim
            decode_flops = 2 * self._queries * (key_width + heads.kv_lora_rank)
            token_bytes = key_width * kv_width
        else:
            decode_flops = expanded_flops
            token_bytes = self._kv_heads * head_values * kv_width
        ops: list[Op] = []
        decode, prompt = self._attended(tokens)
        window = heads.sliding_window or float("inf")
        if decode:
            # Under context parallelism every rank attends to its part of each context.
            pairs = decode * min(tokens.decode_context, window) / self._cp
            name: OpKind = "attention decode"
            # Split over the context, then merged.
            ops.append(Op(name, name, pairs * decode_flops, pairs * token_bytes, 2, spec.dtype))
            if self._expands_by_heads:
                ops.append(self._latent_queries(decode))
        if prompt:
            context = min(tokens.prefill_context, window)
            moved = prompt * self._queries * head_values * self._width
            read = (2 * context + prompt) * token_bytes
            flops = prompt * context * expanded_flops
            padding = 0.0
            if self._tile_keys:
                reach = min(
                    tokens.prefill_context + prompt / (2 * max(1.0, tokens.prompts)), window
                )
                # FlashAttention wants values as wide as keys.
                pair_flops = 4 * heads.head_dim if self._expands_by_heads else 2 * head_values
                taken = prefill_flops(
                    prompt, context, reach, self._queries, pair_flops, self._tile_keys
                )
                padding = taken - flops
            name = "attention prefill"
            ops.append(Op(name, name, flops, moved + read, 1, spec.dtype, padding))
            ops += self._expansion_ops(prompt, tokens)
        return ops

    def ring_op(self, tokens: StepTokens) -> Op:
        """Return what prompts take more where a context's parts are attended to one by one.

        A launch for each part, and what it found, in float32, written and then read by the merge.
        """
        values = self._attended(tokens)[1] * self._queries * (self._layer.attention.head_dim + 1)
        moved = 2 * 4 * self._cp * values
        return Op("merge", "elementwise", 0, moved, self._cp, self._spec.dtype)

    def _latent_queries(self, rows: float) -> Op:
        """Return both parts of the queries copied side by side, and what was found in order."""
        heads = self._layer.attention
        assert heads.kv_lora_rank is not None
        assert heads.rope_head_dim is not None
        width = heads.kv_lora_rank + heads.rope_head_dim + heads.value_head_dim
        values = 2 * rows * self._queries * width
        return Op("latent copies", "elementwise", 0, values * self._width, 3, self._spec.dtype)

    def _expansion_ops(self, prompt: float, tokens: StepTokens) -> list[Op]:
        """Return the expansion of latents of earlier chunks and of other ranks of a context group.

        Those of the rank's own tokens are in the output projection.
        """
        if self._expansion is None:
            return []
        prompts = max(1.0, tokens.prompts / self._attention_ranks)
        reach = prompts * tokens.prefill_context + prompt * self._cp / 2
        others = reach - prompt
        ops = [self._expansion.op(others, self._width)] if others > 0.5 else []
        if self._expands_by_heads:
            size, launches = latent_prefill(
                self._layer.attention, self._queries, prompt, prompts, reach / prompts, self._width
            )
            name = "latent copies"
            ops.append(Op(name, "elementwise", 0, size, launches, self._spec.dtype))
        return ops

    def _router_op(self, tokens: float, pairs: float) -> Op:
        """Return logits, top-k, sorting tokens by expert, and the weighted sum of the results.

        Args:
            tokens: That are routed.
            pairs: Of them and experts of this rank: as many rows are summed.
        """
        spec, block = self._spec, self._layer.feed_forward
        size = block.num_experts * spec.hidden_size
        moved = (tokens + pairs) * spec.hidden_size * self._width
        weights = size * BITS[spec.weight_dtypes.other] / 8
        return Op("router", "elementwise", 2 * tokens * size, weights + moved, 4, spec.dtype)

    def _expert_op(self, experts: "_Product", tokens: float) -> tuple[float, Op]:
        """Return the (token, expert) pairs of the fullest rank and their grouped product."""
        block = self._layer.feed_forward
        share = expert_imbalance(self._ep) / self._ep
        touched = share * expected_experts(block.num_experts, block.experts_per_token, tokens)
        touched = min(self._local_experts, touched)
        pairs = tokens * min(self._local_experts, block.experts_per_token * share)
        held = self._local_experts
        op = Op(
            experts.name,
            "moe",
            pairs * experts.flops_per_row / held,
            touched * experts.weight_bytes / held
            + pairs * experts.values_per_row / held * self._width,
            experts.launches,
            experts.dtype,
        )
        return pairs, op


def embedding_op(spec: ModelSpec, tokens: StepTokens) -> Op:
    """Return the look-up of the first stage: a row read and written for each token."""
    size = 2 * tokens.total * spec.hidden_size * BITS[spec.weight_dtypes.embedding] / 8
    return Op("embedding", "elementwise", 0, size, 1, spec.dtype)


def logits_op(
    spec: ModelSpec,
    tokens: StepTokens,
    *,
    tp: int,
    tp_rank: int = 0,
    shares: Shares | None = None,
) -> Op:
    """Return the final norm and head of the last stage, for tokens that are sampled from."""
    head = head_tensor(spec, tp=tp, tp_rank=tp_rank, shares=shares)
    weights = tensor_bytes(head, spec.weight_dtypes)
    sampled = tokens.decode + tokens.prompts
    # Logits are written once in the model's format and read twice in float32 by the sampler.
    traffic = weights + sampled * head.rows * (BITS[spec.dtype] / 8 + 12)
    return Op("logits", "gemm", 2 * sampled * head.size, traffic, 3, spec.dtype)


@dataclass(frozen=True, slots=True)
class _Product:
    """Matrix products with fixed weights: what a row of input adds to FLOPs and bytes."""

    name: str
    flops_per_row: float
    weight_bytes: float
    values_per_row: float
    launches: int
    dtype: Dtype

    def op(self, rows: float, width: float) -> Op:
        moved = self.weight_bytes + rows * self.values_per_row * width
        padding = PRODUCT_ROWS * self.flops_per_row
        flops = rows * self.flops_per_row
        kind: OpKind = "gemm" if rows > 1 else "vector"
        return Op(self.name, kind, flops, moved, self.launches, self.dtype, padding)


def _product(
    spec: ModelSpec, name: str, tensors: Iterable[Tensor], names: tuple[str, ...], launches: int
) -> _Product:
    """Return the matrix products with the tensors in `names`, inputs and outputs included."""
    chosen = [tensor for tensor in tensors if tensor.name in names]
    stored = (
        spec.weight_dtypes.attention if "projection" in name else spec.weight_dtypes.feed_forward
    )
    return _Product(
        name,
        2 * sum(tensor.size for tensor in chosen),
        sum(tensor_bytes(tensor, spec.weight_dtypes) for tensor in chosen),
        sum(tensor.copies * (tensor.rows + tensor.columns) for tensor in chosen),
        launches,
        # Those that have no arithmetic of their own are widened on the way in (`ops.Rates`).
        stored if stored in ("float8", "mxfp4", "int4") else spec.dtype,
    )
