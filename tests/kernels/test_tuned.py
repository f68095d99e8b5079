from pathlib import Path

import pytest
import torch

from rankwright.kernels import tuned
from rankwright.kernels.decode_config import decode_config
from rankwright.kernels.gpu_facts import GpuFacts
from rankwright.kernels.tuned import read_table, rows_of, tuned_rows


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


def test_measured_cuts_of_decode_attention_go_before_the_rules(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = {"tile": 16, "num_warps": 2, "num_stages": 7}
    rows = rows_of({"decode": [{"shape": [128, 2], "config": measured}]}, "decode")
    monkeypatch.setattr(
        "rankwright.kernels.decode_config.tuned_rows", lambda device, kind: {"decode": rows}[kind]
    )
    device = torch.device("cuda")
    tuned_cut, by_rule = (
        decode_config(8, 8, 128, 64, 64, torch.bfloat16, 132, at) for at in (device, None)
    )
    assert {name: getattr(tuned_cut, name) for name in measured} == measured
    assert {name: getattr(by_rule, name) for name in measured} != measured
