from pathlib import Path

import pytest

from rankwright.cli import main
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.trace import TraceRow, workload_of
from rankwright.cost_model.workload import Workload
from rankwright.planner.make_plan import NoFeasiblePlanError, make_plan
from rankwright.topology.shorthand import parse_cluster

LLAMA_8B = read_model("meta-llama/Llama-3.1-8B")
FOUR = parse_cluster("4xh100-sxm")


def test_a_limit_above_the_median_is_decided_by_simulation() -> None:
    load = Workload(input_tokens=2000, output_tokens=100, request_rate=4.0, ttft_limit_s=1.0)
    usual = make_plan(LLAMA_8B, FOUR, load)
    assert not any(note.startswith("simulated") for note in usual.assumptions)
    strict = make_plan(LLAMA_8B, FOUR, load.model_copy(update={"percentile": 95}))
    (note,) = (one for one in strict.assumptions if one.startswith("simulated: 400 requests"))
    assert note.endswith("at the 95th percentile")
    assert float(note.split("TTFT ")[1].split(" ms")[0].replace(",", "")) <= 1000


def test_bursts_that_break_a_limit_are_refused_with_what_would_do() -> None:
    # Forty requests at once, and again every ten seconds: the means say four a second.
    burst = [
        TraceRow(arrival_s=10.0 * wave, input_tokens=4000, output_tokens=20)
        for wave in range(4)
        for _ in range(40)
    ]
    load = workload_of(tuple(burst))
    assert load.request_rate == pytest.approx(159 / 30)
    limits = {"ttft_limit_s": 0.4, "percentile": 90}
    with pytest.raises(NoFeasiblePlanError) as caught:
        make_plan(LLAMA_8B, FOUR, load.model_copy(update=limits), trace=burst)
    assert caught.value.constraint.startswith("limits at the 90th percentile: simulated, ")
    words = caught.value.change.split()
    assert words[:4] == ["a", "TTFT", "limit", "of"]
    looser = {**limits, "ttft_limit_s": float(words[4]) / 1e3}
    plan = make_plan(LLAMA_8B, FOUR, load.model_copy(update=looser), trace=burst)
    assert any("of the trace's 160" in note for note in plan.assumptions)


def test_a_trace_takes_the_place_of_lengths_and_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.csv"
    rows = "".join(f"{second},100,10\n" for second in range(5))
    path.write_text(f"arrival_s,input_tokens,output_tokens\n{rows}", encoding="utf-8")
    command = ["plan", "HuggingFaceTB/SmolLM2-135M-Instruct", "--cluster", "1xcpu"]
    assert main([*command, "--trace", str(path)]) == 0
    assert "100 input and 10 output tokens" in capsys.readouterr().out
    assert main([*command, "--trace", str(path), "--isl", "5"]) == 2
    assert "--isl and --trace both say what the requests are" in capsys.readouterr().err
    path.write_text("arrival_s,input_tokens,output_tokens\n0,many,10\n", encoding="utf-8")
    assert main([*command, "--trace", str(path)]) == 2
    error = capsys.readouterr().err
    assert "line 2" in error
    assert "input_tokens" in error
