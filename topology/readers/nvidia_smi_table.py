"""Reads the table that `nvidia-smi` prints without arguments, and that of `rocm-smi`."""

import re
from dataclasses import replace

from rankwright.topology.device_table import MIB
from rankwright.topology.readers.listing import ListedGpu
from rankwright.topology.readers.rocm_smi import rocm_names
from rankwright.topology.readers.text import numbered_lines, refusal

_VERSION = re.compile(r"NVIDIA-SMI\s+\d[\d.]*.*?(?:Driver|KMD) Version:\s*(\d[\d.]*)")
_GPU = re.compile(r"\s*(\d{1,3})\s+(\S.*?)\s+(?:On|Off|N/A|WDDM|TCC|MCDM|ERR!)\s*$")
_BUS = re.compile(r"\s*([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f])\s+\S+\s*$")
_MEMORY = re.compile(r"\s*(\d{1,8})MiB\s*/\s*(\d{1,8})MiB\s*$")
# Of a board that shares the memory of its host, or of one that is lost.
_UNTOLD = r"Not Supported|N/A|Unknown Error|GPU is lost|ERR! */ *ERR!"
_POWER = re.compile(r"/\s*(\d{1,5})W\s*$")
_PROCESS = re.compile(r"\|\s+(\d{1,3})\s+(?:(?:N/A|\d+)\s+){2}?(\d+)\s+(M?\+?C(?:\+G)?|G)\s")
_OLD_PROCESS = re.compile(r"\|\s+(\d{1,3})\s+(\d{2,})\s+(M?\+?C(?:\+G)?|G)\s")
_SECTION = re.compile(r"\|\s*(Processes|MIG devices)\s*:", re.IGNORECASE)


def is_smi_table(text: str) -> bool:
    """Return whether the text has the table of `nvidia-smi`, or the short one of `rocm-smi`."""
    return _VERSION.search(text) is not None or "Concise Info" in text


def parse_smi_table(text: str) -> tuple[ListedGpu, ...]:
    """Return the GPUs in such a table; names are cut (`...`) where the tool cut them.

    Raises:
        ProbeError: A row of a GPU cannot be read, or its memory is missing.
        ValueError: There is no such table, or it lists no GPU.
    """
    version = _VERSION.search(text)
    if version is None:
        names = rocm_names(text) if "Concise Info" in text else {}
        if not names:
            raise ValueError("no GPU table in the text; expected the output of `nvidia-smi`")
        return tuple(ListedGpu(index, name) for index, name in sorted(names.items()))
    gpus: list[ListedGpu] = []
    section = "gpus"
    awaits_memory = False
    for number, line in numbered_lines(text):
        if _SECTION.match(line.strip()):
            section = "processes" if "rocesses" in line else "mig"
        elif section == "gpus":
            cells = line.strip().strip("|").split("|")
            if awaits_memory:
                gpus[-1] = _with_memory(number, line, cells, gpus[-1])
                awaits_memory = False
            elif line.strip().startswith("|") and re.match(r"\s*\d+\s", cells[0]):
                gpus.append(_first_line(number, line, cells, gpus, version[1]))
                awaits_memory = True
            elif gpus and len(cells) == 3 and cells[2].strip() in ("Enabled", "Disabled"):
                gpus[-1] = replace(gpus[-1], mig=cells[2].strip() == "Enabled")
        elif section == "processes":
            process = _PROCESS.match(line.strip()) or _OLD_PROCESS.match(line.strip())
            if process is not None and "C" in process[3]:
                _count(gpus, int(process[1]))
    if awaits_memory or not gpus:
        raise ValueError("the table of nvidia-smi ends before its first GPU does")
    return tuple(gpus)


def _first_line(
    number: int, line: str, cells: list[str], gpus: list[ListedGpu], driver: str
) -> ListedGpu:
    gpu = _GPU.match(cells[0])
    bus = _BUS.match(cells[1]) if len(cells) == 3 else None
    last = gpus[-1].index if gpus else None
    if gpu is None or bus is None or (last is not None and int(gpu[1]) <= last):
        raise refusal(number, line, "expected the next GPU, its name and its bus id")
    ecc = cells[2].strip()
    return ListedGpu(
        index=int(gpu[1]),
        name=gpu[2],
        bus_id=bus[1],
        ecc=None if ecc in ("N/A", "ERR!", "") else ecc != "Off",
        num_processes=0,
        driver=driver,
    )


def _with_memory(number: int, line: str, cells: list[str], gpu: ListedGpu) -> ListedGpu:
    power = _POWER.search(cells[0])
    gpu = replace(gpu, power_limit_w=float(power[1]) if power else None)
    if len(cells) == 3 and re.fullmatch(_UNTOLD, cells[1].strip()):
        return gpu
    memory = _MEMORY.match(cells[1]) if len(cells) == 3 else None
    if memory is None or int(memory[1]) > int(memory[2]):
        raise refusal(number, line, "expected the memory of a GPU, as `211MiB / 8192MiB`")
    return replace(
        gpu,
        memory_total_bytes=int(memory[2]) * MIB,
        memory_free_bytes=(int(memory[2]) - int(memory[1])) * MIB,
    )


def _count(gpus: list[ListedGpu], index: int) -> None:
    for at, gpu in enumerate(gpus):
        if gpu.index == index:
            gpus[at] = replace(gpu, num_processes=(gpu.num_processes or 0) + 1)
