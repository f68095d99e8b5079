"""Times the kernels at the shapes of an 8B-class model beside what the memory could do.

    PYTHONPATH=src python benchmarks/bench_kernels.py [--only decode] [--output FOLDER]
    PYTHONPATH=src python benchmarks/bench_kernels.py --sweep attention [--table FOLDER]

Every kernel is first held to its reference on fresh random inputs; one that fails is not timed,
and the exit status is 1. Times are medians of CUDA graph replays, so launches cost what they cost
in a decode step. `share` is the least time that the GPU needs for the bytes (or operations), by a
copy (or matrix product) measured in the same run, over the time it took.

`--sweep` times other cuts of some kernels instead, in about a minute each, and writes what it finds
into `kernels/tuned`, or where `--table` says: `RANKWRIGHT_KERNEL_TABLES` then has kernels read it.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from kernel_cases import (
    DECODES,
    LINEARS,
    PREFILLS,
    decode_case,
    linear_case,
    norm_case,
    prefill_case,
    rotary_case,
    sample_case,
    swiglu_case,
)
from kernel_timing import Case, begin, line, measure
from kernel_tuning import Tuner, write_table
from rankwright.kernels.skinny_linear import skinny_config
from result import write_result
from tune_attention import tune_decode, tune_prefill
from tune_linear import tune_linear

SWEEPS = ("linear", "attention")


def cases() -> Iterator[Case]:
    """Return the table, cheap rows first."""
    for tokens in (1, 64, 4096, 8192):
        yield norm_case(tokens)
        yield swiglu_case(min(tokens, 4096))
        yield rotary_case(tokens, with_norm=False)
        yield rotary_case(tokens, with_norm=True)
    for tokens in (1, 4, 8, 16, 64):
        for inputs, outputs in LINEARS:
            yield linear_case(tokens, inputs, outputs)
            config = skinny_config(tokens, inputs, outputs, torch.device("cuda", 0))
            if config is not None:
                yield linear_case(tokens, inputs, outputs, config)
    for shape, contexts in DECODES.items():
        yield decode_case(contexts, shape)
    for shape, (lengths, contexts) in PREFILLS.items():
        for backend in ("triton", "sdpa", *(["cudnn"] if lengths == contexts else [])):
            yield prefill_case(lengths, contexts, shape, backend)
    for batch, filtered in ((1, False), (64, False), (64, True)):
        yield sample_case(batch, filtered)


def sweep(kind: str, copy_bytes_per_s: float, folder: Path | None) -> int:
    """Return the exit status: 1 where a candidate was wrong."""
    tuner = Tuner()
    if kind == "linear":
        found = tune_linear(tuner, copy_bytes_per_s)
    else:
        found = {"decode": tune_decode(tuner), **tune_prefill(tuner)}
    print(write_table(found, torch.cuda.get_device_name(), folder))
    return 0 if tuner.all_right else 1


def main() -> int:
    """Return the exit status: 1 where a kernel failed its check, 4 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="rows whose operation contains this")
    parser.add_argument("--sweep", choices=SWEEPS, help="find the best cuts instead")
    parser.add_argument("--table", type=Path, help="folder of the table that a sweep writes")
    parser.add_argument("--output", type=Path, help="folder of the JSON file")
    arguments = parser.parse_args()
    seed, rates = begin("bench_kernels")
    if arguments.sweep:
        return sweep(arguments.sweep, rates["copy_bytes_per_s"], arguments.table)
    rows = []
    for case in cases():
        if arguments.only in case.op:
            rows.append(measure(case, rates))
            print(line(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    content = {"seed": seed, **rates, "rows": rows}
    print(write_result("kernels", content, folder=arguments.output))
    return 1 if any(row["passed"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
