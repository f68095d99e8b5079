"""Requests reach a leader over a real socket, and strangers do not matter."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from rankwright.executor.front_end import FrontEnd, ReplicaLostError
from rankwright.executor.messages import Sampling, Tokens

WORKER = Path(__file__).with_name("protocol_worker.py")
pytestmark = pytest.mark.timeout(120)


@contextlib.contextmanager
def leader(front_end: FrontEnd, run_dir: Path, rank: int = 0, **extra: str) -> Iterator[int]:
    """Run a leader in a process of its own; yields its process id."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "RANKWRIGHT_FRONT_END": front_end.address,
        "RANKWRIGHT_AUTHKEY": front_end.authkey.hex(),
        "RANKWRIGHT_RUN_DIR": str(run_dir),
        **extra,
    }
    process = subprocess.Popen([sys.executable, str(WORKER)], env=environment)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


async def collect(tokens: AsyncIterator[Tokens]) -> tuple[list[int], str | None]:
    ids: list[int] = []
    reason = None
    async for message in tokens:
        ids.extend(message.token_ids)
        reason = message.finish_reason
    return ids, reason


def run(test: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 50))


def test_tokens_come_back_in_order(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(1) as front_end:
            with leader(front_end, tmp_path):
                await front_end.ready()
                assert front_end.max_model_len == 512
                got = await collect(front_end.submit([1, 2, 3], Sampling(max_tokens=7)))
                assert got == ([1, 2, 3, 1, 2, 3, 1], "length")
                assert front_end.num_outstanding == 0

    run(test())


def test_requests_run_at_once_and_spread_over_replicas(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(2) as front_end:
            # Their requests take 2 s, at the begin of which they are counted.
            slow = {"TEST_STEP_S": "0.05"}
            with leader(front_end, tmp_path, 0, **slow), leader(front_end, tmp_path, 1, **slow):
                await front_end.ready()
                jobs = [
                    asyncio.create_task(
                        collect(front_end.submit([n, n + 1], Sampling(max_tokens=40)))
                    )
                    for n in range(1, 9)
                ]
                await asyncio.sleep(0.02)
                held = [front_end.replicas[n].num_requests for n in (0, 1)]
                assert held == [4, 4]
                for n, job in enumerate(jobs, start=1):
                    assert await job == ([n, n + 1] * 20, "length")
                assert [r.outstanding_tokens for r in front_end.replicas.values()] == [0, 0]
                await front_end.idle()

    run(test())


def test_a_closed_iterator_takes_the_request_back(tmp_path: Path) -> None:
    events = tmp_path / "events"

    async def test() -> None:
        async with FrontEnd(1) as front_end:
            with leader(front_end, tmp_path, TEST_EVENTS=str(events)):
                await front_end.ready()
                tokens = front_end.submit([5], Sampling(max_tokens=100_000))
                async with contextlib.aclosing(tokens):
                    async for _ in tokens:
                        break
                assert front_end.num_outstanding == 0
                while not events.exists():
                    await asyncio.sleep(0.01)
                assert events.read_text().split()[1] == "abort"

    run(test())


def test_strangers_are_ignored(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(1) as front_end:
            host, port = front_end.address.split(":")
            silent = socket.create_connection((host, int(port)))
            rude = socket.create_connection((host, int(port)))
            rude.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(10_000))

            with pytest.raises(AuthenticationError):
                await asyncio.to_thread(Client, (host, int(port)), authkey=b"guessed")
            assert not front_end.replicas
            with leader(front_end, tmp_path):
                await front_end.ready()
                assert await collect(front_end.submit([9], Sampling(max_tokens=2))) == (
                    [9, 9],
                    "length",
                )
            silent.close()
            rude.close()

    run(test())


def test_a_second_leader_of_a_replica_is_sent_away(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(1) as front_end:
            with leader(front_end, tmp_path):
                await front_end.ready()
                with leader(front_end, tmp_path, rank=0) as second:
                    while Path(f"/proc/{second}/stat").read_text().split()[2] != "Z":
                        await asyncio.sleep(0.01)
                assert front_end.is_ready
                assert (await collect(front_end.submit([9], Sampling(max_tokens=1))))[0] == [9]

    run(test())


def test_a_leader_that_dies_ends_its_requests_with_an_error(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(1) as front_end:
            with leader(front_end, tmp_path):
                await front_end.ready()
                long = asyncio.create_task(
                    collect(front_end.submit([1], Sampling(max_tokens=100_000)))
                )
                await asyncio.sleep(0.05)
                await collect(front_end.submit([666], Sampling(max_tokens=5)))
                assert (await long)[1] == "error"
                assert front_end.lost.is_set()
                assert not front_end.is_ready
                with pytest.raises(ReplicaLostError):
                    await collect(front_end.submit([1], Sampling(max_tokens=5)))

    run(test())


def test_a_replica_that_says_nothing_while_it_has_work_is_stalled(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(1) as front_end:
            with leader(front_end, tmp_path, TEST_SILENT="1"):
                await front_end.ready()
                assert front_end.stalled(0.0) == []  # no work
                job = asyncio.create_task(collect(front_end.submit([1], Sampling(max_tokens=5))))
                await asyncio.sleep(0.1)
                assert front_end.stalled(0.05) == [0]
                assert front_end.stalled(30) == []
                front_end.abort_all("enough")
                assert (await job)[1] == "error"

    run(test())


def test_stop_ends_the_leader_and_is_no_loss(tmp_path: Path) -> None:
    async def test() -> None:
        async with FrontEnd(1) as front_end:
            with leader(front_end, tmp_path):
                await front_end.ready()
                front_end.stop()
                while not (tmp_path / "stopped-0").exists():
                    await asyncio.sleep(0.01)
                assert not front_end.lost.is_set()

    run(test())
