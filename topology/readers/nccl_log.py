"""Reads NCCL's log (`NCCL_DEBUG=INFO`): which way each channel goes, and why not a better one.

Lines as NCCL prints them from 2.4 to 2.28 (src/transport/*.cc):

    Channel 00/0 : 7[7] -> 8[0] [send] via NET/IB/0(1)/GDRDMA
    Channel 00 : 3[b1000] -> 4[18000] [receive] via NET/AWS Libfabric/3/GDRDMA/Shared
    Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
    Channel 00 : 1[1a000] -> 2[af000] via direct shared memory
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# A way is one word with slashes; names of network plugins may have a blank ("AWS Libfabric").
_CHANNEL = re.compile(r"Channel \d+(?:/\d+)? ?: .*? via (.+?)(?: comm 0x\S+.*| nRanks.*)?\s*$")
_PREFIX = re.compile(r"^.*?NCCL (?:INFO|WARN) ")
# What keeps NCCL from RDMA, or RDMA from the memory of GPUs.
_REASONS = (
    re.compile(r"NET/IB : No device found"),
    re.compile(r"Failed to open libibverbs"),
    re.compile(r"NCCL_IB_DISABLE set by environment to [1-9]"),
    re.compile(r"NCCL_NET set by environment to Socket", re.IGNORECASE),
    re.compile(r"GPU Direct RDMA Disabled"),
    re.compile(r"disabling GDR", re.IGNORECASE),
)
_NUMBERS = re.compile(r"GPU [0-9a-f]+ / HCA \d+|HCA \d+ '[^']*'|\[\d+\]")


@dataclass(frozen=True, slots=True)
class NcclLog:
    """What the logs of some ranks say.

    Attributes:
        transports: Ways that channels take, without numbers of channels and adapters.
        num_net: Channels over a network.
        num_direct: Of them, those by which an adapter reads or writes a GPU's memory itself.
        reasons: Lines that say why RDMA or GPUDirect is not used, each once.
    """

    transports: tuple[str, ...]
    num_net: int
    num_direct: int
    reasons: tuple[str, ...]


def read_nccl_log(lines: Iterable[str]) -> NcclLog:
    """Return what the log says.

    >>> read_nccl_log(["NCCL INFO Channel 00/0 : 1[1] -> 0[0] [send] via NET/IB/0(4)/GDRDMA"])
    NcclLog(transports=('NET/IB/GDRDMA',), num_net=1, num_direct=1, reasons=())
    """
    ways: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    for line in lines:
        channel = _CHANNEL.search(line)
        if channel is not None:
            ways[way_of(channel[1])] += 1
        elif any(reason.search(line) for reason in _REASONS):
            text = _PREFIX.sub("", line).strip()
            reasons.setdefault(_NUMBERS.sub("", text), text)
    net = {way: count for way, count in ways.items() if way.startswith(("NET/", "COLLNET/"))}
    return NcclLog(
        transports=tuple(sorted(ways)),
        num_net=sum(net.values()),
        num_direct=sum(count for way, count in net.items() if way.endswith("GDRDMA")),
        reasons=tuple(reasons.values()),
    )


def way_of(text: str) -> str:
    """Return a way without the numbers of adapters and ranks.

    >>> way_of("NET/IB/3(2)/GDRDMA/Shared"), way_of("P2P/direct pointer"), way_of("P2P/CUMEM/read")
    ('NET/IB/GDRDMA', 'P2P/direct pointer', 'P2P/CUMEM')
    """
    if text == "direct shared memory":  # before NCCL 2.13
        return "SHM"
    words = text.split("/")
    kept = words[:2] if words[0] in ("P2P", "NET", "COLLNET") else words[:1]
    return "/".join([*kept, *(["GDRDMA"] if "GDRDMA" in text else [])])


def join_logs(logs: Iterable[NcclLog]) -> NcclLog:
    """Return what several ranks' logs say together."""
    each = list(logs)
    return NcclLog(
        transports=tuple(sorted({way for log in each for way in log.transports})),
        num_net=sum(log.num_net for log in each),
        num_direct=sum(log.num_direct for log in each),
        reasons=tuple(dict.fromkeys(reason for log in each for reason in log.reasons)),
    )
