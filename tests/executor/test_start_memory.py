"""Memory that runs out at start: who holds it, and the setting that would fit."""

import re
import warnings
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.executor.launched import launched
from tests.executor.plans import cpu_plan
from tests.executor.test_launch import SPEC

from rankwright.executor import peer_memory, start_device
from rankwright.executor.peer_memory import wait_until
from rankwright.executor.start_memory import (
    Room,
    StartMemoryError,
    blocks_that_fit,
    check_room,
    explain,
)
from rankwright.planner.plan import Plan
from rankwright.planner.plan_shares import memory_of

PLAN = cpu_plan(SPEC, num_blocks=4000, max_model_len=256)
RANK = PLAN.ranks[0]


def with_blocks(plan: Plan, num_blocks: int) -> Plan:
    return plan.model_copy(
        update={"kv_cache": plan.kv_cache.model_copy(update={"num_blocks": num_blocks})}
    )


def needed_bytes(plan: Plan) -> int:
    return sum(part.bytes for part in memory_of(plan, RANK))


@given(st.integers(0, 2 * needed_bytes(PLAN)))
def test_the_blocks_that_fit_do_and_one_more_does_not(free_bytes: int) -> None:
    fits = blocks_that_fit(PLAN, RANK, Room(free_bytes, free_bytes))
    if fits >= 1:
        assert needed_bytes(with_blocks(PLAN, fits)) <= free_bytes
    assert needed_bytes(with_blocks(PLAN, max(fits, 0) + 1)) > free_bytes


def test_the_message_names_the_largest_first_and_a_setting_that_fits() -> None:
    room = Room(needed_bytes(with_blocks(PLAN, 1000)), 10**9)
    text = explain(PLAN, RANK, room, "at start")
    sizes = [
        float(number) * {"GB": 1e3, "MB": 1}[unit]
        for number, unit in re.findall(
            r"(?:[a-z]) ([\d.]+) (GB|MB)", text.split("largest first")[1]
        )
    ]
    assert len(sizes) == 5
    assert sizes == sorted(sizes, reverse=True)
    assert "set kv_cache.num_blocks to 1000 (now 4000) in the plan, or plan again with" in text


def test_a_request_that_no_longer_fits_is_shortened_in_the_advice() -> None:
    room = Room(needed_bytes(with_blocks(PLAN, 3)), 10**9)
    assert "and limits.max_model_len to 48 (now 256)" in explain(PLAN, RANK, room, "at start")


def test_weights_that_do_not_fit_need_more_gpus() -> None:
    text = explain(PLAN, RANK, Room(1000, 10**9), "at start")
    assert "leave no KV cache: cut the model over more GPUs" in text


def test_what_fits_by_the_count_is_blamed_on_no_setting() -> None:
    text = explain(PLAN, RANK, Room(10**12, 10**12), "at start")
    assert "another process has taken memory since" in text


def test_only_weights_and_cache_refuse_a_start() -> None:
    exact = sum(p.bytes for p in memory_of(PLAN, RANK) if p.name in ("weights", "kv cache"))
    check_room(PLAN, RANK, Room(exact, exact))
    with pytest.raises(StartMemoryError):
        check_room(PLAN, RANK, Room(exact - 1, exact))


def test_an_error_of_the_gpu_becomes_a_line_about_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mock: PyTorch's error and what it says of the GPU's memory."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 10**8, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10**8)
    gpu = torch.device("cuda", 0)
    with (
        pytest.raises(StartMemoryError, match=r"after: layer 2 of 4: of 80.0 GB, 0.6 GB are free"),
        start_device.memory_explained(PLAN, RANK, gpu, ["layer 2 of 4"]),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (
        pytest.raises(RuntimeError, match="something else"),
        start_device.memory_explained(PLAN, RANK, gpu, ["nothing"]),
    ):
        raise RuntimeError("something else")


def test_a_launch_without_the_memory_says_what_would_fit(tmp_path: Path) -> None:
    # 2 PB of KV cache: no machine gives them.
    plan = with_blocks(PLAN, 2 * 10**11)
    with launched(tmp_path, plan, load_format="dummy") as it:
        assert it.exit_code() == 5
        assert "did not start: StartMemoryError: out of memory at start" in it.text
        assert re.search(r"largest first: kv cache [\d.]+ GB, ", it.text)
        assert re.search(r"set kv_cache.num_blocks to \d+ \(now 200000000000\)", it.text)


def test_warnings_of_ours_are_one_line_and_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    ours = Path(start_device.__file__).parent / "mesh.py"
    start_device.show_warning(UserWarning("GPUs do\nnot share"), UserWarning, str(ours), 1)
    start_device.show_warning(UserWarning("of theirs"), UserWarning, "/usr/torch.py", 1)
    out = capsys.readouterr()
    assert out.out == "warning: GPUs do not share\n"
    assert "of theirs" in out.err
    assert "of theirs" not in out.out
    assert warnings.showwarning is not start_device.show_warning


def test_a_peer_that_never_answers_ends_the_trial() -> None:
    """Mock: an event of a GPU that is never done."""
    with pytest.raises(TimeoutError, match="RANKWRIGHT_PEER_MEMORY=0"):
        wait_until(lambda: False, within_s=0.05)
    answers = iter((False, False, True))
    wait_until(lambda: next(answers), within_s=60)


@pytest.mark.parametrize("what", ["refused", "wrong sums"])
def test_gpus_that_cannot_share_memory_sum_through_nccl_with_one_warning(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mock: the driver's refusal, or sums that come out wrong, on a group of one process."""

    class Group:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    def open_memory(*_: object, **__: object) -> object:
        if what == "refused":
            raise RuntimeError("peer access is not supported\nbetween these two devices")
        return object()

    monkeypatch.setattr(peer_memory, "PeerMemory", open_memory)
    monkeypatch.setattr(peer_memory, "_sums_right", lambda *_: False)
    monkeypatch.setattr(peer_memory, "_all", lambda mine, *_: mine)
    with pytest.warns(UserWarning, match="sums over 2 of them go through NCCL, .* slower") as seen:
        opened = peer_memory.open_peer_memory(
            cast("torch.distributed.ProcessGroup", Group()),
            one_machine=True,
            max_rows=8,
            dim=64,
            dtype=torch.bfloat16,
            device=torch.device("cuda", 0),
        )
    assert opened is None
    assert len(seen) == 1
    said = str(seen[0].message)
    assert "\n" not in said
    reason = {"refused": "peer access is not supported between", "wrong sums": "came out wrong"}
    assert reason[what] in said
