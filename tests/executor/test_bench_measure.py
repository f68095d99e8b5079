"""The benchmark that holds `probe --measure` says under which clock and power each figure is."""

import time
from types import SimpleNamespace

import pynvml

from board import Board, summary
from measure_products import settled_round_s


def refuse(*arguments: object) -> int:
    raise RuntimeError("not supported")


# A board at its power limit: 1,400 MHz, 700 W by its energy counter, 100 W as it reads power at
# once; it does not tell its heat.
NVML = SimpleNamespace(
    nvmlClocksEventReasonAll=511,
    nvmlClocksEventReasonNone=0,
    nvmlClocksEventReasonGpuIdle=1,
    nvmlClocksEventReasonSwPowerCap=4,
    nvmlClocksEventReasonHwThermalSlowdown=64,
    NVML_CLOCK_SM=1,
    NVML_TEMPERATURE_GPU=0,
    nvmlInit=lambda: None,
    nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-18": "board"}[uuid],
    nvmlDeviceGetClockInfo=lambda handle, clock: 1400,
    nvmlDeviceGetPowerUsage=lambda handle: 100_000,
    nvmlDeviceGetTotalEnergyConsumption=lambda handle: int(time.monotonic() * 700_000),
    nvmlDeviceGetTemperature=refuse,
    nvmlDeviceGetCurrentClocksEventReasons=lambda handle: 5,
)


def work() -> float:
    time.sleep(0.15)
    return 42.0


def test_the_fake_has_the_names_of_the_real_binding() -> None:
    assert all(hasattr(pynvml, name) for name in vars(NVML))


def test_a_board_is_watched_while_work_runs() -> None:
    result, seen = Board("GPU-18", NVML).watch(work)
    assert result == 42.0
    assert seen["sm_hz"] == 1.4e9
    assert seen["limited_by"] == ["SwPowerCap"]
    # A busy machine may take its time between a look at the clock and one at the counter.
    assert 350 < seen["power_w"] < 1400
    assert "temperature_c" not in seen


def test_only_the_last_half_second_is_told() -> None:
    early = [(at / 10, {"sm_hz": 1.9e9, "power_w": 300.0}) for at in range(10)]
    late = [(1 + at / 10, {"sm_hz": 1.5e9, "power_w": 700.0}) for at in range(6)]
    told = summary([*early, *late])
    assert (told["sm_hz"], told["power_w"], told["looks"]) == (1.5e9, 700.0, 6)


def test_where_nvml_cannot_be_asked_the_work_is_done_and_the_reason_told() -> None:
    assert Board(None).watch(lambda: 1.0) == (1.0, {"not_seen": "ValueError: no GPU"})
    _, seen = Board("GPU-99", NVML).watch(lambda: 1.0)
    assert "GPU-99" in seen["not_seen"]


def test_rounds_before_the_last_half_second_do_not_count() -> None:
    assert settled_round_s([0.1] * 20 + [0.125] * 4) == 0.125
    assert settled_round_s([0.7]) == 0.7
