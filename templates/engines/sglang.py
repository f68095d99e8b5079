"""SGLang: `python3 -m sglang.launch_server`.

Flags and their asserts were read in the wheel of 0.5.17: `sglang/srt/server_args.py`,
`sglang/srt/distributed/utils.py` (`get_pp_indices`), and `mem_cache/kv_cache_configurator.py`,
which divides the running requests by the ranks of data-parallel attention, as `server_args.py`
does with the tokens of a chunk.
"""

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates.engines.engine import Engine, Flag, Span
from rankwright.templates.engines.fit import (
    activation_dtype,
    cache_dtype,
    has_experts,
    memory_fraction,
    micro_batch_note,
    quantized_at_load,
    refuse,
    stage_variable,
)

_TITLE = "SGLang"


def _limits(plan: Plan) -> None:
    split = plan.split
    if split.cp > 1:
        refuse(
            _TITLE,
            f"cp={split.cp} beside tp={split.tp}: its attention CP takes ranks of TP, and splits "
            "the other weights over them",
            "plan with --cp 1",
        )
    if split.attention == "dp" and not has_experts(plan):
        refuse(
            _TITLE,
            "data-parallel attention of a dense model",
            "plan with tensor-parallel attention",
        )
    if quantized_at_load(plan) not in (None, "float8"):
        refuse(
            _TITLE,
            f"plain weights turned into {quantized_at_load(plan)} when loaded",
            "plan for a quantised checkpoint, or with --dtype float8",
        )


def _span(plan: Plan, num_nodes: int) -> Span:
    return Span(
        every=(f'--nnodes {num_nodes} --node-rank "$part"', '--dist-init-addr "$head:$meet"'),
    )


def _environment(plan: Plan) -> tuple[EnvironmentVariable, ...]:
    return stage_variable("SGLANG_PP_LAYER_PARTITION", plan)


SGLANG = Engine(
    title=_TITLE,
    version="0.5.17",
    command=("python3", "-m", "sglang.launch_server"),
    model_flag="--model-path",
    flags=(
        Flag("--tp-size", lambda plan: plan.split.tp),
        Flag("--pp-size", lambda plan: plan.split.pp),
        Flag("--ep-size", lambda plan: plan.split.ep if has_experts(plan) else None),
        Flag("--enable-dp-attention", lambda plan: plan.split.attention == "dp"),
        Flag("--dp-size", lambda plan: plan.split.tp if plan.split.attention == "dp" else None),
        # Of all ranks together: the server divides them.
        Flag("--max-running-requests", lambda plan: plan.limits.max_num_seqs),
        Flag("--chunked-prefill-size", lambda plan: plan.limits.max_batched_tokens),
        Flag("--max-prefill-tokens", lambda plan: plan.limits.max_batched_tokens),
        Flag("--context-length", lambda plan: plan.limits.max_model_len),
        Flag("--mem-fraction-static", memory_fraction),
        Flag("--dtype", lambda plan: activation_dtype(_TITLE, plan)),
        Flag(
            "--kv-cache-dtype",
            lambda plan: cache_dtype(_TITLE, plan, {"float8": "fp8_e4m3", "bfloat16": "bfloat16"}),
        ),
        Flag("--quantization", lambda plan: "fp8" if quantized_at_load(plan) else None),
        Flag("--enable-metrics", lambda plan: True),
    ),
    limits=_limits,
    span=_span,
    environment=_environment,
    notes=lambda plan: micro_batch_note(_TITLE, plan),
    served_name_flag="--served-model-name",
    image="lmsysorg/sglang:v0.5.17",
)
