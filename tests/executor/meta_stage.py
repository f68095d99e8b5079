"""A model's layers on the meta device, and what they ask of a checkpoint."""

from types import SimpleNamespace
from typing import Any

import torch
from tests.executor.plans import cpu_plan

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.executor.kv_cache import allocate, cache_head_dim
from rankwright.executor.models import tensor_names
from rankwright.executor.models.decoder import DecoderStage


class Asked:
    """Notes what layers ask for."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return True

    def shard(self, name: str, shape: tuple[int, ...], *parts: Any, **options: Any) -> torch.Tensor:
        self.shapes[name] = shape
        given = dict(zip(("rows", "columns", "depth"), parts, strict=False)) | options
        extent = list(shape)
        for dim, part in enumerate(given.get(key) for key in ("rows", "columns", "depth")):
            if part is not None:
                extent[dim] = part[1] - part[0]
        return torch.empty(extent, device="meta")


def meta_stage(spec: ModelSpec, source: Asked, *, is_last: bool = True) -> DecoderStage:
    """Return the whole model as one rank has it; not `is_last`: as if stages followed."""
    (place,) = (plan := cpu_plan(spec)).ranks
    mesh: Any = SimpleNamespace(
        plan=plan,
        split=plan.split,
        device=torch.device("meta"),
        place=place,
        tp=SimpleNamespace(size=1, ranks=(0,)),
        attention_ranks=1,
        expert_slots=None,
        counts_experts=False,
        is_first_stage=True,
        is_last_stage=is_last,
    )
    caches = allocate(
        num_layers=spec.num_layers,
        num_blocks=1,
        num_kv_heads=place.kv_heads[1],
        block_tokens=16,
        head_dim=cache_head_dim(spec.layers[0].attention),
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        latent=spec.layers[0].attention.kv_lora_rank,
    )
    return DecoderStage(source, mesh, tensor_names(spec.architecture), spec, caches)
