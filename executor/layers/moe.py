"""A MoE block: router, this rank's experts, shared experts.

The tokens are equal on all ranks of the group, so each rank routes all of them, runs the pairs
(token, expert) whose expert it holds, with its columns of that expert, and the parts are summed.
Shape letters: T tokens, D hidden, E experts, S slots of this rank, F columns of an expert.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import linear

from rankwright.cost_model.model_spec import FeedForward, Router
from rankwright.executor.expert_slots import LayerSlots, Slots
from rankwright.executor.layers.expert_weights import load_experts
from rankwright.executor.layers.feed_forward import GatedMlp
from rankwright.executor.mesh import Mesh
from rankwright.executor.models.names import ExpertNames, PackedExpertNames
from rankwright.executor.weights import WeightSource
from rankwright.kernels.moe_experts import run_experts
from rankwright.kernels.moe_routing import RoutingRule, route


class MoeBlock:
    """`sum over chosen experts of weight * expert(x)`, and what the shared experts add."""

    def __init__(
        self,
        source: WeightSource,
        mesh: Mesh,
        block: FeedForward,
        names: ExpertNames | PackedExpertNames,
        *,
        layer: int,
        hidden_size: int,
        reduce: bool = True,
        slots: Slots | None = None,
    ) -> None:
        """Load this rank's experts: its range of them, or those that `slots` gives it."""
        self._mesh = mesh
        self._reduce = reduce
        self._num_experts = block.num_experts
        self._rule = routing_rule(block.router, block.experts_per_token)
        held: Sequence[int] = range(*mesh.place.experts)
        self._first_slot = mesh.place.experts[0]
        self.slots: LayerSlots | None = None
        if slots is not None:
            ep_rank = mesh.ep.ranks.index(mesh.place.rank)
            held = slots[ep_rank]
            self._first_slot = ep_rank * len(held)
            self.slots = LayerSlots(slots, block.num_experts, mesh.device)
        self._float32_router = names.float32_router
        router = names.router.format(layer=layer)
        shape = (block.num_experts, hidden_size)
        self.router_ED = source.shard(f"{router}.weight", shape)
        self.router_bias_E = (
            source.shard(f"{router}.bias", shape[:1]) if block.router.bias else None
        )
        self.correction_E = None
        if names.correction is not None and block.router.correction_bias:
            # Differences between experts are far below the bias itself.
            self.correction_E = source.shard(
                names.correction.format(layer=layer), shape[:1], dtype=torch.float32
            )
        self.experts = load_experts(
            source,
            names,
            block,
            layer=layer,
            experts=held,
            columns=mesh.place.ffn_columns,
            hidden_size=hidden_size,
        )
        self.shared: GatedMlp | None = None
        if block.shared_intermediate_size:
            assert names.shared is not None
            self.shared = GatedMlp(
                source,
                mesh,
                prefix=names.shared.format(layer=layer),
                hidden_size=hidden_size,
                intermediate_size=block.shared_intermediate_size,
                bias=False,
                reduce=False,
            )

    def __call__(self, x_TD: torch.Tensor, counted_T: torch.Tensor | None = None) -> torch.Tensor:
        """Return [T, D], equal on every rank; without `reduce`, this rank's part.

        Args:
            x_TD: Tokens.
            counted_T: int32, 0 for those that are padding; None: none is. Read where experts are
                in slots, whose placement follows the counts.
        """
        slots = self.slots
        weights_TK, slots_TK = route(
            self._router_logits(x_TD),
            self._rule,
            first_slot=self._first_slot,
            num_slots=self.experts.num_slots,
            correction_E=self.correction_E,
            table=None if slots is None else slots.table,
            load_E=None if slots is None else slots.load_E,
            counted_T=None if slots is None else counted_T,
        )
        y_TD = run_experts(x_TD, self.experts, weights_TK, slots_TK, num_experts=self._num_experts)
        if self.shared is not None:
            y_TD += self.shared(x_TD)
        return self._mesh.sum_tokens(y_TD) if self._reduce else y_TD

    def _router_logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        if self._float32_router:
            return linear(x_TD.float(), self.router_ED.float())
        return linear(x_TD, self.router_ED, self.router_bias_E)


def routing_rule(router: Router, top_k: int) -> RoutingRule:
    """Return what the routing kernel needs to know of the model's router."""
    return RoutingRule(
        top_k=top_k,
        scoring=router.scoring,
        normalize=router.normalize,
        scale=router.scale,
        num_groups=router.num_groups,
        groups_per_token=router.groups_per_token,
        group_score=router.group_score,
    )
