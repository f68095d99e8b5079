"""Time from `rankwright launch` to the first token, and the phases in between.

    python benchmarks/bench_start.py Qwen/Qwen3-8B --load-formats dummy
    python benchmarks/bench_start.py ./my-model --load-formats dummy auto -- --tp 2

The command is run as a user would, first with an empty cache of compiled kernels, then with what
that run left there. Every start is a new process; whether weights come from disk or from the page
cache is not controlled, so the second start with real weights reads what the first one has cached.
What follows `--` goes to `rankwright launch`.

Phases are those of rank 0, seconds: its log says what was done when, counted from the end of its
imports; when a line was first seen ties that clock to the command's.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rankwright.executor.log_tail import LogTail
from result import write_result

_LINE = re.compile(r"\s*([\d.]+) s  (.+)")
_READY = re.compile(r"ready in .* on (http://\S+)")
_POLL_S = 0.01
_STOP_S = 60.0
# Of a rank's log line, by its first word: the phase that it ends.
PHASES = {
    "device": "open_device",
    "groups": "groups",
    "cache": "kv_cache",
    "layer": "weights",
    "weights": "weights",
    "compiler": "wait_for_compiler",
    "graph": "graphs",
    "batch": "batches",
    "kernels": "batches",
    "ready": "last_checks",
}
# What it says of its Triton kernels, in all.
_KERNELS = re.compile(r"kernels of all batches: compiled (\d+) in ([\d.]+) s, read (\d+) in")


class StartError(Exception):
    """The launch did not serve."""


def phases_of(lines: Iterable[str]) -> dict[str, float]:
    """Return the seconds of each phase of a rank, from its log.

    >>> phases_of(["   1.50 s  cache made", "   2.00 s  layer 1 of 1", "   2.25 s  ready"])
    {'kv_cache': 1.5, 'weights': 0.5, 'last_checks': 0.25}
    """
    found: dict[str, float] = {}
    before_s = 0.0
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        at_s, said = float(match[1]), match[2]
        phase = PHASES.get(said.split()[0])
        if phase is None:
            continue
        found[phase] = found.get(phase, 0.0) + at_s - before_s
        before_s = at_s
    return found


def kernels_of(lines: Iterable[str]) -> dict[str, float]:
    """Return how many kernels a rank compiled, in how many seconds, and how many it read."""
    names = ("compiled_kernels", "compiling_s", "read_kernels")
    for line in lines:
        if found := _KERNELS.search(line):
            return dict(zip(names, map(float, found.groups()), strict=True))
    return {}


def start_once(command: Sequence[str], folder: Path, limit_s: float) -> dict[str, float]:
    """Run `command` until its server has sent a token; return the seconds of each part.

    Args:
        command: A launch that serves on a free port.
        folder: Where its ranks' files go; empty.
        limit_s: Until it must be ready.

    Raises:
        StartError: It ended, or was not ready in time.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    said: list[str] = []
    log = LogTail(lambda: folder.glob("rankwright-*/rank-0.log"))
    lines: list[str] = []
    first_line_s = None
    began_s, began_wall_s = time.monotonic(), time.time()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    reader = threading.Thread(target=_read, args=(process, said), daemon=True)
    reader.start()
    try:
        while (url := _url(said)) is None:
            ended = process.poll() is not None
            if ended:
                reader.join()
            if ended or time.monotonic() - began_s > limit_s:
                raise StartError("\n".join(said[-5:]) or "it said nothing")
            lines += log.lines()
            if lines and first_line_s is None:
                first_line_s = time.monotonic() - began_s
            time.sleep(_POLL_S)
        ready_s = time.monotonic() - began_s
        read_first_token(url)
        total_s = time.monotonic() - began_s
        lines += log.lines()
        (pid_file,) = folder.glob("rankwright-*/rank-0.pid")
        rank_s = pid_file.stat().st_mtime - began_wall_s
    finally:
        _stop(process)
        reader.join()
    row = {"total_s": total_s, "ready_s": ready_s, "launcher_s": rank_s}
    clock = next((float(found[1]) for line in lines if (found := _LINE.match(line))), None)
    if first_line_s is not None and clock is not None:
        row["imports_s"] = first_line_s - clock - rank_s
    row |= {f"{name}_s": value for name, value in phases_of(lines).items()}
    for line in lines:
        print(line, file=sys.stderr)
    return {**row, **kernels_of(lines), "first_token_s": total_s - ready_s}


def read_first_token(url: str) -> None:
    """Ask the server for a token, and return when it has come.

    Raises:
        StartError: It sent none.
    """
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]
    body = {"model": model, "prompt": [1, 2, 3, 4], "max_tokens": 1, "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps({**body, "ignore_eos": True}).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        if not any(line.startswith(b"data:") and b'"choices"' in line for line in response):
            raise StartError("the server sent no token")


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each part over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: statistics.median(run[name] for run in runs if name in run) for name in names}


def _read(process: "subprocess.Popen[str]", said: list[str]) -> None:
    assert process.stderr is not None
    with process.stderr as stream:
        for line in stream:
            said.append(line.rstrip())


def _url(said: Sequence[str]) -> str | None:
    return next((found[1] for line in said if (found := _READY.search(line))), None)


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> None:
    """Measure every load format with an empty and a full kernel cache, and write one file."""
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    ours, passed_on = given[:cut], given[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a plan or a model, as `rankwright launch` takes it")
    parser.add_argument("--load-formats", nargs="+", choices=("dummy", "auto"), default=["dummy"])
    parser.add_argument("--repeats", type=int, default=3, help="starts with cached kernels")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds of one start")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args(ours)
    rows: list[dict[str, Any]] = []
    for load_format in arguments.load_formats:
        command = [sys.executable, "-m", "rankwright", "launch", arguments.model]
        command += ["--port", "0", "--load-format", load_format, *passed_on]
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache
            runs = []
            for _ in range(arguments.repeats + 1):
                with tempfile.TemporaryDirectory() as folder:
                    runs.append(start_once(command, Path(folder), arguments.limit))
        for kernels, chosen in (("empty", runs[:1]), ("filled", runs[1:])):
            if chosen:
                row = {"load_format": load_format, "kernel_cache": kernels, "runs": len(chosen)}
                rows.append({**row, **medians(chosen)})
                print(json.dumps(rows[-1]), flush=True)
    name = f"start-{arguments.model.rstrip('/').split('/')[-1].lower().removesuffix('.json')}"
    content = {"model": arguments.model, "launch_options": passed_on, "rows": rows}
    print(write_result(name, content, folder=arguments.output))


if __name__ == "__main__":
    main()
