"""What memory.py says of a rank is what the executor's layers ask for, to the byte.

Process groups are left out: a rank's constructor needs its row of the plan only, so that every rank
of a split can be built in this process, on torch's meta device.
"""

from types import SimpleNamespace
from typing import Any, Literal

import pytest
from tests.cost_model.configs import FAMILY_CONFIGS
from tests.executor.plans import cpu_plan

from rankwright.cost_model.memory import stage_kv_bytes_per_token, stage_weight_bytes
from rankwright.cost_model.read_model import read_model

torch: Any = pytest.importorskip("torch")
decoder: Any = pytest.importorskip("rankwright.executor.models.decoder")
models: Any = pytest.importorskip("rankwright.executor.models")
kv_cache: Any = pytest.importorskip("rankwright.executor.kv_cache")

DENSE = [name for name in FAMILY_CONFIGS if name.startswith(("llama", "mistral", "qwen2"))] + [
    "qwen3",
    "qwen3 with biases",
]
MOE = [
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "deepseek v2",
    "deepseek v2 with q_lora and biases",
    "deepseek v3",
]
BLOCK_TOKENS = 16
SPLITS = [(1, 1, 1), (2, 1, 1), (1, 1, 3), (2, 1, 2), (6, 1, 1)]  # tp, ep, pp
MOE_SPLITS = [(1, 1, 1), (2, 2, 1), (6, 3, 1), (2, 2, 2)]
CASES = [(family, *split, "tp") for family in DENSE for split in SPLITS] + [
    (family, *split, attention)
    for family in MOE
    for *split, attention in [
        *((*split, "tp") for split in MOE_SPLITS),
        (4, 2, 1, "dp"),
    ]
]


class CountingSource:
    """A weight source whose shards take no memory; counts what they would take."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __contains__(self, name: str) -> bool:
        return True

    def shard(
        self,
        name: str,
        shape: tuple[int, ...],
        rows: tuple[int, int] | None = None,
        columns: tuple[int, int] | None = None,
        depth: tuple[int, int] | None = None,
        dtype: object = None,
    ) -> object:
        extent = list(shape)
        for dim, part in enumerate((rows, columns, depth)):
            if part is not None:
                extent[dim] = part[1] - part[0]
        tensor = torch.empty(extent, dtype=dtype or torch.bfloat16, device="meta")
        self.num_bytes += tensor.nbytes
        return tensor


@pytest.mark.parametrize(("family", "tp", "ep", "pp", "attention"), CASES)
def test_every_rank_loads_what_is_predicted(
    family: str, tp: int, ep: int, pp: int, attention: Literal["tp", "dp"]
) -> None:
    spec = read_model(FAMILY_CONFIGS[family])
    plan = cpu_plan(
        spec,
        tp=tp,
        ep=ep,
        pp=pp,
        attention=attention,
        num_blocks=5,
        block_tokens=BLOCK_TOKENS,
    )
    for place in plan.ranks:
        first, last = place.layers
        caches = kv_cache.allocate(
            num_layers=last - first,
            num_blocks=5,
            num_kv_heads=place.kv_heads[1] - place.kv_heads[0],
            block_tokens=BLOCK_TOKENS,
            head_dim=kv_cache.cache_head_dim(spec.layers[0].attention),
            dtype=torch.bfloat16,
            device=torch.device("meta"),
            latent=spec.layers[0].attention.kv_lora_rank,
        )
        mesh = SimpleNamespace(
            plan=plan,
            split=plan.split,
            device=torch.device("meta"),
            place=place,
            tp=SimpleNamespace(size=tp, ranks=tuple(range(tp))),
            attention_ranks=tp if attention == "dp" else 1,
            expert_slots=None,
            counts_experts=False,
            is_first_stage=place.stage == 0,
            is_last_stage=place.stage == pp - 1,
        )
        source = CountingSource()
        decoder.DecoderStage(source, mesh, models.tensor_names(spec.architecture), spec, caches)
        assert source.num_bytes == stage_weight_bytes(
            spec, plan.split, stage=place.stage, tp_rank=place.tp_rank
        )
        cache_bytes = sum(
            tensor.untyped_storage().nbytes()
            for cache in caches
            for tensor in ((cache.keys,) if cache.values._is_view() else (cache.keys, cache.values))
        )
        assert cache_bytes == 5 * BLOCK_TOKENS * stage_kv_bytes_per_token(
            spec, plan.split, stage=place.stage
        )
