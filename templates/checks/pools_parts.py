"""What makes a worker one of a pool, wherever it runs: flags, configuration, the router's list."""

import json

import yaml

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.plan import Plan
from rankwright.templates.checks.commands import Flags, check_trtllm_config
from rankwright.templates.checks.mismatch import ManifestMismatchError, expect
from rankwright.templates.checks.objects import LOADER


def check_transfer_flags(target: str, role: str, flags: Flags) -> None:
    """Take the flags that make a worker one of a pool out of `flags`, and check them.

    Raises:
        ManifestMismatchError: They are of another role, or missing.
    """
    if target == "vllm":
        given = json.loads(flags.pop("--kv-transfer-config", None) or "{}")
        kind = "kv_producer" if role == "prefill" else "kv_consumer"
        expect(role, given, {"kv_connector": "NixlConnector", "kv_role": kind})
    if target == "sglang":
        expect(role, flags.pop("--disaggregation-mode", None), role)
        expect("transfer", flags.pop("--disaggregation-transfer-backend", None), "nixl")


def check_pool_config(pool: Plan, role: str, text: str) -> None:
    """Compare TensorRT-LLM's configuration of one pool with its plan.

    Raises:
        ManifestMismatchError: It says something else.
    """
    config = yaml.load(text, LOADER)
    cache = config.pop("cache_transceiver_config", {})
    expect("cache backend", cache.get("backend"), "DEFAULT")
    tokens = cache.get("max_tokens_in_buffer", 0)
    least = pool.workload.input_tokens
    if not least <= tokens < least + pool.kv_cache.block_tokens:
        raise ManifestMismatchError(f"max_tokens_in_buffer is {tokens}, prompts have {least}")
    overlap = config.pop("disable_overlap_scheduler", False)
    expect("disable_overlap_scheduler", overlap, role == "prefill")
    check_trtllm_config(pool, yaml.safe_dump(config))


def check_router_config(
    plan: DisaggregatedPlan, text: str, urls: dict[str, list[str]], port: int | None = None
) -> None:
    """Compare `disagg_config.yaml` with the URLs that workers have.

    Raises:
        ManifestMismatchError: It names others.
    """
    config = yaml.load(text, LOADER)
    for key, role in zip(("context_servers", "generation_servers"), plan.pools, strict=True):
        expect(f"{key}: instances", config[key]["num_instances"], plan.pools[role].split.dp)
        expect(f"{key}: urls", config[key]["urls"], urls[role])
    if port is not None:
        expect("port of the router", config["port"], port)
