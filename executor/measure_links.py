"""Entry point of a rank that measures: `python -m rankwright.executor.measure_links`.

Started by `measure.py`, one process a GPU (or a CPU rank), on one machine or on several.
"""

import argparse
import gc
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.cuda.nccl
import torch.distributed as dist

from rankwright.executor.measure_collectives import Collectives
from rankwright.executor.measure_device import time_gemms, time_memory
from rankwright.executor.measure_network import time_network
from rankwright.executor.measure_pairs import time_pairs
from rankwright.executor.measure_ranks import Place, Ranks
from rankwright.topology.measurements import CollectiveTime, Measurements
from rankwright.topology.readers.nccl_log import NcclLog, join_logs, read_nccl_log

_MEET_TIMEOUT = timedelta(minutes=4)  # the launcher gives up after five


def main() -> None:
    """Measure as this rank; rank 0 writes the result and prints what is being done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--places", required=True, help="machine and GPU of each rank, such as 0:0,0:1,1:0"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rank = int(os.environ["RANK"])
    places = read_places(arguments.places)
    if arguments.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=_MEET_TIMEOUT)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        dist.init_process_group("gloo", timeout=_MEET_TIMEOUT)
    gc.collect()
    gc.freeze()  # each capture collects garbage, and would go through all of torch for it
    measured = measure_rank(rank, places, device)
    if rank == 0:
        temporary = arguments.output.with_suffix(".part")
        temporary.write_text(measured.model_dump_json(), encoding="utf-8")
        temporary.replace(arguments.output)
    dist.destroy_process_group()


def read_places(text: str) -> tuple[Place, ...]:
    """Return machine and GPU of each rank.

    >>> read_places("0:0,0:3,1:0")
    ((0, 0), (0, 3), (1, 0))
    """
    pairs = [word.split(":") for word in text.split(",")]
    return tuple((int(node), int(gpu)) for node, gpu in pairs)


def measure_rank(rank: int, places: tuple[Place, ...], device: torch.device) -> Measurements:
    """Return all that was measured; on other ranks than 0 some of it is missing.

    Args:
        rank: Of this process in the default group.
        places: Machine and GPU index of each rank.
        device: Of this rank; device `i` is the `i`-th rank's of the machine where it is a GPU.
    """
    started_s = time.monotonic()

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.monotonic() - started_s:5.1f} s  {text}", flush=True)

    ranks = Ranks(rank, places, device)
    collectives = Collectives(ranks)
    say("memory and matrix products")
    memory, gemms = ranks.all_of(time_memory(ranks)), ranks.all_of(time_gemms(ranks))
    num_pairs = len(ranks.local) * (len(ranks.local) - 1) // 2
    if num_pairs:
        say(f"copies between {num_pairs} pairs")
    pairs = ranks.all_of(time_pairs(ranks))
    times: list[CollectiveTime] = ranks.all_of(collectives.within(say))
    node_pairs = time_network(ranks, say)
    times += collectives.over(say)
    notes = ranks.all_of(ranks.notes)
    log = join_logs(ranks.all_of([_own_log()]))
    say("done")
    return Measurements(
        backend=dist.get_backend(),
        software=_software(device),
        seconds=time.monotonic() - started_s,
        pairs=tuple(pairs),
        node_pairs=tuple(node_pairs),
        collectives=tuple(times),
        memory=tuple(memory),
        gemms=tuple(gemms),
        transports=log.transports,
        num_net_channels=log.num_net,
        num_gpudirect_channels=log.num_direct,
        nccl_reasons=log.reasons[:8],
        notes=tuple(dict.fromkeys(notes)),
    )


def _own_log() -> NcclLog:
    """Return what NCCL wrote for this process, where its debug file is known."""
    name = os.environ.get("NCCL_DEBUG_FILE", "").replace("%h", "*")
    if not name:
        return read_nccl_log(())
    path = Path(name.replace("%p", str(os.getpid())))
    texts = [file.read_text(errors="replace") for file in path.parent.glob(path.name)]
    return read_nccl_log(line for text in texts for line in text.splitlines())


def _software(device: torch.device) -> str:
    if device.type == "cpu":
        return f"torch {torch.__version__}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"torch {torch.__version__}, CUDA {torch.version.cuda}, NCCL {nccl}"


if __name__ == "__main__":
    main()
