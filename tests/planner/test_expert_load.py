import json
from pathlib import Path

import pytest

from rankwright.planner.expert_load import ExpertLoad, read_expert_loads, write_expert_load


def test_loads_of_replicas_add_up(tmp_path: Path) -> None:
    paths = [tmp_path / "load.json", tmp_path / "load.1.json"]
    for path, layers in zip(paths, (((1, 2), (3, 4)), ((10, 0), (0, 10))), strict=True):
        write_expert_load(ExpertLoad(model="m", layers=layers), path)
    assert read_expert_loads(paths, "m") == ((11, 2), (3, 14))
    assert sorted(tmp_path.iterdir()) == sorted(paths), "no half-written file is left"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "is not what launch --record-expert-load writes"),
        ('{"layers": [[1]]}', "is not what launch --record-expert-load writes"),
        ('{"model": "m", "layers": []}', "is not what launch --record-expert-load writes"),
        ('{"model": "m", "layers": [[1, -1]]}', "has a count below 0"),
        ('{"model": "other", "layers": [[1, 1]]}', "is of other, and the plan of m"),
    ],
)
def test_a_file_that_is_no_load_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "load.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_expert_loads([path], "m")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_differ_or_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"load\.json cannot be read: No such file"):
        read_expert_loads([tmp_path / "load.json"], "m")
    for name, layers in (("a", [[1, 2]]), ("b", [[1, 2, 3]])):
        (tmp_path / name).write_text(json.dumps({"model": "m", "layers": layers}))
    with pytest.raises(ValueError, match="has other layers or experts than"):
        read_expert_loads([tmp_path / "a", tmp_path / "b"], "m")
