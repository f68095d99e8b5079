"""A launch in a process of its own, for tests to watch, to signal and to hurt."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan

HERE = Path(__file__).parent
WORKER = [sys.executable, str(HERE / "protocol_worker.py")]


class Launched:
    """A launch in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    def url(self) -> str:
        found = self.wait_for(lambda: re.search(r"ready in .* on (http://\S+)", self.text))
        return str(found.group(1))

    def wait_for(self, what: Callable[[], Any], within_s: float = 120) -> Any:
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if value := what():
                return value
            assert self.process.poll() is None, self.text
            time.sleep(0.02)
        raise AssertionError(f"waited in vain:\n{self.text}")

    def pid_of(self, rank: int) -> int:
        def find() -> int | None:
            files = list(self.folder.glob(f"rankwright-*/rank-{rank}.pid"))
            return int(files[0].read_text() or 0) if files else None

        return int(self.wait_for(find))

    def exit_code(self) -> int:
        code = self.process.wait(120)
        self._reader.join(10)
        return code

    def processes(self) -> list[str]:
        """Command lines of the processes that this launch has started."""
        return processes_of(self.folder)


def processes_of(folder: Path) -> list[str]:
    """Command lines of ranks and agents with files in `folder`, which their environment names."""
    found: list[str] = []
    mark = f"RANKWRIGHT_RUN_DIR={folder}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text().replace("\0", " "))
    return found


@contextlib.contextmanager
def launched(folder: Path, plan: Plan | PartsPlan, **extra: Any) -> Iterator[Launched]:
    """Launch `plan` with the options in `extra`; end it with the block."""
    environment = {**os.environ, "TMPDIR": str(folder), **extra.pop("environment", {})}
    plan_path = folder / f"plan-{extra.get('node_rank', 0)}.json"
    plan_path.write_text(plan.model_dump_json())
    options = {"port": 0, **extra}
    process = subprocess.Popen(
        [sys.executable, str(HERE / "run_launch.py"), str(plan_path), json.dumps(options)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    it = Launched(process, folder)
    try:
        yield it
    finally:
        process.terminate()
        it.exit_code()
        assert it.process.stderr is not None
        it.process.stderr.close()


def complete(url: str, **body: Any) -> dict[str, Any]:
    """The answer of `/v1/completions`."""
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    result: dict[str, Any] = response.json()
    return result
