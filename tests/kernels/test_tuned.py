from pathlib import Path

import pytest
import torch

from rankwright.kernels import tuned
from rankwright.kernels.gpu_facts import GpuFacts
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


def test_a_folder_of_own_tables_goes_before_those_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = '{"linear": [{"shape": [8, 4096, 6144], "config": {"block_n": 64}}]}'
    (tmp_path / "made-up-gpu.json").write_text(rows)
    monkeypatch.setattr(tuned, "gpu_facts", lambda _: GpuFacts("Made-Up GPU", 1))
    assert tuned_rows(torch.device("cuda"), "linear") == {}
    monkeypatch.setenv("RANKWRIGHT_KERNEL_TABLES", str(tmp_path))
    assert tuned_rows(torch.device("cuda"), "linear") == {(8, 4096, 6144): {"block_n": 64}}
    assert tuned_rows(torch.device("cuda"), "decode") == {}
