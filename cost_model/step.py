"""Seconds of one step of a replica: its stages and the hand-overs between them.

A `stage.StageModel` times the layers of one kind of stage; a `Pipeline` puts stages one after
another. With one stage and one micro-batch the pipeline's round is simply the step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rankwright.cost_model.collectives import Group, send_s
from rankwright.cost_model.ops import StepTokens
from rankwright.cost_model.prediction import Bound, Part
from rankwright.cost_model.stage import LayerKinds, StageModel, link_part


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages of one replica, each with its layers.

    Args:
        stages: One model a stage, first to last.
        kinds: For each stage, how many layers it has of each kind: (kind, count).
        boundaries: Links between neighbouring stages; one fewer than stages.
    """

    stages: tuple[StageModel, ...]
    kinds: tuple[tuple[tuple[int, int], ...], ...]
    boundaries: tuple[Group, ...] = ()
    _times: dict[StepTokens, tuple[list[float], float]] = field(
        default_factory=dict[StepTokens, tuple[list[float], float]], compare=False, repr=False
    )
    # What `_find_alike` returns, once it was asked for.
    _firsts: list[list[int]] = field(default_factory=list[list[int]], compare=False, repr=False)

    def stage_s(self, stage: int, tokens: StepTokens) -> float:
        """Return the seconds that `stage` is busy with one micro-batch."""
        model = self.stages[stage]
        seconds = 0.0
        for kind, count in self.kinds[stage]:
            seconds += count * model.layer_s(kind, tokens)
        if stage == 0:
            seconds += model.first_s(tokens)
        if stage == len(self.stages) - 1:
            seconds += model.last_s(tokens)
        else:
            seconds += model.handover_s
        return seconds

    def send_s(self, stage: int, tokens: StepTokens) -> float:
        """Return the seconds until the next stage has what `stage` made."""
        return send_s(self.stages[stage].handover_bytes(tokens), self.boundaries[stage])

    def round_s(self, tokens: StepTokens, micro_batches: int = 1) -> float:
        """Return the seconds from one token of a sequence to its next.

        A micro-batch passes all stages and starts again when its token is known, so a round takes
        `sum(stage_s + send_s)`. With `m` micro-batches in flight the slowest stage works for all of
        them in that time, so that it takes no less than `m * max(stage_s)`:

            round_s = max(sum(stage_s) + sum(send_s), m * max(stage_s))

        With equal stages and `m >= pp` both terms meet but for the hand-overs.
        """
        busy, sends = self._busy_s(tokens)
        host_s = micro_batches * self.stages[0].host_s(tokens)
        return max(sum(busy) + sends, micro_batches * max(busy), host_s)

    def prompt_s(self, tokens: StepTokens, steps: int) -> float:
        """Return the seconds in which one prompt passes all stages in `steps` chunks.

        Chunks follow each other into the pipeline: only the last one is sampled, so that the next
        need not wait for the one before to come out. With one stage these are `steps` rounds.
        """
        busy, sends = self._busy_s(tokens)
        return sum(busy) + sends + (steps - 1) * max(busy)

    def slowest_stage(self, tokens: StepTokens) -> int:
        """Return the stage that is busy longest."""
        busy, _ = self._busy_s(tokens)
        return busy.index(max(busy))

    def _busy_s(self, tokens: StepTokens) -> tuple[list[float], float]:
        """Return the seconds of each stage and of all hand-overs; stages that are alike once."""
        times = self._times.get(tokens)
        if times is None:
            if not self._firsts:
                self._firsts.extend(self._find_alike())
            busy: list[float] = []
            for stage, like in enumerate(self._firsts[0]):
                busy.append(self.stage_s(stage, tokens) if like == stage else busy[like])
            sent: list[float] = []
            for stage, like in enumerate(self._firsts[1]):
                sent.append(self.send_s(stage, tokens) if like == stage else sent[like])
            times = self._times[tokens] = busy, sum(sent)
        return times

    def _find_alike(self) -> tuple[list[int], list[int]]:
        """Return, of each stage and of each boundary, the first that costs what it costs."""
        last = len(self.stages) - 1
        stages: dict[tuple[object, ...], int] = {}
        like = [
            stages.setdefault((id(model), kinds, stage == 0, stage == last), stage)
            for stage, (model, kinds) in enumerate(zip(self.stages, self.kinds, strict=True))
        ]
        pairs: dict[tuple[int, int], int] = {}
        like_sends = [
            pairs.setdefault((id(self.stages[stage]), id(group)), stage)
            for stage, group in enumerate(self.boundaries)
        ]
        return like, like_sends

    def parts(self, stage: int, tokens: StepTokens, repeat: float = 1) -> tuple[Part, ...]:
        """Return the terms of one step of `stage`, each summed over its layers and `repeat`."""
        model = self.stages[stage]
        weighted: list[tuple[float, Part]] = []
        if stage == 0:
            weighted += [(1, part) for part in model.first_parts(tokens)]
        for kind, count in self.kinds[stage]:
            weighted += [(count, part) for part in model.layer_parts(kind, tokens)]
        if stage == len(self.stages) - 1:
            weighted += [(1, part) for part in model.last_parts(tokens)]
        else:
            seconds = model.handover_s + self.send_s(stage, tokens)
            weighted.append(
                (1, link_part("stage hand-over", seconds, model.handover_bytes(tokens)))
            )
        return _merge([(count * repeat, part) for count, part in weighted])


def make_pipeline(
    layers: LayerKinds,
    stages: tuple[StageModel, ...],
    stage_layers: tuple[int, ...],
    boundaries: tuple[Group, ...] = (),
) -> Pipeline:
    """Return the pipeline whose stages have `stage_layers` layers each, in the model's order."""
    return Pipeline(stages, layers.of_stages(stage_layers), boundaries)


def _merge(weighted: Sequence[tuple[float, Part]]) -> tuple[Part, ...]:
    """Return parts of equal name as one, bound by what most of its seconds are bound by."""
    by_name: dict[str, list[tuple[float, Part]]] = {}
    for weight, part in weighted:
        by_name.setdefault(part.name, []).append((weight, part))
    merged: list[Part] = []
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
