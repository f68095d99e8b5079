"""The environment a plan asks for, checked before it reaches a shell or a pod."""

import re

from rankwright.planner.parts_plan import OwnPlan
from rankwright.planner.plan import EnvironmentVariable


def checked_environment(plan: OwnPlan) -> tuple[EnvironmentVariable, ...]:
    """Return the plan's variables.

    Raises:
        ValueError: A name is no shell name, is given twice, or a value has control characters.
    """
    seen: set[str] = set()
    for variable in plan.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable.name):
            raise ValueError(
                f"the plan sets the environment variable {variable.name!r}; expected a name of "
                "letters, digits and '_'"
            )
        if variable.name in seen:
            raise ValueError(f"the plan sets the environment variable {variable.name} twice")
        if not variable.value.isprintable():
            raise ValueError(
                f"the plan sets {variable.name} to {variable.value!r}; expected printable text"
            )
        seen.add(variable.name)
    return plan.environment
