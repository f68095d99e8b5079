"""The benchmark of the start: its phases from a log, and a launch that does not serve."""

import sys
from pathlib import Path

import pytest

from bench_start import StartError, medians, phases_of, start_once

LOG = """\
/usr/lib/python3/x.py:1: UserWarning: 3 s  layer of paint
   2.50 s  layer 1 of 3
   3.00 s  layer 2 of 3
warning: GPUs do not share memory
   3.25 s  layer 3 of 3
   4.00 s  graph of batch 1 captured
   6.00 s  graph of batch 2 captured
   9.00 s  kernels compiled
   9.50 s  ready
"""


def test_phases_add_up_to_when_the_rank_was_ready() -> None:
    found = phases_of(LOG.splitlines())
    assert found == {
        "groups_and_first_layer": 2.5,
        "weights": 0.75,
        "graphs": 2.75,
        "kernels": 3.0,
        "last_checks": 0.5,
    }
    assert sum(found.values()) == 9.5


def test_a_part_that_some_runs_lack_is_the_median_of_the_others() -> None:
    runs = [{"a": 1.0}, {"a": 3.0, "b": 7.0}, {"a": 2.0}]
    assert medians(runs) == {"a": 2.0, "b": 7.0}


def test_a_launch_that_ends_is_an_error_with_its_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no plan fits')"]
    with pytest.raises(StartError, match="no plan fits"):
        start_once(command, tmp_path, 60)
