"""Looks up accelerators: which row of the table a driver's name means, and how fast it is."""

import difflib
import re
from types import MappingProxyType
from typing import TYPE_CHECKING

from rankwright.topology.device_table import MIB, ROWS, Device, ScaleUp, pcie_bytes_per_s

if TYPE_CHECKING:
    from rankwright.topology.cluster import Gpu

__all__ = [
    "ALIASES",
    "DEVICES",
    "Device",
    "ScaleUp",
    "device_key",
    "device_of",
    "flops_per_s",
    "memory_bytes_per_s",
    "pcie_bytes_per_s",
    "resolve_key",
]

# A rank on one core of a cloud machine, for clusters written as `4xcpu`; a probe measures instead.
# Memory: hosted CI runners have 16 GB on 4 cores (docs.github.com, "GitHub-hosted runners"). Rates:
# one thread on a busy 2-core Sapphire Rapids cloud machine, torch 2.13, 2026-11-21: an 8192^2
# float32 matrix by a vector read 12.2 GB/s, a 1024^3 product did 100 GFLOP/s in float32 (827 in
# bfloat16 through AMX, which most CPUs lack, so bfloat16 falls back to float32 here).
_CPU = Device(
    key="cpu",
    vendor="cpu",
    pattern="cpu",
    memory_bytes=4 * 2**30,
    memory_bytes_per_s=12e9,
    flops_per_s=MappingProxyType({"float32": 100e9}),
    compute_capability=None,
    num_sms=1,
    boost_hz=None,
    scale_up="none",
    scale_up_token="",
    scale_up_bytes_per_s=0.0,
    scale_up_domain=1,
    pcie_generation=3,
    pcie_width=16,
    pcie_bytes_per_s=16e9,
    tdp_w=15,
    usd_per_hour=None,
    price_source="",
    source="measured on one core of a cloud machine, see the comment above",
)

DEVICES: dict[str, Device] = {}
for _device in (*ROWS, _CPU):
    assert _device.key not in DEVICES, f"two rows for {_device.key}"
    DEVICES[_device.key] = _device

# Shorter names that people write, and the variant that they most often mean.
ALIASES: dict[str, str] = {
    "a100": "a100-sxm-80gb",
    "a100-80gb": "a100-sxm-80gb",
    "a100-40gb": "a100-sxm-40gb",
    "a100-sxm": "a100-sxm-80gb",
    "a100-sxm4": "a100-sxm-80gb",
    "a100-pcie": "a100-pcie-80gb",
    "b200": "b200-sxm",
    "b300": "b300-sxm",
    "gb200": "gb200-nvl72",
    "gb300": "gb300-nvl72",
    "gh200": "gh200-96gb",
    "h100": "h100-sxm",
    "h100-sxm5": "h100-sxm",
    "h20": "h20-sxm",
    "h200": "h200-sxm",
    "h800": "h800-sxm",
    "rtx-3090": "rtx3090",
    "rtx-4090": "rtx4090",
    "rtx-5090": "rtx5090",
    "v100": "v100-sxm2-32gb",
    "v100-sxm2": "v100-sxm2-32gb",
    "v100-pcie": "v100-pcie-16gb",
}

# Rate to use where a device has no unit for a dtype. 8-bit weights are then widened to 16 bits on
# the way in, and 4-bit weights always are (weight-only quantisation). Before Ampere there is no
# bfloat16: the float16 rate is what the same product reaches once the weights are converted, which
# the executor must do, since bfloat16 itself would run at a small part of the float32 rate.
_FALLBACK: dict[str, tuple[str, ...]] = {
    "float32": (),
    "float16": ("bfloat16", "float32"),
    "bfloat16": ("float16", "float32"),
    "float8": ("bfloat16", "float16", "float32"),
    "int8": ("bfloat16", "float16", "float32"),
    "int4": ("bfloat16", "float16", "float32"),
    "mxfp4": ("bfloat16", "float16", "float32"),
}


def nearest(word: str, choices: list[str]) -> str:
    """Return up to three choices that look like `word`, joined for an error message."""
    close = difflib.get_close_matches(word, choices, n=3, cutoff=0.4)
    return ", ".join(close or sorted(choices)[:5])


def resolve_key(word: str) -> str:
    """Return the table key that `word` names, itself or by alias.

    >>> resolve_key("a100-sxm")
    'a100-sxm-80gb'

    Raises:
        ValueError: No row and no alias has that name; the nearest are listed.
    """
    key = word.strip().lower()
    key = ALIASES.get(key, key)
    if key not in DEVICES:
        choices = [*DEVICES, *ALIASES]
        raise ValueError(f"unknown device {word!r}; the nearest known are {nearest(key, choices)}")
    return key


def _plain(name: str) -> str:
    """Return the driver's name without vendor, brand and MIG profile."""
    name = re.sub(r"\s+MIG\s.*$", "", " ".join(name.split()), flags=re.IGNORECASE)
    return re.sub(r"^(NVIDIA|Tesla|AMD)\s+", "", re.sub(r"^NVIDIA\s+Tesla\s+", "", name))


def device_key(name: str, total_memory_bytes: int | None = None) -> str:
    """Return the table key of the GPU that a driver calls `name`.

    Args:
        name: As NVML, nvidia-smi or rocm-smi print it; a table key or an alias works too.
        total_memory_bytes: Rejects a row of another size (a 96 GB board with an 80 GB row's name).

    >>> device_key("NVIDIA H100 80GB HBM3")
    'h100-sxm'

    Raises:
        ValueError: No row matches; the nearest keys are listed.
    """
    plain = _plain(name)
    for device in ROWS:
        if re.fullmatch(device.pattern, plain, flags=re.IGNORECASE):
            # A MIG slice or an older driver reports less; more than the row has is another board.
            if total_memory_bytes and total_memory_bytes > device.memory_bytes * 1.1:
                continue
            return device.key
    try:
        return resolve_key(name)
    except ValueError:
        choices = {re.sub(r"[.*|()?\[\]]", " ", device.pattern): device.key for device in ROWS}
        close = difflib.get_close_matches(plain, list(choices), n=3, cutoff=0.4)
        keys = [choices[match] for match in close] or ["h100-sxm", "a100-sxm-80gb", "rtx4090"]
        size = f" with {total_memory_bytes / MIB:.0f} MiB" if total_memory_bytes else ""
        raise ValueError(
            f"unknown GPU {name!r}{size}; the nearest known are {', '.join(keys)}; "
            "add a row to topology/device_table.py"
        ) from None


def device_of(gpu: "Gpu") -> Device | None:
    """Return the table row of a GPU, or None when the probe derived its rates instead."""
    return DEVICES.get(gpu.device)


def memory_bytes_per_s(gpu: "Gpu") -> float:
    """Return the memory bandwidth of a GPU or CPU rank in bytes/s.

    Raises:
        ValueError: The device is not in the table and the GPU carries no rate of its own.
    """
    if gpu.memory_bytes_per_s is not None:
        return gpu.memory_bytes_per_s
    device = device_of(gpu)
    if device is None:
        raise ValueError(_no_rate(gpu, "memory_bytes_per_s"))
    return device.memory_bytes_per_s


def flops_per_s(gpu: "Gpu", dtype: str) -> float:
    """Return the dense peak FLOP/s of a GPU or CPU rank for products of `dtype`.

    Rates that the `Gpu` carries go before the table's. A dtype without a unit of its own takes the
    rate of the type that it is widened to.

    Raises:
        ValueError: The dtype is unknown, or the device is and the GPU carries no rate of its own.
    """
    if dtype not in _FALLBACK:
        raise ValueError(f"unknown dtype {dtype!r}; expected one of {', '.join(_FALLBACK)}")
    device = device_of(gpu)
    rates = {**(device.flops_per_s if device else {}), **(gpu.flops_per_s or {})}
    if device is not None and device.vendor == "cpu" and gpu.flops_per_s is not None:
        rates = dict(gpu.flops_per_s)  # a measured core has nothing to do with the default one
    for choice in (dtype, *_FALLBACK[dtype]):
        if choice in rates:
            return rates[choice]
    raise ValueError(_no_rate(gpu, f"flops_per_s of {dtype}"))


def _no_rate(gpu: "Gpu", what: str) -> str:
    return (
        f"GPU {gpu.index} ({gpu.name!r}): {what} is unknown, since {gpu.device!r} is no row of the "
        f"device table; set it in the cluster file, or use {nearest(gpu.device, list(DEVICES))}"
    )
