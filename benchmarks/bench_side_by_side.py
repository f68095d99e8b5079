"""Our engine and vLLM one after another on the same GPUs, with one model shape and one load.

    python benchmarks/bench_side_by_side.py --model Qwen/Qwen3-8B --peer ./vllm_bundle
    python benchmarks/bench_side_by_side.py --model Qwen/Qwen3-8B --peer ./vllm_bundle --tp 2

`--peer` is a folder that goes first on `PYTHONPATH` and makes `import vllm` work in this Python.
Both engines take random weights in bfloat16, token ids and greedy sampling, prompts that share
nothing, up to 256 sequences; both get each load twice, and the second counts (`side_load.py`). Ours
is driven over its socket, vLLM by `LLM.generate`: neither has HTTP or a tokenizer in it. The result
holds both and their ratio. An engine's start is its own, from its first import until weights are
made and graphs captured; what its kernels left in caches before is not controlled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rankwright.cost_model.read_model import read_config
from result import write_result
from side_load import LOADS, compared

HERE = Path(__file__).parent


def ours(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what our engine's leader wrote."""
    path = folder / "ours.json"
    ranks = ("--nproc-per-node", str(arguments.tp * arguments.pp))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *ranks]
    command += [str(HERE / "side_ours.py"), "--model", arguments.model, "--json", str(path)]
    command += ["--tp", str(arguments.tp), "--pp", str(arguments.pp)]
    command += ["--max-batch", str(arguments.max_batch), "--device", arguments.device]
    command += ["--load", arguments.load]
    return finished(command, dict(os.environ), path, arguments.limit)


def peer(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return what vLLM's process wrote."""
    path, model = folder / "peer.json", folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(read_config(arguments.model)))
    command = [sys.executable, str(HERE / "side_vllm.py"), str(model), str(path)]
    command += ["--tp", str(arguments.tp), "--max-batch", str(arguments.max_batch)]
    command += ["--load", arguments.load]
    before = os.environ.get("PYTHONPATH")
    places = [str(arguments.peer.resolve()), str(HERE), *([before] if before else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return finished(command, environment, path, arguments.limit)


def finished(
    command: list[str], environment: dict[str, str], path: Path, limit_s: float
) -> dict[str, Any]:
    """Run a command to its end and return the JSON that it wrote to `path`.

    Raises:
        SystemExit: It failed, with its last lines.
    """
    log = path.with_suffix(".log")
    with log.open("wb") as file:
        done = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s
        )
    if done.returncode != 0 or not path.exists():
        lines = log.read_text(errors="replace").splitlines()[-25:]
        raise SystemExit(f"{path.stem} failed with {done.returncode}:\n" + "\n".join(lines))
    content: dict[str, Any] = json.loads(path.read_text())
    return content


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
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of one engine")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mine = ours(arguments, folder)
        other = peer(arguments, folder)
    rows = compared(mine.pop("rows"), other.pop("rows"))
    for row in rows:
        print(
            f"{row['what']:28} ours {row['ours']:<12.5g} vLLM {row['peer']:<12.5g} "
            f"{row['unit']:14} {row['speed_ratio']:.2f} x",
            flush=True,
        )
    name = f"side-by-side-tp{arguments.tp}-{arguments.model.rstrip('/').split('/')[-1].lower()}"
    content = {"model": arguments.model, "ours": mine, "peer": other, "rows": rows}
    print(write_result(name, content, folder=arguments.output))


if __name__ == "__main__":
    main()
