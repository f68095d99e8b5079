"""How other engines schedule: what their runs depend on besides the speed of kernels.

One row an engine. `efficiency.py` says how fast its kernels are; this says which requests share a
step, how much of the memory holds KV cache, and how its published benchmarks were run.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankwright.cost_model.simulate import Policy


@dataclass(frozen=True, slots=True)
class Engine:
    """Defaults of one serving engine.

    Args:
        policy: Whether prompts share steps with decoding.
        chunk_tokens: Tokens of a step, where the split does not say.
        split_prompts: Whether prompts are cut into chunks.
        reserved_share: Share of a request's output that must have room before it enters.
        memory_share: Of the device, for weights, activations and KV cache.
        free_share: Of what weights and activations leave of that, for KV cache.
        length_spread: Lengths in its published runs lie evenly within this share of the mean, to
            both sides. Where a workload does not say, so are ours: equal requests that start
            together stay together, and real ones do not.
        request_s: Of each request outside the engine's steps, beside others: HTTP and queues.
        steps_of_ranks: Whether ranks that attend for sequences of their own (attention DP) each
            fill a step of `chunk_tokens`; else all of them together.
        source: Of these.
        host_token_s: Of each token in the one process that hands them to clients, one after
            another; `simulate.py` says what follows. 0 where published runs show no such limit.
        host_request_s: Of each request in that process.
    """

    policy: "Policy"
    chunk_tokens: int
    split_prompts: bool
    reserved_share: float
    memory_share: float
    free_share: float
    length_spread: float
    request_s: float
    source: str
    host_token_s: float = 0.0
    host_request_s: float = 0.0
    steps_of_ranks: bool = True


# Requests of a closed run, for each that is in flight at a time (InferenceX benchmarks send
# 10 * concurrency prompts); no more than `MOST_REQUESTS` where that would take long.
ROUNDS = 10
MOST_REQUESTS = 2560

# chunked_prefill_size 8,192 on GPUs of 80 GB and more; prompts before decoding; enters with
# new_token_ratio (0.7 at first) of the output. Its host: 512 requests in flight of Llama-3.1-8B end
# at 20,000 tokens/s on two, four and eight H200, and the more TTFT grows the faster these are.
_SGLANG = Engine(
    policy="prefill_first",
    chunk_tokens=8192,
    split_prompts=True,
    reserved_share=0.7,
    memory_share=0.88,
    free_share=1.0,
    length_spread=0.0,
    request_s=0.0097,
    host_token_s=4.8e-5,
    host_request_s=1.0e-3,
    steps_of_ranks=False,  # chunked_prefill_size is divided by dp_size
    source="SGLang 0.5 ServerArgs defaults",
)

ENGINE_ROWS: dict[str, Engine] = {
    # V1 scheduler: prompts are chunked into what decoding leaves of max_num_batched_tokens, 8,192
    # on GPUs of 70 GB and more; gpu_memory_utilization 0.9; no reservation, eviction of the newest.
    "vllm": Engine(
        policy="mixed",
        chunk_tokens=8192,
        split_prompts=True,
        reserved_share=0.5,
        memory_share=0.90,
        free_share=1.0,
        length_spread=0.03,
        request_s=0.011,
        source="vLLM 0.12 EngineArgs defaults",
    ),
    "sglang": _SGLANG,
    # The same with --enable-mixed-chunk. NVIDIA's AIConfigurator writes that option into the launch
    # files of aggregated serving of SGLang 0.5.6 (generator/rule_plugin/sglang.rule), so that its
    # published runs of that version are of this row, and those of 0.5.1 of the row above.
    "sglang-mixed": replace(_SGLANG, policy="mixed"),
    # max_num_tokens 8,192; GUARANTEED_NO_EVICT; kv_cache_free_gpu_mem_fraction 0.9 of what weights
    # leave.
    "trtllm": Engine(
        policy="mixed",
        chunk_tokens=8192,
        split_prompts=True,
        reserved_share=1.0,
        memory_share=1.0,
        free_share=0.90,
        length_spread=0.03,
        request_s=0.104,
        source="TensorRT-LLM 1.0 LlmArgs defaults",
    ),
}
