"""What happens when the solver's time is over."""

from dataclasses import replace
from typing import Any

import pulp
import pytest

from rankwright.cli import main
from rankwright.cost_model.read_model import read_model
from rankwright.cost_model.workload import Workload
from rankwright.planner import ilp, solver
from rankwright.planner.make_plan import make_plan
from rankwright.planner.plan import Plan
from rankwright.planner.solver import Ending, NoIncumbentError, SolverError, solve
from rankwright.topology.shorthand import parse_cluster


def plan_now() -> Plan:
    load = Workload(input_tokens=500, output_tokens=50)
    model = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    return make_plan(model, parse_cluster("2xcpu"), load)


def test_the_best_plan_until_then_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(problem: pulp.LpProblem, limit_s: float, bound: float | None) -> Ending | None:
        ending = solve(problem, limit_s, bound)
        return ending and replace(ending, status="time limit", bound=1.25 * ending.value)

    monkeypatch.setattr(ilp, "solve", stopped)
    plan = plan_now()
    assert plan.certificate.status == "time limit"
    assert plan.certificate.gap == pytest.approx(0.25)
    warning = "NOT PROVED BEST: time limit; a better plan may be better by 25.00%"
    assert warning in plan.explain()


def test_without_any_plan_it_is_exit_code_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(problem: pulp.LpProblem, limit_s: float, bound: float | None) -> Ending | None:
        raise NoIncumbentError("HiGHS ended as 'Not Solved' after 0.1 s without a plan; ...")

    monkeypatch.setattr(ilp, "solve", stopped)
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert main(["plan", model, "--cluster", "1xcpu", "--time-limit", "0.1"]) == 3
    assert "without a plan" in capsys.readouterr().err


class Stopped:
    """A solver that was stopped at a solution of which it does not know whether it is the best."""

    def __init__(self, **_: object) -> None: ...

    def available(self) -> bool:
        return True

    def actualSolve(self, problem: Any, **_: object) -> int:  # noqa: N802
        for variable in problem.variables():
            variable.varValue = 2
        problem.assignStatus(pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible)
        return pulp.LpStatusOptimal


def test_a_solver_without_a_bound_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "find_spec", lambda name: None)
    monkeypatch.setattr(pulp, "COIN_CMD", Stopped)
    problem = pulp.LpProblem("stopped", pulp.LpMaximize)
    problem += 3 * problem.add_variable("x", 0, 7, cat=pulp.LpInteger)
    ending = solve(problem, 0.1, 21.0)
    assert ending is not None
    assert (ending.status, ending.value, ending.bound) == ("time limit", 6, 21)
    assert ending.gap == pytest.approx(2.5)
    with pytest.raises(SolverError, match="CBC reached its limit"):
        solve(problem, 0.1)


def test_no_time_at_all_is_refused() -> None:
    model = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")
    with pytest.raises(ValueError, match="time_limit_s=0: expected more than 0"):
        make_plan(model, parse_cluster("1xcpu"), Workload(), time_limit_s=0)
