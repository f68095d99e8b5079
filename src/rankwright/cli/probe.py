"""`rankwright probe`: this machine, or one whose `nvidia-smi` output was saved, as a cluster."""

from pathlib import Path
from typing import Annotated, cast

import typer

from rankwright.cli import options
from rankwright.cli.capture_page import print_capture
from rankwright.cli.cluster_page import print_cluster
from rankwright.cli.measured_page import print_measurements
from rankwright.cli.output import print_json, status
from rankwright.cluster_svg import write_svg
from rankwright.topology.captures import describe_topology_text, probe_from_text
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.gather import Method, gather
from rankwright.topology.read_cluster import check_cluster_name, write_cluster
from rankwright.topology.readers.kubernetes import is_kubernetes, parse_kubernetes


def run(
    from_file: Annotated[
        Path | None,
        typer.Option(
            help="Read saved output of `nvidia-smi topo -m` (and `-L`), of `rocm-smi --showtopo`, "
            "`amd-smi topology`, `ibstat` and their like, NCCL's topology XML, or `kubectl get "
            "nodes -o json`, instead of this machine."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            "--gather",
            help="Read all machines of a Slurm job, of a torchrun, of a Ray cluster, or those that "
            "kubectl lists; none: this one alone.",
        ),
    ] = "auto",
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Of the Ray cluster to read.  [default: RAY_ADDRESS, else the one that runs here]",
        ),
    ] = None,
    fabric: Annotated[
        str | None,
        typer.Option(
            metavar="FABRIC",
            help="What joins the machines, such as ib400, roce200x4 or eth25.  "
            "[default: what their ports say]",
        ),
    ] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time links, memory, matrix products and the way between machines (below a "
            "minute for one); the plan then uses what was measured.",
        ),
    ] = False,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Fail where there is no GPU.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the cluster here, YAML or JSON.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Draw the cluster here, as SVG.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Read this machine, or all of a job: GPUs, links, network ports.

    Without a GPU, its cores are CPU ranks.
    """
    if output is not None:
        check_cluster_name(output)  # before what takes a minute
    if from_file is None:
        if timed:
            method = "ray" if ray_address is not None else method
            cluster = _measured(method, require_gpu, fabric)
        else:
            cluster = gather(
                method, require_gpu=require_gpu, fabric=fabric, ray_address=ray_address
            )
        if cluster is not None:  # else another process of the run has it
            _show(cluster, output, svg, as_json)
        return
    if timed:
        raise ValueError("--measure times this machine, and --from-file reads another; give one")
    if method != "auto" or ray_address is not None or require_gpu:
        raise ValueError(
            "--gather, --ray-address and --require-gpu are for the machines of this job, and "
            "--from-file reads a text; give one"
        )
    text = from_file.read_text(encoding="utf-8", errors="replace")
    if is_kubernetes(text):
        _show(parse_kubernetes(text, fabric=fabric), output, svg, as_json)
        return
    if fabric is not None:
        raise ValueError("--fabric is between machines, and this text is of one; leave it out")
    read = describe_topology_text(text)
    if "error" in read:
        error = cast("dict[str, str]", read["error"])
        raise ProbeError(error["class"], error["message"])
    if as_json:
        print_json(read)
    else:
        print_capture(read)
    if output is not None or svg is not None:
        cluster = probe_from_text(text)
        for note in cluster.notes:
            status(f"note: {note}")
        _write(cluster, output, svg)


def _show(cluster: Cluster, output: Path | None, svg: Path | None, as_json: bool) -> None:
    if as_json:
        print_json(cluster)
    else:
        print_cluster(cluster)
        print_measurements(cluster)
    _write(cluster, output, svg)


def _measured(method: Method, require_gpu: bool, fabric: str | None) -> Cluster | None:
    from rankwright.executor.measure_job import measure_job  # only here: plans do without it

    return measure_job(method, require_gpu=require_gpu, fabric=fabric, progress=status)


def _write(cluster: Cluster, output: Path | None, svg: Path | None) -> None:
    if output is not None:
        write_cluster(cluster, output)
        status(f"wrote {output}")
    if svg is not None:
        write_svg(cluster, svg)
        status(f"wrote {svg}")
