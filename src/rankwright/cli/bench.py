"""`rankwright bench`: load a server, and print predicted beside measured."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rankwright.cli import options
from rankwright.cli.bench_page import print_bench
from rankwright.cli.errors import RunError
from rankwright.cli.load_values import Load, Measured
from rankwright.cli.output import print_json, status
from rankwright.cost_model.calibration import (
    Calibration,
    RunTime,
    add_run,
    find_calibration,
    write_calibration,
)
from rankwright.cost_model.calibration_file import default_path
from rankwright.cost_model.predict import predict
from rankwright.cost_model.predict_trace import TracePrediction, predict_trace
from rankwright.cost_model.prediction import Prediction
from rankwright.cost_model.trace import TraceRow, read_trace, workload_of
from rankwright.cost_model.workload import Workload
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_plan

_START_LIMIT_S = 3600.0  # hundreds of gigabytes of weights from a slow disk
_STOP_LIMIT_S = 60.0
_MAX_CONCURRENCY = 256  # of a plan that says none; one client process keeps up with about as many


def run(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PLAN|URL",
            help="A plan.json, which is launched first, or the address of a running server.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        Path | None, typer.Option(help="Plan of the server at URL, to predict from.")
    ] = None,
    isl: Annotated[
        int | None, typer.Option(min=1, help="Prompt length.  [default: the plan's, or 1024]")
    ] = None,
    osl: Annotated[
        int | None, typer.Option(min=1, help="Answer length.  [default: the plan's, or 128]")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests in flight.  [default: the plan's, or 8]")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Requests a second, in open loop.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="Requests to send as they came, JSON Lines or CSV, instead of these."),
    ] = None,
    num_requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests in all.  [default: the trace's, or 4 rounds, 8 at least]"
        ),
    ] = None,
    load_format: options.LoadFormat = "auto",
    model_path: options.ModelPath = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Add the result to what `rankwright calibrate` measured on these GPUs.",
        ),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure a server beside what its plan predicts."""
    is_url = target.startswith(("http://", "https://"))
    if not is_url and plan is not None:
        raise ValueError("--plan goes with a URL; a PLAN given by itself is launched")
    options.refuse_beside_trace(
        trace, {"--isl": isl, "--osl": osl, "--concurrency": concurrency, "--rate": rate}
    )
    rows = () if trace is None else read_trace(trace)[:num_requests]
    made = read_plan(Path(target)) if not is_url else None if plan is None else read_plan(plan)
    from rankwright.cli.load import measure  # needs httpx, which is of rankwright[executor]

    if rows:
        load = _trace_load(made, rows)
    else:
        load = _load(made, isl, osl, concurrency, rate, num_requests)
    kept = _calibration_of(made, load) if calibrate else None
    if is_url:
        measured = measure(target, load)
    else:
        with served(Path(target), load_format, model_path) as url:
            measured = measure(url, load)
    predicted = None if made is None else _predict(made, load)
    if made is not None and kept is not None:
        _add_to(kept, made, load, measured)
    if as_json:
        print_json(
            {
                "load": {
                    "input_tokens": load.input_tokens,
                    "output_tokens": load.output_tokens,
                    "concurrency": load.concurrency,
                    "request_rate": load.request_rate,
                    "num_requests": load.num_requests,
                },
                "measured": measured.model_dump(),
                "predicted": None if predicted is None else predicted.model_dump(),
            }
        )
        return
    print_bench(load, measured, predicted)


def _calibration_of(plan: Plan | None, load: Load) -> Calibration:
    """Return this user's calibration of the plan's GPUs.

    Raises:
        ValueError: There is none, no plan, or the load is no closed loop of several tokens.
    """
    if plan is None or load.concurrency is None or load.output_tokens < 2:
        raise ValueError(
            "--calibrate needs a plan, --concurrency instead of --rate or --trace, and --osl of 2 "
            "or more"
        )
    found = find_calibration(plan.cluster)
    if found is None:
        raise ValueError(
            f"there is no calibration of the GPUs of {plan.cluster.describe()} to add to; make one "
            "with: rankwright calibrate"
        )
    return found


def _add_to(calibration: Calibration, plan: Plan, load: Load, measured: Measured) -> None:
    assert load.concurrency is not None
    if measured.tpot_s is None or measured.num_failed:
        status("not added to the calibration: requests failed")
        return
    run = RunTime(
        model=plan.model,
        split=plan.split,
        input_tokens=load.input_tokens,
        output_tokens=load.output_tokens,
        concurrency=load.concurrency,
        tpot_s=measured.tpot_s.mean,
    )
    path = default_path(calibration.device)
    write_calibration(add_run(calibration, run), path)
    status(f"added to {path}")


def _load(
    plan: Plan | None,
    isl: int | None,
    osl: int | None,
    concurrency: int | None,
    rate: float | None,
    num_requests: int | None,
) -> Load:
    planned = Workload(concurrency=8) if plan is None else plan.workload
    if rate is None and concurrency is None:
        rate, concurrency = planned.request_rate, planned.concurrency
        if plan is not None and rate is None and concurrency is None:
            at_once = plan.prediction.batch_size * plan.split.dp
            concurrency = min(at_once, _MAX_CONCURRENCY)
    checked = options.workload(
        isl=isl or planned.input_tokens,
        osl=osl or planned.output_tokens,
        concurrency=concurrency,
        rate=rate,
    )
    return Load(
        input_tokens=checked.input_tokens,
        output_tokens=checked.output_tokens,
        num_requests=num_requests or max(8, 4 * (concurrency or 8)),
        concurrency=checked.concurrency,
        request_rate=checked.request_rate,
        vocab_size=_vocab_size(plan),
    )


def _trace_load(plan: Plan | None, rows: tuple[TraceRow, ...]) -> Load:
    """Return the load that `rows` are.

    Raises:
        ValueError: The plan's server would refuse one of them.
    """
    longest = max(rows, key=lambda row: row.input_tokens + row.output_tokens)
    tokens = longest.input_tokens + longest.output_tokens
    if plan is not None and tokens > plan.limits.max_model_len:
        raise ValueError(
            f"--trace has a request of {longest.input_tokens} + {longest.output_tokens} tokens; "
            f"the plan's server takes at most {plan.limits.max_model_len}"
        )
    means = workload_of(rows)
    return Load(
        input_tokens=means.input_tokens,
        output_tokens=means.output_tokens,
        num_requests=len(rows),
        concurrency=None,
        request_rate=means.request_rate,
        vocab_size=_vocab_size(plan),
        trace=rows,
    )


def _vocab_size(plan: Plan | None) -> int:
    return 1000 if plan is None else plan.model.vocab_size


def _predict(plan: Plan, load: Load) -> Prediction | TracePrediction:
    if load.trace:
        split = plan.split
        caches = split.cp * (split.tp if split.attention == "dp" else 1)
        tokens = plan.kv_cache.num_tokens * caches
        return predict_trace(plan.model, plan.cluster, split, load.trace, kv_tokens=tokens)
    workload = plan.workload.model_copy(
        update={
            "input_tokens": load.input_tokens,
            "output_tokens": load.output_tokens,
            "concurrency": load.concurrency,
            "request_rate": load.request_rate,
        }
    )
    return predict(plan.model, plan.cluster, workload, plan.split)


@contextmanager
def served(plan: Path, load_format: str, model_path: Path | None) -> Generator[str]:
    """Launch `plan` for as long as the block runs; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "rankwright", "launch", str(plan)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load-format", load_format]
    if model_path is not None:
        command += ["--model-path", str(model_path)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # what it says is on stderr
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, server)
        status(f"{url} is ready; sending requests")
        yield url
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    until_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < until_s:
        code = server.poll()
        if code is not None:
            raise RunError(f"the server ended with code {code} before it was ready; see above")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RunError(f"the server was not ready within {_START_LIMIT_S:.0f} s")
