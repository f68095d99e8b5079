"""Which way tokens take to the experts of other ranks, with attention DP.

The cost model's own choice (`cost_model/expert_exchange.py`): what is predicted is what runs.
"""

import os

import torch

from rankwright.cost_model.collectives import Group, find_group
from rankwright.cost_model.efficiency import Exchange, find_efficiency
from rankwright.cost_model.expert_exchange import choose_exchange
from rankwright.cost_model.model_spec import FeedForward
from rankwright.executor.expert_memory import ExpertMemory
from rankwright.executor.mesh import Mesh

# `gather` or `dispatch` for all sizes, or `peers` for steps that fit into `ExpertMemory`, for
# trials; unset: by size, of what ran on such a device.
VARIABLE = "RANKWRIGHT_EXPERT_EXCHANGE"


def open_expert_memory(
    mesh: Mesh, *, top_k: int, dim: int, dtype: torch.dtype
) -> ExpertMemory | None:
    """Return the memory through which tokens of small steps go, where the variable asks for it.

    All layers share it: the first to call opens it. All ranks of a stage must call this together.

    Raises:
        ValueError: The TP group is not of GPUs of one machine.
    """
    if mesh.attention_ranks == 1 or os.environ.get(VARIABLE) != "peers":
        return None
    group, nodes = mesh.tp.process_group, {mesh.plan.ranks[rank].node for rank in mesh.tp.ranks}
    if group is None or mesh.device.type != "cuda" or len(nodes) > 1:
        raise ValueError(f"{VARIABLE}=peers needs the GPUs of a stage on one machine")
    if mesh.expert_memory is None:
        mesh.expert_memory = ExpertMemory(
            group, top_k=top_k, dim=dim, dtype=dtype, moe_tp=mesh.split.moe_tp, device=mesh.device
        )
    return mesh.expert_memory


class ExchangeChoice:
    """Chooses for one block, by how many tokens there are."""

    def __init__(self, mesh: Mesh, block: FeedForward) -> None:
        """Read the variable and the links between the ranks of the stage.

        Raises:
            ValueError: The variable names another way.
        """
        self._block = block
        self._ranks, self._ep = mesh.split.tp, mesh.split.ep
        self._allowed, self._links = _allowed_and_links(mesh)
        self._chosen: dict[int, Exchange] = {}

    def __call__(self, x_TD: torch.Tensor) -> Exchange:
        """Return the way for `x_TD`, this rank's tokens: all ranks have as many, so all agree.

        A captured graph gathers, as no host can read in it how many tokens go where.
        """
        if x_TD.is_cuda and torch.cuda.is_current_stream_capturing():
            return "gather"
        if self._links is None:
            return self._allowed[0]
        size_bytes = x_TD.numel() * x_TD.element_size() * self._ranks
        if size_bytes not in self._chosen:
            self._chosen[size_bytes] = choose_exchange(
                self._block, size_bytes, self._links, ep=self._ep, allowed=self._allowed
            )[0]
        return self._chosen[size_bytes]


def _allowed_and_links(mesh: Mesh) -> tuple[tuple[Exchange, ...], Group | None]:
    """Return the ways that there are, and the links to choose by; None: take the first."""
    forced = os.environ.get(VARIABLE)
    if forced in ("gather", "dispatch", "peers"):
        return ("dispatch" if forced == "dispatch" else "gather",), None
    if forced:
        raise ValueError(
            f"{VARIABLE} is {forced!r}; expected gather, dispatch or peers, or nothing"
        )
    plan, place = mesh.plan, mesh.place
    gpu = next(gpu for gpu in plan.cluster.node(place.node).gpus if gpu.index == place.gpu)
    allowed = find_efficiency("rankwright", gpu).expert_exchanges
    if len(allowed) == 1:
        return allowed, None
    places = tuple((plan.ranks[rank].node, plan.ranks[rank].gpu) for rank in mesh.tp.ranks)
    try:
        return allowed, find_group(plan.cluster, places)
    except ValueError:  # ranks that no link joins, in a plan that no planner made
        return ("gather",), None
