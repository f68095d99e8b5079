"""The Slurm that the tests of this folder share."""

from collections.abc import Iterator

import pytest
from tests.templates.slurm_rig.rig import SlurmRig, why_not


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmRig]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with SlurmRig(tmp_path_factory.mktemp("slurm") / "rig", num_nodes=2, gpus_per_node=8) as rig:
        yield rig
