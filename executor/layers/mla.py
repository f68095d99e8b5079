"""Latent attention (MLA) with this rank's heads, over latents that every rank holds whole.

Shape letters: T tokens, D hidden, H heads of this rank, E columns of a head before its rotary ones,
R rotary columns, V value columns, L width of the latent, K context tokens.
Decode takes queries and outputs through the halves of `kv_b_proj`, so that the latents are attended
to as they are; prefill expands them into keys and values, which takes fewer operations when many
queries meet them (arXiv 2405.04434, section 2.1). Under context parallelism ranks exchange latents,
and each expands what it got for its own heads.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch.nn.functional import pad

from rankwright.cost_model.model_spec import Attention, Rope
from rankwright.executor.forward_context import ForwardContext, GatheredPrompts
from rankwright.executor.kv_cache import LayerCache
from rankwright.executor.layers.linear import ColumnParallelLinear, Part, RowParallelLinear
from rankwright.executor.mesh import Mesh
from rankwright.executor.weights import WeightSource
from rankwright.kernels.attention_plain import attend_sdpa
from rankwright.kernels.merge_attention import merge_attention
from rankwright.kernels.mla_attention import mla_decode_attention
from rankwright.kernels.mla_rotary import mla_rotary_and_cache
from rankwright.kernels.part_attention import part_attention
from rankwright.kernels.prefill_attention import prefill_attention
from rankwright.kernels.rms_norm import rms_norm

# Of the norms inside the attention: DeepSeek's code leaves it at its class's default.
EPS = 1e-6


class LatentAttention:
    """Project to queries and a latent, rotate, cache, attend, project."""

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        attention: Attention,
        rope: Rope,
        cache: LayerCache,
        *,
        prefix: str,
        hidden_size: int,
        reduce: bool = True,
    ) -> None:
        assert attention.kv_lora_rank is not None
        assert attention.rope_head_dim is not None
        first, last = mesh.place.query_heads
        self._mesh = mesh
        self._cache = cache.keys
        self._num_heads = last - first
        self._latent, self._rotary = attention.kv_lora_rank, attention.rope_head_dim
        self._head_dim = attention.head_dim
        self._value_dim = attention.value_head_dim
        self._scale = attention.head_dim**-0.5 * score_magnitude(rope.scaling) ** 2
        before = self._head_dim - self._rotary
        columns = self._latent + self._rotary
        # `a`: what is whole on every rank; with a query latent, both latents in one product.
        parts = [Part(f"{prefix}.kv_a_proj_with_mqa", columns, (0, columns))]
        query_rank = attention.q_lora_rank
        self._query_rank = query_rank or 0
        if query_rank is not None:
            parts.insert(0, Part(f"{prefix}.q_a_proj", query_rank, (0, query_rank)))
            self._q_a_norm = source.shard(f"{prefix}.q_a_layernorm.weight", (query_rank,))
        self._a = ColumnParallelLinear(source, tuple(parts), hidden_size, bias=attention.qkv_bias)
        self._q = ColumnParallelLinear(
            source,
            (
                Part(
                    f"{prefix}.q_proj" if query_rank is None else f"{prefix}.q_b_proj",
                    attention.num_heads * self._head_dim,
                    (first * self._head_dim, last * self._head_dim),
                ),
            ),
            query_rank or hidden_size,
            bias=False,
        )
        if rope.interleaved:
            self._untwist_rotary_rows()
        self._kv_a_norm = source.shard(f"{prefix}.kv_a_layernorm.weight", (self._latent,))
        rows = before + self._value_dim
        kv_b = source.shard(
            f"{prefix}.kv_b_proj.weight",
            (attention.num_heads * rows, self._latent),
            (first * rows, last * rows),
        ).view(self._num_heads, rows, self._latent)
        self._keys_HEL, self._values_HVL = kv_b[:, :before], kv_b[:, before:]
        self._output = RowParallelLinear(
            source,
            mesh,
            f"{prefix}.o_proj",
            (hidden_size, attention.num_heads * self._value_dim),
            (first * self._value_dim, last * self._value_dim),
            bias=attention.output_bias,
            reduce=reduce,
        )

    def _untwist_rotary_rows(self) -> None:
        """Move pairs (0, 1), (2, 3), ... to (0, R / 2), (1, R / 2 + 1), ..., as kernels take them.

        Queries and keys are permuted alike, so that their products stay what they were.
        """
        order = torch.arange(self._rotary).view(-1, 2).T.flatten()
        heads = self._q.weight_CD.view(self._num_heads, self._head_dim, -1)
        order = order.to(heads.device)
        heads[:, -self._rotary :] = heads[:, -self._rotary :][:, order]
        self._a.weight_CD[-self._rotary :] = self._a.weight_CD[-self._rotary :][order]
        if self._a.bias_C is not None:
            self._a.bias_C[-self._rotary :] = self._a.bias_C[-self._rotary :][order]

    def __call__(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Return [T, D]; writes the latents and rotary keys of the T tokens to the cache.

        Without `reduce`, it is this rank's part of the sum over the TP group.
        """
        a_TC = self._a(x_TD)
        kv_TC = a_TC[:, self._query_rank :]
        if self._query_rank:
            x_TD = rms_norm(a_TC[:, : self._query_rank], self._q_a_norm, EPS)
        q_THE = self._q(x_TD).view(len(x_TD), self._num_heads, self._head_dim)
        mla_rotary_and_cache(
            q_THE,
            kv_TC,
            self._kv_a_norm,
            context.cos_sin_PD,
            context.positions_T,
            context.slots_T,
            self._cache,
            EPS,
        )
        decodes, outputs = context.num_decodes, list[torch.Tensor]()
        if decodes:
            outputs.append(self._decode(q_THE[:decodes], context))
        if context.num_padding:
            outputs.append(q_THE.new_zeros(context.num_padding, self._num_heads, self._value_dim))
        if len(context.prefill_context_lens):
            outputs.append(self._prefill(q_THE[decodes:], context))
        is_ring = self._mesh.split.cp_exchange == "ring"
        attend = self._attend_round if is_ring else self._attend_gathered
        for prompts in context.gathers:
            outputs.append(attend(q_THE[prompts.rows], prompts))
        out_THV = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self._output(out_THV.flatten(1))

    def _decode(self, q_THE: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        before = self._head_dim - self._rotary
        absorbed_THC = q_THE.new_empty(*q_THE.shape[:2], self._latent + self._rotary)
        absorbed_THC[..., : self._latent] = torch.bmm(
            q_THE[..., :before].transpose(0, 1), self._keys_HEL
        ).transpose(0, 1)
        absorbed_THC[..., self._latent :] = q_THE[..., before:]
        lens_T, _ = context.seen_here(None)
        lse_TH = None
        if context.parts.cp > 1:
            lse_TH = torch.empty(q_THE.shape[:2], dtype=torch.float32, device=q_THE.device)
        found_THL = mla_decode_attention(
            absorbed_THC,
            self._cache,
            context.block_tables_SN[: len(q_THE)],
            lens_T,
            self._scale,
            self._latent,
            lse_BH=lse_TH,
        )
        if lse_TH is not None:
            part_THE = torch.cat([found_THL.float(), lse_TH.unsqueeze(-1)], dim=-1)
            found_THL = merge_attention(self._mesh.gather_context(part_THE), q_THE.dtype)
        return torch.bmm(found_THL.transpose(0, 1), self._values_HVL.transpose(1, 2)).transpose(
            0, 1
        )

    def _prefill(self, q_THE: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        tables = context.block_tables_SN[context.num_decodes :]
        starts, lens = context.prefill_query_starts, context.prefill_context_lens
        block_tokens = self._cache.shape[2]
        out_THV = q_THE.new_empty(*q_THE.shape[:2], self._value_dim)
        for b, length in enumerate(lens):
            start, stop = starts[b], starts[b + 1]
            if start == stop:
                continue
            blocks = tables[b, : -(-length // block_tokens)].long()
            c_KC = self._cache[blocks, 0].flatten(0, 1)[:length]
            # So many heads at a time that a long context's keys and values take no more memory
            # than half of what this step's own tokens would have, or one head's.
            step = max(1, self._num_heads * len(q_THE) // (2 * length))
            for head in range(0, self._num_heads, step):
                some = slice(head, head + step)
                out_THV[start:stop, some] = self._expanded(q_THE[start:stop, some], c_KC, some)
        return out_THV

    def _attend_gathered(self, q_THE: torch.Tensor, prompts: GatheredPrompts) -> torch.Tensor:
        """Return the attention of this rank's tokens of some prompts over their whole contexts."""
        gathered_NBC = self._mesh.gather_context(self._cache[prompts.blocks_M, 0]).flatten(0, 1)
        out_THV = q_THE.new_empty(*q_THE.shape[:2], self._value_dim)
        for some, keys, values in self._pools(gathered_NBC, len(q_THE)):
            out_THV[:, some] = prefill_attention(
                q_THE[:, some],
                keys,
                values,
                prompts.block_tables_PN,
                prompts.query_starts,
                prompts.context_lens,
                self._scale,
            )[..., : self._value_dim]
        return out_THV

    def _attend_round(self, q_THE: torch.Tensor, prompts: GatheredPrompts) -> torch.Tensor:
        """Return the same, of one rank's part of the contexts after the other."""
        size, width = self._mesh.cp.size, self._value_dim
        parts_CTHV = torch.empty(
            (size, *q_THE.shape[:2], width + 1), dtype=torch.float32, device=q_THE.device
        )
        for part, latents_NBC in self._mesh.pass_round(self._cache[prompts.blocks_M, 0]):
            for some, keys, values in self._pools(latents_NBC, len(q_THE)):
                q_THF = q_THE[:, some]
                found_THF = parts_CTHV.new_empty(*q_THF.shape[:2], self._head_dim + 1)
                part_attention(
                    q_THF,
                    keys,
                    values,
                    prompts.part_tables_PN,
                    prompts.query_starts,
                    prompts.context_lens,
                    self._scale,
                    found_THF,
                    part=part,
                    parts=size,
                )
                parts_CTHV[part, :, some, :width] = found_THF[..., :width]
                parts_CTHV[part, :, some, width] = found_THF[..., -1]
        return merge_attention(parts_CTHV, q_THE.dtype)

    def _pools(
        self, c_NBC: torch.Tensor, num_queries: int
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Yield some heads with their keys and values of blocks of latents, [N, H, B, E] each.

        So many heads at a time as `_prefill` takes; none for no queries.
        """
        num_blocks, block_tokens = c_NBC.shape[:2]
        c_NBL, rotary_NBR = c_NBC[..., : self._latent], c_NBC[..., self._latent :]
        before = self._head_dim - self._rotary
        step = max(1, self._num_heads * num_queries // (2 * num_blocks * block_tokens))
        for head in range(0, self._num_heads if num_queries else 0, step):
            some = slice(head, head + step)
            count = len(self._keys_HEL[some])
            shape = (num_blocks, block_tokens, count, self._head_dim)
            keys_NBHE, values_NBHE = c_NBC.new_empty(shape), c_NBC.new_zeros(shape)
            keys_NBHE[..., :before] = self._up(c_NBL, self._keys_HEL[some])
            keys_NBHE[..., before:] = rotary_NBR.unsqueeze(2)
            # Kernels want values as wide as keys.
            values_NBHE[..., : self._value_dim] = self._up(c_NBL, self._values_HVL[some])
            yield some, keys_NBHE.transpose(1, 2), values_NBHE.transpose(1, 2)

    @staticmethod
    def _up(c_NBL: torch.Tensor, weight_HEL: torch.Tensor) -> torch.Tensor:
        """Return the latents times each head's matrix, [N, B, H, E], by one product."""
        return (c_NBL @ weight_HEL.flatten(0, 1).T).unflatten(2, weight_HEL.shape[:2])

    def _expanded(self, q_QHE: torch.Tensor, c_KC: torch.Tensor, heads: slice) -> torch.Tensor:
        """Return the attention [Q, H, V] of some heads over one sequence's expanded latents."""
        c_KL, rotary_KR = c_KC[:, : self._latent], c_KC[:, self._latent :]
        keys_HKE = c_KL @ self._keys_HEL[heads].transpose(1, 2)
        keys_HKE = torch.cat([keys_HKE, rotary_KR.expand(len(keys_HKE), -1, -1)], dim=-1)
        values_HKV = c_KL @ self._values_HVL[heads].transpose(1, 2)
        # FlashAttention wants values as wide as keys.
        values_HKV = pad(values_HKV, (0, self._head_dim - self._value_dim))
        out_HQE = attend_sdpa(q_QHE.transpose(0, 1), keys_HKE, values_HKV, self._scale, None)
        return out_HQE[..., : self._value_dim].transpose(0, 1)


def score_magnitude(scaling: Mapping[str, object] | None) -> float:
    """Return what YaRN multiplies queries and keys with, in DeepSeek's form of it.

    Source: `yarn_get_mscale` of DeepSeek-V2's published code; arXiv 2309.00071, section 3.4.

    >>> score_magnitude(None)
    1.0
    """
    if scaling is None or scaling.get("rope_type") != "yarn":
        return 1.0
    factor, weight = scaling["factor"], scaling.get("mscale_all_dim") or 0
    assert isinstance(factor, int | float)
    assert isinstance(weight, int | float)
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
