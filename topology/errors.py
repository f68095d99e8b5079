"""Why a machine could not be read: one class of failure a row, with its message and its remedy."""

import re
from dataclasses import dataclass


class ProbeError(Exception):
    """The machine, or a capture of its tools' output, could not be read.

    Attributes:
        kind: Class of the failure, a key of `FAILURES` or `inconsistent_topology`.
    """

    def __init__(self, kind: str, message: str) -> None:
        """Keep the class beside the one-line message, which ends with a remedy."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Failure:
    """How a failure announces itself, and what to do about it."""

    kind: str
    pattern: str
    meaning: str
    remedy: str


# In order: the first pattern that is found decides. Texts are those of nvidia-smi and
# NVML, then of amd-smi and rocm-smi.
FAILURES: tuple[Failure, ...] = (
    Failure(
        "driver_library_mismatch",
        r"driver/library version mismatch",
        "the loaded NVIDIA kernel module and the user-space library are of different versions",
        "reboot, or unload and reload the nvidia kernel modules",
    ),
    Failure(
        "gpu_access_blocked",
        r"gpu access blocked by the operating system",
        "the operating system blocks access to the GPU",
        "under WSL update Windows and the NVIDIA driver, then run `wsl --shutdown`",
    ),
    Failure(
        "nvml_library_not_found",
        r"couldn't find libnvidia-ml|nvml shared library not found|libnvidia-ml\.so.*not found",
        "the NVIDIA library libnvidia-ml.so is missing",
        "install the NVIDIA driver, or start the container with --gpus all",
    ),
    Failure(
        "driver_not_loaded",
        r"couldn't communicate with the nvidia driver|driver not loaded",
        "the NVIDIA driver is not loaded",
        "install the driver or run `modprobe nvidia`, then see `dmesg`",
    ),
    Failure(
        "device_lost",
        r"gpu is lost",
        "a GPU has fallen off the bus",
        "reboot; if it comes back, check power, seating and Xid errors in `dmesg`",
    ),
    Failure(
        "nvml_unknown_error",
        r"failed to initialize nvml: unknown error",
        "NVML fails without a reason, as in a container that lost its device permissions",
        "restart the container; with systemd cgroups pass the /dev/nvidia* devices explicitly",
    ),
    Failure(
        "device_handle",
        r"unable to determine the device handle",
        "the driver cannot open a GPU",
        "see Xid errors in `dmesg`, then reset the GPU or reboot",
    ),
    Failure(
        "no_permission",
        r"insufficient permissions",
        "this user may not read the GPUs",
        "join the group that owns /dev/nvidia*, or ask the administrator",
    ),
    Failure(
        "no_devices",
        r"no devices (were|was) found|nvml: not found",
        "the driver is loaded but sees no GPU",
        "check `lspci | grep -i nvidia`, CUDA_VISIBLE_DEVICES and the container's GPU request",
    ),
    Failure(
        "no_permission",
        r"user is missing the following required groups|permission needed to access required gpu",
        "this user may not read the AMD GPUs",
        "join the groups that own /dev/kfd and /dev/dri/*, usually render and video",
    ),
    Failure(
        "no_devices",
        r"unable to detect any gpu devices|driver not initialized \(amdgpu",
        "the AMD driver is not loaded or sees no GPU",
        "run `modprobe amdgpu`, then see `dmesg`",
    ),
    Failure(
        "tool_not_found",
        r"nvidia-smi.{0,4}(command not found|no such file or directory|is not recognized)",
        "nvidia-smi is not installed here",
        "install the NVIDIA driver, or run where it is",
    ),
    Failure(
        "tool_not_found",
        r"(amd|rocm)-smi.{0,4}(command not found|no such file or directory|is not recognized)",
        "neither amd-smi nor rocm-smi is installed here",
        "install ROCm, or run where it is",
    ),
    Failure(
        "tool_hung",
        r"nvidia-smi.{0,20}(timed out|hangs)",
        "nvidia-smi hangs",
        "see Xid errors in `dmesg`, reset the GPU that hangs, or reboot",
    ),
    Failure(
        "driver_hung",
        r"nvidia driver does not answer",
        "the NVIDIA driver does not answer",
        "see Xid errors in `dmesg`, reset the GPU that hangs, or reboot",
    ),
    Failure(
        "nvml_crashed",
        r"nvml crashed",
        "NVML crashed, as it does beside a GPU that fell off the bus",
        "see Xid errors in `dmesg`, then reset the GPU or reboot",
    ),
)

_SURVIVING_GPU = re.compile(r"^\s*(\d+\s*,\s*\S|GPU \d+: \S)", re.MULTILINE)


def failure_of(kind: str, detail: str) -> ProbeError:
    """Return the error of a class of `FAILURES` (NVIDIA's row of it), with what was seen of it."""
    failure = next(failure for failure in FAILURES if failure.kind == kind)
    return ProbeError(kind, f"{failure.meaning} ({detail}); {failure.remedy}")


def find_failure(text: str) -> ProbeError | None:
    """Return the failure that a tool's output announces, or None.

    >>> find_failure("Failed to initialize NVML: Driver/library version mismatch").kind
    'driver_library_mismatch'
    """
    for failure in FAILURES:
        match = re.search(failure.pattern, text, flags=re.IGNORECASE)
        if match is None:
            continue
        kind, meaning = failure.kind, failure.meaning
        if kind == "device_handle" and _SURVIVING_GPU.search(text):
            kind, meaning = (
                "device_handle_partial",
                "the driver lists some GPUs and has lost others",
            )
        start = text.rfind("\n", 0, match.start()) + 1
        line = text[start:].splitlines()[0].strip()[:160]
        return ProbeError(kind, f"{meaning} ({line!r}); {failure.remedy}")
    return None
