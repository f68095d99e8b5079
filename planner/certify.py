"""The certificate of a plan: what the solver says, in the words of the objective."""

from rankwright.cost_model.workload import Objective
from rankwright.planner.goals import GOALS
from rankwright.planner.plan import Certificate, RunnerUp
from rankwright.planner.solver import Ending


def certify(
    objective: Objective,
    value: float,
    ending: Ending,
    *,
    num_candidates: int,
    num_illegal: int,
    binding_constraint: str,
    runners_up: tuple[RunnerUp, ...] = (),
) -> Certificate:
    """Return the certificate of a choice.

    Args:
        objective: That was solved for.
        value: Of the choice, in the unit of the objective.
        ending: How the solver ended; its bound is in that unit too.
        num_candidates: In the program.
        num_illegal: Shapes that were left out of it.
        binding_constraint: What keeps the value from being better.
        runners_up: What lost, and why.
    """
    goal = GOALS[objective]
    return Certificate(
        objective=f"{goal.name} ({goal.unit})",
        objective_value=value,
        bound=ending.bound,
        gap=ending.gap,
        solver=ending.solver,
        status=ending.status,
        solve_s=ending.seconds,
        num_candidates=num_candidates,
        num_illegal=num_illegal,
        binding_constraint=binding_constraint,
        runners_up=runners_up,
    )
