"""A MoE block: router, this rank's experts, shared experts.

With attention TP the tokens are equal on all ranks of the group, so each rank routes all of them,
runs the pairs (token, expert) whose expert it holds, with its columns of that expert, and the parts
are summed. With attention DP each rank has tokens of its own: they are gathered before and
scattered after, or sent to the ranks that hold their experts (`dispatch.py`), and while they are on
their way the shared experts, whole on each rank, work on the rank's own.
Shape letters: T tokens, D hidden, K experts a token, E experts, S slots of this rank, F columns of
an expert.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch.nn.functional import linear

from rankwright.cost_model.model_spec import FeedForward, Router
from rankwright.cost_model.shards import even_range
from rankwright.executor.expert_memory import MAX_TOKENS, ExpertMemory
from rankwright.executor.expert_slots import LayerSlots, Slots
from rankwright.executor.forward_context import ForwardContext
from rankwright.executor.layers.dispatch import Dispatch
from rankwright.executor.layers.exchange import ExchangeChoice, open_expert_memory
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
        slots: Slots | None = None,
    ) -> None:
        """Load this rank's experts: its range of them, or those that `slots` gives it."""
        self._mesh = mesh
        self._block = block
        self._rule = routing_rule(block.router, block.experts_per_token)
        ep = mesh.split.ep
        self._ep_rank = mesh.place.tp_rank // mesh.split.moe_tp
        placed = slots or tuple(
            tuple(range(*even_range(block.num_experts, ep, rank))) for rank in range(ep)
        )
        held: Sequence[int] = placed[self._ep_rank]
        stops = accumulate((len(experts) for experts in placed), initial=0)
        self._slots_of_ranks = tuple(pairwise(stops))
        self.slots: LayerSlots | None = None
        if slots is not None:
            self.slots = LayerSlots(slots, block.num_experts, mesh.device)
        self.load_E: torch.Tensor | None = None
        if self.slots is not None:
            self.load_E = self.slots.load_E
        elif mesh.counts_experts:
            self.load_E = torch.zeros(block.num_experts, dtype=torch.int64, device=mesh.device)
        self._choose = ExchangeChoice(mesh, block) if mesh.attention_ranks > 1 else None
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
                whole=mesh.attention_ranks > 1,
            )

        self._memory = open_expert_memory(
            mesh, top_k=block.experts_per_token, dim=hidden_size, dtype=self.router_ED.dtype
        )
        if self._memory is not None:
            firsts = [first for first, _ in self._slots_of_ranks]
            stop = self._slots_of_ranks[-1][1]
            self._starts = torch.tensor([*firsts, stop], dtype=torch.int32, device=mesh.device)
            self._beside = torch.cuda.Stream(mesh.device)

    def __call__(self, x_TD: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        """Return [T, D]: this rank's part of a sum over the group; with attention DP, all of it.

        Args:
            x_TD: Tokens, with attention DP this rank's.
            context: Which of them are padding: those are neither counted nor sent.
        """
        if self._mesh.attention_ranks == 1:
            y_TD = self._run_all(x_TD, None if self.load_E is None else context.counted())
            return y_TD if self.shared is None else y_TD.add_(self.shared(x_TD))
        if self._memory is not None and len(x_TD) <= MAX_TOKENS:
            return self._over_peers(self._memory, x_TD, context.counted())
        if self._choose is not None and self._choose(x_TD) == "dispatch":
            return self._dispatched(x_TD, context.counted())
        counted_T = None if self.load_E is None else self._count_own(context.counted())
        y_TD = self._mesh.sum_tokens(
            self._run_all(
                self._mesh.gather_tokens(x_TD), counted_T, context.counted_of_group(self._mesh)
            )
        )
        return y_TD if self.shared is None else y_TD.add_(self.shared(x_TD))

    def _run_all(
        self,
        x_TD: torch.Tensor,
        counted_T: torch.Tensor | None,
        real_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return what this rank's experts make of tokens that every rank has.

        Args:
            x_TD: Tokens.
            counted_T: 0 where a choice of experts is not counted.
            real_T: 0 where a token is padding, which goes to no expert: of a rank without prompts
                it may be as much as another's prompt.
        """
        first, stop = self._slots_of_ranks[self._ep_rank]
        weights_TK, slots_TK = self._route(x_TD, first, stop - first, counted_T)
        if real_T is not None:
            slots_TK = slots_TK.masked_fill_((real_T == 0).unsqueeze(1), -1)
        return run_experts(
            x_TD, self.experts, weights_TK, slots_TK, num_experts=self._block.num_experts
        )

    def _dispatched(self, x_TD: torch.Tensor, counted_T: torch.Tensor) -> torch.Tensor:
        """Return what all ranks' experts make of this rank's tokens, zeros for padding."""
        num_slots = self._slots_of_ranks[-1][1]
        weights_TK, slots_TK = self._route(x_TD, 0, num_slots, counted_T)
        sent = Dispatch(
            self._mesh.tp,
            self._slots_of_ranks,
            self._ep_rank,
            x_TD,
            weights_TK,
            slots_TK,
            counted_T,
        )
        shared_TD = None if self.shared is None else self.shared(x_TD)  # tokens are on their way
        here = sent.arrived()
        y_TD = sent.combine(
            run_experts(
                here.x_MD,
                self.experts,
                here.weights_MK,
                here.slots_MK,
                num_experts=self._block.num_experts,
            )
        )
        return y_TD if shared_TD is None else y_TD.add_(shared_TD)

    def _over_peers(
        self, memory: ExpertMemory, x_TD: torch.Tensor, counted_T: torch.Tensor
    ) -> torch.Tensor:
        """Return the same, through memory that GPUs share; a graph may hold it."""
        shared_TD = None
        here = torch.cuda.current_stream()
        if self.shared is not None:
            self._beside.wait_stream(here)
            with torch.cuda.stream(self._beside):  # while tokens are on their way
                shared_TD = self.shared(x_TD)
        num_slots = self._slots_of_ranks[-1][1]
        weights_TK, slots_TK = self._route(x_TD, 0, num_slots, counted_T)
        slots_TK = slots_TK.masked_fill_((counted_T == 0).unsqueeze(1), -1)
        x_ND, weights_NK, slots_NK = memory.dispatch(x_TD, weights_TK, slots_TK, self._starts)
        run_experts(
            x_ND,
            self.experts,
            weights_NK,
            slots_NK,
            num_experts=self._block.num_experts,
            out_TD=memory.parts(len(x_ND)),
        )
        if shared_TD is not None:
            here.wait_stream(self._beside)
            shared_TD.record_stream(here)
        return memory.combine(slots_TK, self._starts, shared_TD)

    def _route(
        self, x_TD: torch.Tensor, first_slot: int, num_slots: int, counted_T: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        slots = self.slots
        return route(
            self._router_logits(x_TD),
            self._rule,
            first_slot=first_slot,
            num_slots=num_slots,
            correction_E=self.correction_E,
            table=None if slots is None else slots.table,
            load_E=self.load_E,
            counted_T=None if self.load_E is None else counted_T,
        )

    def _count_own(self, counted_T: torch.Tensor) -> torch.Tensor:
        """Return the counts of all gathered tokens, 0 for other ranks', who count their own."""
        rank, ranks = self._mesh.place.tp_rank, self._mesh.attention_ranks
        out_RT = counted_T.new_zeros(ranks, len(counted_T))
        out_RT[rank] = counted_T
        return out_RT.flatten()

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
