"""Links, memory and matrix products are really timed: over gloo here, over NCCL where GPUs are."""

import json
import os
from pathlib import Path

import pytest
import torch

from rankwright.cli import main
from rankwright.cli.measured_page import print_measurements
from rankwright.executor import measure_pairs
from rankwright.executor.measure import make_team, measure, measure_environment
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.measurements import Measurements
from rankwright.topology.probe import probe
from rankwright.topology.read_cluster import read_cluster
from rankwright.topology.shorthand import parse_cluster

OPERATIONS = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"}


def check(measured: Measurements, gpus: set[int], largest_bytes: int) -> None:
    """Everything that was to be timed is there, and none of it is impossible."""
    assert {(pair.a, pair.b) for pair in measured.pairs} == {
        (a, b) for a in gpus for b in gpus if a < b
    }
    groups = {row.gpus for row in measured.collectives}
    assert {len(group) for group in groups} >= {2, len(gpus)}
    for group in groups:
        rows = [row for row in measured.collectives if row.gpus == group]
        assert {row.operation for row in rows} == OPERATIONS
        assert {min(row.size_bytes for row in rows)} == {1024}
        assert max(row.size_bytes for row in rows) == largest_bytes
    for pair in measured.pairs:
        assert 1e6 < pair.forth_bytes_per_s < 1e12
        assert 1e-7 < pair.latency_s < 1
    assert {row.gpu for row in measured.memory} == gpus
    assert {row.gpu for row in measured.gemms} == gpus
    assert measured.notes == ()


def test_two_cpu_ranks_are_measured_and_saved_with_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    here = parse_cluster("2xcpu")
    lines: list[str] = []
    after = measure(here, progress=lines.append)
    assert after.measurements is not None
    check(after.measurements, {0, 1}, 4 * 2**20)
    assert after.measurements.backend == "gloo"
    assert any("collectives over 2" in line for line in lines)
    assert after.fingerprint == here.fingerprint
    gpu = after.nodes[0].gpus[0]
    assert gpu.memory_bytes_per_s != here.nodes[0].gpus[0].memory_bytes_per_s
    assert set(gpu.flops_per_s or ()) == {"float32", "bfloat16"}
    assert after.nodes[0].links[0].bytes_per_s != here.nodes[0].links[0].bytes_per_s
    # The table that the command prints, and a plan on what was measured.
    print_measurements(after)
    assert "all-reduce" in capsys.readouterr().out
    saved = tmp_path / "cluster.json"
    saved.write_text(after.model_dump_json())
    assert read_cluster(str(saved)) == after
    assert main(["plan", "Qwen/Qwen3-0.6B", "--cluster", str(saved), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["cluster"]["measurements"]["backend"] == "gloo"


def test_a_rank_that_fails_is_named_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "few")
    with pytest.raises(ProbeError, match=r"rank 0 of the measurement failed: ValueError.*few"):
        measure(parse_cluster("1xcpu"))


def test_one_that_does_not_end_is_stopped() -> None:
    with pytest.raises(ProbeError, match="did not end in time"):
        measure(parse_cluster("2xcpu"), timeout_s=0.3)


def test_several_machines_are_refused() -> None:
    with pytest.raises(ValueError, match="measure each by itself"):
        measure(parse_cluster("2x2xcpu+eth25"))


def test_another_machines_file_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "box.txt"
    saved.write_text("")
    assert main(["probe", "--measure", "--from-file", str(saved)]) == 2
    assert "--measure" in capsys.readouterr().err


def test_ranks_see_every_gpu_in_the_drivers_order_and_the_users_settings(tmp_path: Path) -> None:
    node = parse_cluster("4xh100-sxm").nodes[0]
    node = node.model_copy(update={"gpus": node.gpus[2:], "links": ()})
    outer = {"CUDA_VISIBLE_DEVICES": "3,2", "NCCL_NVLS_ENABLE": "0", "TORCHELASTIC_RUN_ID": "x"}
    team = make_team([node], "127.0.0.1", 1234)
    made = measure_environment(team, 1, tmp_path, outer)
    assert made["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert (made["RANK"], made["LOCAL_RANK"], made["WORLD_SIZE"]) == ("1", "1", "2")
    assert made["NCCL_NVLS_ENABLE"] == "0"
    assert "TORCHELASTIC_RUN_ID" not in made
    assert "NCCL_NVLS_ENABLE" not in measure_environment(team, 0, tmp_path, {})
    uuids = {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}
    made = measure_environment(team, 0, tmp_path, uuids)
    assert made["CUDA_VISIBLE_DEVICES"] == uuids["CUDA_VISIBLE_DEVICES"]


@pytest.mark.gpu
def test_gpus_are_measured_over_nccl(tmp_path: Path) -> None:
    here = probe(require_gpu=True)
    if here.num_gpus < 2:
        pytest.skip("needs two GPUs")
    made = tmp_path / "cluster.json"
    assert main(["probe", "--measure", "--gather", "none", "-o", str(made)]) == 0
    after = Cluster.model_validate_json(made.read_text())
    assert after.measurements is not None
    check(after.measurements, {gpu.index for gpu in here.nodes[0].gpus}, 256 * 2**20)
    assert after.measurements.backend == "nccl"
    assert after.measurements.seconds < 60
    assert after.measurements.transports or "NCCL_DEBUG" in os.environ


class _Alone:
    """A rank of two on one machine, whose driver lets no process use the GPU of another."""

    rank, local, node = 0, (0, 1), 0
    device = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.notes: list[str] = []

    def all_of(self, rows: list[str]) -> list[str]:
        return [*rows, ""]  # the other rank met no refusal


def test_without_access_to_other_gpus_pairs_are_timed_by_messages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nmore")

    ranks = _Alone()
    monkeypatch.setattr(torch, "zeros", refuse)
    assert not measure_pairs.may_use_others(ranks)  # type: ignore[arg-type]
    assert "exclusive-process compute mode" in ranks.notes[0]
    assert "busy or unavailable" in ranks.notes[0]
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **options: None)
    assert measure_pairs.may_use_others(ranks)  # type: ignore[arg-type]
