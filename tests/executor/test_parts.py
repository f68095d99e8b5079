"""Parts of unlike shapes behind one address: tokens, shares of requests, status, and an end."""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.executor.conftest import Reference
from tests.executor.launched import WORKER, complete, launched
from tests.executor.plans import cpu_parts, cpu_plan
from tests.executor.tiny_tokenizer import write_tokenizer

from rankwright.cost_model.read_model import read_model
from rankwright.executor.launch import launch
from rankwright.executor.launch_record import make_record, this_process
from rankwright.executor.router import Load, choose_replica
from rankwright.executor.tokenizer import HubTokenizer

pytestmark = pytest.mark.timeout(180)
SMOLLM2 = read_model("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_replica_twice_as_fast_gets_twice_the_tokens() -> None:
    held = [0, 0]
    for _ in range(300):
        loads = [Load(i, held[i], 0, tokens_per_s=speed) for i, speed in enumerate((200, 100))]
        held[choose_replica(loads, 10)] += 10
    assert held == [2000, 1000]


def test_a_fast_replica_takes_a_long_request_before_an_idle_slow_one() -> None:
    loads = [Load(0, 100, 1, tokens_per_s=100), Load(1, 0, 0, tokens_per_s=10)]
    assert choose_replica(loads, 5) == 1  # done after 0.5 s, and there after 1.05 s
    assert choose_replica(loads, 50) == 0  # after 1.5 s, and 5 s there


def test_a_request_does_not_wait_while_a_batch_has_room() -> None:
    fast = Load(0, 80, 8, tokens_per_s=1000, slots=8)
    slow = Load(1, 500, 1, tokens_per_s=10, slots=2)
    assert choose_replica([fast, slow], 10) == 1
    assert choose_replica([fast, Load(1, 500, 2, tokens_per_s=10, slots=2)], 10) == 0


def test_two_shapes_answer_alike_through_one_address(
    references: dict[str, Reference], tmp_path: Path
) -> None:
    reference = references["llama"]
    folder, spec = reference.folder, read_model(reference.folder)
    wide, narrow = cpu_plan(spec, tp=2, max_num_seqs=2), cpu_plan(spec, max_num_seqs=1)
    plan = cpu_parts(wide, narrow, tokens_per_s=(200.0, 100.0))
    kept = {"RANKWRIGHT_LOG_DIR": str(tmp_path / "logs")}
    tokenized = str(write_tokenizer(folder))
    with launched(tmp_path, plan, model_path=tokenized, environment=kept) as it:
        url = it.url()
        prompts = [[5, 17, 42, n] for n in range(1, 7)]
        body = complete(url, prompt=prompts, max_tokens=12, temperature=0, ignore_eos=True)
        decode = HubTokenizer(folder).decode
        texts = [decode(reference.greedy(prompt, 12)) for prompt in prompts]
        assert [choice["text"] for choice in body["choices"]] == texts
        made = it.wait_for(lambda: generated(url, num_tokens=6 * 12))
        assert made == [48, 24]  # the fast part has four of the six
        it.process.send_signal(signal.SIGTERM)
        assert it.exit_code() == 0
        assert it.processes() == []
    logs = [str(path.relative_to(tmp_path / "logs")) for path in tmp_path.rglob("logs/*/*.log")]
    assert sorted(logs) == ["part-0/rank-0.log", "part-0/rank-1.log", "part-1/rank-0.log"]


def test_slots_of_all_parts_fill_and_a_lost_rank_ends_all(tmp_path: Path) -> None:
    narrow, wide = cpu_plan(SMOLLM2, dp=2, max_num_seqs=2), cpu_plan(SMOLLM2, tp=2, max_num_seqs=3)
    plan = cpu_parts(narrow, wide, tokens_per_s=(100.0, 30.0))
    slow = {"worker": WORKER, "load_format": "dummy", "environment": {"TEST_STEP_S": "0.1"}}
    with launched(tmp_path, plan, **slow) as it:
        url = it.url()
        with ThreadPoolExecutor(7) as pool:
            for n in range(1, 8):
                pool.submit(complete, url, prompt=[n, n], max_tokens=400, ignore_eos=True)
            it.wait_for(lambda: gauges(url, "rankwright_requests_running") == [2, 2, 3])
            os.kill(it.pid_of(1), signal.SIGKILL)
            assert it.exit_code() == 5
        assert re.search(r"part [01] \((2 x TP1|TP2)\): rank 1 .* failed", it.lines[-1])
        assert it.processes() == []


def test_a_rank_that_cannot_start_is_named_with_its_part(tmp_path: Path) -> None:
    plan = cpu_parts(cpu_plan(SMOLLM2, tp=3), cpu_plan(SMOLLM2))
    failing = {"TEST_FAIL_RANK": "2", "TEST_START_S": "60"}  # only the first part has a rank 2
    extra = {"worker": WORKER, "load_format": "dummy", "environment": failing}
    with launched(tmp_path, plan, **extra) as it:
        assert it.exit_code() == 5
        assert "part 0 (TP3): rank 2" in it.lines[-1]
        assert "did not start: RuntimeError: out of memory: 3 GB wanted" in it.lines[-1]
        assert it.processes() == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"backend": "ray"}, "--backend ray is for plans of one shape"),
        ({"nnodes": 2}, "--nnodes is for plans of one shape, this one has TP2 [+] TP1"),
        ({"master_port": 29500}, "--master-port is for plans of one shape"),
        ({"record_expert_load": "loads.json"}, "--record-expert-load is for plans of one shape"),
    ],
)
def test_what_parts_cannot_have_is_refused(option: dict[str, Any], words: str) -> None:
    plan = cpu_parts(cpu_plan(SMOLLM2, tp=2), cpu_plan(SMOLLM2))
    with pytest.raises(ValueError, match=f"{words}.*--mixed-shapes never"):
        launch(plan, **option)


def test_status_knows_all_parts_as_one_launch() -> None:
    record = make_record(
        cpu_parts(cpu_plan(SMOLLM2, tp=2), cpu_plan(SMOLLM2, dp=2)), "local", this_process()
    )
    assert record.split == "TP2 + 2 x TP1"
    assert (record.num_ranks, record.num_replicas) == (4, 3)


@pytest.mark.gpu
def test_two_shapes_answer_alike_on_gpus(references: dict[str, Reference], tmp_path: Path) -> None:
    import torch

    spec = read_model(references["llama"].folder)
    tp = 2 if torch.cuda.device_count() > 2 else 1
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs, one here")
    plan = cpu_parts(
        cpu_plan(spec, tp=tp, device="h100-sxm", block_tokens=64),
        cpu_plan(spec, device="h100-sxm", block_tokens=64, max_num_seqs=4),
        tokens_per_s=(200.0, 100.0),
    )
    folder = write_tokenizer(references["llama"].folder)
    with launched(tmp_path, plan, model_path=str(folder), force=True) as it:
        it.wait_for(lambda: "ready in" in it.text, within_s=120)
        url = it.url()
        prompts = [[5, 17, 42]] * 6
        body = complete(url, prompt=prompts, max_tokens=12, temperature=0, ignore_eos=True)
        decode = HubTokenizer(folder).decode
        expected = decode(references["llama"].greedy(prompts[0], 12))
        assert [choice["text"] for choice in body["choices"]] == [expected] * 6
        made = it.wait_for(lambda: generated(url, num_tokens=6 * 12))
        assert made == [48, 24]


def gauges(url: str, name: str) -> list[float]:
    """Return a gauge of every replica, by number."""
    found = re.findall(
        rf'^{name}{{replica="(\d+)"}} (\S+)$', httpx.get(f"{url}/metrics").text, re.M
    )
    return [float(value) for _, value in sorted(found, key=lambda pair: int(pair[0]))]


def generated(url: str, num_tokens: int) -> list[float] | None:
    """Return the tokens that each replica has made, once all are counted."""
    made = gauges(url, "rankwright_engine_generated_tokens_total")
    return made if sum(made) >= num_tokens else None
