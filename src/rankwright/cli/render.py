"""`rankwright render`: a plan as manifests."""

from pathlib import Path
from typing import Annotated

import typer

from rankwright.cli import options
from rankwright.cli.output import print_json, status
from rankwright.planner.read_plan import read_any_plan
from rankwright.templates.render import PLAN_FILE, TARGETS, render


def run(
    plan: Annotated[Path, typer.Argument(help="A plan.json.", show_default=False)],
    target: Annotated[str, typer.Option(help=f"One of {', '.join(sorted(TARGETS))}.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write the files here; else print."),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            help="Around another engine: slurm or kubernetes. Without it, a script for every node."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="An option of the target; may be repeated."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write PLAN as files for Slurm, Kubernetes or another engine."""
    files = render(read_any_plan(plan), target, output, on=on, **parse_settings(settings or []))
    if as_json:
        print_json(dict(files))
    elif output is None:
        for name, text in files.items():
            if name != PLAN_FILE:  # the manifests carry it
                print(text, end="")
    else:
        for name in files:
            status(f"wrote {output / name}")


def parse_settings(settings: list[str]) -> dict[str, str]:
    """Return `key=value` texts as a dict.

    >>> parse_settings(["image=rankwright:1", "time=01:00:00"])
    {'image': 'rankwright:1', 'time': '01:00:00'}

    Raises:
        ValueError: One has no `=`, or a key comes twice.
    """
    parsed: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {setting!r} is not KEY=VALUE")
        if key in parsed:
            raise ValueError(f"--set {key} is given twice")
        parsed[key] = value
    return parsed
