"""vLLM: `vllm serve`.

Flags, variables and what they exclude were read in the wheel of 0.26.0: `vllm/engine/arg_utils.py`,
`vllm/config/{parallel,cache}.py`, `vllm/distributed/utils.py` (`get_pp_indices`), and in
docs/serving/data_parallel_deployment.md.
"""

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates.engines.engine import Engine, Flag, Span
from rankwright.templates.engines.fit import (
    activation_dtype,
    attention_ranks,
    cache_dtype,
    dense_layers,
    has_experts,
    memory_fraction,
    micro_batch_note,
    quantized_at_load,
    refuse,
    share,
    stage_variable,
)
from rankwright.templates.layout import DRAIN_S

_TITLE = "vLLM"


def _limits(plan: Plan) -> None:
    split = plan.split
    if split.cp > 1:
        refuse(
            _TITLE,
            f"cp={split.cp}: it splits prefill over GPUs of its own for MLA models only, and "
            "decode over the GPUs of TP",
            "plan with --cp 1",
        )
    if has_experts(plan) and split.ep not in (1, split.tp):
        refuse(
            _TITLE,
            f"ep={split.ep} within tp={split.tp}: experts are split over all ranks of a stage "
            "or none",
            f"plan with --ep 1 or --ep {split.tp}",
        )
    if split.attention == "dp":
        if not has_experts(plan):
            refuse(
                _TITLE,
                "data-parallel attention of a dense model: its ranks would hold whole copies of "
                "every MLP",
                "plan with tensor-parallel attention",
            )
        if split.pp > 1:
            refuse(
                _TITLE,
                f"data-parallel attention within pp={split.pp} stages: its data-parallel ranks "
                "hold whole pipelines",
                "plan with --pp 1",
            )
    if quantized_at_load(plan) not in (None, "float8"):
        refuse(
            _TITLE,
            f"plain weights turned into {quantized_at_load(plan)} when loaded",
            "plan for a quantised checkpoint, or with --dtype float8",
        )


def _span(plan: Plan, num_nodes: int) -> Span:
    if plan.split.attention == "dp":
        ranks_each = plan.split.tp // num_nodes
        return Span(
            every=(
                f"--data-parallel-size-local {ranks_each}",
                '--data-parallel-address "$head" --data-parallel-rpc-port "$meet"',
            ),
            workers=(f'--headless --data-parallel-start-rank "$(({ranks_each} * part))"',),
        )
    return Span(
        every=(
            f'--nnodes {num_nodes} --node-rank "$part"',
            '--master-addr "$head" --master-port "$meet"',
        ),
        workers=("--headless",),
    )


def _environment(plan: Plan) -> tuple[EnvironmentVariable, ...]:
    return stage_variable("VLLM_PP_LAYER_PARTITION", plan)


def _notes(plan: Plan) -> tuple[str, ...]:
    notes = micro_batch_note(_TITLE, plan)
    if plan.split.attention == "dp" and dense_layers(plan):
        notes += (
            f"vLLM holds the {dense_layers(plan)} dense MLPs whole on every rank; the plan splits "
            "them. Its cache is smaller by as much.",
        )
    return notes


VLLM = Engine(
    title=_TITLE,
    version="0.26",
    command=("vllm", "serve"),
    flags=(
        Flag(
            "--tensor-parallel-size",
            lambda plan: 1 if plan.split.attention == "dp" else plan.split.tp,
        ),
        Flag("--pipeline-parallel-size", lambda plan: plan.split.pp),
        Flag(
            "--data-parallel-size",
            lambda plan: plan.split.tp if plan.split.attention == "dp" else None,
        ),
        Flag(
            "--enable-expert-parallel",
            lambda plan: has_experts(plan) and plan.split.ep > 1,
        ),
        # Both hold for each data-parallel rank.
        Flag("--max-num-seqs", lambda plan: share(plan.limits.max_num_seqs, attention_ranks(plan))),
        Flag(
            "--max-num-batched-tokens",
            lambda plan: share(plan.limits.max_batched_tokens, attention_ranks(plan)),
        ),
        Flag("--enable-chunked-prefill", lambda plan: True),
        Flag("--max-model-len", lambda plan: plan.limits.max_model_len),
        Flag("--gpu-memory-utilization", memory_fraction),
        Flag("--dtype", lambda plan: activation_dtype(_TITLE, plan)),
        Flag("--kv-cache-dtype", lambda plan: cache_dtype(_TITLE, plan, {"float8": "fp8"})),
        Flag("--quantization", lambda plan: "fp8" if quantized_at_load(plan) else None),
        Flag("--shutdown-timeout", lambda plan: DRAIN_S),  # 0, the default, cuts answers off
    ),
    limits=_limits,
    span=_span,
    environment=_environment,
    notes=_notes,
    served_name_flag="--served-model-name",
    image="vllm/vllm-openai:v0.26.0",
)
