import multiprocessing
import os
import random
import threading
import time
from pathlib import Path

import pytest

from rankwright.executor.shared_channel import NUM_SLOTS, SLOT_BYTES, SharedChannel, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="needs x86-64 and /dev/shm")


def messages(count: int) -> list[bytes]:
    rng = random.Random(count)
    sizes = [0, 1, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1, 3 * SLOT_BYTES]
    return [bytes([i % 251]) * rng.choice([*sizes, rng.randrange(5000)]) for i in range(count)]


def test_every_reader_gets_every_message_whole_and_in_order() -> None:
    sent = messages(5 * NUM_SLOTS)
    writer, path = SharedChannel.create(2)
    got: list[list[bytes]] = [[], []]

    def listen(reader: int) -> None:
        channel = SharedChannel(path, 2, reader)
        for _ in sent:
            got[reader].append(channel.read())
            if reader:
                time.sleep(random.random() / 500)  # one reader lags behind

    threads = [threading.Thread(target=listen, args=(reader,)) for reader in range(2)]
    for thread in threads:
        thread.start()
    for message in sent:
        writer.write(message)
    for thread in threads:
        thread.join(timeout=60)
    path.unlink()
    assert got == [sent, sent]


def test_a_reader_sleeps_until_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    has_next = SharedChannel.has_next

    def counted(self: SharedChannel) -> bool:
        nonlocal looks
        looks += 1
        return has_next(self)

    monkeypatch.setattr(SharedChannel, "has_next", counted)
    writer, path = SharedChannel.create(1)
    reader = SharedChannel(path, 1, 0)
    path.unlink()
    timer = threading.Timer(0.5, writer.write, [b"at last"])
    timer.start()
    assert reader.read() == b"at last"
    timer.join()
    assert looks <= 5, "one look, one when it is woken; a few where a signal wakes it"


def test_a_message_longer_than_the_ring_passes_through_it() -> None:
    long = os.urandom((NUM_SLOTS + 3) * SLOT_BYTES + 17)
    writer, path = SharedChannel.create(1)
    reader = SharedChannel(path, 1, 0)
    thread = threading.Thread(target=writer.write, args=(long,))
    thread.start()
    assert reader.read() == long
    thread.join()
    path.unlink()


def test_a_writer_whose_reader_has_stopped_gives_up() -> None:
    _, path = SharedChannel.create(1)
    writer = SharedChannel(path, 1, None, timeout_s=0.5)
    for _ in range(NUM_SLOTS):
        writer.write(b"x")
    with pytest.raises(TimeoutError, match="a reader said nothing for"):
        writer.write(b"x")
    path.unlink()


def _write_and_die(path: str) -> None:
    SharedChannel(Path(path), 1, None).write(b"last")


def test_a_reader_notices_that_the_writer_is_gone() -> None:
    _, path = SharedChannel.create(1)
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(str(path),))
    process.start()
    process.join()
    reader = SharedChannel(path, 1, 0)
    assert reader.read() == b"last"
    with pytest.raises(ConnectionError, match="the leader's process is gone"):
        reader.read()
    path.unlink()
