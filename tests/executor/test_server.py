"""The HTTP API over a real server, a real socket and a leader in a process of its own."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.executor.tiny_tokenizer import write_tokenizer

from rankwright.executor.front_end import FrontEnd
from rankwright.executor.metrics import Metrics
from rankwright.executor.server import create_app, make_server
from rankwright.executor.service import Service
from rankwright.executor.tokenizer import load_tokenizer

WORKER = Path(__file__).with_name("protocol_worker.py")
MODEL = "test/echo"
pytestmark = pytest.mark.timeout(120)


@dataclass
class Running:
    """A server in a thread, with one replica."""

    url: str
    events: Path
    service: Service
    run_in_loop: Callable[[Callable[[], object]], object]

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=20)

    def wait_for_event(self, reason: str) -> None:
        self.wait_until(
            lambda: self.events.exists() and reason in self.events.read_text().split(),
            f"the engine never saw {reason!r}",
        )

    def wait_until(self, is_so: Callable[[], bool], otherwise: str) -> None:
        deadline_s = time.monotonic() + 20
        while not is_so():
            assert time.monotonic() < deadline_s, otherwise
            time.sleep(0.01)

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@contextlib.contextmanager
def serve(folder: Path, *, with_leader: bool = True, **environment: str) -> Iterator[Running]:
    """Run a server until the caller is done."""
    events = folder / "events"
    tokenizer = load_tokenizer(write_tokenizer(folder))
    listening = socket.create_server(("127.0.0.1", 0))
    box: dict[str, Any] = {}
    up = threading.Event()

    async def main() -> None:
        async with FrontEnd(1) as front_end:
            service = Service(
                front_end, tokenizer, MODEL, 1000, {"temperature": 0.5}, Metrics(front_end)
            )
            server = make_server(create_app(service))
            box.update(service=service, server=server, loop=asyncio.get_running_loop())
            process = None
            if with_leader:
                process = subprocess.Popen(
                    [sys.executable, str(WORKER)],
                    env={
                        **os.environ,
                        "RANKWRIGHT_FRONT_END": front_end.address,
                        "RANKWRIGHT_AUTHKEY": front_end.authkey.hex(),
                        "RANKWRIGHT_RUN_DIR": str(folder),
                        "TEST_EVENTS": str(events),
                        **environment,
                    },
                )
                await front_end.ready()
            up.set()
            try:
                await server.serve(sockets=[listening])
            finally:
                if process is not None:
                    process.kill()
                    process.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert up.wait(40)
    host, port = listening.getsockname()

    def run_in_loop(call: Callable[[], object]) -> object:
        async def wrapped() -> object:
            return call()

        return asyncio.run_coroutine_threadsafe(wrapped(), box["loop"]).result(10)

    yield Running(f"http://{host}:{port}", events, box["service"], run_in_loop)
    box["server"].should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serve(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Running]:
    """For tests that leave a server in another state."""
    with serve(tmp_path) as running:
        yield running


@pytest.fixture
def starting_server(tmp_path: Path) -> Iterator[Running]:
    with serve(tmp_path, with_leader=False) as running:
        yield running


def chunks(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion_follows_its_prompt(server: Running) -> None:
    body = server.post("/v1/completions", prompt="abc", max_tokens=7, model=MODEL).json()
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    assert body["choices"] == [
        {"index": 0, "text": "abcabca", "logprobs": None, "finish_reason": "length"}
    ]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}


def test_sixteen_tokens_are_the_default_of_a_completion(server: Running) -> None:
    body = server.post("/v1/completions", prompt="x").json()
    assert body["choices"][0]["text"] == "x" * 16


def test_a_token_that_ends_the_text_is_counted_but_not_shown(server: Running) -> None:
    body = server.post("/v1/completions", prompt=[66, 67, 0], max_tokens=9).json()
    assert len(body["choices"][0]["text"]) == 2
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3
    ignored = server.post("/v1/completions", prompt=[66, 67, 0], max_tokens=9, ignore_eos=True)
    assert ignored.json()["usage"]["completion_tokens"] == 9


def test_several_prompts_and_choices_come_back_in_order(server: Running) -> None:
    body = server.post("/v1/completions", prompt=["ab", "cd"], n=2, max_tokens=3).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "aba"),
        (1, "aba"),
        (2, "cdc"),
        (3, "cdc"),
    ]


def test_a_stop_string_ends_the_text_before_it(server: Running) -> None:
    body = server.post("/v1/completions", prompt="one two ", max_tokens=100, stop="o on").json()
    assert body["choices"][0]["text"] == "one tw"
    assert body["choices"][0]["finish_reason"] == "stop"
    server.wait_for_event("abort")  # the engine does not go on for nobody


def test_a_streamed_completion_is_the_same_text_in_pieces(server: Running) -> None:
    response = server.post(
        "/v1/completions",
        prompt="héé",
        max_tokens=11,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, usage = chunks(response)
    texts = [piece["choices"][0]["text"] for piece in pieces]
    assert "".join(texts) == "hééhééh"
    assert all("\ufffd" not in text for text in texts)  # no half characters
    assert len(texts) > 3
    assert [piece["choices"][0]["finish_reason"] for piece in pieces][-1] == "length"
    assert all(piece["usage"] is None for piece in pieces)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 11, "total_tokens": 16}


def test_a_chat_is_rendered_with_the_models_template(server: Running) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    prompt = "[system]be brief[user]hi[assistant]"
    body = server.post("/v1/chat/completions", messages=messages, max_tokens=len(prompt)).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": prompt}
    assert body["usage"]["prompt_tokens"] == len(prompt)


def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(server: Running) -> None:
    response = server.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "hi"}],
        max_completion_tokens=9,
        stream=True,
    )
    first, *middle, last = chunks(response)
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == "[user]hi["
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": "length",
    }
    assert "usage" not in first


def test_a_chat_may_fill_the_context(server: Running) -> None:
    body = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}]).json()
    assert body["usage"]["total_tokens"] == 512


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({}, "prompt", "prompt is missing"),
    ({"prompt": "a" * 600}, "prompt", "context holds 512 tokens: the prompt has 600"),
    ({"prompt": "a", "max_tokens": 512}, "max_tokens", "max_tokens is 512"),
    ({"prompt": "a", "max_tokens": -1}, "max_tokens", "greater than or equal to 1, got -1"),
    ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
    ({"prompt": "a", "temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
    ({"prompt": "a", "max_token": 5}, "max_token", "did you mean 'max_tokens'?"),
    ({"prompt": "a", "quux": 5}, "quux", "unknown field 'quux'"),
    ({"prompt": "a", "logprobs": 3}, "logprobs", "logprobs is not supported"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "not supported"),
    ({"prompt": [1, 5000]}, "prompt", "token 5000 is not in the vocabulary of 1000"),
    ({"prompt": [1, -5]}, "prompt.1", "greater than or equal to 0"),
    ({"prompt": "a", "stop": ["x", ""]}, "stop.1", "at least 1 character"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, None, "needs stream: true"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_with_a_request_is_named(
    server: Running, body: dict[str, Any], param: str | None, message: str
) -> None:
    response = server.post("/v1/completions", **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert httpx.get(server.url + "/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"prompt": "a",}', "the body is not JSON"),
        (b'{"prompt": NaN}', "prompt"),
        (b"[1, 2]", "JSON object"),
        (b"", "JSON object"),
        (b"\xff\xfe", "body"),
        (b'{"prompt": "\\ud800"}', "prompt"),
    ],
)
def test_a_body_that_is_no_request_is_refused(server: Running, body: bytes, message: str) -> None:
    response = httpx.post(
        server.url + "/v1/completions",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_roles_that_the_template_refuses_are_a_bad_request(server: Running) -> None:
    response = server.post(
        "/v1/chat/completions", messages=[{"role": "assistant", "content": "me first"}]
    )
    assert response.status_code == 400
    assert "cannot speak first" in response.json()["error"]["message"]


def test_images_are_a_bad_request(server: Running) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    response = server.post("/v1/chat/completions", messages=[{"role": "user", "content": parts}])
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages.0.content")


def test_another_model_is_not_found(server: Running) -> None:
    response = server.post("/v1/completions", model="gpt-9", prompt="a")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    assert MODEL in response.json()["error"]["message"]


def test_an_unknown_path_and_method_answer_in_the_same_form(server: Running) -> None:
    for response, status in (
        (httpx.get(server.url + "/v2"), 404),
        (httpx.get(server.url + "/v1/completions"), 405),
    ):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_models_lists_the_one_that_is_served(server: Running) -> None:
    (card,) = httpx.get(server.url + "/v1/models").json()["data"]
    assert card["id"] == MODEL
    assert card["max_model_len"] == 512


def test_an_error_of_the_engine_is_told_and_the_server_goes_on(server: Running) -> None:
    response = server.post("/v1/completions", prompt=[667])
    assert response.status_code == 500
    assert "the engine says no" in response.json()["error"]["message"]
    (chunk,) = chunks(server.post("/v1/completions", prompt=[667], stream=True))
    assert chunk["error"]["code"] == "engine_error"
    assert server.post("/v1/completions", prompt="a").status_code == 200


def test_metrics_count_requests_tokens_and_times(own_server: Running) -> None:
    own_server.post("/v1/completions", prompt="abc", max_tokens=5)
    own_server.post("/v1/completions", prompt="abc", max_tokens=1)
    generated = 'rankwright_engine_generated_tokens_total{replica="0"}'
    # The leader tells its state ten times a second.
    own_server.wait_until(lambda: own_server.metrics().get(generated) == 6, "no word of 6 tokens")
    metrics = own_server.metrics()
    assert metrics["rankwright_prompt_tokens_total"] == 6
    assert metrics["rankwright_output_tokens_total"] == 6
    assert metrics["rankwright_time_to_first_token_seconds_count"] == 2
    assert metrics["rankwright_time_per_output_token_seconds_count"] == 1
    assert metrics["rankwright_request_seconds_count"] == 2
    assert metrics['rankwright_requests_total{finish_reason="length"}'] == 2
    assert metrics['rankwright_requests_running{replica="0"}'] == 0
    assert metrics['rankwright_kv_cache_usage_ratio{replica="0"}'] == 0
    assert metrics['rankwright_replica_up{replica="0"}'] == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_takes_its_request_back(tmp_path: Path, stream: bool) -> None:
    with serve(tmp_path, TEST_STEP_S="0.02") as server:
        body = {"prompt": "abc", "max_tokens": 500, "stream": stream}
        with (
            contextlib.suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST", server.url + "/v1/completions", json=body, timeout=1.0
            ) as response,
        ):
            next(response.iter_lines())
        server.wait_for_event("abort")
        assert server.service.front_end.num_outstanding == 0
        assert server.metrics()['rankwright_requests_total{finish_reason="disconnect"}'] == 1


def test_before_the_model_is_loaded_health_and_requests_say_so(starting_server: Running) -> None:
    health = httpx.get(starting_server.url + "/health")
    assert (health.status_code, health.json()["status"]) == (503, "starting")
    response = starting_server.post("/v1/completions", prompt="a")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert httpx.get(starting_server.url + "/v1/models").status_code == 200


def test_while_draining_new_requests_are_refused(own_server: Running) -> None:
    assert httpx.get(own_server.url + "/health").json() == {"status": "ok"}
    own_server.service.draining = True
    assert httpx.get(own_server.url + "/health").json()["status"] == "draining"
    response = own_server.post("/v1/completions", prompt="a")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"


def test_a_leader_that_dies_ends_answers_with_an_error(own_server: Running) -> None:
    response = own_server.post("/v1/completions", prompt=[666])
    assert response.status_code == 500
    assert "replica 0 is gone" in response.json()["error"]["message"]
    health = httpx.get(own_server.url + "/health")
    assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_a_replica_that_hangs_with_work_is_unhealthy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwright.executor.server.STALL_S", 0.2)
    with serve(tmp_path, TEST_SILENT="1") as server:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(server.url + "/v1/completions", json={"prompt": "a"}, timeout=0.1)
        answer: list[int] = []
        waiting = threading.Thread(
            target=lambda: answer.append(server.post("/v1/completions", prompt="a").status_code)
        )
        waiting.start()
        server.wait_until(
            lambda: httpx.get(server.url + "/health").status_code != 200, "it never stalled"
        )
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["status"]) == (503, "stalled: replica 0")
        server.run_in_loop(lambda: server.service.front_end.abort_all("enough"))
        waiting.join(10)
        assert answer == [500]
