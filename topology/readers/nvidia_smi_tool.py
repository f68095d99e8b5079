"""Asks the `nvidia-smi` of this machine what NVML could not tell."""

import subprocess

from rankwright.topology.errors import ProbeError, failure_of, find_failure
from rankwright.topology.readers.assemble import FoundGpu, FoundMachine, with_numa
from rankwright.topology.readers.nvidia_smi import TopoMatrix, parse_topo_m
from rankwright.topology.readers.nvidia_smi_query import (
    BASIC_FIELDS,
    QUERY_FIELDS,
    driver_of,
    parse_query,
)

# A hung driver keeps nvidia-smi for ever; one that works answers within 3 s. Eight GPUs without
# persistence mode take 20 to 30 s to wake, but NVML, which is asked first, has then woken them.
SMI_TIMEOUT_S = 10.0


def read_nvidia_smi() -> FoundMachine:
    """Return what `nvidia-smi --query-gpu` and `nvidia-smi topo -m` say of this machine.

    Raises:
        ProbeError: The tool is missing, hangs, names a failure, or contradicts itself.
    """
    for fields in (QUERY_FIELDS, BASIC_FIELDS):  # older drivers refuse a field they do not know
        output = run_smi("--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits")
        if "is not a valid field" not in output:
            break
    found = parse_query(output, fields)
    driver = driver_of(output, fields)
    if len(found) == 1:
        return FoundMachine(found, {}, driver, ())
    try:
        matrix = parse_topo_m(run_smi("topo", "-m"))
    except ValueError:  # a driver or a container that cannot tell
        note = "nvidia-smi topo -m failed: all pairs of GPUs are taken to meet in the CPU (SYS)"
        return FoundMachine(found, {}, driver, (note,))
    if len(matrix.gpu_names) != len(found):
        raise ProbeError(
            "inconsistent_topology",
            f"nvidia-smi lists {len(found)} GPUs and links {len(matrix.gpu_names)}; run "
            "`rankwright doctor`",
        )
    return FoundMachine(with_numa(found, matrix.numa_affinity), _kinds(found, matrix), driver, ())


def run_smi(*arguments: str) -> str:
    """Return what nvidia-smi prints with these arguments.

    Raises:
        ProbeError: It is missing, hangs, or names a failure.
    """
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SMI_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise failure_of("tool_not_found", "nvidia-smi") from None
    except subprocess.TimeoutExpired:
        raise failure_of("tool_hung", f"no answer within {SMI_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise failure_of("driver_not_loaded", f"nvidia-smi: {error}") from None
    text = done.stdout + done.stderr
    failure = find_failure(text)
    if failure is not None:
        raise failure
    return text


def _kinds(found: tuple[FoundGpu, ...], matrix: TopoMatrix) -> dict[tuple[int, int], str]:
    return {
        (found[i].index, found[j].index): token
        for i, row in enumerate(matrix.matrix)
        for j, token in enumerate(row)
        if i < j
    }
