"""`render(plan, target)`: a plan as the files a scheduler takes. A new target is a row here."""

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan
from rankwright.templates.check import check
from rankwright.templates.checks.pools import check_pools
from rankwright.templates.engines.pods import engine_kubernetes_files
from rankwright.templates.engines.pool_engine import POOL_ENGINES
from rankwright.templates.engines.pools_pods import pools_kubernetes_files
from rankwright.templates.engines.render_engine import engine_files, engine_slurm_files
from rankwright.templates.engines.render_pools import pools_files, pools_slurm_files
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_objects import kubernetes_files
from rankwright.templates.kubernetes_options import (
    EngineKubernetesOptions,
    KubernetesOptions,
    PoolKubernetesOptions,
)
from rankwright.templates.options import (
    EngineOptions,
    SlurmOptions,
    parse_options,
)
from rankwright.templates.plan_text import plan_text
from rankwright.templates.slurm_script import slurm_files

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class Target:
    """A scheduler or an engine that a plan can be rendered for."""

    summary: str
    options: type[Any]  # a model of templates/options.py
    files: Callable[[Any, Any], dict[str, str]]  # of a plan and an instance of `options`
    on: Mapping[str, "Target"] = field(default_factory=dict[str, "Target"])  # schedulers around it


def _engine(target: str) -> Target:
    engine = ENGINES[target]
    return Target(
        f"{engine.title} {engine.version}: its command and configuration",
        EngineOptions,
        partial(engine_files, target=target),
        on={
            "slurm": Target(
                "within one sbatch script",
                SlurmOptions,
                partial(engine_slurm_files, target=target),
            ),
            "kubernetes": Target(
                "its image in plain objects in one YAML file",
                EngineKubernetesOptions,
                partial(engine_kubernetes_files, target=target),
            ),
        },
    )


TARGETS: dict[str, Target] = {
    "slurm": Target("one sbatch script", SlurmOptions, slurm_files),
    "kubernetes": Target("plain objects in one YAML file", KubernetesOptions, kubernetes_files),
    **{target: _engine(target) for target in ENGINES},
}


# Those of our own executor, which starts all parts of a plan with one command.
PART_TARGETS = {target: TARGETS[target] for target in ("slurm", "kubernetes")}

POOL_TARGETS: dict[str, Target] = {
    target: Target(
        "workers of both pools, and the router in front of them",
        EngineOptions,
        partial(pools_files, target=target),
        on={
            "slurm": Target(
                "within one sbatch script",
                SlurmOptions,
                partial(pools_slurm_files, target=target),
            ),
            "kubernetes": Target(
                "its image in plain objects, a router in front, in one YAML file",
                PoolKubernetesOptions,
                partial(pools_kubernetes_files, target=target),
            ),
        },
    )
    for target in POOL_ENGINES
}


def render(
    plan: Plan | PartsPlan | DisaggregatedPlan,
    target: str,
    directory: Path | str | None = None,
    **options: object,
) -> dict[str, str]:
    """Return the files of `plan` for `target` by name, `plan.json` among them.

    Args:
        plan: What to run, and where; with separate pools, or with one.
        target: A key of `TARGETS`; for separate pools, of `POOL_TARGETS`.
        directory: Where to write the files; made if missing. None: they are only returned.
        options: Fields of the target's model in `templates/options.py`; and `on`, the scheduler
            around another engine: a key of the target's `on`. None: the engine alone.

    Raises:
        ValueError: The target or an option is unknown or not valid, the plan does not fit the
            target, or `directory` cannot be written to.
        ManifestMismatchError: The result does not say what the plan says (a fault of ours).
    """
    on = options.pop("on", None)
    if on is not None and not isinstance(on, str):
        raise ValueError(f"on={on!r} is no scheduler's name")
    if isinstance(plan, PartsPlan) and (target in TARGETS and target not in PART_TARGETS):
        raise ValueError(
            f"the plan has replicas of different shapes ({plan.label()}), and target {target!r} "
            f"starts one shape; render it for {' or '.join(PART_TARGETS)}, or plan with "
            "--mixed-shapes never"
        )
    if isinstance(plan, DisaggregatedPlan):
        row = _find(target, on, POOL_TARGETS)
        files = row.files(plan, parse_options(row.options, target, options))
        files[PLAN_FILE] = plan_text(plan)
        check_pools(plan, target, files, on)
    else:
        row = _find(target, on, TARGETS)
        files = row.files(plan, parse_options(row.options, target, options))
        files[PLAN_FILE] = plan_text(plan)
        check(plan, target, files, on)
    if directory is not None:
        _write(files, Path(directory))
    return files


def _find(target: str, on: str | None, targets: Mapping[str, Target]) -> Target:
    if target in TARGETS and target not in targets:
        raise ValueError(
            f"target {target!r} is for our own executor, which does not run separate pools for "
            f"prefill and decode; render for {', '.join(targets)}, with --on for a scheduler"
        )
    if target not in targets:
        near = difflib.get_close_matches(target, targets, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(targets)}"
        raise ValueError(f"no target {target!r}; {hint}")
    row = targets[target]
    if on is None:
        return row
    if on not in row.on:
        if not row.on:
            raise ValueError(f"target {target!r} runs on nothing else; leave --on {on} out")
        raise ValueError(f"no scheduler {on!r} around {target}; expected {' or '.join(row.on)}")
    return row.on[on]


def _write(files: dict[str, str], directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            unfinished = directory / f".{name}.{os.getpid()}.tmp"
            try:
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(directory / name)
            finally:
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot write to {str(directory)!r}: {error.strerror}; give a folder you may write to"
        ) from None
