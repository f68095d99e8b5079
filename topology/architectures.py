"""What one streaming multiprocessor (SM) of an NVIDIA architecture does in a clock.

Used twice: to derive the rates of a GPU that the device table lacks, and to check the rows that it
has (`tests/topology/test_devices.py`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """Per-SM rates of one compute capability, per clock.

    `tensor_flops` counts fp16 or bf16 products added in fp32, as language models use them; GeForce
    boards do half of it, though all of the int8 (NVIDIA Ampere GA102 whitepaper v2.0, appendix A).
    """

    name: str
    cuda_cores: int
    tensor_flops: int
    has_bfloat16: bool
    float8_factor: float  # float8 rate over the 16-bit rate; 0: no float8 unit
    int8_factor: float


# Source: "Tensor Core" tables of NVIDIA's architecture whitepapers (V100, Turing, A100, GA102, Ada,
# Hopper, Blackwell). Each reproduces a data-sheet peak: sm90 4096 * 132 SMs * 1.83 GHz = 989e12.
ARCHITECTURES: dict[tuple[int, int], Architecture] = {
    (7, 0): Architecture("volta", 64, 1024, False, 0, 0),
    (7, 5): Architecture("turing", 64, 1024, False, 0, 2),
    (8, 0): Architecture("ampere", 64, 2048, True, 0, 2),
    (8, 6): Architecture("ampere", 128, 1024, True, 0, 2),
    (8, 9): Architecture("ada", 128, 1024, True, 2, 2),
    (9, 0): Architecture("hopper", 128, 4096, True, 2, 2),
    (10, 0): Architecture("blackwell", 128, 8192, True, 2, 2),
    (10, 3): Architecture("blackwell ultra", 128, 8192, True, 2, 0),
    (12, 0): Architecture("blackwell rtx", 128, 1024, True, 2, 2),
}

_GEFORCE_FACTOR = 0.5


def derived_flops_per_s(
    name: str, compute_capability: tuple[int, int], num_sms: float, clock_hz: float
) -> dict[str, float]:
    """Return dense peak FLOP/s by dtype, derived from SM count and clock.

    >>> rates = derived_flops_per_s("NVIDIA A40", (8, 6), 84, 1.74e9)
    >>> round(rates["bfloat16"] / 1e12, 1)
    149.7

    Raises:
        ValueError: The compute capability is older than Volta or newer than the table.
    """
    architecture = ARCHITECTURES.get(compute_capability)
    if architecture is None:
        known = ", ".join(f"{major}.{minor}" for major, minor in ARCHITECTURES)
        major, minor = compute_capability
        raise ValueError(
            f"{name!r} has compute capability {major}.{minor}; rates are known for {known}; "
            "add the GPU to topology/devices.py"
        )
    consumer = "geforce" in name.lower() or name.lower().startswith("titan")
    full = num_sms * architecture.tensor_flops * clock_hz
    tensor = full * (_GEFORCE_FACTOR if consumer else 1)
    rates = {
        "float32": num_sms * architecture.cuda_cores * 2 * clock_hz,
        "float16": tensor,
    }
    if architecture.has_bfloat16:
        rates["bfloat16"] = tensor
    if architecture.float8_factor:
        rates["float8"] = tensor * architecture.float8_factor
    if architecture.int8_factor:
        rates["int8"] = full * architecture.int8_factor
    return rates
