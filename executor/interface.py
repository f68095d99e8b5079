"""Finds the network interface that leads to another machine."""

import fcntl
import socket
import struct

_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


def interface_towards(host: str) -> str | None:
    """Return the interface that IPv4 packets to `host` leave by, None where that is not known.

    gloo otherwise takes the one that the machine's own name resolves to, which on many systems is
    the loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: a datagram socket only chooses its route
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == address:
                    return name
    except OSError:
        return None
    return None


def _address_of(handle: socket.socket, name: str) -> str | None:
    request = struct.pack("256s", name.encode()[:15])
    try:
        answer = fcntl.ioctl(handle.fileno(), _SIOCGIFADDR, request)
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(answer[20:24])
