"""How values look on a terminal: units, bars and the tables that several commands share.

Results go to stdout, progress to stderr. Rich is imported where a table is drawn: it takes 50 ms,
which `--json` has no use for.
"""

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import BaseModel

from rankwright.cost_model.prediction import Estimate, Part, Prediction
from rankwright.planner.figures import figure

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from rankwright.planner.plan import Certificate


def console() -> "Console":
    """Return a console on stdout; without a terminal, tables are 100 columns wide."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def status(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"rankwright: {text}", file=sys.stderr, flush=True)


def print_json(value: BaseModel | dict[str, object] | list[object]) -> None:
    """Print `value` as JSON on stdout."""
    if isinstance(value, BaseModel):
        print(value.model_dump_json(indent=2))
    else:
        print(json.dumps(value, indent=2))


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> "Table":
    """Return an empty table in the house's looks; columns in `right` are aligned right."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", header_style="dim")
    return made


def proof_table(proof: "Certificate", candidates: str, *, nothing: str = "plan") -> "Table":
    """Return what proves a plan, with a warning where it is not proved to be the best.

    Args:
        proof: Of the plan.
        candidates: How many the program chose among, in words.
        nothing: What the bound is said of.
    """
    made = table("proof", "")
    if proof.status != "optimal":
        warning = f"{proof.status}: a better plan may be better by {proof.gap:.2%}"
        made.add_row("[bold red]NOT PROVED BEST[/]", warning)
    made.add_row("objective", f"{proof.objective}: {figure(proof.objective_value, 5)}")
    made.add_row(f"no {nothing} is better than", f"{figure(proof.bound, 5)} (gap {proof.gap:.2%})")
    solved = f"{proof.solver}: {proof.status} in {seconds(proof.solve_s)}"
    made.add_row("solver", f"{solved}, {candidates}")
    made.add_row("what binds", proof.binding_constraint)
    return made


def seconds(value: float) -> str:
    """Return a time as people say it.

    >>> seconds(0.01234), seconds(2.5), seconds(8.5e-6), seconds(1023.4)
    ('12.3 ms', '2.50 s', '8.50 us', '1,023 s')
    """
    if value >= 1:
        return f"{value:,.0f} s" if value >= 100 else f"{value:.2f} s"
    unit, scale = ("ms", 1e3) if value >= 1e-3 else ("us", 1e6)
    scaled = value * scale
    digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
    return f"{scaled:.{digits}f} {unit}"


def gigabytes(value: float) -> str:
    """Return bytes in decimal GB, or MB where that is 0.

    >>> gigabytes(17.25e9), gigabytes(3.2e6)
    ('17.25 GB', '3.2 MB')
    """
    return f"{value / 1e9:.2f} GB" if value >= 0.1e9 else f"{value / 1e6:.1f} MB"


def bandwidth(bytes_per_s: float) -> str:
    """Return a rate in decimal GB/s.

    >>> bandwidth(450e9)
    '450 GB/s'
    """
    return (
        f"{bytes_per_s / 1e9:.3g} GB/s" if bytes_per_s < 1e12 else f"{bytes_per_s / 1e9:.0f} GB/s"
    )


def bar(share: float, width: int = 24) -> str:
    """Return a bar of `width` cells, `share` of it filled, in eighths of a cell.

    >>> bar(0.5, 4), bar(0.0, 4)
    ('██', '')
    """
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def ranges(numbers: list[int]) -> str:
    """Return ascending numbers with runs joined.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def prediction_table(prediction: Prediction, num_gpus: int) -> "Table":
    """Return the predicted speed with its intervals."""
    made = table("predicted", "value", "interval", right=("value",))

    def row(name: str, estimate: Estimate, show: Callable[[float], str]) -> None:
        interval = f"{show(estimate.low)} to {show(estimate.high)}"
        made.add_row(name, show(estimate.value), interval)

    row("time to first token", prediction.ttft_s, seconds)
    row("time per output token", prediction.tpot_s, seconds)
    row("output tokens/s", prediction.output_tokens_per_s, _tokens)
    per_gpu = _divided(prediction.output_tokens_per_s, num_gpus)
    row("output tokens/s per GPU", per_gpu, _tokens)
    row("memory of the fullest GPU", prediction.memory_bytes_per_gpu, gigabytes)
    return made


def memory_table(prediction: Prediction, capacity_bytes: float) -> "Table":
    """Return the memory of the fullest rank by part, beside `capacity_bytes`."""
    made = table("memory of the fullest rank", "bytes", "share", right=("bytes",))
    for part in prediction.memory_parts:
        made.add_row(part.name, gigabytes(part.bytes), bar(part.bytes / capacity_bytes))
    total = sum(part.bytes for part in prediction.memory_parts)
    made.add_row("total", gigabytes(total), f"of the {gigabytes(capacity_bytes)} that it has")
    return made


def parts_table(title: str, parts: tuple[Part, ...]) -> "Table":
    """Return the terms of a step, with what bounds each and where its number is from."""
    made = table(title, "time", "share", "bound", "source", right=("time", "share"))
    total_s = sum(part.seconds for part in parts) or 1.0
    for part in sorted(parts, key=lambda part: -part.seconds):
        made.add_row(
            part.name,
            seconds(part.seconds),
            f"{part.seconds / total_s:.0%}",
            part.bound,
            part.source,
        )
    return made


def _tokens(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _divided(estimate: Estimate, by: int) -> Estimate:
    return Estimate(value=estimate.value / by, low=estimate.low / by, high=estimate.high / by)
