"""What is checked before any process starts: options, this machine, and the model's files.

A mistake found here costs a second and one line; found by a rank it costs a minute and a log.
"""

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rankwright.executor.check_tensors import check_tensors
from rankwright.executor.checkpoint import check_weights, find_checkpoint, find_model_folder
from rankwright.executor.models.supported import check_supported
from rankwright.executor.run_options import (
    WORKER,
    BackendName,
    DeviceKind,
    LoadFormat,
    RunOptions,
    node_order,
)
from rankwright.executor.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from rankwright.planner.plan import Plan
from rankwright.planner.read_plan import check_cluster
from rankwright.topology.cluster import Cluster
from rankwright.topology.probe import probe

BACKENDS = ("auto", "local", "ray")
# Set inside a Slurm job and inside a Kubernetes pod, which have their own way to start ranks.
SCHEDULER_VARIABLES = ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST")


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
    ray_address: str | None = None,
    prefix_cache: bool = True,
    record_expert_load: Path | str | None = None,
    force: bool = False,
) -> RunOptions:
    """Return the options, checked against each other and the plan.

    Raises:
        ValueError: One is out of range, or the plan wants another number of machines.
    """
    _one_of("backend", backend, BACKENDS)
    _one_of("load format", load_format, ("auto", "dummy"))
    _one_of("device", device, ("auto", "cpu", "cuda"))
    chosen = choose_backend(plan, backend, nnodes)
    num_nodes = len(plan.nodes_used())
    if chosen == "ray":
        if nnodes != 1:
            raise ValueError(f"nnodes is {nnodes}, and Ray starts the ranks of all machines itself")
    elif nnodes != len(node_order(plan)):
        raise ValueError(
            f"the plan uses {num_nodes} machines and nnodes is {nnodes}; run it on each of them "
            f"with --nnodes {num_nodes} --node-rank 0, 1, ..., or once with --backend ray or slurm"
        )
    if ray_address is not None and chosen != "ray":
        raise ValueError(f"there is an address of Ray, and the backend is {chosen}")
    if not 0 <= node_rank < nnodes:
        raise ValueError(f"node_rank is {node_rank}, must be 0 to {nnodes - 1}")
    if start_timeout_s <= 0:
        raise ValueError(f"start_timeout_s is {start_timeout_s:g}, must be more than 0")
    if master_port is not None and not 1 <= master_port <= 65534:
        raise ValueError(f"master_port is {master_port}, must be 1 to 65534")
    return RunOptions(
        backend=chosen,
        ray_address=ray_address,
        prefix_cache=prefix_cache,
        record_expert_load=_load_file(plan, record_expert_load),
        force=force,
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


def _load_file(plan: Plan, path: Path | str | None) -> Path | None:
    """Return the whole path of the file for loads of experts, which can be written.

    Raises:
        ValueError: It cannot, or the model has no experts.
    """
    if path is None:
        return None
    if all(run.layer.feed_forward.kind == "dense" for run in plan.model.layer_runs):
        raise ValueError(f"--record-expert-load: {plan.model.name} has no experts")
    whole = Path(path).expanduser().absolute()
    if whole.is_dir() or not os.access(whole.parent, os.W_OK):
        raise ValueError(f"--record-expert-load {str(path)!r} is no file that can be written")
    return whole


def choose_backend(plan: Plan, backend: str, nnodes: int) -> BackendName:
    """Return what starts the ranks, where `backend` may be 'auto'.

    Ray for a plan of several machines that is launched once; torchrun on one machine, and where
    the launch is itself one of several, as in a job or a pod.
    """
    if backend in ("local", "ray"):
        return "ray" if backend == "ray" else "local"
    in_job = any(name in os.environ for name in SCHEDULER_VARIABLES)
    return "ray" if len(plan.nodes_used()) > 1 and nnodes == 1 and not in_job else "local"


@contextlib.contextmanager
def joined(plan: Plan, options: RunOptions) -> Iterator[RunOptions]:
    """Join what the back end needs, for the length of the block: a Ray cluster.

    Yields:
        The options with what is known now.

    Raises:
        MissingToolError: There is none.
        ValueError: It is smaller than the plan.
    """
    if options.backend == "local":
        yield options
        return
    # Here, not at the top: Ray is an extra.
    from rankwright.executor.backends.ray_cluster import connected

    with connected(plan, options) as found:
        yield found


def check_machine(plan: Plan, options: RunOptions) -> None:
    """Check that this machine is the one that the plan means by `options.node_rank`.

    Ray's nodes are checked where they are, once they are known.

    Raises:
        ValueError: It is another one; says what differs.
        ProbeError: This machine cannot be read.
    """
    if options.backend == "local":
        check_node(plan, node_order(plan)[options.node_rank], options.device)


def check_node(plan: Plan, number: int, device: str) -> None:
    """Check that this machine is machine `number` of the plan.

    CPU ranks run anywhere, however many the plan has, so a plan of those fits every machine.

    Raises:
        ValueError: It is another one; says what differs.
        ProbeError: This machine cannot be read.
    """
    node = plan.cluster.node(number)
    if device == "cpu" or all(gpu.device == "cpu" for gpu in node.gpus):
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
        ValueError: The executor cannot run the model, or weights or tokenizer are missing,
            truncated, of other shapes than the model's, or stored in a way that it cannot read.
    """
    check_supported(plan)
    name, given = plan.model.name, options.model_path
    if options.load_format == "auto":
        folder = find_checkpoint(name, given)
        check_tensors(plan.model, check_weights(folder))
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
