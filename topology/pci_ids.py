"""The device that a PCI id means, for readers that meet ids and no names.

Ids are those of the PCI ID repository (pci-ids.ucw.cz, 2023.04.11; H20, H200, B200, GB200, GB300
and Instinct MI300X, MI355X from later copies of it). Only devices of our table are listed, and of
these only ids that name one variant.
"""

_NVIDIA, _AMD = "0x10de", "0x1002"

PCI_IDS: dict[tuple[str, str], str] = {
    (_NVIDIA, "0x1db1"): "v100-sxm2-16gb",
    (_NVIDIA, "0x1db4"): "v100-pcie-16gb",
    (_NVIDIA, "0x1db5"): "v100-sxm2-32gb",
    (_NVIDIA, "0x1db8"): "v100-sxm2-32gb",
    (_NVIDIA, "0x1eb8"): "t4",
    (_NVIDIA, "0x20b0"): "a100-sxm-40gb",
    (_NVIDIA, "0x20b2"): "a100-sxm-80gb",
    (_NVIDIA, "0x20b5"): "a100-pcie-80gb",
    (_NVIDIA, "0x20b7"): "a30",
    (_NVIDIA, "0x20f1"): "a100-pcie-40gb",
    (_NVIDIA, "0x2204"): "rtx3090",
    (_NVIDIA, "0x2235"): "a40",
    (_NVIDIA, "0x2236"): "a10",
    (_NVIDIA, "0x2324"): "h800-sxm",
    (_NVIDIA, "0x2329"): "h20-sxm",
    (_NVIDIA, "0x2330"): "h100-sxm",
    (_NVIDIA, "0x2331"): "h100-pcie",
    (_NVIDIA, "0x2335"): "h200-sxm",
    (_NVIDIA, "0x233b"): "h200-nvl",
    (_NVIDIA, "0x2684"): "rtx4090",
    (_NVIDIA, "0x27b8"): "l4",
    (_NVIDIA, "0x2901"): "b200-sxm",
    (_NVIDIA, "0x2941"): "gb200-nvl72",
    (_NVIDIA, "0x31c2"): "gb300-nvl72",
    (_AMD, "0x740f"): "mi210",
    (_AMD, "0x74a1"): "mi300x",
    (_AMD, "0x75a3"): "mi355x",
}
