"""`rankwright doctor`: this machine and a running server, checked; each finding with its remedy."""

import json
import platform
import resource
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from rankwright.cli import options
from rankwright.cli.output import console, gigabytes, print_json, table
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.probe import probe
from rankwright.topology.value import Value

# NCCL and torch's data loaders share buffers there; Docker's default of 64 MB breaks both.
# Source: NCCL user guide, "Troubleshooting", section "Docker" (1 GB advised).
_MIN_SHARED_MEMORY_BYTES = 1 << 30
# Each connection and each rank's sockets take descriptors; many systems start at 1024.
_MIN_OPEN_FILES = 4096
# Memory of a GPU that a driver, an ECC scheme and an idle display may hold.
_MAX_USED_SHARE = 0.05

_STYLES = {"ok": "green", "warning": "yellow", "failure": "red"}


class Finding(Value):
    """One thing that was looked at."""

    check: str
    state: Literal["ok", "warning", "failure"]
    detail: str
    remedy: str | None = None


def run(
    url: Annotated[
        str | None, typer.Option(help="Also check the server here, such as http://localhost:8000.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check this machine and a running server.

    Each finding comes with what to do about it.
    """
    findings = list(check_machine())
    if url is not None:
        findings += check_server(url)
    if as_json:
        print_json({"findings": [finding.model_dump() for finding in findings]})
    else:
        made = table("check", "state", "found", "remedy")
        for finding in findings:
            state = f"[{_STYLES[finding.state]}]{finding.state}[/]"
            made.add_row(finding.check, state, escape(finding.detail), escape(finding.remedy or ""))
        console().print(made)
    if any(finding.state == "failure" for finding in findings):
        raise typer.Exit(4)


def check_machine() -> Iterator[Finding]:
    """Yield what there is to say about this machine."""
    yield Finding(check="python", state="ok", detail=platform.python_version())
    cluster: Cluster | None = None
    try:
        cluster = probe()
    except ProbeError as error:
        yield Finding(check="GPUs", state="failure", detail=error.kind, remedy=str(error))
    if cluster is not None:
        yield from _check_gpus(cluster)
    yield from _check_packages(cluster)
    yield _check_shared_memory()
    yield _check_open_files()


def _check_gpus(cluster: Cluster) -> Iterator[Finding]:
    (node,) = cluster.nodes
    if node.gpus[0].device == "cpu":
        detail = f"none; {len(node.gpus)} CPU ranks"
        remedy = "nothing to do, unless there should be a GPU: see the driver's log (dmesg)"
        yield Finding(check="GPUs", state="ok", detail=detail, remedy=remedy)
        return
    driver = f", driver {node.driver}" if node.driver else ""
    yield Finding(check="GPUs", state="ok", detail=cluster.describe() + driver)
    for gpu in node.gpus:
        used_bytes = gpu.total_memory_bytes - gpu.memory_bytes
        if gpu.num_processes or used_bytes > _MAX_USED_SHARE * gpu.total_memory_bytes:
            yield Finding(
                check=f"GPU {gpu.index}",
                state="warning",
                detail=f"busy: {gpu.num_processes} processes, {gigabytes(used_bytes)} in use",
                remedy="stop them (nvidia-smi lists them); plans use the memory that is free",
            )
        if gpu.mig:
            yield Finding(
                check=f"GPU {gpu.index}",
                state="warning",
                detail="MIG is on: a slice cannot talk to other GPUs",
                remedy=f"nvidia-smi -i {gpu.index} -mig 0 as root, or plan for single slices",
            )


def _check_packages(cluster: Cluster | None) -> Iterator[Finding]:
    has_gpu = cluster is not None and cluster.nodes[0].gpus[0].device != "cpu"
    for name in ("torch", "triton", "transformers"):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding(
                check=name,
                state="warning",
                detail="not installed: planning and rendering work, running models does not",
                remedy="pip install 'rankwright[executor]'",
            )
            continue
        if name == "torch" and has_gpu and found.endswith("+cpu"):
            yield Finding(
                check=name,
                state="failure",
                detail=f"{found} is built without CUDA, but there are GPUs",
                remedy="pip install --force-reinstall torch with the CUDA build of pytorch.org",
            )
        else:
            yield Finding(check=name, state="ok", detail=found)


def _check_shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.exists():
        return Finding(check="shared memory", state="ok", detail="no /dev/shm on this system")
    free_bytes = shutil.disk_usage(path).free
    if free_bytes >= _MIN_SHARED_MEMORY_BYTES:
        return Finding(check="shared memory", state="ok", detail=f"{gigabytes(free_bytes)} free")
    return Finding(
        check="shared memory",
        state="warning",
        detail=f"{gigabytes(free_bytes)} free in /dev/shm; NCCL may fail between ranks",
        remedy="docker run --shm-size=1g, or an emptyDir of medium Memory on Kubernetes",
    )


def _check_open_files() -> Finding:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= _MIN_OPEN_FILES:
        return Finding(check="open files", state="ok", detail=str(limit))
    return Finding(
        check="open files",
        state="warning",
        detail=f"{limit} at most: each client takes one",
        remedy=f"ulimit -n {_MIN_OPEN_FILES}",
    )


def check_server(url: str) -> Iterator[Finding]:
    """Yield whether the server at `url` is healthy and which models it serves."""
    base = url.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"--url must start with http:// or https://, got {url!r}")
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=10):
            yield Finding(check="server", state="ok", detail=f"{base} is healthy")
        with urllib.request.urlopen(f"{base}/v1/models", timeout=10) as response:
            names = [model["id"] for model in json.load(response)["data"]]
            yield Finding(check="models", state="ok", detail=", ".join(names))
    except urllib.error.HTTPError as error:
        yield Finding(
            check="server",
            state="failure",
            detail=f"{error.url} answers {error.code}",
            remedy="503: it is loading or lost a rank; see the log of `rankwright launch`",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "reason", error)
        yield Finding(
            check="server",
            state="failure",
            detail=f"no answer from {base}: {reason}",
            remedy="is `rankwright launch` running, and on this host and port?",
        )
