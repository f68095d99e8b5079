"""TensorRT-LLM: `trtllm-serve` with a YAML file of options, on its PyTorch backend.

Read in its API reference (TorchLlmArgs, KvCacheConfig) and `tensorrt_llm/commands/serve.py` of
1.2: the file given by `--config`, formerly `--extra_llm_api_options`, overwrites the flags.
"""

import math

from rankwright.cost_model.memory import stage_kv_bytes_per_token
from rankwright.planner.plan import Plan
from rankwright.templates.engines.engine import Engine, Span
from rankwright.templates.engines.fit import (
    activation_dtype,
    attention_ranks,
    cache_dtype,
    has_experts,
    is_uneven,
    micro_batch_note,
    quantized_at_load,
    refuse,
    share,
    smallest_gpu,
)

_TITLE = "TensorRT-LLM"


def _limits(plan: Plan) -> None:
    split = plan.split
    if split.cp > 1:
        refuse(
            _TITLE,
            f"cp={split.cp}: its context parallelism splits the cache of MLA models in decode, and "
            "prefill is for one long prompt",
            "plan with --cp 1",
        )
    if split.attention == "dp" and not has_experts(plan):
        refuse(
            _TITLE,
            "data-parallel attention of a dense model: its ranks would hold whole copies of "
            "every MLP",
            "plan with tensor-parallel attention",
        )
    if quantized_at_load(plan) is not None:
        refuse(
            _TITLE,
            f"plain weights turned into {quantized_at_load(plan)} when loaded",
            "plan for a quantised checkpoint",
        )


def _span(plan: Plan, num_nodes: int) -> Span:
    raise ValueError(
        f"{_TITLE} starts its ranks through MPI where a replica has {num_nodes} nodes; render with "
        "--on slurm, which has it, or plan replicas that fit a node"
    )


def cache_fraction(plan: Plan) -> float:
    """Return the cache's part of what is left of a GPU once all else is there.

    This engine counts so, where others take the part of the whole GPU. Rounded up to a thousandth,
    since the tokens, which are given too, are the bound.
    """
    tokens = plan.kv_cache.num_tokens
    stages = range(plan.split.pp)
    cache_bytes = tokens * max(
        stage_kv_bytes_per_token(plan.model, plan.split, stage=stage) for stage in stages
    )
    rest_bytes = max(plan.prediction.memory_bytes_per_gpu.high - cache_bytes, 0)
    total_bytes = smallest_gpu(plan).total_memory_bytes
    left_bytes = max(total_bytes - rest_bytes, cache_bytes, 1)
    return min(math.ceil(1000 * cache_bytes / left_bytes), 1000) / 1000


def _config(plan: Plan) -> dict[str, object]:
    split, limits, ranks = plan.split, plan.limits, attention_ranks(plan)
    config: dict[str, object] = {
        "tensor_parallel_size": split.tp,
        "pipeline_parallel_size": split.pp,
    }
    if is_uneven(plan):
        config["pp_partition"] = list(split.stage_layers)
    if has_experts(plan):
        config["moe_tensor_parallel_size"] = split.moe_tp
        config["moe_expert_parallel_size"] = split.ep
    if split.attention == "dp":
        config["enable_attention_dp"] = True
    return config | {
        # Of each rank, where attention is data-parallel.
        "max_batch_size": share(limits.max_num_seqs, ranks),
        "max_num_tokens": share(limits.max_batched_tokens, ranks),
        "max_seq_len": limits.max_model_len,
        "enable_chunked_prefill": True,
        "dtype": activation_dtype(_TITLE, plan),
        "kv_cache_config": {
            "free_gpu_memory_fraction": cache_fraction(plan),
            "max_tokens": plan.kv_cache.num_tokens,
            "dtype": cache_dtype(_TITLE, plan, {"float8": "fp8"}),
        },
    }


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = micro_batch_note(_TITLE, plan)
    if is_uneven(plan):
        notes += ("`pp_partition` is in the reference of 1.3; a release without it refuses it.",)
    return notes


TRTLLM = Engine(
    title=_TITLE,
    version="1.2",
    command=("trtllm-serve",),
    flags=(),
    limits=_limits,
    span=_span,
    environment=lambda plan: (),
    notes=_notes,
    config=_config,
    image="nvcr.io/nvidia/tensorrt-llm/release:1.2.0",
    mpi=True,
    has_metrics=False,  # they take `return_perf_metrics`, and another path
)
