"""A rendered plan as pods whose image has this interpreter, and a command called `rankwright`."""

import sys
from pathlib import Path

from tests.templates.pod_rig.controllers import pods_of
from tests.templates.pod_rig.rig import ROOT, PodRig

from rankwright.planner.plan import Plan
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.render import render

EXECUTOR = '#!/bin/sh\nexec {python} -m rankwright "$@"\n'


def image_rig(folder: Path, made: Plan, command: str, **options: object) -> PodRig:
    """A rig for the pods of `made`, where `command` is the text of `rankwright`."""
    objects = read_objects(render(made, "kubernetes", None, name="x", **options)["rankwright.yaml"])
    found = PodRig(
        folder / "rig",
        pods_of(objects),
        objects,
        secrets={"x-key": {"key": "00" * 32}},
        extra={
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    (folder / "rig" / "commands").mkdir(parents=True)
    for name, text in (("rankwright", command), ("python3", '#!/bin/sh\nexec {python} "$@"\n')):
        path = folder / "rig" / "commands" / name
        path.write_text(text.replace("{python}", sys.executable))
        path.chmod(0o755)
    return found
