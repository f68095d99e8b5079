"""Seconds of the layers, the embedding and the head on the ranks of one stage of a replica.

A `StageModel` times the layers of one kind of stage; `step.Pipeline` puts stages one after another.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import log2

from rankwright.cost_model.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    peer_sum_s,
    send_s,
)
from rankwright.cost_model.dtypes import BITS
from rankwright.cost_model.efficiency import Exchange, Provenance
from rankwright.cost_model.expert_exchange import choose_exchange
from rankwright.cost_model.layer_ops import LayerModel, embedding_op, logits_op
from rankwright.cost_model.memory import kv_bytes_per_token
from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.cost_model.ops import Op, Rates, StepTokens
from rankwright.cost_model.peer_sums import peer_sums
from rankwright.cost_model.prediction import Part
from rankwright.cost_model.split import AttentionSplit, CpExchange


class LayerKinds:
    """The distinct layers of a model and which of them each layer is."""

    def __init__(self, spec: ModelSpec) -> None:
        """Find the distinct layers of `spec`."""
        self.kinds: list[Layer] = []
        self.of_layer: list[int] = []
        for run in spec.layer_runs:
            if run.layer not in self.kinds:
                self.kinds.append(run.layer)
            self.of_layer += [self.kinds.index(run.layer)] * run.count
        self._cuts: dict[tuple[int, ...], tuple[tuple[tuple[int, int], ...], ...]] = {}

    def of_stages(self, stage_layers: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Return, for each stage, how many layers it has of each kind: (kind, count).

        Args:
            stage_layers: Layers of each stage, in the model's order.
        """
        if stage_layers not in self._cuts:
            ends = list(accumulate(stage_layers, initial=0))
            self._cuts[stage_layers] = tuple(
                tuple(Counter(self.of_layer[start:end]).items()) for start, end in pairwise(ends)
            )
        return self._cuts[stage_layers]


class StageModel:
    """Times layers, embedding and head on the ranks of one stage."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: LayerKinds,
        rates: Rates,
        group: Group,
        *,
        ep: int = 1,
        attention: AttentionSplit = "tp",
        context: Group | None = None,
        cp_exchange: CpExchange = "gather",
    ) -> None:
        """Prepare the stage.

        Args:
            spec: The model.
            layers: Its distinct layers.
            rates: Of the slowest GPU of the group.
            group: The TP group and its links.
            ep: Groups that share the experts out.
            attention: `dp` when each rank attends for its own share of the sequences.
            context: The ranks that each have a part of every context; None: there is one.
            cp_exchange: How prompts come by the other ranks' keys and values.
        """
        self._context = context or _ALONE
        self._is_ring = cp_exchange == "ring"
        self._layer_kinds = layers.kinds
        self._spec = spec
        self._rates = rates
        self._group = group
        self._attention: AttentionSplit = attention
        self._ep = ep
        self._width = BITS[spec.dtype] / 8
        # The executor sums over peers' memory where NVLink joins them, and by NCCL elsewhere.
        self._peer_sums = (
            rates.efficiency.peer_sums
            and group.size > 1
            and group.num_nodes == 1
            and group.one_machine
            and group.bytes_per_s >= _NVLINK_BYTES_PER_S
            and peer_sums(group.size).max_bytes > 0
        )
        self.fused_norms = rates.efficiency.fused_norms or self._peer_sums
        self.provenance: Provenance = rates.efficiency.provenance
        self._skew_s = rates.efficiency.skew_s * log2(group.size)
        self._layers = [
            LayerModel(
                spec,
                layer,
                tp=group.size,
                ep=ep,
                cp=self._context.size,
                attention=attention,
                fused_norms=self.fused_norms,
                tile_keys=rates.efficiency.tile_keys,
                expands_by_heads=rates.efficiency.expands_by_heads,
            )
            for layer in layers.kinds
        ]
        self._launches: dict[int, int] = {}  # by kind of layer, but for attention itself
        self._cache: dict[tuple[int, StepTokens], float] = {}
        # By kind of layer, all tokens, and tokens that a rank attends for.
        self._others_s: dict[tuple[int, float, float], float] = {}

    def layer_s(self, kind: int, tokens: StepTokens) -> float:
        """Return the seconds of one layer of kind `kind`."""
        seconds = self._cache.get((kind, tokens))
        if seconds is None:
            mine = self._mine(tokens)
            layer = self._layers[kind]
            # A simulated run asks for thousands of steps of few sizes: only contexts differ.
            key = (kind, mine.total, layer.rows(mine))
            others_s = self._others_s.get(key)
            if others_s is None:
                others_s = self._rates.seconds(layer.other_ops(mine))
                others_s += self._exchange_s(mine, kind=kind)
                self._others_s[key] = others_s
            attention = layer.attention_ops(mine)
            seconds = others_s + self._rates.seconds(attention)
            if self._context.size > 1:
                seconds += self._context_s(kind, tokens)[0]
            seconds = max(seconds, self._eager_s(kind, mine, attention))
            self._cache[kind, tokens] = seconds
        return seconds

    def _eager_s(self, kind: int, tokens: StepTokens, attention: Sequence[Op]) -> float:
        """Return the seconds in which the host launches a layer of a step with prompts.

        Decoding replays graphs; steps with prompts are of any size and run without. The host is
        ahead of the GPU unless kernels are shorter than their launches.

        Args:
            kind: Of layer.
            tokens: What a rank computes.
            attention: Its ops of attention, whose launches depend on the tokens.
        """
        launch_s = self._rates.efficiency.eager_launch_s
        if not tokens.prefill or not launch_s:
            return 0.0
        launches = self._launches.get(kind)
        if launches is None:
            launches = sum(op.launches for op in self._layers[kind].other_ops(tokens))
            if self._group.size > 1:
                # Sums of prompts are too large for the kernel that has the norm in it.
                launches += 4 if self._peer_sums else 2
            self._launches[kind] = launches
        return (launches + sum(op.launches for op in attention)) * launch_s

    def layer_parts(self, kind: int, tokens: StepTokens) -> list[Part]:
        """Return the terms of one layer of kind `kind`."""
        mine = self._mine(tokens)
        parts = [self._part(op, rates) for op, rates in self._layer_ops(kind, mine)]
        if self._group.size > 1:
            parts.append(self._exchange(mine, kind=kind))
        if self._context.size > 1:
            name = "context ring" if self._is_ring and tokens.prefill else "context exchange"
            parts.append(link_part(name, *self._context_s(kind, tokens)))
        attention = self._layers[kind].attention_ops(mine)
        host_s = self._eager_s(kind, mine, attention) - sum(part.seconds for part in parts)
        if host_s > 0:
            parts.append(
                Part(name=LAUNCHES, seconds=host_s, bound="launch", source=self.provenance)
            )
        return parts

    def first_parts(self, tokens: StepTokens) -> list[Part]:
        """Return what the first stage does before its layers."""
        tokens = self._mine(tokens)
        parts = [self._part(embedding_op(self._spec, tokens), self._rates)]
        if self._group.size > 1:
            parts.append(self._exchange(tokens, times=1))
        return parts

    def last_parts(self, tokens: StepTokens) -> list[Part]:
        """Return what the last stage does after its layers, the host's work included."""
        parts = [self._part(*self._logits(tokens))]
        if self._group.size > 1:
            size = self._logits_bytes(tokens)
            seconds = all_gather_s(size, self._group)
            parts.append(link_part("logits gather", seconds, size))
        step_s = self._rates.efficiency.step_s
        parts.append(
            Part(name="sampling and host", seconds=step_s, bound="launch", source=self.provenance)
        )
        return parts

    def first_s(self, tokens: StepTokens) -> float:
        """Return the seconds of the embedding."""
        mine = self._mine(tokens)
        key = (_FIRST, mine.total, 0.0)
        if key not in self._others_s:
            seconds = self._rates.seconds([embedding_op(self._spec, mine)])
            self._others_s[key] = seconds + self._exchange_s(mine, times=1)
        return self._others_s[key]

    def last_s(self, tokens: StepTokens) -> float:
        """Return the seconds of head, sampling and host."""
        key = (_LAST, tokens.decode + tokens.prompts, 0.0)
        if key not in self._others_s:
            op, rates = self._logits(tokens)
            seconds = rates.seconds([op])
            seconds += all_gather_s(self._logits_bytes(tokens), self._group)
            self._others_s[key] = seconds + self._rates.efficiency.step_s
        return self._others_s[key]

    def _layer_ops(self, kind: int, tokens: StepTokens) -> list[tuple[Op, Rates]]:
        """Return the ops of one layer of kind `kind`, each with the rates of its GPU."""
        return [(op, self._rates) for op in self._layers[kind].ops(tokens)]

    def _logits(self, tokens: StepTokens) -> tuple[Op, Rates]:
        """Return the product with the head, with the rates of its GPU."""
        return logits_op(self._spec, tokens, tp=self._group.size), self._rates

    def _logits_bytes(self, tokens: StepTokens) -> float:
        return (tokens.decode + tokens.prompts) * self._spec.vocab_size * self._width

    def message_bytes(self, tokens: StepTokens) -> float:
        """Return the bytes of hidden states of all `tokens`."""
        return tokens.total * self._spec.hidden_size * self._width

    def handover_bytes(self, tokens: StepTokens) -> float:
        """Return the bytes that a rank hands to the next stage."""
        return self.message_bytes(self._mine(tokens))

    def _mine(self, tokens: StepTokens) -> StepTokens:
        """Return what of `tokens` one rank of the context group computes: a part of a prompt."""
        size = self._context.size
        return tokens if size == 1 else tokens._replace(prefill=tokens.prefill / size)

    def _context_s(self, kind: int, tokens: StepTokens) -> tuple[float, float]:
        """Return the seconds and bytes of a layer's exchange within the context group.

        Prompts: keys and values of all that they attend to are gathered, or go round. Decoding:
        each rank's weighted sum and its log-sum-exp, in float32, are gathered and merged.
        """
        layer, tp = self._layer_kinds[kind], self._group.size
        seconds = size = 0.0
        if tokens.prefill:
            reach = tokens.prefill_context + tokens.prefill / 2
            gathered = reach * kv_bytes_per_token(
                self._spec, layer, tp=tp, attention=self._attention
            )
            if self._is_ring:
                seconds = self._ring_s(kind, tokens, gathered)
            else:
                seconds = all_gather_s(gathered, self._context)
            size = gathered
        if tokens.decode:
            heads = layer.attention
            width = heads.kv_lora_rank if heads.kind == "mla" else heads.value_head_dim
            assert width is not None
            shared = 1 if self._attention == "dp" else tp
            sums = tokens.decode * heads.num_heads / shared * (width + 1) * 4
            merged = sums * self._context.size
            seconds, size = seconds + all_gather_s(merged, self._context), size + merged
        return seconds, size

    def _ring_s(self, kind: int, tokens: StepTokens, context_bytes: float) -> float:
        """Return the seconds that a ring takes beside the attention itself.

        A part travels while the one before it is attended to: what takes longer is left over, once
        for each part but a rank's own.
        """
        layer, size = self._layers[kind], self._context.size
        mine = self._mine(tokens)
        prompts = mine._replace(decode=0.0, decode_context=0.0)
        attended_s = self._rates.seconds(layer.attention_ops(prompts)) / size
        sent_s = send_s(context_bytes / size, self._context)
        waiting_s = (size - 1) * max(0.0, sent_s - attended_s)
        return waiting_s + self._rates.seconds([layer.ring_op(mine)])

    @property
    def handover_s(self) -> float:
        """Seconds that a hand-over takes on the sending side, before any byte moves."""
        return self._rates.efficiency.send_s

    def _exchange_s(self, tokens: StepTokens, times: int = 2, kind: int | None = None) -> float:
        """Return the seconds of a layer's collectives: after attention and after feed-forward."""
        if self._attention == "dp":
            return self._chosen(tokens, kind)[1] + 2 * self._skew_s
        size = self.message_bytes(tokens)
        share = self._rates.efficiency
        if self._peer_sums:
            algorithm = peer_sums(self._group.size).algorithm(size)
            once_s = peer_sum_s(algorithm, size, self._group)
        elif share.peer_sums:  # of NCCL, where no memory is shared
            once_s = all_reduce_s(size, self._group)
        else:
            once_s = all_reduce_s(size, self._group, share.all_reduce, share.one_shot_bytes)
        return times * (once_s + self._skew_s)

    def _chosen(self, tokens: StepTokens, kind: int | None) -> tuple[Exchange, float]:
        """Return how tokens reach all ranks' parts of a layer and come back, and the seconds."""
        return choose_exchange(
            None if kind is None else self._layer_kinds[kind].feed_forward,
            self.message_bytes(tokens),
            self._group,
            ep=self._ep,
            allowed=self._rates.efficiency.expert_exchanges,
        )

    def host_s(self, tokens: StepTokens) -> float:
        """Return the seconds of the host's work for the sequences of a step.

        Under attention DP each rank's process has its own.
        """
        mine = tokens.decode / (self._group.size if self._attention == "dp" else 1)
        return self._rates.efficiency.host_sequence_s * mine

    def _exchange(self, tokens: StepTokens, times: int = 2, kind: int | None = None) -> Part:
        name = "all-reduce"
        if self._attention == "dp":
            name = _EXCHANGE_NAMES[self._chosen(tokens, kind)[0]]
        size = times * self.message_bytes(tokens)
        return link_part(name, self._exchange_s(tokens, times, kind), size)

    def _part(self, op: Op, rates: Rates) -> Part:
        cost = rates.cost(op)
        return Part(
            name=op.name,
            seconds=cost.seconds,
            flops=op.flops,
            bytes=op.bytes,
            bound=cost.bound,
            source=self.provenance,
        )


LAUNCHES = "launches"  # the part of a layer in which the GPU waits for the host
_ALONE = Group(1)
# NVLink begins at 100 GB/s each way on the GPUs that serve (A100: 300); PCIe 5 has 63.
_NVLINK_BYTES_PER_S = 100e9
_EXCHANGE_NAMES: dict[Exchange, str] = {
    "gather": "all-gather and reduce-scatter",
    "dispatch": "dispatch and combine",
}
_FIRST, _LAST = -1, -2  # in place of a kind of layer: the embedding, the head


def link_part(name: str, seconds: float, size_bytes: float) -> Part:
    """Return the term of a step that is spent on links."""
    return Part(name=name, seconds=seconds, bytes=size_bytes, bound="link", source="analytic")
