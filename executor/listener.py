"""An authenticated message socket for the event loop: who may speak, and which thread waits.

A peer connects over TCP and proves that it knows the run's key, as
`multiprocessing.connection.Client(address, authkey=key)` does; who cannot is dropped without a word
to anyone else. One thread a peer reads and one writes, so that a peer that is busy never holds up
the event loop; the callbacks run on the loop.
"""

import asyncio
import contextlib
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from pydantic import ValidationError

from rankwright.executor.messages import Message, decode, encode

# A leader on another node answers in milliseconds; a stranger that says nothing holds a thread and
# a socket only this long.
_HANDSHAKE_TIMEOUT_S = 10.0


class Link:
    """One peer that has proved who it is."""

    def __init__(self, connection: Connection) -> None:
        """Start to write to `connection`."""
        self._connection = connection
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="link-writer", daemon=True)
        self._writer.start()

    def send(self, message: Message) -> None:
        """Send `message` soon, after those before it; never blocks."""
        self._outbox.put(message)

    def close(self) -> None:
        """Hang up once what was sent before has left; the peer sees the end of the stream."""
        self._outbox.put(None)

    def read(self) -> Message:
        """Return the next message; blocks, for the reading thread only."""
        return decode(self._connection.recv_bytes())

    def end(self) -> None:
        """Hang up now and free the socket, for the reading thread only."""
        _shut(self._connection)
        self.close()
        self._writer.join()
        self._connection.close()

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(encode(message))
        _shut(self._connection)  # wakes the reading thread, which closes


class Listener:
    """Takes peers in, and calls back on the event loop it was made on."""

    def __init__(
        self,
        address: tuple[str, int],
        authkey: bytes,
        *,
        on_message: Callable[[Link, Message], None],
        on_end: Callable[[Link, str], None],
    ) -> None:
        """Listen on `address` (port 0: a free one).

        Args:
            address: Host and port to listen on.
            authkey: What a peer must know.
            on_message: Called with each message of a peer, in order.
            on_end: Called once when a peer is gone, with the reason.

        Raises:
            OSError: The address cannot be listened on.
        """
        self._loop = asyncio.get_running_loop()
        self._authkey = authkey
        self._on_message, self._on_end = on_message, on_end
        self._inbox: deque[tuple[Callable[[Link, Any], None], Link, object]] = deque()
        self._woken = False
        self._links: set[Link] = set()
        self._socket = socket.create_server(address)
        host, port = self._socket.getsockname()[:2]
        self.address = f"{host}:{port}"
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def close(self) -> None:
        """Take no one in any more, and hang up on everyone once what was sent has left."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept; close does not
        self._socket.close()
        for link in tuple(self._links):
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), name="link", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        connection = self._admit(client)
        if connection is None:
            return
        link = Link(connection)
        self._links.add(link)
        reason = "its connection ended"
        try:
            while True:
                self._hand_over(self._on_message, link, link.read())
        except (OSError, EOFError):
            pass
        except ValidationError as error:
            reason = f"it sent what is no message: {error.errors()[0]['msg']}"
        self._links.discard(link)
        link.end()
        self._hand_over(self._on_end, link, reason)

    def _admit(self, client: socket.socket) -> Connection | None:
        """Return a connection to `client` if it knows the key; else hang up."""
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _set_read_timeout(client, _HANDSHAKE_TIMEOUT_S)
        options = client.dup()  # `connection` owns the other descriptor
        connection = Connection(client.detach())
        try:
            # The exchange of multiprocessing.connection.Listener.accept, but on a thread of its
            # own: there a stranger that connects and says nothing blocks every peer after it.
            deliver_challenge(connection, self._authkey)
            answer_challenge(connection, self._authkey)
            _set_read_timeout(options, 0)
        except Exception:  # whatever a stranger sends, it is only a stranger
            connection.close()
            return None
        finally:
            options.close()
        return connection

    def _hand_over(self, action: Callable[[Link, Any], None], link: Link, value: object) -> None:
        """Run `action` on the loop; many that come close together cost one wake-up."""
        self._inbox.append((action, link, value))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
                self._loop.call_soon_threadsafe(self._take_over)

    def _take_over(self) -> None:
        self._woken = False  # before reading: what comes from now on wakes the loop again
        while self._inbox:
            action, link, value = self._inbox.popleft()
            action(link, value)


def _set_read_timeout(client: socket.socket, timeout_s: float) -> None:
    """Let blocking reads of `client`'s descriptor fail after `timeout_s` (0: never)."""
    # settimeout would make the descriptor non-blocking, which Connection cannot read.
    value = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)


def _shut(connection: Connection) -> None:
    """End the TCP stream both ways; the descriptor stays."""
    with contextlib.suppress(OSError):
        client = socket.socket(fileno=connection.fileno())
        try:
            client.shutdown(socket.SHUT_RDWR)
        finally:
            client.detach()
