"""`rankwright calibrate`: time this machine's kernels and links, for its own predictions."""

from pathlib import Path
from typing import Annotated

import typer

from rankwright.cli import options
from rankwright.cli.output import console, print_json, status
from rankwright.cost_model.calibration import Calibration, write_calibration
from rankwright.cost_model.calibration_file import default_path
from rankwright.topology.probe import probe


def run(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the table here.  [default: where plan and predict find it by themselves]",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A few shapes and no links: to try that it works. Kept only with -o."
        ),
    ] = False,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Fail where there is no GPU.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Time this machine's kernels and links.

    Takes about a minute; plan and predict then use the times.
    """
    from rankwright.executor.calibrate import calibrate  # only here: plans are made without it

    measured = calibrate(probe(require_gpu=require_gpu), progress=status, quick=quick)
    if output is not None or not quick:
        path = default_path(measured.device) if output is None else output
        write_calibration(measured, path)
        status(f"wrote {path}")
    if as_json:
        print_json(measured)
    else:
        _show(measured)


def _show(measured: Calibration) -> None:
    out = console()
    out.print(
        f"{measured.name}: {len(measured.ops)} kernels and {len(measured.collectives)} collectives "
        f"timed in {measured.seconds:.0f} s"
    )
    for dtype in ("bfloat16", "float8"):
        rows = [op for op in measured.ops if op.kind == "gemm" and op.dtype == dtype]
        if rows:
            flops = max(op.flops / op.seconds for op in rows)
            moved = max(op.bytes / op.seconds for op in rows)
            out.print(
                f"  products in {dtype}: up to {flops / 1e12:.4g} TFLOP/s, {moved / 1e9:.4g} GB/s"
            )
    for note in measured.notes:
        out.print(f"  {note}", markup=False)
