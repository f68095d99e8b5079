"""`rankwright stop`: end launches, after their running requests or at once."""

from typing import Annotated

import typer

from rankwright.cli import options
from rankwright.cli.errors import RunError, nearest
from rankwright.cli.output import print_json, status
from rankwright.executor.follow import EXIT_FAILED, end, until_final
from rankwright.executor.launch_record import LaunchRecord, read_records
from rankwright.executor.phase_view import PhaseView
from rankwright.executor.submit import describe_place, launch_of


def run(
    launch: Annotated[
        str | None,
        typer.Argument(
            metavar="LAUNCH",
            help="Its name in `rankwright status`, or the start of it, or a Slurm job's number.  "
            "[default: the only one]",
            show_default=False,
        ),
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for running requests.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every launch.")] = False,
    timeout: Annotated[float, typer.Option(min=0, metavar="S", help="To wait for the end.")] = 300,
    as_json: options.Json = False,
) -> None:
    """End LAUNCH once its running requests are done.

    Waits until it has ended.
    """
    chosen = choose(read_records(), launch, everything=everything)
    failed = False
    for record in chosen:
        found = launch_of(record)
        status(f"stopping {record.id} ({describe_place(record)})")
        found.stop(drain=not now)
        view = PhaseView(record.id)
        try:
            state = until_final(found, view, within_s=timeout, logs=False)
        except TimeoutError:
            raise RunError(
                f"{record.id} has not ended in {timeout:g} s; wait longer with --timeout, or end "
                "it at once with --now"
            ) from None
        failed |= end(found, view, state) == EXIT_FAILED
    if as_json:
        print_json({"stopped": [record.id for record in chosen]})
    if failed:
        raise typer.Exit(EXIT_FAILED)


def choose(
    records: list[LaunchRecord], name: str | None, *, everything: bool
) -> list[LaunchRecord]:
    """Return the launches that are meant.

    Raises:
        ValueError: None is, or it is not clear which.
    """
    if everything:
        if name is not None:
            raise ValueError("give a launch or --all, not both")
        return records
    if not records:
        raise ValueError("nothing is launched; `rankwright status` shows what is")
    if name is None:
        fitting, what = records, "several launches"
    else:
        fitting = [r for r in records if name in (r.id, getattr(r.place, "job", None))]
        fitting = fitting or [record for record in records if record.id.startswith(name)]
        what = f"{name!r} is the start of several"
    if not fitting:
        raise ValueError(f"no launch {name!r}; {nearest(name or '', [r.id for r in records])}")
    if len(fitting) > 1:
        raise ValueError(f"{what}: {', '.join(r.id for r in fitting)}; name one, or give --all")
    return fitting
