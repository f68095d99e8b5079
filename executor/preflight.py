"""What is checked before any process starts: options, this machine, and the model's files.

A mistake found here costs a second and one line; found by a rank it costs a minute and a log.
"""

import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankwright.executor.backends.local import WORKER
from rankwright.executor.checkpoint import find_checkpoint, find_model_folder
from rankwright.executor.models.supported import check_supported
from rankwright.executor.session import DeviceKind, LoadFormat, RunOptions, node_order
from rankwright.executor.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import check_cluster
from rankwright.topology.cluster import Cluster
from rankwright.topology.probe import probe

BACKENDS = ("auto", "local")
# Their manifests are files to submit: `rankwright render` makes them.
_RENDERED = ("slurm", "kubernetes")


def make_options(
    plan: Plan,
    *,
    backend: str = "auto",
    load_format: LoadFormat = "auto",
    model_path: Path | str | None = None,
    device: DeviceKind = "auto",
    nnodes: int = 1,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int | None = None,
    host_interface: str | None = None,
    start_timeout_s: float = 1800.0,
    worker: Sequence[str] = WORKER,
) -> RunOptions:
    """Return the options, checked against each other and the plan.

    Raises:
        ValueError: One is out of range, or the plan wants another number of machines.
    """
    if backend in _RENDERED:
        raise ValueError(
            f"backend {backend!r} runs from a manifest: `rankwright render PLAN --target {backend}`"
        )
    _one_of("backend", backend, BACKENDS)
    _one_of("load format", load_format, ("auto", "dummy"))
    _one_of("device", device, ("auto", "cpu", "cuda"))
    nodes = node_order(plan)
    if nnodes != len(nodes):
        raise ValueError(
            f"the plan uses {len(nodes)} machines and nnodes is {nnodes}; run it on each of them "
            f"with --nnodes {len(nodes)} --node-rank 0, 1, ..., or render a manifest"
        )
    if not 0 <= node_rank < nnodes:
        raise ValueError(f"node_rank is {node_rank}, must be 0 to {nnodes - 1}")
    if start_timeout_s <= 0:
        raise ValueError(f"start_timeout_s is {start_timeout_s:g}, must be more than 0")
    if master_port is not None and not 1 <= master_port <= 65534:
        raise ValueError(f"master_port is {master_port}, must be 1 to 65534")
    return RunOptions(
        load_format=load_format,
        model_path=None if model_path is None else Path(model_path),
        device=device,
        nnodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        host_interface=host_interface,
        start_timeout_s=start_timeout_s,
        worker=worker,
    )


def check_machine(plan: Plan, options: RunOptions) -> None:
    """Check that this machine is the one that the plan means by `options.node_rank`.

    CPU ranks run anywhere, however many the plan has, so a plan of those fits every machine.

    Raises:
        ValueError: It is another one; says what differs.
        ProbeError: This machine cannot be read.
    """
    node = plan.cluster.node(node_order(plan)[options.node_rank])
    if options.device == "cpu" or all(gpu.device == "cpu" for gpu in node.gpus):
        return
    # One machine cannot see the fabric, nor whether the others are there.
    alone = Cluster(nodes=(node.model_copy(update={"count": 1}),), source=plan.cluster.source)
    here = probe().model_copy(update={"fabric": None})
    expected = plan.model_copy(update={"cluster": alone, "cluster_fingerprint": alone.fingerprint})
    check_cluster(expected, here)


def find_model(plan: Plan, options: RunOptions) -> tuple[RunOptions, Tokenizer]:
    """Return the options with the model's folder filled in, and its tokenizer.

    Random weights need no folder; without one a token stands for a byte.

    Raises:
        ValueError: The executor cannot run the model, or weights or tokenizer are missing or
            malformed.
    """
    check_supported(plan)
    name, given = plan.model.name, options.model_path
    if options.load_format == "auto":
        folder = find_checkpoint(name, given)
        return replace(options, model_path=folder), load_tokenizer(folder)
    found = find_model_folder(name, given)
    if found is None or not (found / "tokenizer.json").is_file():
        return replace(options, model_path=found), ByteTokenizer()
    return replace(options, model_path=found), load_tokenizer(found)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on `host:port`, before anything is started for it.

    Raises:
        ValueError: The address cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port is {port}, must be 0 to 65535 (0: a free one)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"cannot listen on {host}:{port}: {reason}; choose another with --host or --port"
        ) from None


def _one_of(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose {', '.join(choices)}")
