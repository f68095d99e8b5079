"""The command line: each command is a file, and each result prints, or is JSON with `--json`.

Only the command that is asked for is imported, so that `rankwright plan` pays for nothing else.
Errors end in one line on stderr and an exit code from `errors.py`.
"""

import gc
import os
import sys
import traceback
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from typing import NoReturn

import typer

from rankwright.cli.errors import describe_error, exit_code

COMMANDS = (
    "probe",
    "plan",
    "predict",
    "render",
    "launch",
    "status",
    "stop",
    "generate",
    "bench",
    "calibrate",
    "doctor",
)


def build_app(commands: Sequence[str] = COMMANDS) -> typer.Typer:
    """Return the application with `commands`, each imported from the file of its name."""
    app = typer.Typer(
        name="rankwright",
        help="Plan the parallelism of an LLM deployment, prove the plan, then run it.",
        rich_markup_mode=None,  # help as plain text: fast, and the same in docs/cli.md
        pretty_exceptions_enable=False,
    )
    for name in commands:
        app.command(name)(import_module(f"rankwright.cli.{name}").run)
    app.callback(invoke_without_command=True)(_top)
    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` and return the exit code.

    0: done; 2: wrong usage or input; 3: no feasible plan; 4: hardware or probe failure; 5: launch
    or run failure. 1 is a mistake of ours, and the only one that prints a traceback.
    """
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    known = args[:1] == ["--version"] or args[:1] in ([name] for name in COMMANDS)
    asked = [name for name in COMMANDS if name in args[:1]] if known else COMMANDS
    try:
        with _short_lived() if asked == ["plan"] else nullcontext():
            code = build_app(asked)(args=args, prog_name="rankwright", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print("rankwright: stopped", file=sys.stderr)
        return 130  # as a shell reports a command that SIGINT ended
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _report(error, args)
    return code if isinstance(code, int) else 0


@contextmanager
def _short_lived() -> Generator[None]:
    """Leave out what does not repay in a process that lives for half a second.

    Looking for cycles among what imports make takes a tenth of it, NumPy's threads, one a core, as
    much (HiGHS brings NumPy), and pydantic's search of all packages for plug-ins a twentieth.
    """
    settings = {"OPENBLAS_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
    added = settings.keys() - os.environ.keys()
    collects = gc.isenabled()
    gc.disable()
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
        if collects:
            gc.enable()


def _report(error: Exception, args: Sequence[str]) -> int:
    code = exit_code(error)
    if code == 1 or os.environ.get("RANKWRIGHT_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    kind, message = describe_error(error, args)
    if "--json" in args:
        import json

        print(json.dumps({"error": {"class": kind, "message": message}}))
    print(f"rankwright: {message}", file=sys.stderr)
    return code


def _top(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        from rankwright import __version__

        print(__version__)
        raise typer.Exit


def run() -> None:
    """Entry point of the `rankwright` command."""
    code = main()
    if sys.argv[1:2] == ["plan"]:
        _exit_at_once(code)
    sys.exit(code)


def _exit_at_once(code: int) -> NoReturn:
    """Exit without taking apart what the process made: that is a tenth of the time of a plan."""
    with suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
