"""What commands print: JSON of known shape, and tables with the figures in them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rankwright.cli import COMMANDS, main
from rankwright.cost_model.prediction import Prediction
from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import read_any_plan
from rankwright.topology.cluster import Cluster

TOPO = """\
\tGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity
GPU0\t X \tNV18\tPIX\t0-31\t0
GPU1\tNV18\t X \tSYS\t32-63\t1
NIC0\tPIX\tSYS\t X
"""


def ok(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    code = main(args)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_probe_prints_a_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ok(capsys, "probe", "--json", "-o", str(tmp_path / "cluster.yaml"))
    cluster = Cluster.model_validate_json(out)
    assert cluster.num_gpus >= 1
    assert cluster.describe() in ok(capsys, "probe")
    assert (tmp_path / "cluster.yaml").stat().st_size > 0


def test_probe_prints_what_a_file_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "topo.txt"
    path.write_text(TOPO)
    read = json.loads(ok(capsys, "probe", "--from-file", str(path), "--json"))
    assert read["matrix"] == [["X", "NV18"], ["NV18", "X"]]
    assert read["gpu_names"] == ["GPU0", "GPU1"]
    assert read["nics"] == ["NIC0"]
    assert read["nic_matrix"] == [["PIX", "SYS"]]
    assert read["cpu_affinity"] == ["0-31", "32-63"]
    assert read["numa_affinity"] == ["0", "1"]
    page = ok(capsys, "probe", "--from-file", str(path))
    assert "NV18" in page
    assert "between CPU sockets" in page


def test_a_capture_with_names_becomes_a_cluster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "box.txt"
    uuids = (f"GPU-0000000{index}-0000-0000-0000-000000000000" for index in (1, 2))
    names = "".join(
        f"GPU {index}: NVIDIA H100 80GB HBM3 (UUID: {uuid})\n" for index, uuid in enumerate(uuids)
    )
    path.write_text(names + TOPO)
    made = tmp_path / "cluster.json"
    ok(capsys, "probe", "--from-file", str(path), "-o", str(made))
    assert Cluster.model_validate_json(made.read_text()).describe() == "2 x h100-sxm"


def test_predict_prints_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("predict", "Qwen/Qwen3-8B", "--cluster", "8xh100-sxm", "--tp", "4", "--dp", "2")
    prediction = Prediction.model_validate_json(ok(capsys, *args, "--json"))
    assert 0 < prediction.tpot_s.low < prediction.tpot_s.value < prediction.tpot_s.high
    page = ok(capsys, *args)
    assert "TP4 DP2" in page
    assert "time per output token" in page


def test_a_shorter_number_format_takes_less_memory(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("predict", "Qwen/Qwen3-8B", "--cluster", "1xh100-sxm", "--json")
    plain = Prediction.model_validate_json(ok(capsys, *args))
    float8 = Prediction.model_validate_json(ok(capsys, *args, "--dtype", "float8"))
    weights = [
        next(part.bytes for part in prediction.memory_parts if part.name == "weights")
        for prediction in (plain, float8)
    ]
    # 6.95e9 of the 8.19e9 parameters are matrices of layers: half of 2 bytes each is saved.
    assert weights[0] - weights[1] == pytest.approx(6.95e9, rel=0.01)


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    args = ["plan", "Qwen/Qwen3-8B", "--cluster", "4xl4", "--isl", "512", "--osl", "64"]
    assert main([*args, "-o", str(path), "--report", str(path.with_suffix(".html"))]) == 0
    return path


def test_plan_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("plan", "Qwen/Qwen3-8B", "--cluster", "4xl4", "--isl", "512", "--osl", "64", "--json")
    text = ok(capsys, *args)
    plan = Plan.model_validate_json(text)
    top = json.loads(text)
    assert top["feasible"] is True
    assert top["num_gpus"] == plan.num_gpus
    assert {"tp", "pp", "dp", "ep", "cp"} <= top["split"].keys()
    for name in ("ttft_s", "tpot_s", "output_tokens_per_s", "memory_bytes_per_gpu"):
        assert {"value", "low", "high"} <= top["prediction"][name].keys()
    assert {"objective", "bound", "gap", "solver"} <= top["certificate"].keys()


def test_plan_prints_split_ranks_memory_and_proof(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("plan", "Qwen/Qwen3-8B", "--cluster", "4xl4")
    page = ok(capsys, *args)
    for part in ("Qwen/Qwen3-8B", "layers", "weights", "interval", "no plan is better", "binds"):
        assert part in page
    plan = Plan.model_validate_json(ok(capsys, *args, "--json"))
    page = ok(capsys, *args, "--explain")
    # The two were solved apart, and do not take the same time.
    assert _without_solve_time(plan.explain()) in _without_solve_time(page)


def _without_solve_time(text: str) -> str:
    assert re.search(r"optimal, [\d.]+ ms\)", text)
    return re.sub(r"optimal, [\d.]+ ms\)", "optimal)", text)


def test_unlike_cards_get_a_plan_of_parts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(tmp_path / "plan.json")
    cards = ("--cluster", "2xrtx4090+2xrtx3090", "--tpot", "50")
    assert main(["plan", "meta-llama/Llama-3.1-8B", *cards, "-o", path]) == 0
    assert isinstance(read_any_plan(path), Plan)
    assert "--mixed-shapes auto also tries" in capsys.readouterr().err
    mixed = ("--mixed-shapes", "auto", "-o", path)
    out = ok(capsys, "plan", "meta-llama/Llama-3.1-8B", *cards, *mixed)
    assert "2 x TP1 + TP2, 4 GPUs" in out
    assert re.search(r"unlike replicas serve \d+\.\d% more", out)
    assert "--mixed-shapes never" in out
    assert isinstance(read_any_plan(path), PartsPlan)
    assert "#SBATCH --gpus-per-node=4" in ok(capsys, "render", path, "--target", "slurm")
    assert main(["launch", path, "--nnodes", "2"]) == 2
    assert "--nnodes is for plans of one shape" in capsys.readouterr().err
    assert main(["bench", path]) == 2
    assert "plan again with --mixed-shapes never" in capsys.readouterr().err


def test_the_fullest_rank_is_shown_beside_its_own_card(capsys: pytest.CaptureFixture[str]) -> None:
    pins = ("--cluster", "1xa100-sxm+1xl4", "--tp", "1", "--pp", "2", "--dp", "1")
    out = ok(capsys, "plan", "meta-llama/Llama-3.1-8B", *pins)
    found = re.search(r"total +([\d.]+) GB +of the ([\d.]+) GB that it has", out)
    assert found is not None, out
    held, capacity = map(float, found.groups())
    assert 25 < held < capacity < 90  # more than the L4 has, on the A100


def test_pins_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--tp", "2", "--pp", "2", "--dp", "1", "--json")
    text = ok(capsys, "plan", "Qwen/Qwen3-8B", "--cluster", "4xl4", *args)
    split = Plan.model_validate_json(text).split
    assert (split.tp, split.pp, split.dp) == (2, 2, 1)


def test_a_report_holds_everything_it_needs(plan_path: Path) -> None:
    page = plan_path.with_suffix(".html").read_text()
    assert page.lstrip().startswith("<!doctype html>")
    assert page.count("<svg") == page.count("</svg>") >= 3
    assert "http" not in page.replace("http://www.w3.org", "")
    plan = Plan.model_validate_json(plan_path.read_text())
    assert page.count("<g><title>rank ") == plan.num_gpus


@pytest.mark.parametrize("target", ["slurm", "kubernetes"])
def test_render_prints_or_writes(
    capsys: pytest.CaptureFixture[str], plan_path: Path, tmp_path: Path, target: str
) -> None:
    text = ok(capsys, "render", str(plan_path), "--target", target)
    assert ("#SBATCH" if target == "slurm" else "apiVersion") in text
    ok(capsys, "render", str(plan_path), "--target", target, "-o", str(tmp_path / "out"))
    assert (tmp_path / "out/plan.json").exists()
    files = json.loads(ok(capsys, "render", str(plan_path), "--target", target, "--json"))
    assert sorted(files) == sorted(path.name for path in (tmp_path / "out").iterdir())


def test_render_takes_options_of_the_target(
    capsys: pytest.CaptureFixture[str], plan_path: Path
) -> None:
    args = ("render", str(plan_path), "--target", "slurm")
    assert "--partition=fast" in ok(capsys, *args, "--set", "partition=fast")
    assert main([*args, "--set", "partitoin=fast"]) == 2
    assert "partition" in capsys.readouterr().err
    assert main([*args, "--set", "partition"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


def test_doctor_has_a_remedy_for_everything_that_is_wrong(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["doctor", "--url", "http://127.0.0.1:9", "--json"])
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert code == 4
    assert {"python", "torch", "shared memory", "server"} <= {f["check"] for f in findings}
    assert all(f["remedy"] for f in findings if f["state"] != "ok")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = ok(capsys, "--help")
    for command in COMMANDS:
        assert command in text


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, "-m", "rankwright", "plan", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 1)
