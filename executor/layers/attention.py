"""Attention over the paged cache, with this rank's heads.

Shape letters: T tokens, D hidden, H query heads and K key-value heads of this rank.
"""

import torch

from rankwright.cost_model.model_spec import Attention
from rankwright.executor.forward_context import ForwardContext
from rankwright.executor.kv_cache import LayerCache
from rankwright.executor.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from rankwright.executor.mesh import Mesh
from rankwright.executor.weights import WeightSource
from rankwright.kernels.decode_attention import decode_attention
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
        decodes, outputs = context.num_decodes, []
        keys, values = self._cache.keys, self._cache.values
        if decodes:
            outputs.append(
                decode_attention(
                    q_THD[:decodes],
                    keys,
                    values,
                    context.block_tables_SN[:decodes],
                    context.context_lens_S[:decodes],
                    self._scale,
                    window=self._window,
                    sinks_H=self._sinks_H,
                    group=self._group,
                    head_offset=self._head_offset,
                )
            )
        if len(context.prefill_context_lens):
            outputs.append(
                prefill_attention(
                    q_THD[decodes:],
                    keys,
                    values,
                    context.block_tables_SN[decodes:],
                    context.prefill_query_starts,
                    context.prefill_context_lens,
                    self._scale,
                    window=self._window,
                    sinks_H=self._sinks_H,
                    group=self._group,
                    head_offset=self._head_offset,
                )
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
