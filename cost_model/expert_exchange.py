"""How tokens reach the experts of other ranks when each rank attends for its own sequences.

*Gather*: every rank gets every token, computes what its experts make of them, and the parts are
summed and scattered. *Dispatch*: a token goes to the ranks that hold one of its experts and to no
other, by all-to-all, and what they made of it comes back the same way. Gathering starts sooner: it
knows its sizes beforehand, where dispatch must exchange how many tokens go where, and wait for it.
Dispatch moves less, the more so the more ranks share the experts out.

One choice for both: the cost model prices the one that the executor takes.
"""

from collections.abc import Sequence
from math import comb

from rankwright.cost_model.collectives import (
    Group,
    all_gather_s,
    all_to_all_s,
    reduce_scatter_s,
)
from rankwright.cost_model.efficiency import Exchange
from rankwright.cost_model.model_spec import FeedForward

# Of a kernel's result on the host: the GPU ends what it does, and waits until the host has seen
# it and started the next kernel. Not measured yet: ten launches from Python at 3 us each.
_READ_BACK_S = 3.0e-5


def share_of_ranks(block: FeedForward, ep: int) -> float:
    """Return the share of `ep` ranks that hold one at least of a token's experts.

    Each token chooses evenly and alone, within as many groups of experts as it may. Groups that are
    not on ranks of their own are left out of account, which gives more than there will be.

    >>> moe = FeedForward(kind="moe", intermediate_size=1, num_experts=128, experts_per_token=8)
    >>> round(share_of_ranks(moe, 2), 3), round(share_of_ranks(moe, 32), 3)
    (0.997, 0.23)
    """
    experts, top_k = block.num_experts, block.experts_per_token
    groups, chosen = block.router.num_groups, block.router.groups_per_token
    allowed = 1.0
    if chosen < groups and ep % groups == 0:
        allowed = chosen / groups
        experts, ep = experts * chosen // groups, ep * chosen // groups
    missed = comb(experts - experts // ep, top_k) / comb(experts, top_k)
    return allowed * (1 - missed)


def gather_s(size_bytes: float, group: Group) -> float:
    """Return the seconds to give every rank all tokens' `size_bytes`, and to sum and scatter."""
    return all_gather_s(size_bytes, group) + reduce_scatter_s(size_bytes, group)


def dispatch_s(size_bytes: float, group: Group, share: float) -> float:
    """Return the seconds to send each token to `share` of the ranks, and to get its parts back.

    Args:
        size_bytes: Of all tokens of the group.
        group: Ranks that share the experts out.
        share: Of the ranks, that a token goes to.
    """
    if group.size == 1:
        return 0.0
    counts_s = all_to_all_s(8 * group.size, group) + _READ_BACK_S
    return counts_s + 2 * all_to_all_s(size_bytes * share, group)


def choose_exchange(
    block: FeedForward | None,
    size_bytes: float,
    group: Group,
    *,
    ep: int,
    allowed: Sequence[Exchange],
) -> tuple[Exchange, float]:
    """Return the faster of the `allowed` ways around `block`, and its seconds.

    Columns of a dense block, and of experts that nobody shares out, are on all ranks: there is
    only gathering.

    Args:
        block: What the tokens go to; None: rows of the embedding.
        size_bytes: Of all tokens of the group.
        group: Ranks of the stage, each with tokens of its own.
        ep: Groups of them that share the experts out.
        allowed: What the engine has.

    >>> moe = FeedForward(kind="moe", intermediate_size=1, num_experts=64, experts_per_token=2)
    >>> h100 = Group(8, bytes_per_s=450e9, latency_s=0.8e-6)
    >>> both = ("gather", "dispatch")
    >>> [choose_exchange(moe, n, h100, ep=8, allowed=both)[0] for n in (1e5, 1e8)]
    ['gather', 'dispatch']
    """
    if block is None or block.kind == "dense" or ep == 1 or "dispatch" not in allowed:
        return "gather", gather_s(size_bytes, group)
    times: dict[Exchange, float] = {
        "gather": gather_s(size_bytes, group),
        "dispatch": dispatch_s(size_bytes, group, share_of_ranks(block, ep)),
    }
    chosen = min(allowed, key=times.__getitem__)
    return chosen, times[chosen]
