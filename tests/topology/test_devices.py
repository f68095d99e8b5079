"""The device table: every row is consistent, and drivers' names find the right one."""

import pytest

from rankwright.topology.architectures import ARCHITECTURES, derived_flops_per_s
from rankwright.topology.cluster import Gpu
from rankwright.topology.devices import (
    ALIASES,
    DEVICES,
    Device,
    device_key,
    flops_per_s,
    memory_bytes_per_s,
    pcie_bytes_per_s,
    resolve_key,
)

MIB = 2**20


def gpu(device: str, **changes: object) -> Gpu:
    values: dict[str, object] = {
        "index": 0,
        "device": device,
        "name": device,
        "memory_bytes": 1,
        "total_memory_bytes": 1,
    }
    return Gpu.model_validate(values | changes)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("A100-SXM4-40GB", "a100-sxm-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("GeForce RTX 3090", "rtx3090"),
        ("Tesla T4", "t4"),
        ("NVIDIA Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-sxm2-16gb"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA B200", "b200-sxm"),
        ("NVIDIA GH200 480GB", "gh200-96gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "h100-sxm"),
        ("h100-sxm", "h100-sxm"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("Quadro RTX A6000", "rtx-a6000"),
        ("NVIDIA A800-SXM4-80GB", "a800-sxm-80gb"),
        ("Tesla V100-PCIE-32GB", "v100-pcie-32gb"),
        ("AMD Instinct MI350X", "mi350x"),
    ],
)
def test_driver_names_find_their_row(name: str, key: str) -> None:
    assert device_key(name, DEVICES[key].memory_bytes) == key


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("NVIDIA GeForce RTX 4090 D", "rtx4090"),  # a slower part: not to be taken for the 4090
        ("NVIDIA L40", "l40s"),
        ("NVIDIA H20-3e", "h20-sxm"),
        ("NVIDIA A10G", "a10"),
        ("Quantum Foo 9000", "known are"),
    ],
)
def test_a_look_alike_is_refused_in_one_line_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="unknown GPU") as caught:
        device_key(name)
    assert nearest in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_board_with_more_memory_than_the_row_is_another_board() -> None:
    with pytest.raises(ValueError, match="98304 MiB"):
        device_key("NVIDIA H100 80GB HBM3", 98304 * MIB)


def test_rates_are_those_of_the_data_sheets() -> None:
    assert memory_bytes_per_s(gpu("h100-sxm")) == 3350e9
    assert flops_per_s(gpu("h100-sxm"), "bfloat16") == 989e12
    assert flops_per_s(gpu("h100-sxm"), "float8") == 1979e12
    assert flops_per_s(gpu("h200-sxm"), "float32") == 67e12
    assert DEVICES["h100-sxm"].memory_bytes == 81559 * MIB
    assert DEVICES["h200-sxm"].memory_bytes == 143771 * MIB
    assert DEVICES["a100-sxm-80gb"].scale_up_bytes_per_s == 300e9
    assert pcie_bytes_per_s(4, 16) == 32e9
    assert pcie_bytes_per_s(4, 8) == 16e9


def test_a_dtype_without_a_unit_takes_the_rate_of_the_wider_type() -> None:
    assert flops_per_s(gpu("a100-sxm-80gb"), "float8") == 312e12  # no float8 before Ada
    assert flops_per_s(gpu("v100-sxm2-32gb"), "bfloat16") == 125e12  # float16 instead
    assert flops_per_s(gpu("v100-sxm2-32gb"), "int8") == 125e12
    assert flops_per_s(gpu("h100-sxm"), "int4") == 989e12  # weight-only
    assert flops_per_s(gpu("h100-sxm"), "mxfp4") == 989e12
    assert flops_per_s(gpu("b200-sxm"), "mxfp4") == 9000e12
    assert flops_per_s(gpu("cpu"), "bfloat16") == flops_per_s(gpu("cpu"), "float32")


def test_rates_that_a_gpu_carries_go_first() -> None:
    measured = gpu("h100-sxm", memory_bytes_per_s=3e12, flops_per_s={"bfloat16": 7e14})
    assert memory_bytes_per_s(measured) == 3e12
    assert flops_per_s(measured, "bfloat16") == 7e14
    assert flops_per_s(measured, "float8") == 1979e12
    core = gpu("cpu", flops_per_s={"float32": 5e10})
    assert flops_per_s(core, "bfloat16") == 5e10


def test_an_unknown_device_without_rates_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"'h10-sxm' is no row.*h100-sxm"):
        memory_bytes_per_s(gpu("h10-sxm"))
    with pytest.raises(ValueError, match="flops_per_s of bfloat16"):
        flops_per_s(gpu("h10-sxm"), "bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'bf16'"):
        flops_per_s(gpu("h100-sxm"), "bf16")


def test_aliases_lead_to_rows() -> None:
    assert set(ALIASES.values()) <= set(DEVICES)
    assert not set(ALIASES) & set(DEVICES)
    assert resolve_key("A100-SXM") == "a100-sxm-80gb"
    with pytest.raises(ValueError, match="nearest known are h100-sxm"):
        resolve_key("h100-smx")


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.key)
def test_every_row_is_whole_and_sourced(device: Device) -> None:
    assert device.source
    assert bool(device.usd_per_hour) == bool(device.price_source)
    assert 2**30 < device.memory_bytes < 400e9
    assert {"float32"} <= set(device.flops_per_s)
    assert (device.scale_up == "none") == (device.scale_up_bytes_per_s == 0)
    if device.usd_per_hour:
        assert device.usd_per_hour[0] <= device.usd_per_hour[1]


# Data sheets print some peaks below SMs x clock: PCIe and NVL boards are held back by power, the
# SXM clock of the tensor units is 1.83 GHz against a 1.98 GHz boost, China's parts are cut.
HELD_BACK = {"h100-sxm", "h200-sxm", "h800-sxm", "gh200-96gb", "gh200-144gb", "h100-pcie"} | {
    "h100-nvl",
    "h200-nvl",
    "h20-sxm",
    "rtx-pro-6000",
    "b200-sxm",
    "b300-sxm",
    "gb200-nvl72",
}


@pytest.mark.parametrize(
    "device",
    [row for row in DEVICES.values() if row.compute_capability and row.boost_hz],
    ids=lambda device: device.key,
)
def test_rows_agree_with_the_units_and_clock_of_their_architecture(device: Device) -> None:
    assert device.compute_capability in ARCHITECTURES
    assert device.boost_hz is not None
    consumer = "NVIDIA GeForce" if "GeForce" in device.pattern else "NVIDIA"
    derived = derived_flops_per_s(
        consumer, device.compute_capability, device.num_sms, device.boost_hz
    )
    ratio = device.flops_per_s["float16"] / derived["float16"]
    low = 0.8 if device.key in HELD_BACK else 0.96
    if device.key == "h20-sxm":  # its tensor units are cut, its other figures are an H100's
        low = 0.2
    assert low < ratio < 1.03
    assert ("bfloat16" in device.flops_per_s) == ("bfloat16" in derived)
    assert ("float8" in device.flops_per_s) == ("float8" in derived)


def test_the_table_has_the_accelerators_that_people_have() -> None:
    gpus = [device for device in DEVICES.values() if device.vendor != "cpu"]
    assert len(gpus) >= 36
    assert all(device.source for device in gpus)
    assert device_key("AMD Instinct MI210", 68702699520) == "mi210"
    assert device_key("AMD Radeon RX 7900 XTX", 25753026560) == "rx7900xtx"
