import pytest
from tests.executor.conftest import Reference
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks

from rankwright.cost_model.read_model import read_model
from rankwright.executor.control import CONTROL_BYTES


@pytest.mark.parametrize("size", [0, 1, CONTROL_BYTES - 8, CONTROL_BYTES - 7, 100_000])
def test_control_messages_of_any_size_reach_every_rank_of_the_replica(
    references: dict[str, Reference], pool: Ranks, size: int
) -> None:
    plan = cpu_plan(read_model(references["llama"].folder), tp=2, dp=2)
    results = pool.run(4, "tests.executor.cases", "control", plan.model_dump_json(), size)
    assert [len(result) for result in results] == [size] * 4
    # Each replica hears its own leader.
    assert results[0] == results[1]
    assert results[2] == results[3]
    assert size == 0 or results[0] != results[2]


def test_columns_of_an_odd_vocabulary_come_together_in_order(
    references: dict[str, Reference], pool: Ranks
) -> None:
    plan = cpu_plan(read_model(references["llama"].folder), tp=4)
    results = pool.run(4, "tests.executor.cases", "columns", plan.model_dump_json())
    assert results == [list(range(plan.model.vocab_size))] * 4
