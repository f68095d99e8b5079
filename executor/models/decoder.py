"""`DecoderStage`: the layers of one pipeline stage, for every decoder family.

What differs between families (biases, head norms, windows, rotary scaling) is in `ModelSpec`; where
their tensors are is in `TensorNames`.
Shape letters: T tokens, R rows to sample, D hidden.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.executor.expert_slots import LayerSlots, Matrices
from rankwright.executor.forward_context import ForwardContext
from rankwright.executor.kv_cache import LayerCache
from rankwright.executor.layers.attention import PagedAttention
from rankwright.executor.layers.embedding import VocabularyEmbedding, VocabularyHead
from rankwright.executor.layers.feed_forward import GatedMlp
from rankwright.executor.layers.mla import LatentAttention
from rankwright.executor.layers.moe import MoeBlock
from rankwright.executor.mesh import Mesh
from rankwright.executor.models.names import TensorNames
from rankwright.executor.weights import WeightSource
from rankwright.kernels.rms_norm import rms_norm

# Blocks whose weights are the same for all tokens.
_PLAIN = PagedAttention | GatedMlp


class DecoderLayer:
    """Norm, attention, norm, feed-forward, around a residual stream that is updated in place."""

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        names: TensorNames,
        spec: ModelSpec,
        layer: Layer,
        index: int,
        cache: LayerCache,
    ) -> None:
        hidden = spec.hidden_size
        self._mesh = mesh
        self._eps = spec.norm_eps
        self.attention_norm_D = source.shard(names.attention_norm.format(layer=index), (hidden,))
        self.feed_forward_norm_D = source.shard(
            names.feed_forward_norm.format(layer=index), (hidden,)
        )
        self.attention = _attention(source, mesh, names, spec, layer, index, cache)
        self.feed_forward = _feed_forward(source, mesh, names, spec, layer, index)

    def __call__(
        self, x_TD: torch.Tensor | None, residual_TD: torch.Tensor, context: ForwardContext
    ) -> torch.Tensor:
        """Return this rank's part of what is to be added to `residual_TD`.

        Blocks return parts of a sum over the TP group, so that summing, adding and normalising can
        be one kernel; with attention DP they return all that is to be added to this rank's tokens.
        `x_TD` is what the layer before returned.
        """
        mesh, is_whole = self._mesh, self._mesh.attention_ranks > 1
        norm_D, eps = self.attention_norm_D, self._eps
        if x_TD is None:
            x_TD = rms_norm(residual_TD, norm_D, eps)
        else:
            x_TD = mesh.add_norm(x_TD, norm_D, eps, residual_TD, is_whole=is_whole)
        x_TD = self.attention(x_TD, context)
        norm_D = self.feed_forward_norm_D
        x_TD = mesh.add_norm(x_TD, norm_D, eps, residual_TD, is_whole=is_whole)
        if isinstance(self.feed_forward, MoeBlock):
            return self.feed_forward(x_TD, context)
        if is_whole:
            return mesh.sum_tokens(self.feed_forward(mesh.gather_tokens(x_TD)))
        return self.feed_forward(x_TD)


def _attention(
    source: WeightSource,
    mesh: Mesh,
    names: TensorNames,
    spec: ModelSpec,
    layer: Layer,
    index: int,
    cache: LayerCache,
) -> PagedAttention | LatentAttention:
    prefix = names.attention.format(layer=index)
    if layer.attention.kind == "mla":
        return LatentAttention(
            source,
            mesh,
            layer.attention,
            spec.rope,
            cache,
            prefix=prefix,
            hidden_size=spec.hidden_size,
            reduce=False,
        )
    return PagedAttention(
        source,
        mesh,
        layer.attention,
        cache,
        prefix=prefix,
        hidden_size=spec.hidden_size,
        norm_eps=spec.norm_eps,
        reduce=False,
    )


def _feed_forward(
    source: WeightSource,
    mesh: Mesh,
    names: TensorNames,
    spec: ModelSpec,
    layer: Layer,
    index: int,
) -> GatedMlp | MoeBlock:
    block = layer.feed_forward
    if block.kind == "moe":
        assert names.experts is not None, f"{spec.name}: a family without names for its experts"
        slots = None
        if mesh.expert_slots is not None:
            before = sum(other.feed_forward.kind == "moe" for other in spec.layers[:index])
            slots = mesh.expert_slots.layers[before]
        return MoeBlock(
            source,
            mesh,
            block,
            names.experts,
            layer=index,
            hidden_size=spec.hidden_size,
            slots=slots,
        )
    return GatedMlp(
        source,
        mesh,
        prefix=names.feed_forward.format(layer=index),
        hidden_size=spec.hidden_size,
        intermediate_size=block.intermediate_size,
        bias=block.bias,
        reduce=False,
    )


class DecoderStage:
    """Embedding (first stage), some layers, final norm and head (last stage)."""

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        names: TensorNames,
        spec: ModelSpec,
        caches: list[LayerCache],
        *,
        on_layer: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Load this rank's shard of the stage; `on_layer` is called as each layer is loaded."""
        self._mesh = mesh
        self._eps = spec.norm_eps
        shape = (spec.vocab_size, spec.hidden_size)
        vocabulary = mesh.place.vocab
        self.embedding: VocabularyEmbedding | None = None
        self.head: VocabularyHead | None = None
        if mesh.is_first_stage:
            self.embedding = VocabularyEmbedding(
                mesh, source.shard(names.embedding, shape, vocabulary)
            )
        first, last = mesh.place.layers
        self.layers: list[DecoderLayer] = []
        for index, cache in zip(range(first, last), caches, strict=True):
            self.layers.append(
                DecoderLayer(source, mesh, names, spec, spec.layers[index], index, cache)
            )
            on_layer(index)
        if mesh.is_last_stage:
            self.final_norm_D = source.shard(names.final_norm, (spec.hidden_size,))
            if not spec.tie_embeddings:
                weight_VD = source.shard(names.head, shape, vocabulary)
            elif self.embedding is not None:
                weight_VD = self.embedding.weight_VD
            else:
                weight_VD = source.shard(names.embedding, shape, vocabulary)
            self.head = VocabularyHead(mesh, weight_VD)
        self._name_what_follows()

    def _name_what_follows(self) -> None:
        """Tell each block which weights come after its own, where that does not hang on tokens."""
        blocks = [part for layer in self.layers for part in (layer.attention, layer.feed_forward)]
        for block, after in pairwise(blocks):
            if isinstance(block, _PLAIN) and isinstance(after, _PLAIN):
                block.goes_before(after.first_weight)
        if self.head is not None and isinstance(blocks[-1], _PLAIN):
            blocks[-1].goes_before(self.head.weight_VD)

    def forward(
        self, ids_T: torch.Tensor, hidden_TD: torch.Tensor | None, context: ForwardContext
    ) -> torch.Tensor:
        """Run the stage.

        Args:
            ids_T: Token ids, used on the first stage.
            hidden_TD: What the previous stage returned; None on the first. Overwritten.
            context: Positions, slots and lengths.

        Returns:
            [T, D]: the residual stream for the next stage, or, on the last, after the final norm.
        """
        self._mesh.begin_step()
        if self.embedding is not None:
            hidden_TD = self.embedding(ids_T)
        assert hidden_TD is not None
        residual_TD = hidden_TD
        x_TD: torch.Tensor | None = None
        for layer in self.layers:
            x_TD = layer(x_TD, residual_TD, context)
        assert x_TD is not None
        is_whole = self._mesh.attention_ranks > 1
        if self.head is None:
            return residual_TD.add_(x_TD if is_whole else self._mesh.sum_tokens(x_TD))
        return self._mesh.add_norm(
            x_TD, self.final_norm_D, self._eps, residual_TD, is_whole=is_whole
        )

    def expert_slots(self) -> list[tuple[LayerSlots, Matrices]]:
        """Return the slots and weights of each layer whose experts are in slots."""
        blocks = (layer.feed_forward for layer in self.layers)
        return [
            (block.slots, block.experts.matrices)
            for block in blocks
            if isinstance(block, MoeBlock) and block.slots is not None
        ]

    def expert_loads(self) -> list[torch.Tensor]:
        """Return how often this rank saw each expert chosen, of each layer that counts."""
        blocks = (layer.feed_forward for layer in self.layers)
        return [
            block.load_E
            for block in blocks
            if isinstance(block, MoeBlock) and block.load_E is not None
        ]

    def logits(self, normed_RD: torch.Tensor) -> torch.Tensor:
        """Return [R, vocabulary] of the TP group's rows, on every rank of it."""
        assert self.head is not None
        return self.head(normed_RD)
