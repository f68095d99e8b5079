"""Routing: the reference against values by hand, the kernel against the reference."""

from dataclasses import replace

import pytest
import torch

from rankwright.kernels.backend import Backend
from rankwright.kernels.moe_routing import RoutingRule, SlotTable, route, route_reference

SOFTMAX = RoutingRule(top_k=2)
# As in DeepSeek-V2 (5 groups, 3 of them) and V3 (sigmoid, correction), with odd sizes.
V2 = RoutingRule(
    top_k=6, normalize=False, scale=1.5, num_groups=5, groups_per_token=3, group_score="max"
)
V3 = RoutingRule(
    top_k=4, scoring="sigmoid", scale=2.5, num_groups=4, groups_per_token=2, group_score="top2_sum"
)
RULES = {
    "softmax": (SOFTMAX, 8),
    "not normalised": (RoutingRule(top_k=3, normalize=False), 13),
    "one of one": (RoutingRule(top_k=1), 1),
    "all": (RoutingRule(top_k=5), 5),
    "groups by their best": (V2, 35),
    "groups by their two best": (V3, 24),
    "groups of one expert": (replace(V3, num_groups=9, groups_per_token=4), 9),
    "more groups allowed than needed": (replace(V3, groups_per_token=4), 24),
}


def test_weights_of_the_chosen_sum_to_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    weights, slots = route(logits, SOFTMAX)
    assert slots.tolist() == [[1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.7310586, 0.2689414]]))


def test_correction_changes_the_choice_and_not_the_weights() -> None:
    rule = RoutingRule(top_k=1, scoring="sigmoid", normalize=False)
    logits = torch.tensor([[0.0, 3.0]])
    weights, slots = route(logits, rule, correction_E=torch.tensor([1.0, 0.0]))
    assert (slots.item(), weights.item()) == (0, 0.5)


def test_only_the_best_groups_are_chosen_from() -> None:
    rule = RoutingRule(top_k=2, num_groups=2, groups_per_token=1, group_score="top2_sum")
    _, slots = route(torch.tensor([[5.0, -9.0, 4.0, 4.0]]), replace(rule, scoring="sigmoid"))
    assert sorted(slots[0].tolist()) == [2, 3]
    _, slots = route(torch.tensor([[5.0, -9.0, 4.0, 4.0]]), replace(rule, group_score="max"))
    assert sorted(slots[0].tolist()) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", RULES)
def test_kernel_equals_reference(name: str, tokens: int, dtype: torch.dtype, device: str) -> None:
    rule, num_experts = RULES[name]
    # Distinct logits: which of two equal experts is chosen is nobody's promise.
    logits = torch.stack([torch.randperm(num_experts) for _ in range(tokens)])
    logits = ((logits - num_experts / 2) / 4).to(device, dtype)
    correction = torch.rand(num_experts, device=device) * 0.01 if "two best" in name else None
    weights, slots = route(logits, rule, correction_E=correction, backend="triton")
    expected, expected_slots = route(logits, rule, correction_E=correction, backend="reference")
    order, expected_order = slots.argsort(-1), expected_slots.argsort(-1)
    assert torch.equal(slots.gather(1, order), expected_slots.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected.gather(1, expected_order))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_pairs_of_other_ranks_are_marked_and_loads_counted(backend: Backend, device: str) -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]], device=device)
    load = torch.tensor([5, 0, 0, 0], device=device)
    _, slots = route(logits, SOFTMAX, first_slot=1, num_slots=2, load_E=load, backend=backend)
    assert slots.tolist() == [[-1, 0], [-1, 1]]
    assert load.tolist() == [6, 1, 1, 1]
    counted = torch.tensor([0, 4], dtype=torch.int32, device=device)  # the first token is padding
    route(logits, SOFTMAX, load_E=load, counted_T=counted, backend=backend)
    assert load.tolist() == [6, 1, 2, 2]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_tokens_take_turns_over_replicas(backend: Backend, device: str) -> None:
    # Expert 0 is in slots 3 and 0, expert 1 in slot 2; slot 1 is not used.
    table = SlotTable(
        torch.tensor([[3, 0], [2, -7]], dtype=torch.int32, device=device),
        torch.tensor([2, 1], dtype=torch.int32, device=device),
    )
    logits = torch.tensor([[9.0, 0.0]] * 3 + [[0.0, 9.0]], device=device)
    rule = RoutingRule(top_k=1)
    _, slots = route(logits, rule, num_slots=4, table=table, backend=backend)
    assert slots.flatten().tolist() == [3, 0, 3, 2]
    _, slots = route(  # the rank of slots 2 and 3
        logits,
        rule,
        first_slot=2,
        num_slots=2,
        table=table,
        backend=backend,
    )
    assert slots.flatten().tolist() == [1, -1, 1, 0]


def test_no_tokens_is_fine(device: str) -> None:
    weights, slots = route(torch.ones(0, 4, device=device), SOFTMAX, backend="triton")
    assert weights.shape == slots.shape == (0, 2)


def test_strided_logits(device: str) -> None:
    wide = torch.randn(4, 20, device=device)
    for logits in (wide[:, 3:11], wide[:, ::2]):
        ours, _ = route(logits, SOFTMAX, backend="triton")
        theirs, _ = route_reference(logits, SOFTMAX, first_slot=0, num_slots=10)
        torch.testing.assert_close(ours.sort().values, theirs.sort().values)


@pytest.mark.parametrize(
    ("rule", "num_experts"),
    [(RoutingRule(top_k=5), 4), (V2, 36), (replace(V3, groups_per_token=1), 12)],
)
def test_too_few_experts_are_refused(rule: RoutingRule, num_experts: int) -> None:
    with pytest.raises(ValueError, match=r"route: \d of \d+ experts from"):
        route(torch.zeros(1, num_experts), rule)
