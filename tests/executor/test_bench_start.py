"""The benchmark of the start: its phases from a log, and a launch that does not serve."""

import sys
from pathlib import Path

import pytest

from bench_start import StartError, kernels_of, medians, phases_of, start_once

LOG = """\
/usr/lib/python3/x.py:1: UserWarning: 3 s  layer of paint
   1.50 s  groups made
   2.50 s  cache made
   2.75 s  layer 1 of 2
warning: GPUs do not share memory
   3.00 s  layer 2 of 2
   3.25 s  weights loaded
   4.00 s  graph 1 of 2, batch 2
   6.00 s  graph 2 of 2, batch 1
   8.50 s  batch 1 of 1, 8192 tokens
   9.00 s  kernels of all batches: compiled 5 in 3.50 s, read 4 in 0.02 s
  compiled _sample_kernel: 2 in 1.00 s
   9.50 s  ready
"""


def test_phases_add_up_to_when_the_rank_was_ready() -> None:
    found = phases_of(LOG.splitlines())
    assert found == {
        "groups": 1.5,
        "kv_cache": 1.0,
        "weights": 0.75,
        "graphs": 2.75,
        "batches": 3.0,
        "last_checks": 0.5,
    }
    assert sum(found.values()) == 9.5


def test_kernels_are_counted_when_all_batches_have_run() -> None:
    found = kernels_of(LOG.splitlines())
    assert found == {"compiled_kernels": 5, "compiling_s": 3.5, "read_kernels": 4}


def test_a_part_that_some_runs_lack_is_the_median_of_the_others() -> None:
    runs = [{"a": 1.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0}]
    assert medians(runs) == {"a": 2.0, "b": 7.0}


def test_a_launch_that_ends_is_an_error_with_its_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no plan fits')"]
    with pytest.raises(StartError, match="no plan fits"):
        start_once(command, tmp_path, 60)
