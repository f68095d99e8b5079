from typing import Any

import pytest

from rankwright.cost_model.efficiency import ENGINES
from rankwright.cost_model.legality import FORMS, cut_is_legal
from rankwright.cost_model.read_model import read_model

LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")
QWEN_MOE = read_model("Qwen/Qwen3-30B-A3B")


def test_every_engine_has_a_row() -> None:
    assert set(FORMS) == set(ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_plain_tensor_parallelism_is_legal_everywhere(engine: str) -> None:
    assert cut_is_legal(LLAMA_8B, tp=8, engine=engine) is None
    assert cut_is_legal(QWEN_MOE, tp=4, ep=4, engine=engine) is None


def test_engines_differ_in_what_they_run() -> None:
    hybrid = {
        engine: cut_is_legal(QWEN_MOE, tp=4, ep=2, engine=engine) for engine in ("vllm", "trtllm")
    }
    assert hybrid["trtllm"] is None
    assert hybrid["vllm"] == "ep=2 of tp=4: vllm shares experts over all ranks or none"
    dense = cut_is_legal(LLAMA_8B, tp=4, attention="dp", engine="sglang")
    assert dense == "sglang runs attention DP for models with experts only"
    assert cut_is_legal(QWEN_MOE, tp=4, ep=4, attention="dp", engine="sglang") is None
    # No head is cut, so that none need divide.
    assert cut_is_legal(QWEN_MOE, tp=3, attention="dp", engine="sglang") is None
    stages = cut_is_legal(QWEN_MOE, tp=4, ep=4, pp=2, attention="dp", engine="vllm")
    assert stages == "pp=2: vllm runs attention DP within one stage only"
    assert cut_is_legal(QWEN_MOE, tp=4, ep=4, pp=2, attention="dp", engine="sglang") is None
    uneven = cut_is_legal(LLAMA_8B, tp=3, engine="vllm")
    assert uneven is not None
    assert "tp=3 does not divide the 32 query heads" in uneven


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        ({"tp": 0}, "expected 1 or more of each"),
        ({"tp": 2, "ep": 2}, "the model has no experts"),
        ({"tp": 1, "attention": "dp"}, "attention DP over one rank is TP1"),
        ({"tp": 20000, "attention": "dp"}, "without any of the 14336 feed-forward columns"),
    ],
)
def test_what_no_engine_runs_says_why(degrees: dict[str, Any], reason: str) -> None:
    found = cut_is_legal(LLAMA_8B, **degrees)
    assert found is not None
    assert reason in found


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match="engine 'tgi': expected one of rankwright, vllm"):
        cut_is_legal(LLAMA_8B, tp=1, engine="tgi")
