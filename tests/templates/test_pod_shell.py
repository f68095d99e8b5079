"""The shell inside a pod, run here: `getent` and `rankwright` are stand-ins found first in PATH."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tests.templates.plans import plan

from rankwright.templates.checks.engine_objects import container_environment, expanded
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.render import render

LAUNCHER = """\
#!/bin/sh
trap 'echo drained > "$RECORD/drained"; exit 0' TERM
{ echo "pid $$"; printf '%s\\n' "$@"; } > "$RECORD/launched.tmp"
mv "$RECORD/launched.tmp" "$RECORD/launched"
while :; do sleep 0.05; done
"""
GETENT = """\
#!/bin/sh
echo "$*" >> "$RECORD/asked"
[ -e "$RECORD/resolves" ]
"""


def start(folder: Path, **options: object) -> "subprocess.Popen[bytes]":
    objects = read_objects(render(plan(), "kubernetes", None, **options)["rankwright.yaml"])
    workload = next(each for each in objects if each["metadata"]["name"].endswith("-workers"))
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    for name, text in (("rankwright", LAUNCHER), ("getent", GETENT)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    given = container_environment(container)
    environment = {
        **os.environ,
        **given,
        "NODE_RANK": "1",
        "RECORD": str(folder),
        "PATH": f"{folder}:{os.environ['PATH']}",
    }
    words = [*container["command"], *container["args"]]
    return subprocess.Popen([expanded(word, given) for word in words], env=environment)


def wait_for(file: Path) -> None:
    end = time.monotonic() + 20
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} did not appear"
        time.sleep(0.02)


def test_a_pod_waits_for_its_head_and_then_becomes_the_launcher(tmp_path: Path) -> None:
    pod = start(tmp_path, name="x", model_pvc="weights", model_path="/models/it's $HOME")
    try:
        wait_for(tmp_path / "asked")
        assert not (tmp_path / "launched").exists()
        (tmp_path / "resolves").touch()
        wait_for(tmp_path / "launched")
        words = (tmp_path / "launched").read_text().splitlines()
        assert words[0] == f"pid {pod.pid}", "the launcher must be the process that gets TERM"
        assert words[1:3] == ["launch", "/etc/rankwright/plan.json"]
        assert dict(zip(words[3::2], words[4::2], strict=True)) == {
            "--nnodes": "2",
            "--node-rank": "1",
            "--master-addr": "x-head-0.x-nodes",
            "--master-port": "29500",
            "--host": "0.0.0.0",
            "--port": "8000",
            "--start-timeout": "5019",
            "--drain": "60",
            "--model-path": "/models/it's $HOME",
        }
        assert (tmp_path / "asked").read_text().splitlines()[0] == "hosts x-head-0.x-nodes"
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(20) == 0
        assert (tmp_path / "drained").exists()
    finally:
        pod.kill()
        pod.wait()


def test_a_pod_that_waits_for_its_head_ends_on_term(tmp_path: Path) -> None:
    pod = start(tmp_path)
    try:
        wait_for(tmp_path / "asked")
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(20) == 143
    finally:
        pod.kill()
        pod.wait()


def test_a_head_that_never_resolves_is_said_and_ends_the_pod(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwright.templates.kubernetes_objects.WAIT_FOR_HEAD_S", 1)
    pod = start(tmp_path, name="x")
    assert pod.wait(20) == 5
    assert "x-head-0.x-nodes has no address" in capfd.readouterr().err
