"""Bytes of a rank as the search needs them: by layer and by what each stage has besides.

The same functions of `cost_model/memory.py` that `rank_memory` sums up, looked up once for each
degree instead of once for each candidate.
"""

from rankwright.cost_model.efficiency import device_class
from rankwright.cost_model.fullest import memory_class
from rankwright.cost_model.memory import (
    RESERVED_BYTES,
    activation_bytes,
    embedding_weight_bytes,
    final_norm_bytes,
    gathered_bytes,
    head_weight_bytes,
    kv_bytes_per_token,
    layer_weight_bytes,
)
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.shards import Shares
from rankwright.planner.shapes import Shape
from rankwright.topology.cluster import Gpu

# Share of a GPU's free memory that a plan may use. What allocators leave between tensors, and what
# NCCL asks for late, is not in the model: planned to the last byte, Llama-3.1-8B with TP2 on two
# H200 (torch 2.11, NCCL 2.28.9) served, but NCCL found no memory for one communicator more.
PLANNED_SHARE = 0.97


class MemoryTable:
    """Bytes of the fullest rank of every shape of one model."""

    def __init__(self, model: ModelSpec, memory_budget_bytes: int | None = None) -> None:
        """Prepare.

        Args:
            model: Whose weights and cache.
            memory_budget_bytes: Bytes of each GPU that may be used; None: what is free.
        """
        self._model = model
        self._budget = memory_budget_bytes
        self._layers: dict[tuple[object, ...], tuple[list[int], list[int]]] = {}
        self._extras: dict[tuple[object, ...], int] = {}

    def budget_bytes(self, gpu: Gpu) -> int:
        """Return the bytes of `gpu` that a plan may use."""
        share = 1.0 if gpu.device == "cpu" else PLANNED_SHARE
        usable = max(1, int(gpu.memory_bytes * share))  # the share of a byte is none to divide by
        return usable if self._budget is None else min(self._budget, usable)

    def layer_bytes(
        self, shape: Shape, tp_rank: int = 0, shares: Shares | None = None
    ) -> tuple[list[int], list[int]]:
        """Return, for every layer, its weight bytes and its KV bytes of a token on one rank."""
        key = (shape.tp, shape.ep, shape.attention, tp_rank, shares)
        if key not in self._layers:
            model, weights, kv = self._model, list[int](), list[int]()
            for run in model.layer_runs:
                size = layer_weight_bytes(
                    model,
                    run.layer,
                    tp=shape.tp,
                    ep=shape.ep,
                    attention=shape.attention,
                    tp_rank=tp_rank,
                    shares=shares,
                )
                token = kv_bytes_per_token(
                    model,
                    run.layer,
                    tp=shape.tp,
                    attention=shape.attention,
                    tp_rank=tp_rank,
                    shares=shares,
                )
                weights += [size] * run.count
                kv += [token] * run.count
            self._layers[key] = weights, kv
        return self._layers[key]

    def extra_bytes(
        self,
        shape: Shape,
        stage: int,
        batch_size: int,
        chunk_tokens: int,
        gpu: Gpu,
        tp_rank: int = 0,
        shares: Shares | None = None,
    ) -> int:
        """Return the bytes of a rank that do not depend on how many layers its stage has."""
        last = stage == shape.pp - 1
        num_seqs = batch_size if last else 0
        is_cpu = gpu.device == "cpu"
        most = max(chunk_tokens, batch_size)
        ends = (stage == 0, last)
        cut = (shape.tp, shape.ep, shape.cp, shape.attention, shape.cp_exchange)
        key = (*cut, most, batch_size, *ends, is_cpu, tp_rank, shares)
        if key not in self._extras:
            extra = self._find_extra_bytes(shape, stage, most, num_seqs, gpu, tp_rank, shares)
            self._extras[key] = extra + gathered_bytes(
                self._model,
                tp=shape.tp,
                cp=shape.cp,
                attention=shape.attention,
                cp_exchange=shape.cp_exchange,
                max_context_tokens=self._model.max_context_tokens,
                max_num_seqs=batch_size,
                max_batched_tokens=most,
            )
        return self._extras[key]

    def _find_extra_bytes(
        self,
        shape: Shape,
        stage: int,
        max_batched_tokens: int,
        num_seqs: int,
        gpu: Gpu,
        tp_rank: int,
        shares: Shares | None,
    ) -> int:
        model = self._model
        total = RESERVED_BYTES[memory_class(gpu.device, device_class(gpu))]
        total += activation_bytes(
            model,
            tp=shape.tp,
            ep=shape.ep,
            attention=shape.attention,
            max_batched_tokens=max_batched_tokens,
            max_num_seqs=num_seqs,
            tp_rank=tp_rank,
            shares=shares,
        )
        if stage == 0:
            total += embedding_weight_bytes(model, tp=shape.tp, tp_rank=tp_rank, shares=shares)
        if stage == shape.pp - 1:
            total += final_norm_bytes(model)
            if not (model.tie_embeddings and shape.pp == 1):
                total += head_weight_bytes(model, tp=shape.tp, tp_rank=tp_rank, shares=shares)
        return total
