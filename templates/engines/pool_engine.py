"""What an engine needs to run a worker of one of two pools, beside what it needs to run at all.

Read in the wheels of vLLM 0.26.0 (`config/kv_transfer.py`, `envs.py`, `kv_connector/v1/nixl`),
SGLang 0.5.17 (`srt/server_args.py`, `srt/disaggregation`), vllm-router 0.1.17 and sglang-router
0.3.2 (`router_args.py`), and for TensorRT-LLM 1.2 in features/disagg-serving.md and
`llmapi/disagg_utils.py`. A new engine is a row.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rankwright.planner.plan import Plan
from rankwright.templates.engines.fit import attention_ranks

Role = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class PoolEngine:
    """A worker's additions, and the router in front.

    Args:
        router: Command that takes requests, before the addresses of workers.
        router_needs: What must be installed for it.
        flags: Of every worker of a role.
        config: Added to the configuration file of a worker of a role.
        side_ports: Ports of a worker for the other pool, as many as it listens on.
        side_variables: Environment of a worker: shell words, in which `$side` is the first of its
            side ports and `$address` its node's address.
        side_flags: Of a prefill worker, likewise.
        router_package: Of PyPI, which has it; None: the engine's image does.
        usual_side_port: Where a worker listens that is told no other.
        url_has_side_port: Whether the router is told the side port of a prefill worker.
    """

    router: tuple[str, ...]
    router_needs: str
    flags: dict[Role, tuple[tuple[str, ...], ...]] = field(
        default_factory=dict[Role, tuple[tuple[str, ...], ...]]
    )
    config: Callable[[Role, Plan], dict[str, object]] | None = None
    side_ports: Callable[[Plan], int] = lambda plan: 0
    side_variables: tuple[tuple[str, str], ...] = ()
    side_flags: tuple[tuple[str, str], ...] = ()
    router_package: str | None = None
    usual_side_port: int | None = None
    url_has_side_port: bool = False


def _transfer(role: str) -> tuple[tuple[str, ...], ...]:
    transfer = {"kv_connector": "NixlConnector", "kv_role": role}
    return (("--kv-transfer-config", json.dumps(transfer, separators=(",", ":"))),)


def _mode(role: str) -> tuple[tuple[str, ...], ...]:
    return (("--disaggregation-mode", role), ("--disaggregation-transfer-backend", "nixl"))


def _transceiver(role: Role, plan: Plan) -> dict[str, object]:
    """A buffer for a whole prompt, as the guide advises; context servers cannot overlap steps."""
    tokens = -(-plan.workload.input_tokens // plan.kv_cache.block_tokens)
    added: dict[str, object] = {
        "cache_transceiver_config": {
            "backend": "DEFAULT",
            "max_tokens_in_buffer": tokens * plan.kv_cache.block_tokens,
        }
    }
    return added | ({"disable_overlap_scheduler": True} if role == "prefill" else {})


POOL_ENGINES: dict[str, PoolEngine] = {
    "vllm": PoolEngine(
        router=("vllm-router", "--vllm-pd-disaggregation"),
        router_needs="vllm-router 0.1.17 (pip install vllm-router), and nixl beside vLLM",
        flags={"prefill": _transfer("kv_producer"), "decode": _transfer("kv_consumer")},
        router_package="vllm-router==0.1.17",
        usual_side_port=5600,
        side_ports=attention_ranks,
        side_variables=(
            ("VLLM_NIXL_SIDE_CHANNEL_HOST", "$address"),
            ("VLLM_NIXL_SIDE_CHANNEL_PORT", "$side"),
        ),
    ),
    "sglang": PoolEngine(
        router=("python3", "-m", "sglang_router.launch_router", "--pd-disaggregation"),
        router_needs="sglang-router 0.3.2 (pip install sglang-router), and nixl beside SGLang",
        flags={"prefill": _mode("prefill"), "decode": _mode("decode")},
        router_package="sglang-router==0.3.2",
        usual_side_port=8998,
        side_ports=lambda plan: 1,
        side_flags=(("--disaggregation-bootstrap-port", "$side"),),
        url_has_side_port=True,
    ),
    "trtllm": PoolEngine(
        router=("trtllm-serve", "disaggregated"),
        router_needs="nothing more",
        config=_transceiver,
    ),
}
