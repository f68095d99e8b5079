"""What another engine is to a renderer: a command, a table of flags, and what it cannot express.

A new engine is one file with an `Engine` and a row in `table.py`. Everything that a plan says and
an engine cannot do is an error here, never left out in silence.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rankwright.planner.plan import EnvironmentVariable, Plan


@dataclass(frozen=True, slots=True)
class Flag:
    """One command-line flag of an engine, and the part of a plan that it carries."""

    name: str
    value: Callable[[Plan], str | int | float | bool | None]  # True: a switch; None, False: absent


@dataclass(frozen=True, slots=True)
class Span:
    """Flags by which the processes of a replica on several nodes find each other.

    Shell words: `$head` is the address of the replica's first node, `$part` the number of a node
    within the replica, and `$meet` a port.
    """

    every: tuple[str, ...]
    workers: tuple[str, ...] = ()  # on nodes other than the first


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine at the version whose flags were read."""

    title: str
    version: str
    command: tuple[str, ...]  # before the model
    flags: tuple[Flag, ...]
    limits: Callable[[Plan], None]  # raises ValueError for what it cannot express
    span: Callable[[Plan, int], Span]  # of a plan and the nodes of a replica
    environment: Callable[[Plan], tuple[EnvironmentVariable, ...]]
    image: str
    model_flag: str | None = None  # None: the model is a positional argument
    notes: Callable[[Plan], tuple[str, ...]] = lambda plan: ()
    config: Callable[[Plan], dict[str, object]] | None = None  # of a YAML file, `--config FILE`
    served_name_flag: str | None = None
    mpi: bool = False  # a process a rank, started by MPI
    health: str = "/health"  # answers 200 once it serves
    has_metrics: bool = True  # at /metrics, with the flags given

    def arguments(self, plan: Plan) -> tuple[tuple[str, ...], ...]:
        """Return the flags of `plan`, each with its value if it takes one."""
        words: list[tuple[str, ...]] = []
        for flag in self.flags:
            value = flag.value(plan)
            if value is True:
                words.append((flag.name,))
            elif value is not None and value is not False:
                words.append((flag.name, str(value)))
        return tuple(words)
