"""What the tuners of `benchmarks/` make of the times they find, and the table that kernels read."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernel_tuning import Tuner, best, write_table
from rankwright.kernels.prefill_config import PrefillConfig
from rankwright.kernels.tuned import read_table, rows_of
from tune_attention import whole_prompts
from tune_linear import candidates


def test_the_best_candidate_is_so_over_all_shapes() -> None:
    # Of "b": twice as fast on one shape, a fifth slower on the other.
    times = {"a": (1.0, 1.0), "b": (0.5, 1.2), "c": (0.1, math.inf)}
    timers = [(1.0, lambda c: times[c][0]), (1.0, lambda c: times[c][1])]
    found, ratio = best(["a", "b", "c"], timers)
    assert found == "b"
    assert ratio == pytest.approx(math.sqrt(0.6))


def test_a_wrong_candidate_is_never_timed_and_fails_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tuner = Tuner()
    exact = torch.ones(4)
    assert tuner.us("off by one", [lambda: exact + 1], exact) == math.inf
    assert tuner.us("unwritten", [lambda: exact * math.nan], exact) == math.inf
    assert not tuner.all_right
    assert "off by one: WRONG" in capsys.readouterr().out


def test_a_table_keeps_the_kinds_that_were_not_tuned_again(tmp_path: Path) -> None:
    row = {"shape": [8, 4096, 6144], "config": {"block_n": 64}}
    write_table({"linear": [row], "decode": []}, "NVIDIA Test", tmp_path)
    other = {"shape": [128, 2], "config": {"tile": 64}}
    path = write_table({"decode": [other]}, "NVIDIA Test", tmp_path)
    assert path == tmp_path / "nvidia-test.json"
    table = read_table(path)
    assert rows_of(table, "linear") == {(8, 4096, 6144): {"block_n": 64}}
    assert rows_of(table, "decode") == {(128, 2): {"tile": 64}}
    assert "torch" in json.loads(path.read_text())["environment"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({8192: (10, 9, 8), 4096: (5, 4, 4), 2048: (2, 1, 2)}, (4096, 1)),
        ({8192: (10, 8, 9), 4096: (5, 6, 1), 2048: (2, 1, 2)}, (8192, 0)),
        ({8192: (10, 9.9, math.inf), 4096: (5, 1, 1), 2048: (2, 1, 1)}, None),
    ],
)  # fmt: skip
def test_torch_takes_prompts_from_where_its_kernel_is_faster_on(
    times: dict[int, tuple[float, float, float]], expected: tuple[int, int] | None
) -> None:
    config = PrefillConfig(128, 64, 8, 3)
    order: tuple[PrefillConfig | str, ...] = (config, "sdpa", "cudnn")

    def timer(tokens: int) -> Callable[[PrefillConfig | str], float]:
        return lambda how: times[tokens][order.index(how)]

    found = whole_prompts({f"1 x {tokens}": timer(tokens) for tokens in times}, config)
    made = [(row["config"]["from_tokens"], row["config"]["is_cudnn"]) for row in found]
    assert made == ([] if expected is None else [expected])


def test_candidates_fill_the_gpu_and_fit_its_shared_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tune_linear.num_multiprocessors", lambda: 132)
    for inputs, outputs in ((4096, 4096), (2048, 4096), (14336, 4096), (4096, 151936)):
        found = list(candidates(inputs, outputs))
        assert len(found) == len(set(found)) >= 10
        for config in found:
            in_flight = (config.block_n + 16) * config.block_k * config.num_stages * 2
            assert in_flight <= 227 * 1024
            if config.num_splits > 1:
                assert 66 <= -(-outputs // config.block_n) * config.num_splits <= 8 * 132
