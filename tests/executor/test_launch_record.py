"""Records of launches, and `status` and `stop` on those of this machine."""

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.executor.launched import WORKER, complete, launched
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC

from rankwright.cli import main
from rankwright.executor.launch_record import (
    LaunchRecord,
    ProcessPlace,
    make_record,
    read_records,
    remove_record,
    state_directory,
    this_process,
    write_record,
)
from rankwright.executor.submit import launch_of

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def record(**fields: Any) -> LaunchRecord:
    return make_record(cpu_plan(SPEC), "local", this_process()).model_copy(update=fields)


def statuses(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["launches"]
    return found


def test_a_launch_is_listed_while_it_runs_and_stop_drains_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"load_format": "dummy", "worker": WORKER}
    plan = cpu_plan(SPEC, dp=2)
    # The request takes 8 s, within which it has to be seen running.
    with launched(tmp_path, plan, environment={"TEST_STEP_S": "0.05"}, **options) as it:
        url = it.url()
        answers: list[dict[str, Any]] = []
        job = threading.Thread(
            target=lambda: answers.append(complete(url, prompt="ab", max_tokens=160))
        )
        job.start()
        it.wait_for(lambda: "requests_running" in httpx.get(f"{url}/metrics").text)
        it.wait_for(lambda: statuses(capsys)[0]["requests_running"] == 1)
        (found,) = statuses(capsys)
        assert (found["state"], found["url"], found["replicas_up"]) == ("ready", url, 2)
        assert main(["status"]) == 0
        assert found["id"] in capsys.readouterr().out
        assert main(["stop", found["id"][:-2]]) == 0
        job.join(60)
        assert answers[0]["choices"][0]["text"] == "ab" * 80, "it was let finish"
        assert it.exit_code() == 0
    assert list(state_directory().iterdir()) == []


def test_stop_now_does_not_wait_for_requests(tmp_path: Path) -> None:
    options: dict[str, Any] = {"load_format": "dummy", "worker": WORKER, "drain_s": 1000}
    slow = {"TEST_STEP_S": "0.5"}
    with launched(tmp_path, cpu_plan(SPEC), environment=slow, **options) as it:
        url = it.url()
        answers: list[dict[str, Any]] = []
        job = threading.Thread(
            target=lambda: answers.append(complete(url, prompt="ab", max_tokens=400))
        )
        job.start()
        running = 'rankwright_requests_running{replica="0"} 1.0'
        it.wait_for(lambda: running in httpx.get(f"{url}/metrics").text)
        assert main(["stop", "--now", "--timeout", "30"]) == 0
        job.join(10)
        assert "the server has stopped" in answers[0]["error"]["message"]
        assert it.exit_code() == 0


def test_a_launch_that_was_killed_is_shown_once_and_forgotten(
    capsys: pytest.CaptureFixture[str],
) -> None:
    child = os.posix_spawn("/bin/true", ["true"], os.environ)
    os.waitpid(child, 0)
    dead = ProcessPlace(host=os.uname().nodename, pid=child, started_ticks=1)
    write_record(record(place=dead))
    assert [found["state"] for found in statuses(capsys)] == ["ended"]
    assert statuses(capsys) == []


def test_a_process_that_has_got_the_number_of_another_is_not_signalled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = this_process()
    other = record(place=place.model_copy(update={"started_ticks": 1}))
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: sent.append(number))
    launch_of(other).stop(drain=True)
    assert signal.SIGTERM not in sent
    launch_of(record(place=place)).stop(drain=True)
    assert signal.SIGTERM in sent


def test_a_launch_of_another_machine_is_named_and_not_signalled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_record(record(place=ProcessPlace(host="elsewhere", pid=1)))
    assert [found["state"] for found in statuses(capsys)] == ["unknown"]
    assert main(["stop"]) == 2
    assert "runs on elsewhere" in capsys.readouterr().err


def test_records_come_back_as_they_were_and_oldest_first() -> None:
    late, early = record(created_s=2.0), record(created_s=1.0)
    for each in (late, early):
        write_record(each)
    assert read_records() == [early, late]
    assert all(path.suffix == ".json" for path in state_directory().iterdir())
    remove_record(early.id)
    remove_record(early.id)
    assert read_records() == [late]


def test_a_file_that_is_no_record_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    state_directory().mkdir(parents=True)
    (state_directory() / "x.json").write_text('{"id": 1}')
    assert main(["status"]) == 2
    assert "x.json is no record" in capsys.readouterr().err


def test_stop_says_what_there_is_to_stop(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop"]) == 2
    assert "nothing is launched" in capsys.readouterr().err
    one = record()
    write_record(one)
    assert main(["stop", "nosuch"]) == 2
    assert one.id in capsys.readouterr().err
