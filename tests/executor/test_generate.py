"""Offline generation over real ranks without a model (protocol_worker.py)."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.executor.launched import WORKER, processes_of
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC
from tests.executor.tiny_tokenizer import write_tokenizer

from rankwright.executor.generate import generate
from rankwright.executor.session import LaunchError

pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)  # tempfile reads TMPDIR once
    folder = write_tokenizer(tmp_path / "model")
    return {"load_format": "dummy", "model_path": folder, "worker": WORKER, "quiet": True}


def test_prompts_are_answered_in_their_order(options: dict[str, Any], tmp_path: Path) -> None:
    pieces: dict[int, str] = {}

    def on_text(index: int, text: str) -> None:
        pieces[index] = pieces.get(index, "") + text

    prompts: list[str | list[int]] = ["ab", "cde", [66, 67, 0]]
    plan = cpu_plan(SPEC, dp=2)
    answers = generate(plan, prompts, {"max_tokens": 6}, on_text=on_text, **options)
    assert [answer.text for answer in answers[:2]] == ["ababab", "cdecde"]
    assert [answer.finish_reason for answer in answers] == ["length", "length", "stop"]
    assert answers[2].token_ids == (66, 67, 0)
    assert answers[1].num_prompt_tokens == 3
    assert pieces == {i: answer.text for i, answer in enumerate(answers)}
    assert all(0 < answer.ttft_s <= answer.total_s for answer in answers)
    assert list(tmp_path.glob("rankwright-*")) == []  # nothing is left


def test_a_chat_prompt_goes_through_the_template(options: dict[str, Any]) -> None:
    (answer,) = generate(
        cpu_plan(SPEC), ["hi"], {"max_tokens": 60}, chat=True, stops=["[assistant]"], **options
    )
    assert (answer.text, answer.finish_reason) == ("[user]hi", "stop")


def test_a_rank_that_crashes_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(LaunchError, match=r"rank 0 \(stage 0.*exit code 3"):
        generate(cpu_plan(SPEC), [[5], [666]], {"max_tokens": 200}, **options)


def test_a_signal_ends_the_ranks_first(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEST_STEP_S", "0.1")
    started = threading.Event()

    def interrupt() -> None:
        started.wait(60)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        generate(
            cpu_plan(SPEC),
            ["ab"],
            {"max_tokens": 200},
            on_text=lambda *_: started.set(),
            **options,
        )
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], {}, "prompt 0 is empty"),
        ([5000], {}, "token 5000, the vocabulary is 0 to 999"),
        ("a" * 250, {"max_tokens": 7}, "has 250 tokens and max_tokens is 7, the plan allows 256"),
        ("a", {"max_tokens": 0}, "max_tokens"),
        ("a", {"temprature": 1}, "temprature"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_refused_before_the_start(
    options: dict[str, Any], prompt: Any, sampling: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(cpu_plan(SPEC), [prompt], sampling, **options)
