"""Routing of a MoE block: from router logits to the expert slots of each token and their weights.

Shapes: T tokens, E experts, K experts a token, R replicas of an expert at most.

An expert lives in one or more slots of the ranks that share the experts out. A rank runs the pairs
(token, expert) whose slot is its own, so that what comes out of routing are this rank's slot
numbers, and -1 for the pairs of others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rankwright.kernels.backend import Backend, jit, next_power_of_two, runs_triton, tl


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """How experts are chosen and weighted; the same fields as the model's router has."""

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


@dataclass(frozen=True, slots=True)
class SlotTable:
    """Where the experts are, when not in order: token t goes to replica `t % replicas[e]`.

    The tensors may change between steps (also of a captured graph), their shapes may not.
    """

    slots: torch.Tensor  # int32 [E, R], slot numbers over all ranks
    replicas: torch.Tensor  # int32 [E], 1 to R


def route_reference(
    logits_TE: torch.Tensor,
    rule: RoutingRule,
    *,
    first_slot: int,
    num_slots: int,
    correction_E: torch.Tensor | None = None,
    table: SlotTable | None = None,
    load_E: torch.Tensor | None = None,
    counted_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights [T, K] in float32 and this rank's slots [T, K] in int32; see `route`."""
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.sigmoid() if rule.scoring == "sigmoid" else logits_TE.softmax(-1)
    choice_TE = scores_TE if correction_E is None else scores_TE + correction_E.float()
    if rule.num_groups > rule.groups_per_token:
        choice_TGS = choice_TE.view(num_tokens, rule.num_groups, -1)
        best = 2 if rule.group_score == "top2_sum" else 1
        group_TG = choice_TGS.topk(min(best, choice_TGS.shape[2]), dim=-1).values.sum(-1)
        allowed_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        allowed_TG.scatter_(1, group_TG.topk(rule.groups_per_token, dim=-1).indices, True)
        choice_TE = choice_TGS.masked_fill(~allowed_TG.unsqueeze(-1), -torch.inf).flatten(1)
    experts_TK = choice_TE.topk(rule.top_k, dim=-1).indices
    weights_TK = scores_TE.gather(1, experts_TK)
    if rule.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + _TINY)
    if load_E is not None:
        counted_TK = experts_TK if counted_T is None else experts_TK[counted_T > 0]
        load_E += torch.bincount(counted_TK.flatten(), minlength=num_experts).to(load_E.dtype)
    if table is None:
        slots_TK = experts_TK
    else:
        token_T1 = torch.arange(num_tokens, device=logits_TE.device).unsqueeze(1)
        slots_TK = table.slots[experts_TK, token_T1 % table.replicas[experts_TK]].long()
    slots_TK = slots_TK - first_slot
    slots_TK = slots_TK.where((slots_TK >= 0) & (slots_TK < num_slots), -1)
    return weights_TK * rule.scale, slots_TK.to(torch.int32)


# Keeps a sum of scores that are all zero from dividing by zero (DeepSeek-V3's own code).
_TINY = 1e-20


@jit(do_not_specialize=("first_slot", "num_slots"))
def _route_kernel(
    logits_ptr,
    correction_ptr,
    table_ptr,
    replicas_ptr,
    load_ptr,
    counted_ptr,
    weights_ptr,
    slots_ptr,
    scale,
    first_slot,
    num_slots,
    logits_stride,
    TOP_K: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PER_TOKEN: tl.constexpr,
    MAX_REPLICAS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOP2: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_LOAD: tl.constexpr,
    HAS_COUNTED: tl.constexpr,
    TINY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    member = tl.arange(0, BLOCK_S)
    expert = group[:, None] * GROUP_SIZE + member[None, :]
    mask = (group < NUM_GROUPS)[:, None] & (member < GROUP_SIZE)[None, :]
    at = logits_ptr + token * logits_stride + expert
    logits = tl.load(at, mask=mask, other=-float("inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.where(mask, tl.sigmoid(logits), 0.0)
    else:
        highest = tl.max(tl.max(logits, axis=1), axis=0)
        scores = tl.exp(logits - highest)
        scores = scores / tl.sum(tl.sum(scores, axis=1), axis=0)
    choice = scores
    if HAS_CORRECTION:
        choice += tl.load(correction_ptr + expert, mask=mask, other=0.0).to(tl.float32)
    choice = tl.where(mask, choice, -float("inf"))

    if NUM_GROUPS > GROUPS_PER_TOKEN:
        best = tl.max(choice, axis=1)
        if TOP2:
            first = tl.argmax(choice, axis=1)
            rest = tl.where(member[None, :] == first[:, None], -float("inf"), choice)
            best += tl.max(rest, axis=1)
        allowed = tl.zeros([BLOCK_G], tl.int32)
        for _ in tl.static_range(GROUPS_PER_TOKEN):
            chosen = tl.argmax(best, axis=0)
            allowed = tl.where(group == chosen, 1, allowed)
            best = tl.where(group == chosen, -float("inf"), best)
        choice = tl.where(allowed[:, None] > 0, choice, -float("inf"))

    choice = tl.reshape(choice, [BLOCK_G * BLOCK_S])
    scores = tl.reshape(scores, [BLOCK_G * BLOCK_S])
    index = tl.arange(0, BLOCK_G * BLOCK_S)
    k = tl.arange(0, BLOCK_K)
    weights = tl.zeros([BLOCK_K], tl.float32)
    experts = tl.zeros([BLOCK_K], tl.int32)
    for i in tl.static_range(TOP_K):
        chosen = tl.argmax(choice, axis=0)
        weight = tl.sum(tl.where(index == chosen, scores, 0.0), axis=0)
        weights = tl.where(k == i, weight, weights)
        experts = tl.where(k == i, (chosen // BLOCK_S) * GROUP_SIZE + chosen % BLOCK_S, experts)
        choice = tl.where(index == chosen, -float("inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + TINY)

    mine = k < TOP_K
    if HAS_LOAD:
        one = tl.full([BLOCK_K], 1, load_ptr.dtype.element_ty)
        counted = mine
        if HAS_COUNTED:
            counted = mine & (tl.load(counted_ptr + token) > 0)
        tl.atomic_add(load_ptr + experts, one, mask=counted, sem="relaxed")
    slots = experts
    if HAS_TABLE:
        replicas = tl.load(replicas_ptr + experts, mask=mine, other=1)
        replica = (token % replicas).to(tl.int32)
        slots = tl.load(table_ptr + experts * MAX_REPLICAS + replica, mask=mine, other=-1)
    slots -= first_slot
    slots = tl.where((slots >= 0) & (slots < num_slots), slots, -1)
    tl.store(weights_ptr + token * TOP_K + k, weights * scale, mask=mine)
    tl.store(slots_ptr + token * TOP_K + k, slots, mask=mine)


def route(
    logits_TE: torch.Tensor,
    rule: RoutingRule,
    *,
    first_slot: int = 0,
    num_slots: int | None = None,
    correction_E: torch.Tensor | None = None,
    table: SlotTable | None = None,
    load_E: torch.Tensor | None = None,
    counted_T: torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights [T, K] in float32 and the slots [T, K] in int32 of each token's experts.

    A slot is counted from this rank's first; -1 where another rank has it. Equal scores go to the
    lower expert on GPUs.

    Args:
        logits_TE: Router logits; rows may be strided.
        rule: How experts are chosen.
        first_slot: First slot of this rank, over all ranks.
        num_slots: Slots of this rank; None: all experts.
        correction_E: Added to the scores for the choice only (DeepSeek-V3, arXiv 2412.19437,
            section 2.1.2).
        table: Where each expert is; None: expert e is in slot e.
        load_E: int64 counters of how often each expert was chosen, added to.
        counted_T: int32, 0 for tokens that are padding and do not count; None: all count.
        backend: What runs it, see `runs_triton`.

    Raises:
        ValueError: Groups do not divide the experts, or hold too few of them.
    """
    num_tokens, num_experts = logits_TE.shape
    group_size, rest = divmod(num_experts, rule.num_groups)
    if rest or not rule.top_k <= group_size * min(rule.groups_per_token, rule.num_groups):
        raise ValueError(
            f"route: {rule.top_k} of {num_experts} experts from {rule.groups_per_token} of "
            f"{rule.num_groups} groups; expected equal groups, with that many experts in those"
        )
    num_slots = num_experts if num_slots is None else num_slots
    if not runs_triton(logits_TE, backend):
        return route_reference(
            logits_TE,
            rule,
            first_slot=first_slot,
            num_slots=num_slots,
            correction_E=correction_E,
            table=table,
            load_E=load_E,
            counted_T=counted_T,
        )
    if logits_TE.stride(1) != 1:
        logits_TE = logits_TE.contiguous()
    device = logits_TE.device
    weights_TK = torch.empty((num_tokens, rule.top_k), dtype=torch.float32, device=device)
    slots_TK = torch.empty((num_tokens, rule.top_k), dtype=torch.int32, device=device)
    # A program that does not group reads one row: in groups of all, rows would be padded for none.
    grouped = rule.num_groups > rule.groups_per_token
    num_groups = rule.num_groups if grouped else 1
    group_size = num_experts // num_groups
    if num_tokens:
        _route_kernel[(num_tokens,)](
            logits_TE,
            logits_TE if correction_E is None else correction_E,
            slots_TK if table is None else table.slots,
            slots_TK if table is None else table.replicas,
            slots_TK if load_E is None else load_E,
            slots_TK if counted_T is None else counted_T,
            weights_TK,
            slots_TK,
            rule.scale,
            first_slot,
            num_slots,
            logits_TE.stride(0),
            TOP_K=rule.top_k,
            NUM_GROUPS=num_groups,
            GROUP_SIZE=group_size,
            GROUPS_PER_TOKEN=rule.groups_per_token if grouped else 1,
            MAX_REPLICAS=1 if table is None else table.slots.shape[1],
            BLOCK_G=next_power_of_two(num_groups),
            BLOCK_S=next_power_of_two(group_size),
            BLOCK_K=next_power_of_two(rule.top_k),
            SIGMOID=rule.scoring == "sigmoid",
            NORMALIZE=rule.normalize,
            TOP2=rule.group_score == "top2_sum" and group_size > 1,
            HAS_CORRECTION=correction_E is not None,
            HAS_TABLE=table is not None,
            HAS_LOAD=load_E is not None,
            HAS_COUNTED=counted_T is not None,
            TINY=_TINY,
            num_warps=1,
        )
    return weights_TK, slots_TK
