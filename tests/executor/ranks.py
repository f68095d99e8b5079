"""Worker processes for tests of many ranks over gloo, kept alive over cases.

Importing torch takes seconds, so one process imports it and the pool is its forks (beside a GPU,
processes of their own). It is started once a session and runs one case after another: each makes a
fresh process group, runs `function(rank, *arguments)` and returns what each rank returned.
"""

import importlib
import multiprocessing
import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

# Where type checkers find them: `torch.distributed` has them without saying so.
from torch._C._distributed_c10d import PrefixStore, TCPStore

# What every rank needs: imported once, by the process that the pool is forked from.
_PRELOADED = ["torch", "torch.distributed", "tests.executor.cases"]


def _serve(connection: Connection, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # A store over a file would be looked at every 10 ms, by each rank for each of its groups.
    store = TCPStore("127.0.0.1", port)
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        module, function, rank, world_size, number, backend, arguments = case
        try:
            device = None
            if backend == "nccl":
                device = torch.device("cuda", rank)
                torch.cuda.set_device(device)
            dist.init_process_group(
                backend,
                store=PrefixStore(str(number), store),
                rank=rank,
                world_size=world_size,
                device_id=device,
            )
            result = getattr(importlib.import_module(module), function)(rank, *arguments)
            dist.destroy_process_group()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
            return


class Ranks:
    """A pool of processes, one a rank."""

    def __init__(self) -> None:
        # A process that is forked after CUDA has been asked for cannot use it.
        has_gpu = shutil.which("nvidia-smi") is not None
        self._context: Any = multiprocessing.get_context("spawn" if has_gpu else "forkserver")
        if not has_gpu:
            self._context.set_forkserver_preload(_PRELOADED)
        self._store: Any = None
        self._num_cases = 0
        self._connections: list[Connection] = []
        self._processes: list[Any] = []

    def run(
        self,
        world_size: int,
        module: str,
        function: str,
        *arguments: object,
        backend: str = "gloo",
    ) -> list[Any]:
        """Return what `module.function(rank, *arguments)` returned on each rank."""
        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        while len(self._connections) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(theirs, self._store.port), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._num_cases += 1
        for rank in range(world_size):
            self._connections[rank].send(
                (module, function, rank, world_size, self._num_cases, backend, arguments)
            )
        results = []
        for rank in range(world_size):
            if not self._connections[rank].poll(120):
                self.close()
                raise TimeoutError(f"rank {rank} of {world_size} said nothing for 120 s")
            good, result = self._connections[rank].recv()
            if not good:
                others = self._failures(range(rank + 1, world_size))
                self.close()
                raise RuntimeError(f"rank {rank} of {world_size} failed:\n{result}{others}")
            results.append(result)
        return results

    def _failures(self, ranks: range) -> str:
        """Return what else failed: the first to fail takes its peers along."""
        text = ""
        for rank in ranks:
            try:
                good, result = (
                    self._connections[rank].recv()
                    if self._connections[rank].poll(1)
                    else (True, "")
                )
            except EOFError:
                good, result = False, "it died"
            text += "" if good else f"rank {rank} failed:\n{result}"
        return text

    def close(self) -> None:
        """End every process; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections:
            connection.close()
        self._connections.clear()
        self._processes.clear()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """A pool that is closed at the end."""
    pool = Ranks()
    try:
        yield pool
    finally:
        pool.close()
