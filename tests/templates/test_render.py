import errno
from pathlib import Path

import pytest
from tests.templates.plans import cpu_plan, plan, spec

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates import render as render_module
from rankwright.templates.checks.mismatch import ManifestMismatchError
from rankwright.templates.render import TARGETS, Target, render

FILES = {
    "slurm": {"rankwright.sbatch", "plan.json"},
    "kubernetes": {"rankwright.yaml", "plan.json"},
    "vllm": {"vllm.sh", "plan.json"},
    "sglang": {"sglang.sh", "plan.json"},
    "trtllm": {"trtllm.sh", "parallel_config.yaml", "plan.json"},
}
SCHEDULERS = ("slurm", "kubernetes")


def test_every_target_is_tested_here() -> None:
    assert set(FILES) == set(TARGETS)


@pytest.mark.parametrize("target", FILES)
def test_the_plan_lies_beside_the_manifests(target: str, tmp_path: Path) -> None:
    made = plan((8,), tp=4, pp=1)
    files = render(made, target, tmp_path / "new" / "folder")
    assert set(files) == FILES[target]
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == FILES[target]
    for name, text in files.items():
        assert (tmp_path / "new" / "folder" / name).read_text() == text
    assert Plan.model_validate_json(files["plan.json"]) == made


@pytest.mark.parametrize("target", SCHEDULERS)
def test_files_of_an_earlier_render_are_replaced(target: str, tmp_path: Path) -> None:
    render(plan(), target, tmp_path)
    files = render(cpu_plan(), target, str(tmp_path))
    for name, text in files.items():
        assert (tmp_path / name).read_text() == text


def test_an_unfinished_file_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ValueError, match="No space left on device; give a folder"):
        render(plan(), "slurm", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to .*taken"):
        render(plan(), "slurm", tmp_path / "taken")


def test_an_unknown_target_names_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="no target 'slrum'; did you mean 'slurm'"):
        render(plan(), "slrum")
    with pytest.raises(ValueError, match="expected one of slurm, kubernetes, vllm"):
        render(plan(), "pbs")


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("A B", "1", "environment variable 'A B'"),
        ("A", "1\n2", "sets A to '1\\\\n2'"),
        ("NCCL_DEBUG", "INFO", "NCCL_DEBUG twice"),
    ],
)
def test_an_environment_that_no_shell_can_hold_is_refused(
    target: str, name: str, value: str, message: str
) -> None:
    variables = (
        EnvironmentVariable(name="NCCL_DEBUG", value="WARN", reason="r"),
        EnvironmentVariable(name=name, value=value, reason="r"),
    )
    with pytest.raises(ValueError, match=message):
        render(plan((8,), tp=8, pp=1, environment=variables), target)


@pytest.mark.parametrize("target", SCHEDULERS)
def test_odd_model_names_stay_data(target: str) -> None:
    odd = "x/'; rm -rf /\n#SBATCH --nodes=99\nRANKWRIGHT_PLAN\n"
    odd += '\x7f\x85\u2028\U0001f600: "{{ 7 * 7 }}'
    files = render(plan(model=spec(odd)), target)
    assert "49" not in files[next(iter(files))].splitlines()[1]
    assert Plan.model_validate_json(files["plan.json"]).model.name == odd


def test_a_target_that_forgets_a_gpu_cannot_be_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    row = TARGETS["slurm"]

    def forgetful(made_for: Plan, options: object) -> dict[str, str]:
        files = row.files(made_for, options)
        return {k: v.replace("--gpus-per-node=8", "--gpus-per-node=7") for k, v in files.items()}

    broken = Target(row.summary, row.options, forgetful)
    monkeypatch.setitem(render_module.TARGETS, "slurm", broken)
    with pytest.raises(ManifestMismatchError, match=r"rendered \[7, 7\], the plan says \[8, 8\]"):
        render(plan(), "slurm")
