"""What every test runs under: no network, Triton interpreted where there is no GPU."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from tests.templates.random_plans import TYPES
from tests.templates.slurm_rig.rig import SlurmRig, why_not

from rankwright.demo_model import FetchError, smollm2_folder

# Set before anything imports these libraries, which read them once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Models of tests are tiny: threads only wait for each other, for 25 times the CPU time on a busy
# machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes, and how long it is drawn, says how busy the machine is, not whether it
# is right.
hypothesis.settings.register_profile(
    "rankwright", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("rankwright")
HAS_GPU = shutil.which("nvidia-smi") is not None
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Fixtures that start something which all their tests share, so that one worker runs these.
_SHARED = {
    "pool": "ranks",
    "slurm": "slurm",
    "scripts": "slurm",  # of 300 plans: some go to Slurm, all to shellcheck
    "ray_address": "ray",
}
# Groups of a minute and more, which begin first: else one worker ends with one of them, and the
# other with nothing to do.
_LONGEST = ("ranks", "slurm", "ray", "test_launch.py", "test_measure_job.py")


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        places = {group: place for place, group in enumerate(_LONGEST)}
        items.sort(key=lambda item: places.get(_group(item), len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    reason = None
    if not HAS_GPU:
        reason = "needs a CUDA GPU: no nvidia-smi here"
    else:
        import torch  # only where a GPU test is about to run: it takes seconds

        if not torch.cuda.is_available():
            reason = "needs a CUDA GPU: torch sees none"
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    is_grouped = session.config.getoption("loadgroup", default=False)
    if is_grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError(
            f"pytest {pytest.__version__} hides the groups of tests from pytest-xdist, which would "
            "start what a group shares in every worker; install pytest<9.2"
        )


def _group(item: pytest.Item) -> str:
    """Return what tests that one worker runs have in common: what they share, else their file."""
    used = getattr(item, "fixturenames", ())
    shared = next((group for name, group in _SHARED.items() if name in used), None)
    return shared or item.path.name


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Records of launches go here, not where the user's own are."""
    folder = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmRig]:
    """A Slurm of two nodes with 8 GPUs and 32 CPUs each, and more that are on paper only."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm") / "rig"
    with SlurmRig(folder, num_nodes=2, gpus_per_node=8, paper_kinds=TYPES) as rig:
        yield rig


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """Of a Ray of two nodes on this machine."""
    # Workers are Python processes that must find what this one finds.
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "executor/ray_nodes.py")],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or []))
    reader.start()
    try:
        address = process.stdout.readline().strip()
        assert address, "".join(errors)
        yield address
    finally:
        process.stdin.close()
        process.wait(60)
        reader.join(10)
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct in float32: real weights, 9 query and 3 KV heads."""
    try:
        return smollm2_folder()
    except FetchError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must run on real weights: {error}")
        pytest.skip(f"no real model here: {error}")
