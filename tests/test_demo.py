"""The first thing that a newcomer runs."""

import subprocess
import sys
from pathlib import Path

from rankwright.planner.read_plan import read_plan


def test_the_demo_plans_answers_and_leaves_its_files(smollm2: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rankwright.demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout
    assert "8 greedy tokens, all equal" in done.stdout
    plan = read_plan(tmp_path / "demo-out/plan.json")
    assert plan.split.label() in done.stdout
    assert "#SBATCH" in (tmp_path / "demo-out/rankwright.sbatch").read_text()
    assert "apiVersion" in (tmp_path / "demo-out/rankwright.yaml").read_text()
