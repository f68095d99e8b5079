from pathlib import Path

import pytest
import torch

from rankwright.kernels.tuned import read_table, tuned_rows


def test_without_a_table_nothing_is_tuned(tmp_path: Path) -> None:
    assert read_table(tmp_path / "none.json") == {}
    assert tuned_rows(torch.device("cpu"), "linear") == {}


@pytest.mark.parametrize(("text", "why"), [("{", "Expecting"), ("[]", "it holds a list")])
def test_a_file_that_is_no_table_is_named(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"gpu.json is no table of tuned kernels: {why}"):
        read_table(path)
