"""Our engine and vLLM one after another on the same GPUs, with one model shape and one load.

    python benchmarks/bench_side_by_side.py --model Qwen/Qwen3-8B --peer ./vllm_bundle
    python benchmarks/bench_side_by_side.py --model Qwen/Qwen3-8B --peer ./vllm_bundle --tp 2

`--peer` is a folder that goes first on `PYTHONPATH` and makes `import vllm` work in this Python.
Both engines take random weights in bfloat16, token ids and greedy sampling, prompts that share
nothing, up to 256 sequences; both get each load twice, and the second counts (`side_load.py`). Ours
is driven over its socket, vLLM by `LLM.generate`: neither has HTTP or a tokenizer in it, and the
clock runs from before requests are put into messages. vLLM keeps its defaults but for a share of
0.85 of the memory, no prefix cache, and contexts of 8,192; ours has what its plan says (`limits`,
`num_kv_blocks` in the result). An engine's start is its own, from its first import until weights
are made and graphs captured; what its kernels left in caches before is not controlled.

Each row is printed when it comes, and stays where a later one or an engine fails or the time is up:
the result is written again after each engine, and says what failed. `--rows decode-8,mixed-*` takes
some of them. Run it where nothing else runs: every row says how much did (`load_average`).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rankwright.cost_model.read_model import read_config
from result import write_result
from side_load import LOADS, chosen, compared

HERE = Path(__file__).parent
# How often it is looked for new rows.
LOOK_S = 0.2


def ours(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what our engine's leader wrote."""
    path = folder / "ours.json"
    ranks = ("--nproc-per-node", str(arguments.tp * arguments.pp))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks]
    command += [str(HERE / "side_ours.py"), "--model", arguments.model, "--json", str(path)]
    command += ["--tp", str(arguments.tp), "--pp", str(arguments.pp)]
    command += ["--max-batch", str(arguments.max_batch), "--device", arguments.device]
    command += ["--load", arguments.load, "--rows", arguments.rows]
    return finished(command, dict(os.environ), path, arguments.limit)


def peer(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what vLLM's process wrote."""
    path, model = folder / "peer.json", folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(read_config(arguments.model)))
    command = [sys.executable, str(HERE / "side_vllm.py"), str(model), str(path)]
    command += ["--tp", str(arguments.tp), "--max-batch", str(arguments.max_batch)]
    command += ["--load", arguments.load, "--rows", arguments.rows]
    before = os.environ.get("PYTHONPATH")
    places = [str(arguments.peer.resolve()), str(HERE), *([before] if before else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return finished(command, environment, path, arguments.limit)


def finished(
    command: list[str], environment: dict[str, str], path: Path, limit_s: float
) -> dict[str, Any]:
    """Run a command to its end and return the JSON that it wrote to `path`.

    Rows that it writes beside that are printed meanwhile. If it fails they are all there is, beside
    `error` with its last lines.
    """
    log, lines = path.with_suffix(".log"), path.with_suffix(".jsonl")
    ends_s = time.monotonic() + limit_s
    rows: list[dict[str, Any]] = []
    with log.open("wb") as file:
        # A group of its own: ranks are children of what is started here.
        running = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while running.poll() is None and time.monotonic() < ends_s:
                time.sleep(LOOK_S)
                rows = shown(path.stem, lines, rows)
        finally:
            is_late = running.poll() is None
            if is_late:
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    rows = shown(path.stem, lines, rows)
    if running.returncode == 0 and path.exists():
        content: dict[str, Any] = json.loads(path.read_text())
        return content
    why = f"took longer than {limit_s:g} s" if is_late else f"failed with {running.returncode}"
    last = log.read_text(errors="replace").splitlines()[-25:]
    error = "\n".join([f"{path.stem} {why}:", *last])
    print(error, file=sys.stderr, flush=True)
    return {"rows": rows, "error": error}


def shown(name: str, lines: Path, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of an engine that are there, and print those that were not `before`."""
    text = lines.read_text(encoding="utf-8") if lines.exists() else ""
    # What follows the last line's end is being written.
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.split("\n")[:-1]]
    for row in rows[len(before) :]:
        print(name, "  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    """Measure both, and write one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="Qwen/Qwen3-8B")
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds vLLM")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1, help="of ours; vLLM has --tp GPUs then")
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--load", choices=tuple(LOADS), default="full")
    parser.add_argument("--rows", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of one engine")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    try:
        chosen(LOADS[arguments.load], arguments.rows)
    except ValueError as error:
        parser.error(str(error))
    name = f"side-by-side-tp{arguments.tp}-{arguments.model.rstrip('/').split('/')[-1].lower()}"
    content: dict[str, Any] = {"model": arguments.model}
    with tempfile.TemporaryDirectory() as folder:
        for engine, measured in (("ours", ours), ("peer", peer)):
            content[engine] = measured(arguments, Path(folder))
            path = write_result(name, content, folder=arguments.output)
    content["rows"] = compared(content["ours"]["rows"], content["peer"]["rows"])
    for row in content["rows"]:
        print(
            f"{row['what']:20} ours {row['ours']:<12.5g} vLLM {row['peer']:<12.5g} "
            f"{row['unit']:14} {row['speed_ratio']:.2f} x",
            flush=True,
        )
    path = write_result(name, content, folder=arguments.output)
    print(path)
    engines = (content["ours"], content["peer"])
    if any("error" in part for engine in engines for part in (engine, *engine["rows"])):
        raise SystemExit(f"not all of it was measured; {path} says what failed")


if __name__ == "__main__":
    main()
