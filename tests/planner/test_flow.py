"""The formula of a steady state against the scheduler that serves it, on a virtual clock."""

import pytest

from bench_flow import compare
from rankwright.cost_model.read_model import read_model

LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize(
    ("form", "load"),
    [
        ((1, 1), (1024, 128, 4)),
        ((2, 1), (512, 16, 16)),  # prompts meet by chance, and slots wait for their next request
        ((1, 2), (6000, 64, 8)),  # a prompt's chunks follow each other through the stages
        ((1, 4), (6000, 64, 1)),  # and fill a pipeline that has one sequence
    ],
)
def test_the_formula_is_near_the_scheduler(
    form: tuple[int, int], load: tuple[int, int, int]
) -> None:
    row = compare(LLAMA_8B, *form, *load)
    assert row["output_tokens_per_s_ratio"] == pytest.approx(1, abs=0.06)
    assert row["tpot_s_ratio"] == pytest.approx(1, abs=0.06)
