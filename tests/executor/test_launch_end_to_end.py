"""The whole road on this machine: real ranks over gloo, HTTP in front, and one that is killed."""

import json
import os
import signal
from pathlib import Path

import httpx
import pytest
from tests.executor.conftest import Reference
from tests.executor.launched import complete, launched
from tests.executor.plans import cpu_plan
from tests.executor.tiny_tokenizer import write_tokenizer

from rankwright.cost_model.read_model import read_model
from rankwright.executor.tokenizer import HubTokenizer

pytestmark = pytest.mark.timeout(180)


def test_two_ranks_stream_what_transformers_says_until_one_is_killed(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references["llama"]
    folder = reference.folder
    plan = cpu_plan(read_model(folder), tp=2)
    with launched(tmp_path, plan, model_path=str(write_tokenizer(folder))) as it:
        url = it.url()
        prompt = [5, 17, 42, 99, 7]
        with httpx.stream(
            "POST",
            f"{url}/v1/completions",
            json={
                "prompt": prompt,
                "max_tokens": 24,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            timeout=60,
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        *pieces, usage = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        assert usage["usage"]["completion_tokens"] == 24
        text = "".join(piece["choices"][0]["text"] for piece in pieces)
        assert text == decoded(folder, reference.greedy(prompt, 24))
        chat = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 1},
            timeout=60,
        )
        assert chat.json()["usage"]["total_tokens"] <= len("[user]hi[assistant]") + 5
        metrics = httpx.get(f"{url}/metrics").text
        assert "rankwright_time_to_first_token_seconds_count 2.0" in metrics
        os.kill(it.pid_of(1), signal.SIGKILL)
        assert it.exit_code() == 5
        assert "rank 1 (stage 0, tp rank 1, CPU rank 1 of node 0 'here') failed" in it.lines[-1]
        assert it.processes() == []


def test_requests_beyond_the_batch_wait_and_a_signal_ends_in_good_order(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    plan = cpu_plan(read_model(references["qwen3"].folder), pp=2, max_num_seqs=2)
    with launched(tmp_path, plan, load_format="dummy") as it:
        url = it.url()
        prompts = [[i, i + 1] for i in range(1, 7)]
        body = complete(url, prompt=prompts, max_tokens=8, ignore_eos=True)
        assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 6
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
        assert it.processes() == []


def decoded(folder: Path, ids: list[int]) -> str:
    return HubTokenizer(folder).decode(ids)
