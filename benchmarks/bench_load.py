"""How fast weights come from the page cache, beside what the machine can do.

    python benchmarks/bench_load.py                     # a file of 2 GiB, made and removed
    python benchmarks/bench_load.py --device cuda       # to a GPU, through pinned buffers

The file is read once before, so that it is in the page cache. `cat` is `cat file > /dev/null`,
`copy` is one memory copied to another by one thread. The rows: a matrix of bfloat16 taken whole, a
half of its rows, the half of its columns; by safetensors' own slices as they come from its mapping,
and by `ShardReader` with some numbers of threads. Results are made anew each time, as a model is:
the first touch of their pages is in the time, in that of `copy` too. Medians.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rankwright.executor.shard_reader import Range, SafetensorsFile, ShardReader
from result import write_result

PARTS: dict[str, tuple[float, float]] = {
    "whole": (1, 1),
    "half of the rows": (0.5, 1),
    "half of the columns": (1, 0.5),
}
WIDTH = 8192


def timed(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of `function`, its result thrown away each time."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        del result
    return statistics.median(times)


def rows_of(
    path: Path, device: torch.device, threads: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Return a row for each way to read the tensors of a file."""
    file = SafetensorsFile(path)
    height, width = file.tensors["0"].shape
    rows: list[dict[str, Any]] = []

    def add(how: str, part: str, num_bytes: float, function: Callable[[], object]) -> None:
        seconds = timed(function, device, repeats)
        rate = num_bytes * len(file.tensors) / seconds
        rows.append({"how": how, "part": part, "bytes_per_s": rate})
        print(f"{how:24} {part:20} {rate / 1e9:6.2f} GB/s", flush=True)

    size = height * width * 2
    cat = ["sh", "-c", 'cat "$0" > /dev/null', str(path)]
    add("cat", "whole", size, lambda: subprocess.run(cat, check=True))
    source = torch.ones(height, width, dtype=torch.bfloat16)
    torch.set_num_threads(1)
    names = sorted(file.tensors)
    add("copy", "whole", size, lambda: [source.clone() for _ in names])
    for part, (of_rows, of_columns) in PARTS.items():
        num_bytes = size * of_rows * of_columns
        ranges: list[Range] = [(0, int(height * of_rows)), (0, int(width * of_columns))]
        index = tuple(slice(*one) for one in ranges)

        def by_library(index: tuple[slice, ...] = index) -> list[torch.Tensor]:
            with safe_open(str(path), framework="pt") as opened:
                return [
                    opened.get_slice(name)[index].to(device, torch.bfloat16, copy=True)
                    for name in names
                ]

        add("safetensors", part, num_bytes, by_library)
        for count in threads:
            reader = ShardReader(device, count)

            def by_us(
                reader: ShardReader = reader, ranges: list[Range] = ranges
            ) -> list[torch.Tensor]:
                return [reader.read(file, name, ranges, torch.bfloat16) for name in names]

            add(f"ours, {count} threads", part, num_bytes, by_us)
            reader.close()
    return rows


def main() -> None:
    """Make a file, measure, and write one result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file")
    parser.add_argument("--folder", type=Path, help="where the file is made")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    cpus = len(os.sched_getaffinity(0))
    threads = sorted({1, 2, 4, 8} & set(range(1, cpus + 1)))
    # Matrices of 128 MiB, as those of an 8B model's feed-forward layers.
    count = max(1, int(arguments.gib * 8))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "model.safetensors"
        one = torch.ones(WIDTH, WIDTH, dtype=torch.bfloat16)
        save_file({str(index): one.clone() for index in range(count)}, path)
        device = torch.device(arguments.device)
        rows = rows_of(path, device, threads, arguments.repeats)
    content = {"file_bytes": count * 2 * WIDTH**2, "device": arguments.device, "rows": rows}
    print(write_result(f"load-{arguments.device}", content, folder=arguments.output))


if __name__ == "__main__":
    main()
