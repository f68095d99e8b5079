"""What an exception means to a user: a line of text and an exit code."""

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError


class RunError(Exception):
    """Something that was started did not do its work; exit code 5."""


# Class, where it is defined, exit code. Looked up among loaded modules only: an exception of a
# module that was never imported cannot have been raised.
_EXIT_CODES = (
    ("rankwright.planner.make_plan", "NoFeasiblePlanError", 3),
    ("rankwright.topology.errors", "ProbeError", 4),
    ("rankwright.planner.solver", "NoIncumbentError", 3),
    ("rankwright.planner.solver", "SolverError", 5),
    ("rankwright.executor.backends.tools", "MissingToolError", 4),
    ("rankwright.executor.backends.tools", "ToolError", 5),
    ("rankwright.executor.session", "LaunchError", 5),
    ("rankwright.demo_model", "FetchError", 5),
    ("rankwright.cli.errors", "RunError", 5),
)
USAGE, RUN_FAILED, OUR_MISTAKE = 2, 5, 1


def exit_code(error: Exception) -> int:
    """Return the exit code for `error`; 1 for one that no user's input should cause."""
    for module, name, code in _EXIT_CODES:
        if module in sys.modules and isinstance(error, getattr(sys.modules[module], name)):
            return code
    if _is_usage(error) or isinstance(error, (ValueError, OSError)):
        return USAGE
    if _is_missing_extra(error):
        return RUN_FAILED
    return OUR_MISTAKE


def describe_error(error: Exception, args: Sequence[str] = ()) -> tuple[str, str]:
    """Return the name of the error's kind and one line that says what to do.

    Args:
        error: What was raised.
        args: The command line, to quote an option's value from.
    """
    kind = str(getattr(error, "kind", type(error).__name__))
    if isinstance(error, ValidationError):
        return kind, describe_validation(error)
    if isinstance(error, ModuleNotFoundError) and _is_missing_extra(error):
        return kind, f"{error.name} is missing; install it with: pip install 'rankwright[executor]'"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return kind, f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    message = _usage_message(error, args) if _is_usage(error) else str(error)
    return kind, re.sub(r"\s*\n\s*", " ", message.strip()) or kind


def describe_validation(error: ValidationError) -> str:
    """Return the first complaint of pydantic in one line, with the field that it is about."""
    first, *others = error.errors(include_url=False, include_context=False)
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(others)} more)" if others else ""
    return f"{where}: {message}{more}" if where else f"{message}{more}"


def nearest(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Return the known words nearest to `word`, for an error message.

    >>> nearest("slrum", ["slurm", "kubernetes"])
    "nearest are 'slurm'"
    """
    choices = list(known)
    close = difflib.get_close_matches(word, choices, limit, cutoff=0.5)
    if close:
        return "nearest are " + ", ".join(map(repr, close))
    return "known are " + ", ".join(map(repr, choices[:12]))


def _is_missing_extra(error: Exception) -> bool:
    own = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("rankwright.")
    return isinstance(error, ModuleNotFoundError) and not own


def _is_usage(error: Exception) -> bool:
    # typer's own classes moved between releases; what they all have is this method.
    return hasattr(error, "format_message")


def _usage_message(error: Any, args: Sequence[str]) -> str:
    message: str = error.format_message()
    message = message[:1].lower() + message[1:].rstrip(".").replace(": Value error, ", ": ")
    context: Any = getattr(error, "ctx", None)
    help_hint = f"see `{getattr(context, 'command_path', 'rankwright')} --help`"
    if message.startswith("no such command"):
        from rankwright.cli import COMMANDS  # which imports this module

        word = message.split("'")[1]
        return f"no such command {word!r}; {nearest(word, COMMANDS)}"
    if message.startswith("no such option") and context is not None:
        known = {name for param in context.command.params for name in param.opts if "--" in name}
        option: str = error.option_name
        return f"no such option {option}; {nearest(option, sorted(known))}; {help_hint}"
    given = _given(error, args)
    if given is not None and repr(given) not in message:
        message += f", got {given!r}"
    return f"{message}; {help_hint}"


def _given(error: Exception, args: Sequence[str]) -> str | None:
    """Return the value that was typed for the option that `error` is about."""
    names: Sequence[str] = getattr(getattr(error, "param", None), "opts", ())
    for index, word in enumerate(args):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else next(iter(args[index + 1 : index + 2]), None)
    return None
