"""Where a user's calibrations lie.

Apart from what is in them: most plans find none, and need not load what reads one.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from rankwright.topology.cluster import Cluster


def calibration_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of calibrations: `rankwright/calibration` under the XDG data home.

    >>> calibration_folder({"XDG_DATA_HOME": "/data"}).as_posix()
    '/data/rankwright/calibration'
    """
    home = environment.get("XDG_DATA_HOME", "")
    # The specification ignores what is no absolute path.
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "share"
    return base / "rankwright" / "calibration"


def default_path(device: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Return where the calibration of `device` lies when nobody names another place."""
    return calibration_folder(environment) / f"{device}.json"


def own_file(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return this user's file for the GPUs of `cluster`; None where there is none.

    Only where all GPUs are of one kind: a file describes one.
    """
    devices = {gpu.device for node in cluster.nodes for gpu in node.gpus}
    if len(devices) != 1:
        return None
    path = default_path(devices.pop(), environment)
    return path if path.is_file() else None
