"""`rankwright probe`: this machine, or one whose `nvidia-smi` output was saved, as a cluster."""

from pathlib import Path
from typing import Annotated, cast

import typer

from rankwright.cli import options
from rankwright.cli.cluster_page import print_cluster, print_matrix
from rankwright.cli.output import print_json, status
from rankwright.topology.cluster import Cluster
from rankwright.topology.errors import ProbeError
from rankwright.topology.probe import describe_topology_text, probe, probe_from_text
from rankwright.topology.read_cluster import write_cluster
from rankwright.topology.readers.nvidia_smi import parse_topo_m


def run(
    from_file: Annotated[
        Path | None,
        typer.Option(
            help="Read saved output of `nvidia-smi topo -m` (and `-L`) instead of this machine."
        ),
    ] = None,
    require_gpu: Annotated[
        bool, typer.Option("--require-gpu", help="Fail where there is no GPU.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the cluster here, YAML or JSON.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Read this machine: GPUs, links, network ports.

    Without a GPU, its cores are CPU ranks.
    """
    if from_file is None:
        cluster = probe(require_gpu=require_gpu)
        if as_json:
            print_json(cluster)
        else:
            print_cluster(cluster)
        _write(cluster, output)
        return
    text = from_file.read_text(encoding="utf-8", errors="replace")
    read = describe_topology_text(text)
    if "error" in read:
        error = cast("dict[str, str]", read["error"])
        raise ProbeError(error["class"], error["message"])
    if as_json:
        print_json(read)
    else:
        matrix = parse_topo_m(text)
        print_matrix(matrix.gpu_names, matrix.matrix, matrix.nics, matrix.nic_matrix)
    if output is not None:
        _write(probe_from_text(text), output)


def _write(cluster: Cluster, output: Path | None) -> None:
    if output is not None:
        write_cluster(cluster, output)
        status(f"wrote {output}")
