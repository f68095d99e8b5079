"""Seconds of one step of a replica: its layers, collectives, stages and hand-overs.

A `StageModel` times the layers of one kind of stage; a `Pipeline` puts stages one after another.
With one stage and one micro-batch the pipeline's round is simply the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rankwright.cost_model.collectives import (
    Group,
    all_gather_s,
    all_reduce_s,
    reduce_scatter_s,
    send_s,
)
from rankwright.cost_model.dtypes import BITS
from rankwright.cost_model.model_spec import Layer, ModelSpec
from rankwright.cost_model.ops import (
    AttentionSplit,
    LayerModel,
    Op,
    Rates,
    StepTokens,
    embedding_op,
    logits_op,
)
from rankwright.cost_model.prediction import Bound, Part


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


class StageModel:
    """Times layers, embedding and head on the ranks of one TP group."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: LayerKinds,
        rates: Rates,
        group: Group,
        *,
        ep: int = 1,
        attention: AttentionSplit = "tp",
    ) -> None:
        """Prepare the stage.

        Args:
            spec: The model.
            layers: Its distinct layers.
            rates: Of the slowest GPU of the group.
            group: The TP group and its links.
            ep: Groups that share the experts out.
            attention: `dp` when each rank attends for its own share of the sequences.
        """
        self._spec = spec
        self._rates = rates
        self._group = group
        self._attention = attention
        self._width = BITS[spec.dtype] / 8
        self._layers = [
            LayerModel(
                spec,
                layer,
                tp=group.size,
                ep=ep,
                attention=attention,
                fused_norms=rates.efficiency.fused_norms,
            )
            for layer in layers.kinds
        ]
        self._cache: dict[tuple[int, StepTokens], float] = {}

    def layer_s(self, kind: int, tokens: StepTokens) -> float:
        """Return the seconds of one layer of kind `kind`."""
        key = (kind, tokens)
        if key not in self._cache:
            compute_s = sum(self._rates.cost(op).seconds for op in self._layers[kind].ops(tokens))
            self._cache[key] = compute_s + self._exchange(tokens).seconds
        return self._cache[key]

    def layer_parts(self, kind: int, tokens: StepTokens) -> list[Part]:
        """Return the terms of one layer of kind `kind`."""
        parts = [self._part(op) for op in self._layers[kind].ops(tokens)]
        if self._group.size > 1:
            parts.append(self._exchange(tokens))
        return parts

    def first_parts(self, tokens: StepTokens) -> list[Part]:
        """Return what the first stage does before its layers."""
        parts = [self._part(embedding_op(self._spec, tokens))]
        if self._group.size > 1:
            parts.append(self._exchange(tokens, times=1))
        return parts

    def last_parts(self, tokens: StepTokens) -> list[Part]:
        """Return what the last stage does after its layers, the host's work included."""
        parts = [self._part(logits_op(self._spec, tokens, tp=self._group.size))]
        if self._group.size > 1:
            size = (tokens.decode + tokens.prompts) * self._spec.vocab_size * self._width
            seconds = all_gather_s(size, self._group)
            parts.append(_link_part("logits gather", seconds, size))
        step_s = self._rates.efficiency.step_s
        parts.append(
            Part(name="sampling and host", seconds=step_s, bound="launch", source=_SOURCE)
        )
        return parts

    def first_s(self, tokens: StepTokens) -> float:
        """Return the seconds of the embedding."""
        return self._cached(-1, tokens)

    def last_s(self, tokens: StepTokens) -> float:
        """Return the seconds of head, sampling and host."""
        return self._cached(-2, tokens)

    def message_bytes(self, tokens: StepTokens) -> float:
        """Return the bytes that a rank hands to the next stage."""
        return tokens.total * self._spec.hidden_size * self._width

    @property
    def handover_s(self) -> float:
        """Seconds that a hand-over takes on the sending side, before any byte moves."""
        return self._rates.efficiency.send_s

    def _cached(self, slot: int, tokens: StepTokens) -> float:
        key = (slot, tokens)
        if key not in self._cache:
            parts = self.first_parts(tokens) if slot == -1 else self.last_parts(tokens)
            self._cache[key] = sum(part.seconds for part in parts)
        return self._cache[key]

    def _exchange(self, tokens: StepTokens, times: int = 2) -> Part:
        """Return the collectives of one layer: after attention and after the feed-forward."""
        size = tokens.total * self._spec.hidden_size * self._width
        if self._attention == "dp":
            seconds = all_gather_s(size, self._group) + reduce_scatter_s(size, self._group)
            return _link_part("all-gather and reduce-scatter", seconds, 2 * size)
        algorithms = self._rates.efficiency.all_reduce
        seconds = times * all_reduce_s(size, self._group, algorithms)
        return _link_part("all-reduce", seconds, times * size)

    def _part(self, op: Op) -> Part:
        cost = self._rates.cost(op)
        return Part(
            name=op.name,
            seconds=cost.seconds,
            flops=op.flops,
            bytes=op.bytes,
            bound=cost.bound,
            source=_SOURCE,
        )


_SOURCE = "analytic"


def _link_part(name: str, seconds: float, size_bytes: float) -> Part:
    return Part(name=name, seconds=seconds, bytes=size_bytes, bound="link", source=_SOURCE)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages of one replica, each with its layers.

    Args:
        layers: Distinct layers of the model.
        stages: One model a stage, first to last.
        stage_layers: Layers of each stage.
        boundaries: Links between neighbouring stages; one fewer than stages.
    """

    layers: LayerKinds
    stages: tuple[StageModel, ...]
    stage_layers: tuple[int, ...]
    boundaries: tuple[Group, ...] = ()

    def stage_s(self, stage: int, tokens: StepTokens) -> float:
        """Return the seconds that `stage` is busy with one micro-batch."""
        model = self.stages[stage]
        seconds = sum(
            count * model.layer_s(kind, tokens) for kind, count in self._kinds(stage).items()
        )
        if stage == 0:
            seconds += model.first_s(tokens)
        if stage == len(self.stages) - 1:
            seconds += model.last_s(tokens)
        else:
            seconds += model.handover_s
        return seconds

    def send_s(self, stage: int, tokens: StepTokens) -> float:
        """Return the seconds until the next stage has what `stage` made."""
        return send_s(self.stages[stage].message_bytes(tokens), self.boundaries[stage])

    def round_s(self, tokens: StepTokens, micro_batches: int = 1) -> float:
        """Return the seconds from one token of a sequence to its next.

        A micro-batch passes all stages and starts again when its token is known, so a round takes
        `sum(stage_s + send_s)`. With `m` micro-batches in flight the slowest stage works for all of
        them in that time, so that it takes no less than `m * max(stage_s)`:

            round_s = max(sum(stage_s) + sum(send_s), m * max(stage_s))

        With equal stages and `m >= pp` both terms meet but for the hand-overs.
        """
        busy = [self.stage_s(stage, tokens) for stage in range(len(self.stages))]
        sends = sum(self.send_s(stage, tokens) for stage in range(len(self.stages) - 1))
        return max(sum(busy) + sends, micro_batches * max(busy))

    def slowest_stage(self, tokens: StepTokens) -> int:
        """Return the stage that is busy longest."""
        busy = [self.stage_s(stage, tokens) for stage in range(len(self.stages))]
        return busy.index(max(busy))

    def parts(self, stage: int, tokens: StepTokens, repeat: float = 1) -> tuple[Part, ...]:
        """Return the terms of one step of `stage`, each summed over its layers and `repeat`."""
        model = self.stages[stage]
        weighted: list[tuple[float, Part]] = []
        if stage == 0:
            weighted += [(1, part) for part in model.first_parts(tokens)]
        for kind, count in self._kinds(stage).items():
            weighted += [(count, part) for part in model.layer_parts(kind, tokens)]
        if stage == len(self.stages) - 1:
            weighted += [(1, part) for part in model.last_parts(tokens)]
        else:
            seconds = model.handover_s + self.send_s(stage, tokens)
            weighted.append(
                (1, _link_part("stage hand-over", seconds, model.message_bytes(tokens)))
            )
        return _merge([(count * repeat, part) for count, part in weighted])

    def _kinds(self, stage: int) -> dict[int, int]:
        first = sum(self.stage_layers[:stage])
        counts: dict[int, int] = {}
        for kind in self.layers.of_layer[first : first + self.stage_layers[stage]]:
            counts[kind] = counts.get(kind, 0) + 1
        return counts


def _merge(weighted: Sequence[tuple[float, Part]]) -> tuple[Part, ...]:
    """Return parts of equal name as one, bound by what most of its seconds are bound by."""
    by_name: dict[str, list[tuple[float, Part]]] = {}
    for weight, part in weighted:
        by_name.setdefault(part.name, []).append((weight, part))
    merged = []
    for name, members in by_name.items():
        bounds: dict[Bound, float] = {}
        for weight, part in members:
            bounds[part.bound] = bounds.get(part.bound, 0.0) + weight * part.seconds
        merged.append(
            Part(
                name=name,
                seconds=sum(weight * part.seconds for weight, part in members),
                flops=sum(weight * part.flops for weight, part in members),
                bytes=sum(weight * part.bytes for weight, part in members),
                bound=max(bounds, key=bounds.__getitem__),
                source=members[0][1].source,
            )
        )
    return tuple(merged)
