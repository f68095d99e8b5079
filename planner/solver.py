"""Runs an integer program and says honestly how it ended.

HiGHS inside the process first; the CBC that comes with PuLP where HiGHS is missing.
"""

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter

import pulp

# No program of ours has taken a second; this only keeps a plan from hanging.
TIME_LIMIT_S = 20.0
# The largest objective, in the unit that the solver sees: its tolerances are absolute, about 1e-6,
# while seconds of a request are small and tokens of 16,384 GPUs many.
LARGEST = 1e4
# Choices this much worse than the best in the objective count as equal to it.
TIE = 1e-6
_SMALL = 1000  # variables, up to which a program needs no heuristic to have a solution soon


@dataclass(frozen=True, slots=True)
class Ending:
    """How a solver ended.

    Args:
        status: `optimal`, or `time limit` when a solution was found but not proved best.
        value: Objective of the solution.
        bound: No solution can be better than this.
        solver: Name and version.
        seconds: Wall-clock time.
    """

    status: str
    value: float
    bound: float
    solver: str
    seconds: float

    @property
    def gap(self) -> float:
        """Distance between bound and value, relative to the value."""
        return abs(self.bound - self.value) / max(abs(self.value), 1e-12)


class SolverError(RuntimeError):
    """The solver failed, or none is installed."""


class NoIncumbentError(SolverError):
    """The solver's time was over before it had a solution or a proof that there is none."""


def solve(
    problem: "pulp.LpProblem", time_limit_s: float = TIME_LIMIT_S, bound: float | None = None
) -> Ending | None:
    """Solve `problem` in place and return how it ended; None when it has no solution.

    Args:
        problem: Its variables have the solution afterwards.
        time_limit_s: After which the best solution until then is taken.
        bound: What no solution can beat, for a solver that reports no bound of its own.

    Raises:
        NoIncumbentError: Its time was over without a solution.
        SolverError: It failed.
    """
    # One thread: our programs are solved at the root, and HiGHS's threads cost more than that.
    options: dict[str, object] = {
        "msg": False,
        "timeLimit": time_limit_s,
        "gapRel": 0.0,
        "gapAbs": 0.0,
        "threads": 1,
    }
    use_highs = find_spec("highspy") is not None
    # Without presolve: that of HiGHS 1.14 and 1.15 loses optima of programs with set-packing rows
    # and big-M links, which ours are, and calls what is left optimal (ERGO-Code/HiGHS issue 3094;
    # `test_highs_is_asked_without_its_presolve` has one that ends at a tenth of the optimum).
    # Without its symmetry detection: with it 5 of 315 placements of experts, all near one that
    # Hypothesis found, were called optimal up to 3 % above the optimum, and none of 315 without
    # (`test_highs_is_asked_without_its_symmetry_detection` has one).
    # Without its feasibility jump where the root solves the program: of the 11 ms that HiGHS 1.15
    # took for one of six variables, 9.5 were this heuristic, and a plan solves five.
    jump = len(problem.variables()) > _SMALL
    highs_options = {
        "presolve": "off",
        "mip_detect_symmetry": False,
        "mip_heuristic_run_feasibility_jump": jump,
    }
    solver = pulp.HiGHS(**options, **highs_options) if use_highs else _cbc(options)
    start = perf_counter()
    problem.solve(solver)
    seconds = perf_counter() - start
    if problem.status == pulp.LpStatusInfeasible:
        return None
    name = f"HiGHS {_highs_version(problem)}" if use_highs else "CBC"
    found = problem.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if problem.status != pulp.LpStatusOptimal or not found:
        raise NoIncumbentError(
            f"{name} ended as {pulp.LpStatus[problem.status]!r} after {seconds:.1f} s without a "
            "plan; give it more time (--time-limit), or pin some degrees (--tp, --pp) to make the "
            "program smaller"
        )
    value = float(pulp.value(problem.objective) or 0.0)
    if problem.sol_status == pulp.LpSolutionOptimal:
        return Ending("optimal", value, _bound(problem) if use_highs else value, name, seconds)
    least = _bound(problem) if use_highs else bound
    if least is None:
        raise SolverError(
            f"CBC reached its limit of {time_limit_s:.0f} s and reports no bound; install highspy"
        )
    return Ending("time limit", value, least, name, seconds)


def _cbc(options: dict[str, object]) -> "pulp.LpSolver":
    """Return the CBC on the path, else the one that comes with PuLP 3."""
    solver: pulp.LpSolver = pulp.COIN_CMD(**options)
    if not solver.available():
        with warnings.catch_warnings():
            # PuLP 4 drops its own copy; until then it works, and the user can do nothing better.
            warnings.simplefilter("ignore", DeprecationWarning)
            solver = pulp.PULP_CBC_CMD(**options)
    if not solver.available():
        raise SolverError("no solver for integer programs was found; install highspy")
    return solver


def _highs_version(problem: "pulp.LpProblem") -> str:
    return str(problem.solverModel.version())


def _bound(problem: "pulp.LpProblem") -> float:
    """Return HiGHS's dual bound; PuLP hands it maximisation as the minimisation of the negative."""
    bound = float(problem.solverModel.getInfo().mip_dual_bound)
    return -bound if problem.sense == pulp.LpMaximize else bound
