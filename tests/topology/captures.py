"""Made-up captures, one of each kind that `rankwright probe --from-file` reads."""

TOPO_M = (
    "\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV4\tSYS\tPIX\t0-15\t0\t\tN/A\n"
    "GPU1\tNV4\t X \tSYS\tSYS\t0-15\t0\t\tN/A\n"
    "GPU2\tSYS\tSYS\t X \tSYS\t16-31\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \n\n"
    "Legend:\n\n  X    = Self\n\nNIC Legend:\n\n  NIC0: mlx5_0\n"
)

TOPO_P2P = (
    " \tGPU0\tGPU1\tGPU2\t\n"
    " GPU0\tX\tOK\tCNS\t\n"
    " GPU1\tOK\tX\tCNS\t\n"
    " GPU2\tCNS\tCNS\tX\t\n\n"
    "Legend:\n\n  X    = Self\n  OK   = Status Ok\n  CNS  = Chipset not supported\n"
)

NVLINK_STATUS = (
    "GPU 0: NVIDIA RTX A6000 (UUID: GPU-00000000-0000-0000-0000-000000000000)\n"
    "\t Link 0: 14.062 GB/s\n"
    "\t Link 1: <inactive>\n"
    "GPU 1: NVIDIA RTX A6000 (UUID: GPU-00000000-0000-0000-0000-000000000001)\n"
    "NVML: Unable to retrieve NVLink information as all links are inActive\n"
)

QUERY = (
    "index, name, memory.total [MiB], memory.used [MiB], utilization.gpu [%], ecc.mode.current\n"
    "1, NVIDIA L4, 23034 MiB, 1 MiB, 0 %, Enabled\n"
    "0, NVIDIA L4, 23034 MiB, [Insufficient Permissions], 7 %, Disabled\n"
)

SMI_L = (
    "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-000000000000)\n"
    "  MIG 1g.10gb     Device  0: (UUID: MIG-00000000-0000-0000-0000-00000000000a)\n"
    "  MIG 1g.10gb     Device  1: (UUID: MIG-00000000-0000-0000-0000-00000000000b)\n"
    "GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-000000000001)\n"
)

SMI_Q = """
==============NVSMI LOG==============

Timestamp                                 : Sat Nov 21 10:00:00 2026
Driver Version                            : 580.95.05
CUDA Version                              : 13.0

Attached GPUs                             : 2
GPU 00000000:19:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    MIG Mode
        Current                           : Disabled
        Pending                           : Enabled
    GPU UUID                              : GPU-00000000-0000-0000-0000-000000000000
    PCI
        Bus Id                            : 00000000:19:00.0
        GPU Link Info
            PCIe Generation
                Max                       : 5
                Current                   : 1
            Link Width
                Max                       : 16x
                Current                   : 8x
    FB Memory Usage
        Total                             : 81559 MiB
        Free                              : 81000 MiB
    ECC Mode
        Current                           : Enabled
    GPU Power Readings
        Current Power Limit               : 650.00 W
    Processes
        Process ID                        : 77
            Type                          : C

GPU 00000000:3B:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    Processes                             : None
"""

SMI_TABLE = """\
Sat Nov 21 10:00:00 2026
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 580.95.05              Driver Version: 580.95.05      CUDA Version: 13.0     |
+-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
|                                         |                        |               MIG M. |
|=========================================+========================+======================|
|   0  NVIDIA H200                    On  |   00000000:83:00.0 Off |                    0 |
| N/A   28C    P0             78W /  700W |      55MiB / 143771MiB |     N/A      Default |
|                                         |                        |              Enabled |
+-----------------------------------------+------------------------+----------------------+
|   1  NVIDIA RTX 6000 Ada Gene...    Off |   00000000:84:00.0 Off |                  Off |
| 30%   33C    P8             38W /  300W |   20322MiB /  49140MiB |      0%      Default |
|                                         |                        |                  N/A |
+-----------------------------------------+------------------------+----------------------+

+-----------------------------------------------------------------------------------------+
| Processes:                                                                              |
|  GPU   GI   CI              PID   Type   Process name                        GPU Memory |
|        ID   ID                                                               Usage      |
|=========================================================================================|
|    1   N/A  N/A            1720      G   /usr/bin/gnome-shell                    173MiB |
|    1   N/A  N/A           58130      C   /usr/bin/python                       20140MiB |
+-----------------------------------------------------------------------------------------+
"""

ROCM_TABLE = """\
==================== ROCm System Management Interface ====================
============================== Concise Info ==============================
Device  [Model : Revision]    Temp        Power     Partitions      SCLK
        Name (20 chars)       (Junction)  (Socket)  (Mem, Compute)
==========================================================================
0       [0x74a1 : 0x00]       35.0C       133.0W    NPS1, SPX       131Mhz
        AMD Instinct MI300X
1       [0x74a1 : 0x00]       37.0C       131.0W    NPS1, SPX       132Mhz
        AMD Instinct MI300X
2       [0x74a1 : 0x00]       34.0C       131.0W    NPS1, SPX       132Mhz
        AMD Instinct MI300X
========================== End of ROCm SMI Log ===========================
"""

ROCM_NAMES = "".join(
    f"GPU[{i}]\t\t: Card Series: \t\tAMD Instinct MI300X\nGPU[{i}]\t\t: Card Model: \t\t0x74a1\n"
    for i in range(3)
)

ROCM_TOPO = """\
============================ ROCm System Management Interface ============================
================================ Weight between two GPUs =================================
       GPU0         GPU1         GPU2
GPU0   0            15           72
GPU1   15           0            40
GPU2   72           40           0

================================= Hops between two GPUs ==================================
       GPU0         GPU1         GPU2
GPU0   0            1            3
GPU1   1            0            2
GPU2   3            2            0

=============================== Link Type between two GPUs ===============================
       GPU0         GPU1         GPU2
GPU0   0            XGMI         PCIE
GPU1   XGMI         0            PCIE
GPU2   PCIE         PCIE         0

======================================= Numa Nodes =======================================
GPU[0]		: (Topology) Numa Node: 0
GPU[0]		: (Topology) Numa Affinity: 0
GPU[1]		: (Topology) Numa Node: 0
GPU[1]		: (Topology) Numa Affinity: 0
GPU[2]		: (Topology) Numa Node: 1
GPU[2]		: (Topology) Numa Affinity: -1
================================== End of ROCm SMI Log ===================================
"""

# As AMD SMI's change log (ROCm 6.1) shows tables, and captures in issues the rest.
AMD_TOPOLOGY = """\
ACCESS TABLE:
             0000:0c:00.0 0000:22:00.0 0001:38:00.0
0000:0c:00.0 ENABLED      ENABLED      DISABLED
0000:22:00.0 ENABLED      ENABLED      ENABLED
0001:38:00.0 DISABLED     ENABLED      ENABLED
WEIGHT TABLE:
             0000:0c:00.0 0000:22:00.0 0001:38:00.0
0000:0c:00.0 0            15           72
0000:22:00.0 15           0            30
0001:38:00.0 72           30           0
HOPS TABLE:
             0000:0c:00.0 0000:22:00.0 0001:38:00.0
0000:0c:00.0 0            1            3
0000:22:00.0 1            0            1
0001:38:00.0 3            1            0
LINK TYPE TABLE:
             0000:0c:00.0 0000:22:00.0 0001:38:00.0
0000:0c:00.0 SELF         XGMI         PCIE
0000:22:00.0 XGMI         SELF         XGMI
0001:38:00.0 PCIE         XGMI         SELF
NUMA BW TABLE:
             0000:0c:00.0 0000:22:00.0 0001:38:00.0
0000:0c:00.0 N/A          50000-50000  N/A
0000:22:00.0 50000-50000  N/A          50000-50000
0001:38:00.0 N/A          50000-50000  N/A

Legend:
  SELF = Current GPU
  <BW from>-<BW to>
"""

AMD_STATIC = """\
GPU: 0
    ASIC:
        MARKET_NAME: AMD Instinct MI300X
        OAM_ID: 7
    BUS:
        BDF: 0000:0c:00.0
        MAX_PCIE_WIDTH: 16
        PCIE_INTERFACE_VERSION: Gen 5
    VRAM:
        TYPE: HBM3
        SIZE: 196592 MB
    CACHE_INFO:
        CACHE_0:
            CACHE_PROPERTIES: DATA_CACHE, SIMD_CACHE
    NUMA:
        NODE: 1

GPU: 1
    ASIC:
        MARKET_NAME: AMD Instinct MI300X
    BUS:
        BDF: 0000:22:00.0
    VRAM:
        SIZE: 196592 MB

GPU: 2
    ASIC:
        MARKET_NAME: AMD Instinct MI300X
    BUS:
        BDF: 0001:38:00.0
    VRAM:
        SIZE: 196592 MB
"""

# The plain `amd-smi` of ROCm 7, whose numbers go by PCI address and HIP's do not.
AMD_TABLE = """\
+------------------------------------------------------------------------------+
| AMD-SMI 26.2.2+unknown       amdgpu version: 6.16.6   ROCm version: 7.2.0    |
|-------------------------------------+----------------------------------------|
| BDF                        GPU-Name | Mem-Uti   Temp   UEC       Power-Usage |
| GPU  HIP-ID  OAM-ID  Partition-Mode | GFX-Uti    Fan               Mem-Usage |
|=====================================+========================================|
| 0000:0c:00.0    AMD Instinct MI300X | 0 %      40 °C   0           140/750 W |
|   0       2       7        SPX/NPS1 | 0 %        N/A           592/196592 MB |
|-------------------------------------+----------------------------------------|
| 0000:22:00.0    AMD Instinct MI300X | N/A        N/A   0           N/A/750 W |
|   1       0       3        SPX/NPS1 | N/A        N/A           283/196592 MB |
|-------------------------------------+----------------------------------------|
| 0001:38:00.0    AMD Instinct MI300X | N/A        N/A   0           N/A/750 W |
|   2       1       0        SPX/NPS1 | N/A        N/A           283/196592 MB |
+-------------------------------------+----------------------------------------+
| Processes:                                                                   |
|  GPU        PID  Process Name          GTT_MEM  VRAM_MEM  MEM_USAGE     CU % |
|    0     250235  python3.12             7.9 MB    3.8 GB     4.1 GB  N/A     |
+------------------------------------------------------------------------------+
"""

IBSTAT = """\
CA 'mlx5_0'
\tCA type: MT4129
\tNumber of ports: 1
\tPort 1:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 400
\t\tBase lid: 7
\t\tLink layer: InfiniBand
CA 'mlx4_0'
\tCA type: MT4099
\tNumber of ports: 2
\tPort 1:
\t\tState: Down
\t\tPhysical state: Polling
\t\tRate: 10
\t\tLink layer: InfiniBand
\tPort 2:
\t\tState: Active
\t\tPhysical state: LinkUp
\t\tRate: 56
\t\tLink layer: Ethernet
"""

IBSTATUS = """\
Infiniband device 'mlx5_0' port 1 status:
\tdefault gid:\t fe80:0000:0000:0000:0000:0000:0000:0001
\tstate:\t\t 4: ACTIVE
\tphys state:\t 5: LinkUp
\trate:\t\t 400 Gb/sec (4X NDR)
\tlink_layer:\t InfiniBand

Infiniband device 'mlx5_1' port 1 status:
\tstate:\t\t 1: DOWN
\tphys state:\t 3: Disabled
\trate:\t\t 40 Gb/sec (4X QDR)
\tlink_layer:\t Ethernet
"""

IBV_DEVINFO = """\
hca_id:\tmlx5_0
\ttransport:\t\t\tInfiniBand (0)
\tphys_port_cnt:\t\t\t1
\t\tport:\t1
\t\t\tstate:\t\t\tPORT_ACTIVE (4)
\t\t\tmax_mtu:\t\t4096 (5)
\t\t\tlink_layer:\t\tInfiniBand
\t\t\tactive_width:\t\t4X (2)
\t\t\tactive_speed:\t\t25.0 Gbps (32)
"""

LSPCI = r"""
-+-[0000:60]-+-00.0  Intel Corporation Device 09a2
 |           \-01.0-[61-66]----00.0-[62-66]--+-00.0-[63]----00.0  NVIDIA Corporation GH100
 |                                           +-01.0-[64]--
 |                                           \-02.0-[65]--+-00.0  Mellanox Technologies MT2910
 |                                                        \-00.1  Mellanox Technologies MT2910
 \-[0000:00]-+-00.0  Intel Corporation Device 09a2
             \-1c.0-[01]--+-00.0  NVIDIA Corporation AD102 [GeForce RTX 4090]
                          \-00.1  NVIDIA Corporation AD102 High Definition Audio Controller
"""


def xml_gpu(dev: int, bus: str, links: str = "", device: str = "0x2330") -> str:
    """Return a PCI function with a GPU."""
    return (
        f'<pci busid="{bus}" class="0x030200" vendor="0x10de" device="{device}" '
        f'link_speed="32.0 GT/s PCIe" link_width="16"><gpu dev="{dev}" sm="90" rank="{dev}" '
        f'gdr="1">{links}</gpu></pci>'
    )


def xml_net(name: str, bus: str) -> str:
    """Return a PCI function with a port of 400 Gb/s."""
    return (
        f'<pci busid="{bus}" class="0x020700"><nic><net name="{name}" dev="0" speed="400000" '
        'port="1" guid="0x1" gdr="1"/></nic></pci>'
    )


def xml_switch(bus: str, *inside: str) -> str:
    """Return a PCIe switch."""
    return f'<pci busid="{bus}" class="0x060400">' + "\n".join(inside) + "</pci>"


NCCL_XML = (
    '<!-- dumped -->\n<system version="1">\n'
    '<cpu numaid="0" affinity="0000ffff,0000ffff" arch="x86_64">\n'
    + xml_switch(
        "0000:01:00.0",
        xml_gpu(0, "0000:02:00.0"),
        xml_gpu(1, "0000:03:00.0"),
        xml_net("mlx5_0", "0000:04:00.0"),
        xml_switch("0000:05:00.0", xml_gpu(2, "0000:06:00.0")),
    )
    + xml_gpu(3, "0000:07:00.0")
    + '<nic><net name="eth0" dev="1" speed="25000" port="0"/></nic>'
    + '\n</cpu>\n<cpu numaid="1" affinity="" arch="x86_64">\n'
    + xml_gpu(4, "0000:81:00.0")
    + "\n</cpu>\n</system>\n"
)

SAMPLES: dict[str, str] = {
    "topo_m": TOPO_M,
    "topo_p2p": TOPO_P2P,
    "nvlink_status": NVLINK_STATUS,
    "query_gpu_csv": QUERY,
    "smi_L": SMI_L,
    "smi_q": SMI_Q,
    "smi_table": SMI_TABLE,
    "rocm_showtopo": ROCM_TOPO,
    "amd_smi_topology": AMD_TOPOLOGY,
    "amd_smi_static": AMD_STATIC,
    "ibstat": IBSTAT,
    "ibstatus": IBSTATUS,
    "ibv_devinfo": IBV_DEVINFO,
    "lspci_tv": LSPCI,
    "nccl_topo_xml": NCCL_XML,
}
