"""Seconds of a stage whose ranks are on GPUs of several kinds, or hold unequal parts of the model.

Ranks wait for each other in every sum: a layer lasts as long as attention on the rank that is
slowest there, then as the feed-forward block on the one that is slowest there, and the head as long
as on a third. What is exchanged does not depend on who holds what.
"""

from collections.abc import Sequence
from functools import cached_property
from math import inf

from rankwright.cost_model.collectives import Group
from rankwright.cost_model.layer_ops import LayerModel, logits_op
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.ops import Op, Rates, StepTokens
from rankwright.cost_model.shards import Shares
from rankwright.cost_model.stage import LayerKinds, StageModel


class RankModel:
    """Times what one rank of a TP group computes with its own part, on its own GPU."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: LayerKinds,
        rates: Rates,
        *,
        tp: int,
        tp_rank: int = 0,
        shares: Shares | None = None,
        fused_norms: bool = False,
    ) -> None:
        """Prepare the rank.

        Args:
            spec: The model.
            layers: Its distinct layers.
            rates: Of the rank's GPU.
            tp: Ranks of the group.
            tp_rank: Which one this is.
            shares: Parts of the ranks; None: equal ones.
            fused_norms: Whether norms cost no kernel of their own.
        """
        self.rates = rates
        self._spec = spec
        self._kinds = layers.kinds
        self._tp, self._tp_rank, self._shares = tp, tp_rank, shares
        self._fused_norms = fused_norms

    @cached_property
    def _layers(self) -> list[LayerModel]:
        return [
            LayerModel(
                self._spec,
                layer,
                tp=self._tp,
                fused_norms=self._fused_norms,
                tile_keys=self.rates.efficiency.tile_keys,
                tp_rank=self._tp_rank,
                shares=self._shares,
            )
            for layer in self._kinds
        ]

    def halves(self, kind: int, tokens: StepTokens) -> tuple[list[Op], list[Op]]:
        """Return the ops of one layer of kind `kind` before each of its two sums over ranks."""
        return self._layers[kind].phase_ops(tokens)

    def halves_s(self, kind: int, tokens: StepTokens) -> tuple[float, float]:
        """Return the seconds of one layer of kind `kind` before each of its two sums."""
        attention, feed_forward = self.halves(kind, tokens)
        return self.rates.seconds(attention), self.rates.seconds(feed_forward)

    def logits(self, tokens: StepTokens) -> Op:
        """Return the product with this rank's rows of the head."""
        return logits_op(
            self._spec, tokens, tp=self._tp, tp_rank=self._tp_rank, shares=self._shares
        )

    def logits_s(self, tokens: StepTokens) -> float:
        """Return the seconds of the product with this rank's rows of the head."""
        return self.rates.seconds((self.logits(tokens),))


class UnlikeStage(StageModel):
    """Times layers, embedding and head on ranks that differ."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: LayerKinds,
        rates: Rates,
        group: Group,
        members: Sequence[Rates],
        shares: Shares | None = None,
    ) -> None:
        """Prepare the stage.

        Args:
            spec: The model.
            layers: Its distinct layers.
            rates: Of the slowest GPU of the group, whose launches and links set the pace of all.
            group: The TP group and its links.
            members: Rates of the GPU of each rank, in order of `tp_rank`.
            shares: Parts of the ranks; None: equal ones.
        """
        super().__init__(spec, layers, rates, group)
        # Ranks with equal GPUs and equal parts take equal times.
        unlike: dict[tuple[object, ...], int] = {}
        for rank in range(group.size):
            held = (rank,) if shares is None else shares.of(rank)
            unlike.setdefault((id(members[rank]), *held), rank)
        self._ranks = [
            RankModel(
                spec,
                layers,
                members[rank],
                tp=group.size,
                tp_rank=rank,
                shares=shares,
                fused_norms=self.fused_norms,
            )
            for rank in unlike.values()
        ]

    def layer_s(self, kind: int, tokens: StepTokens) -> float:
        """Return the seconds of one layer of kind `kind`."""
        seconds = self._cache.get((kind, tokens))
        if seconds is None:
            halves = [rank.halves_s(kind, tokens) for rank in self._ranks]
            seconds = sum(map(max, zip(*halves, strict=True)))
            seconds += self._exchange_s(tokens, kind=kind)
            seconds = max(seconds, self._launched_s(kind, tokens))
            self._cache[kind, tokens] = seconds
        return seconds

    def _launched_s(self, kind: int, tokens: StepTokens) -> float:
        """Return the seconds in which the host launches a layer, which is the same on all ranks."""
        return self._eager_s(kind, tokens, self._layers[kind].attention_ops(tokens))

    def least_s(self, kind: int, tokens: StepTokens) -> float:
        """Return what both halves of a layer take at least, for the host launches no faster."""
        host_s = self._launched_s(kind, tokens)
        return host_s - self._exchange_s(tokens, kind=kind) if host_s else -inf

    def _layer_ops(self, kind: int, tokens: StepTokens) -> list[tuple[Op, Rates]]:
        """Return the ops of a layer, those of each half on the rank that is slowest there."""
        ops: list[tuple[Op, Rates]] = []
        for half in range(2):
            seconds = [rank.halves_s(kind, tokens)[half] for rank in self._ranks]
            slowest = self._ranks[seconds.index(max(seconds))]
            ops += [(op, slowest.rates) for op in slowest.halves(kind, tokens)[half]]
        return ops

    def _logits(self, tokens: StepTokens) -> tuple[Op, Rates]:
        """Return the product with the head on the rank that takes longest for it."""
        seconds = [rank.logits_s(tokens) for rank in self._ranks]
        slowest = self._ranks[seconds.index(max(seconds))]
        return slowest.logits(tokens), slowest.rates
