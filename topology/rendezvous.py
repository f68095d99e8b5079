"""Brings one message of each machine to machine 0, and its answer back, over plain TCP.

torchrun's own store needs torch, which reading a machine does not. Messages are signed with a key
that all machines of a run derive alike, so that a stranger's are dropped; they are text to be
checked, never pickles.
"""

import hashlib
import hmac
import socket
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

_HEADER = struct.Struct("!II32s")  # sender, length, signature
_MAX_BYTES = 64 * 2**20  # a cluster of 1,024 machines is some 10 MB of JSON
_RETRY_S = 0.1


def collect(
    message: bytes,
    *,
    count: int,
    port: int,
    key: bytes,
    timeout_s: float,
    answer: Callable[[list[bytes]], bytes],
    host: str = "",
) -> bytes:
    """Return the answer to the messages of all machines, which all of them get.

    Args:
        message: Of machine 0, which calls this.
        count: Machines.
        port: To listen on.
        key: That all share.
        timeout_s: Until all must have spoken.
        answer: Makes it of the messages by number, our own (number 0) first.
        host: Address to listen on; empty: every one.

    Raises:
        TimeoutError: Not all have; says which.
        OSError: The port cannot be had.
    """
    messages: dict[int, bytes] = {0: message}
    deadline_s = time.monotonic() + timeout_s
    with ExitStack() as waiting, _listen(host, port) as server:
        peers: dict[int, socket.socket] = {}
        while len(messages) < count:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                missing = [str(number) for number in range(count) if number not in messages]
                raise TimeoutError(
                    f"no word from machine {', '.join(missing)} of {count} within {timeout_s:g} s"
                )
            server.settimeout(left_s)
            # Whoever breaks off, stays silent or signs wrongly is dropped; a machine tries again.
            with suppress(OSError, EOFError):
                peer, _ = server.accept()
                waiting.enter_context(peer)
                peer.settimeout(min(5.0, left_s))
                sender, received = _receive(peer, key)
                if 0 < sender < count:
                    messages[sender], peers[sender] = received, peer
                else:
                    peer.close()
        made = answer([messages[number] for number in range(count)])
        for peer in peers.values():
            with suppress(OSError):
                peer.sendall(_packed(0, made, key))
    return made


def send(
    message: bytes, *, number: int, host: str, port: int, key: bytes, timeout_s: float
) -> bytes:
    """Hand the message of machine `number` to machine 0 at `host`, and return its answer.

    Machine 0 may start later, and answers when all machines have spoken.

    Raises:
        TimeoutError: It has not answered in time.
    """
    deadline_s = time.monotonic() + timeout_s
    reason = "it takes no connection"
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left_s) as peer:
                peer.sendall(_packed(number, message, key))
                return _receive(peer, key)[1]
        except (OSError, EOFError) as error:
            reason = str(error) or reason
        time.sleep(min(_RETRY_S, max(left_s, 0)))
    raise TimeoutError(f"machine 0 at {host}:{port} took no word in {timeout_s:g} s: {reason}")


def _packed(sender: int, message: bytes, key: bytes) -> bytes:
    return _HEADER.pack(sender, len(message), _sign(sender, message, key)) + message


def _listen(host: str, port: int) -> socket.socket:
    if not host and socket.has_dualstack_ipv6():
        with suppress(OSError):  # a kernel may have IPv6 and no address of it
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=1024)


def _sign(sender: int, message: bytes, key: bytes) -> bytes:
    return hmac.new(key, sender.to_bytes(4, "big") + message, hashlib.sha256).digest()


def _receive(peer: socket.socket, key: bytes) -> tuple[int, bytes]:
    sender, length, signature = _HEADER.unpack(_read(peer, _HEADER.size))
    if length > _MAX_BYTES:
        raise EOFError("too long")
    message = _read(peer, length)
    if not hmac.compare_digest(signature, _sign(sender, message, key)):
        raise EOFError("signed with another key")
    return sender, message


def _read(peer: socket.socket, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = peer.recv(min(count - len(parts), 65536))
        if not part:
            raise EOFError("the other end hung up")
        parts += part
    return bytes(parts)
