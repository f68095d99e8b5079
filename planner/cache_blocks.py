"""Blocks of the KV cache: their size, and how many requests take of a rank."""

from math import ceil

from rankwright.cost_model.workload import Workload
from rankwright.planner.shapes import Shape

BLOCK_TOKENS = {"cuda": 64, "cpu": 16}


class CacheBlocks:
    """Blocks of one workload on one kind of device."""

    def __init__(self, workload: Workload, is_cpu: bool) -> None:
        """Prepare.

        Args:
            workload: Whose requests are kept.
            is_cpu: Whether ranks are on CPUs.
        """
        self._request_tokens = workload.input_tokens + workload.output_tokens
        self._is_cpu = is_cpu

    def block_tokens(self, cp: int) -> int:
        """Return the tokens of a KV block on one rank.

        Under context parallelism a rank's prompt tokens are runs of one block each: twice the usual
        size fills the 128 rows that a program of the prefill kernel takes.
        """
        if self._is_cpu:
            return BLOCK_TOKENS["cpu"]
        return BLOCK_TOKENS["cuda"] * (2 if cp > 1 else 1)

    def kv_tokens(self, shape: Shape, batch_size: int) -> int:
        """Return the tokens of cache that `batch_size` requests take of a rank, in whole blocks.

        Attention DP deals requests to its ranks, context parallelism cuts each into parts.
        """
        block_tokens = self.block_tokens(shape.cp)
        blocks = ceil(ceil(self._request_tokens / shape.cp) / block_tokens)
        sequences = ceil(batch_size / shape.tp) if shape.attention == "dp" else batch_size
        return sequences * blocks * block_tokens
