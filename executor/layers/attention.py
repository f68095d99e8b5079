"""Attention over the paged cache, with this rank's heads.

Shape letters: T tokens, D hidden, H query heads and K key-value heads of this rank.
"""

import torch

from rankwright.cost_model.model_spec import Attention
from rankwright.executor.forward_context import ForwardContext, GatheredPrompts
from rankwright.executor.kv_cache import LayerCache
from rankwright.executor.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from rankwright.executor.mesh import Mesh
from rankwright.executor.weights import WeightSource
from rankwright.kernels.decode_attention import decode_attention
from rankwright.kernels.merge_attention import merge_attention
from rankwright.kernels.part_attention import part_attention
from rankwright.kernels.prefill_attention import prefill_attention
from rankwright.kernels.rotary import rotary_and_cache


class PagedAttention:
    """Multi-head, grouped-query or multi-query attention: project, rotate, cache, attend, project.

    Key and value heads are replicated where there are fewer than ranks; the plan's head ranges say
    who holds what.
    """

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        attention: Attention,
        cache: LayerCache,
        *,
        prefix: str,
        hidden_size: int,
        norm_eps: float,
        reduce: bool = True,
    ) -> None:
        dim = attention.head_dim
        first_q, last_q = mesh.place.query_heads
        first_kv, last_kv = mesh.place.kv_heads
        query, key_value = (first_q * dim, last_q * dim), (first_kv * dim, last_kv * dim)
        self._mesh = mesh
        self._cache = cache
        self._num_heads = last_q - first_q
        self._num_kv_heads = last_kv - first_kv
        # Ranks that share the heads unevenly hold parts of groups.
        self._group = attention.num_heads // attention.num_kv_heads
        self._head_offset = first_q - first_kv * self._group
        self._head_dim = dim
        self._scale = dim**-0.5
        self._window = attention.sliding_window
        self._eps = norm_eps
        whole_q, whole_kv = attention.num_heads * dim, attention.num_kv_heads * dim
        self._qkv = ColumnParallelLinear(
            source,
            (
                Part(f"{prefix}.q_proj", whole_q, query),
                Part(f"{prefix}.k_proj", whole_kv, key_value),
                Part(f"{prefix}.v_proj", whole_kv, key_value),
            ),
            hidden_size,
            bias=attention.qkv_bias,
        )
        self._q_norm_D = self._k_norm_D = None
        if attention.qk_norm:
            self._q_norm_D = source.shard(f"{prefix}.q_norm.weight", (dim,))
            self._k_norm_D = source.shard(f"{prefix}.k_norm.weight", (dim,))
        self._sinks_H = None
        if attention.sinks:
            self._sinks_H = source.shard(
                f"{prefix}.sinks", (attention.num_heads,), (first_q, last_q)
            )
        self._output = RowParallelLinear(
            source,
            mesh,
            f"{prefix}.o_proj",
            (hidden_size, whole_q),
            query,
            bias=attention.output_bias,
            reduce=reduce,
        )
        self._qkv.next_weight = self._output.weight_DC

    @property
    def first_weight(self) -> torch.Tensor:
        """What its input is multiplied with."""
        return self._qkv.weight_CD

    def goes_before(self, next_weight: torch.Tensor) -> None:
        """Say what is multiplied with after it."""
        self._output.next_weight = next_weight

    def __call__(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Return [T, D]; writes the keys and values of the T tokens to the cache.

        Without `reduce`, it is this rank's part of the sum over the TP group.
        """
        q_THD = rotary_and_cache(
            self._qkv(x_TD),
            context.cos_sin_PD,
            context.positions_T,
            context.slots_T,
            self._cache.keys,
            self._cache.values,
            self._num_heads,
            self._num_kv_heads,
            self._head_dim,
            q_norm_D=self._q_norm_D,
            k_norm_D=self._k_norm_D,
            eps=self._eps,
        )
        return self._output(self._attend(q_THD, context).flatten(1))

    def _attend(self, q_THD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        decodes, outputs = context.num_decodes, list[torch.Tensor]()
        if decodes:
            outputs.append(self._decode(q_THD[:decodes], context))
        if context.num_padding:
            outputs.append(q_THD.new_zeros(context.num_padding, *q_THD.shape[1:]))
        if len(context.prefill_context_lens):
            outputs.append(
                self._prefill(
                    q_THD[decodes:],
                    self._cache,
                    context.block_tables_SN[decodes:],
                    context.prefill_query_starts,
                    context.prefill_context_lens,
                )
            )
        is_ring = self._mesh.split.cp_exchange == "ring"
        attend = self._attend_round if is_ring else self._attend_gathered
        for prompts in context.gathers:
            outputs.append(attend(q_THD[prompts.rows], prompts))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _decode(self, q_BHD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Return the attention of one token a sequence; over all parts of its context."""
        lens_B, windows_B = context.seen_here(self._window)
        is_cut = context.parts.cp > 1
        lse_BH = None
        if is_cut:
            lse_BH = torch.empty(q_BHD.shape[:2], dtype=torch.float32, device=q_BHD.device)
        out_BHD = decode_attention(
            q_BHD,
            self._cache.keys,
            self._cache.values,
            context.block_tables_SN[: len(q_BHD)],
            lens_B,
            self._scale,
            window=None if is_cut else self._window,
            windows_B=windows_B,
            sinks_H=None if is_cut else self._sinks_H,
            group=self._group,
            head_offset=self._head_offset,
            lse_BH=lse_BH,
        )
        if lse_BH is None:
            return out_BHD
        part_BHE = torch.cat([out_BHD.float(), lse_BH.unsqueeze(-1)], dim=-1)
        parts_CBHE = self._mesh.gather_context(part_BHE)
        if self._sinks_H is not None:
            sink_BHE = torch.empty_like(part_BHE)
            self._fill_with_sinks(sink_BHE)
            parts_CBHE = torch.cat([parts_CBHE, sink_BHE.unsqueeze(0)])
        return merge_attention(parts_CBHE, q_BHD.dtype)

    def _prefill(
        self,
        q_THD: torch.Tensor,
        cache: LayerCache,
        block_tables_BN: torch.Tensor,
        query_starts: list[int],
        context_lens: list[int],
    ) -> torch.Tensor:
        return prefill_attention(
            q_THD,
            cache.keys,
            cache.values,
            block_tables_BN,
            query_starts,
            context_lens,
            self._scale,
            window=self._window,
            sinks_H=self._sinks_H,
            group=self._group,
            head_offset=self._head_offset,
        )

    def _attend_gathered(self, q_THD: torch.Tensor, prompts: GatheredPrompts) -> torch.Tensor:
        """Return the attention of this rank's tokens of some prompts over their whole contexts."""
        keys, values = (
            self._mesh.gather_context(pool[prompts.blocks_M]).flatten(0, 1)
            for pool in (self._cache.keys, self._cache.values)
        )
        return self._prefill(
            q_THD,
            LayerCache(keys, values),
            prompts.block_tables_PN,
            prompts.query_starts,
            prompts.context_lens,
        )

    def _attend_round(self, q_THD: torch.Tensor, prompts: GatheredPrompts) -> torch.Tensor:
        """Return the same, of one rank's part of the contexts after the other."""
        own = torch.stack(
            [pool[prompts.blocks_M] for pool in (self._cache.keys, self._cache.values)]
        )
        size = self._mesh.cp.size
        has_sinks = self._sinks_H is not None
        shape = (size + has_sinks, *q_THD.shape[:2], self._head_dim + 1)
        parts_CTHE = torch.empty(shape, dtype=torch.float32, device=q_THD.device)
        for part, (keys, values) in self._mesh.pass_round(own):
            part_attention(
                q_THD,
                keys,
                values,
                prompts.part_tables_PN,
                prompts.query_starts,
                prompts.context_lens,
                self._scale,
                parts_CTHE[part],
                part=part,
                parts=size,
                window=self._window,
                group=self._group,
                head_offset=self._head_offset,
            )
        if self._sinks_H is not None:
            self._fill_with_sinks(parts_CTHE[size])
        return merge_attention(parts_CTHE, q_THD.dtype)

    def _fill_with_sinks(self, part_THE: torch.Tensor) -> None:
        """Make a part without values, whose only score is the sink."""
        assert self._sinks_H is not None
        part_THE.zero_()
        part_THE[..., -1] = self._sinks_H
