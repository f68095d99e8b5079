"""Asks the `nvidia-smi` of this machine what NVML could not tell."""

import subprocess

from rankwright.topology.errors import ProbeError, failure_of, find_failure
from rankwright.topology.readers.assemble import with_numa
from rankwright.topology.readers.found import FoundGpu, FoundMachine
from rankwright.topology.readers.nvidia_smi import TopoMatrix, parse_topo_m
from rankwright.topology.readers.nvidia_smi_query import (
    BASIC_FIELDS,
    LIMIT_FIELDS,
    QUERY_FIELDS,
    driver_of,
    parse_query,
)
from rankwright.topology.readers.nvml import lost_note
from rankwright.topology.readers.tool import run_tool

# A hung driver keeps nvidia-smi for ever; one that works answers within 3 s. Eight GPUs without
# persistence mode take 20 to 30 s to wake, but NVML, which is asked first, has then woken them.
SMI_TIMEOUT_S = 10.0
# Failures that one GPU of several may be the reason of.
_OF_ONE_GPU = {"device_lost", "device_handle", "device_handle_partial"}
_MAX_GPUS = 16


def read_nvidia_smi() -> FoundMachine:
    """Return what `nvidia-smi --query-gpu` and `nvidia-smi topo -m` say of this machine.

    A GPU that the driver has lost is left out with a note.

    Raises:
        ProbeError: The tool is missing, hangs, names a failure, or contradicts itself.
    """
    notes: list[str] = []
    try:
        found, driver = _query()
    except ProbeError as error:
        if error.kind not in _OF_ONE_GPU:
            raise
        found, driver, notes = _one_by_one(error)
    if len(found) == 1:
        return FoundMachine(found, {}, driver, tuple(notes))
    try:
        matrix = parse_topo_m(run_smi("topo", "-m"))
    except (ValueError, ProbeError) as error:  # a driver or a container that cannot tell
        if not notes and isinstance(error, ProbeError):
            raise
        notes.append("nvidia-smi topo -m failed: all pairs of GPUs are taken to meet in the CPU")
        return FoundMachine(found, {}, driver, tuple(notes))
    if not notes and len(matrix.gpu_names) != len(found):
        raise ProbeError(
            "inconsistent_topology",
            f"nvidia-smi lists {len(found)} GPUs and links {len(matrix.gpu_names)}; run "
            "`rankwright doctor`",
        )
    rows = {int(name[3:]): at for at, name in enumerate(matrix.gpu_names)}
    if not {gpu.index for gpu in found} <= rows.keys():
        notes.append("nvidia-smi topo -m lacks GPUs: all pairs are taken to meet in the CPU")
        return FoundMachine(found, {}, driver, tuple(notes))
    numa = matrix.numa_affinity
    found = with_numa(found, numa and [numa[rows[gpu.index]] for gpu in found])
    return FoundMachine(found, _kinds(found, matrix, rows), driver, tuple(notes))


def run_smi(*arguments: str) -> str:
    """Return what nvidia-smi prints with these arguments.

    Raises:
        ProbeError: It is missing, hangs, or names a failure.
    """
    try:
        text = run_tool(["nvidia-smi", *arguments], SMI_TIMEOUT_S)
    except FileNotFoundError:
        raise failure_of("tool_not_found", "nvidia-smi") from None
    except subprocess.TimeoutExpired:
        raise failure_of("tool_hung", f"no answer within {SMI_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise failure_of("driver_not_loaded", f"nvidia-smi: {error}") from None
    failure = find_failure(text)
    if failure is not None:
        raise failure
    return text


def _query(*which: str) -> tuple[tuple[FoundGpu, ...], str | None]:
    """Return the GPUs and the driver's version; `which` are options that choose GPUs."""
    # Older drivers refuse a field they do not know.
    for fields in ((*QUERY_FIELDS, *LIMIT_FIELDS), QUERY_FIELDS, BASIC_FIELDS):
        asked = "--query-gpu=" + ",".join(fields)
        output = run_smi(*which, asked, "--format=csv,noheader,nounits")
        if "is not a valid field" not in output:
            break
    return parse_query(output, fields), driver_of(output, fields)


def _one_by_one(failure: ProbeError) -> tuple[tuple[FoundGpu, ...], str | None, list[str]]:
    """Return the GPUs that answer alone, with a note on each that does not.

    Raises:
        ProbeError: None does; the failure of all of them.
    """
    found: list[FoundGpu] = []
    notes: list[str] = []
    driver: str | None = None
    for index in range(_MAX_GPUS):
        try:
            gpus, driver = _query("-i", str(index))
        except ProbeError as error:
            if error.kind not in _OF_ONE_GPU:
                break  # past the last: "No devices were found"
            notes.append(lost_note(index, "nvidia-smi cannot open it"))
            continue
        except ValueError:
            break
        found += gpus
    if not found:
        raise failure
    return tuple(found), driver, notes


def _kinds(
    found: tuple[FoundGpu, ...], matrix: TopoMatrix, rows: dict[int, int]
) -> dict[tuple[int, int], str]:
    return {
        (a.index, b.index): matrix.matrix[rows[a.index]][rows[b.index]]
        for a in found
        for b in found
        if a.index < b.index
    }
