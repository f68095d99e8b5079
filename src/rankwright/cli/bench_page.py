"""How `rankwright bench` shows what it measured beside what was predicted."""

from collections.abc import Callable

from rich.markup import escape

from rankwright.cli.load_values import Load, Measured, Spread
from rankwright.cli.output import console, seconds, table
from rankwright.cost_model.predict_trace import TracePrediction
from rankwright.cost_model.prediction import Estimate, Prediction


def print_bench(
    load: Load, measured: Measured, predicted: Prediction | TracePrediction | None
) -> None:
    """Print the table, and the first failure where there was one."""
    out = console()
    out.print(f"{measured.num_requests} requests {_what(load)}, in {seconds(measured.duration_s)}")
    made = table(
        "",
        "measured",
        "p50",
        "p90",
        "p99",
        "predicted",
        "interval",
        right=("measured", "predicted"),
    )
    for name, spread, estimate in (
        ("time to first token", measured.ttft_s, predicted.ttft_s if predicted else None),
        ("time per output token", measured.tpot_s, predicted.tpot_s if predicted else None),
    ):
        if spread is not None:
            made.add_row(
                name, seconds(spread.mean), *_percentiles(spread), *_estimate(estimate, seconds)
            )
    made.add_row(
        "output tokens/s",
        f"{measured.output_tokens_per_s:,.1f}",
        *("", "", ""),
        *_estimate(
            predicted.output_tokens_per_s if predicted else None, lambda rate: f"{rate:,.1f}"
        ),
    )
    if isinstance(predicted, TracePrediction):
        for name, at_s in (
            ("predicted: first token", predicted.ttft_percentiles_s),
            ("predicted: output token", predicted.tpot_percentiles_s),
        ):
            made.add_row(name, "", *map(seconds, at_s.values()), "", "")
    out.print(made)
    if measured.num_failed:
        out.print(
            f"[red]{measured.num_failed} requests failed[/]: {escape(str(measured.first_failure))}"
        )


def _what(load: Load) -> str:
    lengths = f"of {load.input_tokens} + {load.output_tokens} tokens"
    if load.trace:
        return f"{lengths} on average, as the trace has them"
    if load.concurrency is not None:
        return f"{lengths}, {load.concurrency} in flight"
    return f"{lengths}, {load.request_rate:g} a second"


def _percentiles(spread: Spread) -> tuple[str, str, str]:
    return seconds(spread.p50), seconds(spread.p90), seconds(spread.p99)


def _estimate(estimate: Estimate | None, show: Callable[[float], str]) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    return show(estimate.value), f"{show(estimate.low)} to {show(estimate.high)}"
