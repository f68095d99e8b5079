"""The engine's kernels are really timed on this machine's CPU, and the table is found again."""

import json
from pathlib import Path

import pytest

from rankwright.cli import main
from rankwright.cost_model.calibration import find_calibration, read_calibration
from rankwright.cost_model.calibration_file import default_path
from rankwright.executor.calibrate import calibrate
from rankwright.topology.errors import ProbeError
from rankwright.topology.shorthand import parse_cluster


def test_the_command_times_kernels_of_every_kind_and_saves_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = default_path("cpu")
    assert path == tmp_path / "rankwright" / "calibration" / "cpu.json"
    assert main(["calibrate", "--quick"]) == 0
    assert not path.exists()  # a few shapes are no table to plan by
    capsys.readouterr()
    assert main(["calibrate", "--quick", "--json", "-o", str(path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = read_calibration(path)
    assert json.loads(saved.model_dump_json()) == printed
    assert {op.kind for op in saved.ops} == {
        *("gemm", "attention prefill", "attention decode", "elementwise", "launch"),
    }
    assert {op.name for op in saved.ops if op.kind == "elementwise"} == {
        *("rms_norm", "swiglu", "sample"),
    }
    for op in saved.ops:
        assert 1e-8 < op.seconds < 10, op
    assert saved.notes == ()
    assert [file.name for file in path.parent.iterdir()] == ["cpu.json"]
    assert find_calibration(parse_cluster("2xcpu")) == saved
    assert find_calibration(parse_cluster("2xh100-sxm")) is None
    # A machine's own table is used at once.
    command = ["predict", "Qwen/Qwen3-0.6B", "--cluster", "1xcpu", "--json"]
    assert main(command) == 0
    parts = json.loads(capsys.readouterr().out)["decode_parts"]
    assert {part["source"] for part in parts} == {"measured here"}


def test_machines_that_one_table_cannot_describe_are_refused() -> None:
    with pytest.raises(ValueError, match="2 machines; calibrate on one of each kind"):
        calibrate(parse_cluster("2x1xh100-sxm+ib400"))
    with pytest.raises(ValueError, match="several kinds"):
        calibrate(parse_cluster("1xh100-sxm+1xh200-sxm"))


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ProbeError, match="the calibration failed: torch sees no GPU"):
        calibrate(parse_cluster("1xh100-sxm"))


def test_one_that_does_not_end_is_stopped() -> None:
    with pytest.raises(ProbeError, match=r"did not end in 0\.2 s"):
        calibrate(parse_cluster("1xcpu"), timeout_s=0.2)
