"""The process of torchrun's agent: `python -m rankwright.executor.backends.agent_main`.

Imports PyTorch and, while nobody has told it what to start, all that a rank needs. Its order is one
line on standard input; the end of that without a line means that nothing is to be started.

A rank is then a command, as under torchrun, or a fork of this process. A fork has every module at
hand: on CPUs that is most of the time of a start. It is only right while nothing here has touched a
GPU, ran an operation on several threads or opened a process group.
"""

import gc
import os
import select
import shutil
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from rankwright.executor.backends.agent import Order

# Where set to 1, PyTorch counts GPUs without CUDA.
_ASK_DRIVER = "PYTORCH_NVML_BASED_CUDA_CHECK"
WORKER_MODULE = "rankwright.executor.worker"


def main() -> int:
    """Wait for an order, start its ranks, and return 0 when all of them have ended well."""
    begun_with = set(os.environ)
    if not select.select([sys.stdin], [], [], 0)[0]:
        import_module(WORKER_MODULE)
    line = sys.stdin.readline()
    if not line:
        # A parent that was killed has left its folder.
        shutil.rmtree(os.environ["RANKWRIGHT_RUN_DIR"], ignore_errors=True)
        return 0
    order = Order.decode(line)
    for name in begun_with - order.environment.keys():
        del os.environ[name]
    os.environ.update(order.environment)
    if order.num_ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    if order.compiles is not None:
        from rankwright.executor.compile_ahead import fork_compiler

        run_dir = Path(os.environ["RANKWRIGHT_RUN_DIR"])
        fork_compiler(Path(order.compiles), order.rendezvous.node_rank, run_dir)
    try:
        if order.command is None:
            _run_forks(order)
        else:
            launch_agent(_configuration(order), order.command, list(order.arguments))
    except ChildFailedError as error:
        print(error)
        return 1
    return 0


def _run_forks(order: Order) -> None:
    import_module(WORKER_MODULE)
    # A signal for all processes of a job: the parent drains, then ends the ranks and this process.
    # torchrun's own handler would give up on ranks that still answer.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # or each fork's first collection would copy every page
    config = _configuration(order)
    config.signals_to_handle = "SIGQUIT"
    launch_agent(config, _run_rank, [order.arguments])


def _configuration(order: Order) -> LaunchConfig:
    """Return what `python -m torch.distributed.run` would make of its options."""
    meeting = order.rendezvous
    # It asks whether there are GPUs: the driver would do, and CUDA makes forks unable to use it.
    os.environ[_ASK_DRIVER] = "1"
    config = LaunchConfig(
        min_nodes=meeting.nnodes,
        max_nodes=meeting.nnodes,
        nproc_per_node=order.num_ranks,
        run_id="none",
        max_restarts=0,
        rdzv_backend="static",
        rdzv_endpoint=f"{meeting.master_addr}:{meeting.master_port}",
        rdzv_configs={"rank": meeting.node_rank},
        # Without it torchrun asks the resolver for this machine's name, which may take seconds.
        local_addr=meeting.master_addr if meeting.node_rank == 0 else None,
        start_method="fork",
    )
    del os.environ[_ASK_DRIVER]
    config.numa_options = None  # ranks see to it themselves (`numa.py`)
    return config


def _run_rank(arguments: Sequence[str]) -> None:
    """Be a rank: what `LocalRanks` expects of its command, and then the worker."""
    os.setsid()  # so that it can be killed with all that it starts
    folder, rank = Path(os.environ["RANKWRIGHT_RUN_DIR"]), os.environ["RANK"]
    (folder / f"rank-{rank}.pid").write_text(f"{os.getpid()}\n")
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    import_module(WORKER_MODULE).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
