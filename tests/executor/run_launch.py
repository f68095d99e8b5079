"""Runs `launch` on a plan, as the command line does: `run_launch.py PLAN '{"port": 0}'`."""

import json
import sys
from pathlib import Path

from rankwright.executor.launch import launch
from rankwright.planner.read_plan import read_launchable

if __name__ == "__main__":
    plan = read_launchable(Path(sys.argv[1]))
    assert "torch" not in sys.modules, "the parent must not pay for torch"
    try:
        sys.exit(launch(plan, **json.loads(sys.argv[2])))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
