"""GPUs as NVML describes them, for tests of what is made of its answers."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pynvml: Any = pytest.importorskip("pynvml")

MIB = 2**20
HIDDEN = "FFFFFFFF:FF:FF.0"
SWITCH = 2


@dataclass
class Board:
    """What the binding says about one GPU."""

    name: str = "NVIDIA H200"
    bus: str = "00000000:01:00.0"
    total: int = 143771 * MIB
    free: int = 143156 * MIB
    capability: tuple[int, int] = (9, 0)
    links: list[tuple[int, str, int]] = field(default_factory=list)  # (state, remote bus, type)
    mig: int = 0
    processes: int = 0
    cores: int = 16896
    sm_mhz: int = 1980
    memory_mhz: int = 3201
    bus_bits: int = 6016
    width_now: int = 16
    limit_mw: int | None = 700_000
    default_mw: int = 700_000
    set_mhz: int | None = 1980
    default_mhz: int = 1980
    version: int = 4  # of its NVLinks
    lost_at: str | None = None  # the function that finds it lost
    lost_by: int = pynvml.NVML_ERROR_GPU_IS_LOST
    near: tuple[int, ...] = ()  # words of the mask of NUMA domains; none: not supported


def install(
    monkeypatch: pytest.MonkeyPatch,
    boards: list[Board],
    *,
    ancestor: int = 30,
    nvlink_p2p: int = 0,
    read_p2p: int = 0,
) -> None:
    """Have the binding answer as a machine with these boards.

    Args:
        monkeypatch: Of the test.
        boards: In the driver's order.
        ancestor: What any two boards have in common on PCIe.
        nvlink_p2p: Status of peer access through NVLink.
        read_p2p: Status of reading a peer's memory.
    """

    def links_of(board: Board, link: int) -> tuple[int, str, int]:
        if link >= len(board.links):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return board.links[link]

    def p2p(_a: Board, _b: Board, capability: int) -> int:
        return read_p2p if capability == 0 else nvlink_p2p

    def memory_affinity(board: Board, _words: int, _scope: int) -> tuple[int, ...]:
        if not board.near:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return board.near

    def known(value: int | None) -> int:
        if value is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    clocks = {pynvml.NVML_CLOCK_SM: "sm_mhz", pynvml.NVML_CLOCK_MEM: "memory_mhz"}
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
        "nvmlDeviceGetCount": lambda: len(boards),
        "nvmlDeviceGetHandleByIndex": lambda index: boards[index],
        "nvmlDeviceGetPciInfo": lambda board: SimpleNamespace(busId=board.bus),
        "nvmlDeviceGetName": lambda board: board.name,
        "nvmlDeviceGetUUID": lambda board: f"GPU-{board.bus}",
        "nvmlDeviceGetMemoryInfo": lambda board: SimpleNamespace(
            total=board.total, free=board.free
        ),
        "nvmlDeviceGetCudaComputeCapability": lambda board: board.capability,
        "nvmlDeviceGetMigMode": lambda board: (board.mig, board.mig),
        "nvmlDeviceGetMaxClockInfo": lambda board, clock: getattr(board, clocks[clock]),
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda _board: 5,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda _board: 16,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda board: board.width_now,
        "nvmlDeviceGetPowerManagementLimit": lambda board: known(board.limit_mw),
        "nvmlDeviceGetPowerManagementDefaultLimit": lambda board: board.default_mw,
        "nvmlDeviceGetApplicationsClock": lambda board, _clock: known(board.set_mhz),
        "nvmlDeviceGetDefaultApplicationsClock": lambda board, _clock: board.default_mhz,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _board: 0,
        "nvmlDeviceGetTotalEccErrors": lambda _board, _kind, _counter: 0,
        "nvmlDeviceGetEccMode": lambda _board: (1, 1),
        "nvmlDeviceGetComputeMode": lambda _board: 0,
        "nvmlDeviceGetComputeRunningProcesses": lambda board: [object()] * board.processes,
        "nvmlDeviceGetNumGpuCores": lambda board: board.cores,
        "nvmlDeviceGetMemoryBusWidth": lambda board: board.bus_bits,
        "nvmlDeviceGetMemoryAffinity": memory_affinity,
        "nvmlDeviceGetNvLinkState": lambda board, link: links_of(board, link)[0],
        "nvmlDeviceGetNvLinkVersion": lambda board, link: links_of(board, link) and board.version,
        "nvmlDeviceGetNvLinkRemotePciInfo": lambda board, link: SimpleNamespace(
            busId=links_of(board, link)[1]
        ),
        "nvmlDeviceGetNvLinkRemoteDeviceType": lambda board, link: links_of(board, link)[2],
        "nvmlDeviceGetTopologyCommonAncestor": lambda _a, _b: ancestor,
        "nvmlDeviceGetP2PStatus": p2p,
    }

    def unless_lost(name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            found = boards[arguments[0]] if name == "nvmlDeviceGetHandleByIndex" else arguments[:1]
            board = found if isinstance(found, Board) else (found or (None,))[0]
            if isinstance(board, Board) and board.lost_at == name:
                raise pynvml.NVMLError(board.lost_by)
            return answers[name](*arguments)

        return answer

    for name in answers:
        monkeypatch.setattr(pynvml, name, unless_lost(name))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def pair(name: str, mib: int) -> list[Board]:
    return [Board(name=name, bus=f"00000000:0{i}:00.0", total=mib * MIB) for i in (1, 2)]


def switched(number: int = 18, **changes: Any) -> list[Board]:
    return [
        Board(bus=f"00000000:0{i}:00.0", links=[(1, HIDDEN, SWITCH)] * number, **changes)
        for i in range(1, 3)
    ]
