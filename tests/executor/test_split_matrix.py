"""What the planner calls legal runs and is right: every family in every product of parallel forms.

Each case runs the real runner and engine over gloo, with requests that come, wait, share a prefix
and go: the tokens are those that transformers would take, and the logits that they were drawn from
are transformers'. A part of `split_cells.py`'s cases runs by default, beside some that Hypothesis
draws from all legal splits; `RANKWRIGHT_MATRIX=whole` runs all cases and more draws.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks, ranks
from tests.executor.split_cells import (
    FAMILIES,
    MOE_FAMILIES,
    MOST_FORMS,
    Case,
    cells,
    every_case,
    forms_of,
    legal_splits,
    usual_cases,
)
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.read_model import read_model
from rankwright.executor.models.supported import check_supported

Result = tuple[dict[str, list[int]], dict[tuple[int, int], np.ndarray]]

IS_WHOLE = os.environ.get("RANKWRIGHT_MATRIX") == "whole"
NUM_DRAWS = 8 if IS_WHOLE else 2
# Tokens to make of each request. Most blocks that it holds at last are of 16 tokens.
LENGTHS = (48, 20, 48, 7)
LONGEST_BLOCKS = 6
# Room for two long sequences a rank, so that others wait or are sent back.
ORDER = [0, 1, 2, 3]
LIMITS: dict[str, Any] = {"num_blocks": 12, "max_num_seqs": 4, "max_batched_tokens": 40}


def chosen() -> list[Case]:
    """Return the cases of this run, smallest first: processes are started as they are needed."""
    cases = every_case() if IS_WHOLE else usual_cases(2)
    return sorted(cases, key=lambda case: case.split.num_gpus)


def requests_of(reference: Reference) -> list[list[int]]:
    """Return the prompts: the last begins as the one before it, for more than a block."""
    first, second, third = prompts(reference.vocab_size, (1, 17, 40))
    return [first, second, third, [*third[:19], 3]]


@pytest.fixture(scope="module")
def known(
    references: dict[str, Reference], moe_references: dict[str, Reference]
) -> dict[str, Reference]:
    return references | moe_references


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest, known: dict[str, Reference], pool: Ranks
) -> Iterator[dict[str, Future[list[Result]]]]:
    """What the ranks of each case say: of the whole matrix two cases run at once.

    One alone leaves a third of two cores idle: ranks wait for each other, and then for the test.
    """
    here = threading.local()
    with ranks() as second, ThreadPoolExecutor(1 + IS_WHOLE) as executor:
        free = [second, pool]

        def run(case: Case) -> list[Result]:
            if not hasattr(here, "pool"):
                here.pool = free.pop()
            return run_case(here.pool, known[case.family], case, LIMITS, ORDER)

        asked = [getattr(item, "callspec", None) for item in request.session.items]
        cases = [spec.params["case"] for spec in asked if spec and "case" in spec.params]
        yield {str(case): executor.submit(run, case) for case in cases}
        executor.shutdown(cancel_futures=True)


def run_case(
    pool: Ranks, reference: Reference, case: Case, limits: dict[str, Any], order: list[int]
) -> list[Result]:
    """Serve the requests in this order; return what each rank says."""
    degrees: dict[str, Any] = case.split.model_dump(
        include={"tp", "pp", "dp", "ep", "cp", "attention", "cp_exchange", "stage_layers"}
    )
    plan = cpu_plan(read_model(reference.folder), **degrees, **limits)
    plan = plan.model_copy(update={"expert_slots": case.slots})
    check_supported(plan)
    texts = requests_of(reference)
    # The seed tells whose a row of logits is: greedy requests draw nothing.
    requests = [
        (f"r{i}", texts[i], {"temperature": 0.0, "max_tokens": LENGTHS[i], "seed": i})
        for i in order
    ]
    said: list[Result] = pool.run(
        plan.num_gpus,
        "tests.executor.cases",
        "tokens_and_logits",
        plan.model_dump_json(),
        str(reference.folder),
        requests,
    )
    return said


def check(reference: Reference, said: list[Result]) -> None:
    """Hold tokens and logits to transformers'."""
    answers: dict[str, list[int]] = {}
    logits: dict[tuple[int, int], np.ndarray] = {}
    for tokens, rows in said:
        answers |= tokens
        logits |= rows
    assert len(logits) == sum(LENGTHS)
    for i, (text, length) in enumerate(zip(requests_of(reference), LENGTHS, strict=True)):
        answer = answers[f"r{i}"]
        assert answer == reference.greedy(text, length, answer), f"request {i}"
        theirs = reference.drawn_from(text, length)
        ours = np.stack([logits[i, len(text) + step] for step in range(length)])
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max(), f"request {i}"


def test_the_matrix_has_every_family_in_every_product_of_two_and_every_product_of_three() -> None:
    every = every_case()
    assert len({str(case) for case in every}) == len(every) >= 240
    assert len({case.split.label() for case in every}) >= 60
    for family in FAMILIES:
        mine = [case for case in every if case.family == family]
        legal = cells(family)
        run = {forms_of(case.split) for case in mine}
        assert run >= {forms for forms in legal if len(forms) < MOST_FORMS}
        assert set(legal) >= run
        names = {name for forms in legal for name in forms}
        has_experts = any(case.slots for case in mine)
        assert has_experts == (family in MOE_FAMILIES)
        assert names == {"TP", "PP", "DP", "CP", "CP ring", "attention DP"} | (
            {"EP"} if has_experts else set()
        )
    run = {forms_of(case.split) for case in every}
    assert run == {forms for family in FAMILIES for forms in cells(family)}
    assert any(8 % case.split.tp for case in every)
    usual = usual_cases(2)
    assert len({str(case) for case in usual}) == 2 * len(FAMILIES)
    assert len({forms_of(case.split) for case in usual}) >= 16


@pytest.mark.parametrize("case", chosen(), ids=str)
def test_a_legal_split_gives_the_logits_and_tokens_of_transformers(
    known: dict[str, Reference], results: dict[str, Future[list[Result]]], case: Case
) -> None:
    check(known[case.family], results[str(case)].result())


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    """Any legal split of any family, its layers over the stages in any way."""
    family = draw(st.sampled_from(FAMILIES))
    split = draw(st.sampled_from(legal_splits(family)))
    num_layers = sum(split.stage_layers)
    cuts = draw(st.permutations(range(1, num_layers)))[: split.pp - 1]
    edges = [0, *sorted(cuts), num_layers]
    layers = tuple(stop - start for start, stop in pairwise(edges))
    return Case(family, split.model_copy(update={"stage_layers": layers}))


@settings(
    max_examples=NUM_DRAWS,
    derandomize=not IS_WHOLE,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    case=drawn_cases(),
    limits=st.fixed_dictionaries(
        {
            "num_blocks": st.integers(LONGEST_BLOCKS, 16),
            "max_num_seqs": st.integers(1, 5),
            "max_batched_tokens": st.integers(1, 64),
        }
    ),
    order=st.permutations(range(len(LENGTHS))),
)
def test_any_legal_split_under_any_limits_gives_the_logits_and_tokens_of_transformers(
    known: dict[str, Reference],
    pool: Ranks,
    case: Case,
    limits: dict[str, Any],
    order: list[int],
) -> None:
    check(known[case.family], run_case(pool, known[case.family], case, limits, order))
