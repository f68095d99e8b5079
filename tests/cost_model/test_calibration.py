"""Calibration files come back as they were written; a bad one is refused by its field."""

import json
from pathlib import Path

import pytest

from rankwright.cost_model.calibration import (
    Calibration,
    OpTime,
    read_calibration,
    write_calibration,
)
from rankwright.cost_model.calibration_file import default_path

OP = OpTime(
    kind="gemm",
    name="linear",
    dtype="bfloat16",
    shape=(1, 4096, 4096),
    flops=2.0 * 4096**2,
    bytes=2.0 * 4096**2,
    seconds=1e-5,
)
SMALL = Calibration(device="h100-sxm", name="NVIDIA H100 80GB HBM3", ops=(OP,))


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "h100.json"
    write_calibration(SMALL, path)
    assert read_calibration(path) == SMALL
    assert [file.name for file in path.parent.iterdir()] == ["h100.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ops": []}, "ops: .* at least 1 item"),
        ({"ops": [OP.model_dump() | {"seconds": 0}]}, r"ops\.0\.seconds: .* greater than 0"),
        ({"ops": [OP.model_dump() | {"kind": "magic"}]}, r"ops\.0\.kind: "),
        ({"schema_version": 2}, "schema_version: "),
        ({"colour": "red"}, "colour: .*not permitted"),
    ],
)
def test_a_bad_file_is_refused_by_its_field(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(SMALL.model_dump(mode="json") | change))
    with pytest.raises(ValueError, match=message) as caught:
        read_calibration(path)
    assert str(path) in str(caught.value)
    assert "rankwright calibrate" in str(caught.value)


def test_what_is_no_json_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text("seconds: 3")
    with pytest.raises(ValueError, match=r"text\.json: the file: Invalid JSON"):
        read_calibration(path)
    with pytest.raises(ValueError, match=r"none\.json: No such file"):
        read_calibration(tmp_path / "none.json")


def test_a_relative_data_home_is_ignored_as_the_standard_says() -> None:
    assert default_path("cpu", {"XDG_DATA_HOME": "here"}) == default_path("cpu", {})
