"""Another engine's script and configuration against the plan.

What each flag must say is written here once more, apart from the tables that the renderer fills
from: a wrong row there must not pass for right.
"""

import re
from collections.abc import Callable

import yaml

from rankwright.planner.plan import Plan
from rankwright.templates.checks.mismatch import (
    ManifestMismatchError,
    expect,
    exported,
    heredoc,
    shell_words,
    variables,
)
from rankwright.templates.checks.objects import LOADER
from rankwright.templates.checks.sbatch import check_job, job_variables, slurm_headers

Flags = dict[str, str | None]  # None: a switch
_CONFIG = "parallel_config.yaml"


def check_engine(plan: Plan, target: str, files: dict[str, str]) -> None:
    """Compare the script of `target`, and its configuration, with `plan`.

    Raises:
        ManifestMismatchError: They say something else.
    """
    check_script(plan, target, files[f"{target}.sh"], files.get(_CONFIG))


def check_engine_job(plan: Plan, target: str, script: str) -> None:
    """Compare an sbatch script that starts `target` with `plan`.

    Raises:
        ManifestMismatchError: It says something else.
    """
    check_job(plan, script)
    if target == "trtllm":
        check_trtllm_config(plan, heredoc(script, "RANKWRIGHT_PARALLEL_CONFIG"))
        outer = script.partition("<<'RANKWRIGHT")[0]
        expect("environment", job_variables(outer), variables(plan))
        _check_steps(plan, script)
        return
    inner = heredoc(script, f"RANKWRIGHT_{target.upper()}")
    check_script(plan, target, inner, None)
    if len(slurm_headers(script)) == 1:
        sizes = re.findall(r"^ +--nodes=(\d+)", script, re.MULTILINE)
        nodes = len({rank.node for rank in plan.ranks})
        expect("srun --nodes", sizes, [str(nodes)])


def check_script(plan: Plan, target: str, script: str, config: str | None) -> None:
    """Compare a script of `target` with `plan`: its command, places and environment.

    Raises:
        ManifestMismatchError: It says something else.
    """
    flags = command_flags(script)
    if target == "trtllm":
        expect("--config", flags.pop("--config", None), f"$(dirname $0)/{_CONFIG}")
        if config is None:
            raise ManifestMismatchError(f"no {_CONFIG}")
        check_trtllm_config(plan, config)
    first = re.search(r"^engine=\(\n(.*)$", script, re.MULTILINE)
    check_flags(plan, target, flags, first and shell_words(first[1])[-1])
    expect("places", script_places(script), plan_places(plan))
    expect("environment", exported(script), variables(plan) | stage_variable(plan, target))


def check_flags(plan: Plan, target: str, flags: Flags, positional: str | None) -> None:
    """Compare the flags of `target` with `plan`; `positional` is the word before the first flag.

    Raises:
        ManifestMismatchError: They say something else.
    """
    flags = dict(flags)
    _check_model(plan, target, positional, flags)
    expect("--host", flags.pop("--host", None), "0.0.0.0")
    fraction = "--gpu-memory-utilization" if target == "vllm" else "--mem-fraction-static"
    if target != "trtllm":
        _check_fraction(plan, float(flags.pop(fraction, None) or 0))
    expect("flags", flags, EXPECTED[target](plan))


def command_flags(script: str, array: str = "engine") -> Flags:
    r"""Return the flags of the script's `array`; what is before the first is left out.

    >>> command_flags('engine=(\n  vllm serve "m"\n  --a 1\n  --b\n)\n')
    {'--a': '1', '--b': None}
    """
    body = re.search(rf"^{array}=\(\n(.*?)^\)$", script, re.MULTILINE | re.DOTALL)
    if body is None:
        raise ManifestMismatchError("no command")
    flags: Flags = {}
    for line in body[1].splitlines():
        words = shell_words(line.replace('"$(dirname "$0")/', '"$(dirname $0)/'))
        at = next((i for i, word in enumerate(words) if re.match(r"--[a-z]", word)), None)
        if at is None:
            continue
        if words[at] in flags:
            raise ManifestMismatchError(f"{words[at]} is given twice")
        if len(words) - at > 2:
            raise ManifestMismatchError(f"{words[at]} has several values")
        flags[words[at]] = words[at + 1] if len(words) - at == 2 else None
    return flags


def _check_model(plan: Plan, target: str, positional: str | None, flags: Flags) -> None:
    """The model is the plan's, or weights in a folder that are served under the plan's name."""
    model = flags.pop("--model-path", None) or positional
    served = flags.pop("--served-model-name", None)
    if target != "trtllm" or not str(model).startswith("/"):
        expect("model", served or model, plan.model.name)


def script_places(script: str) -> set[tuple[int, int, str, int, int]]:
    """Return what a script starts: node, replica, GPUs, part of the replica, its first node."""
    places: set[tuple[int, int, str, int, int]] = set()
    node = 0
    for line in script.splitlines():
        label = re.fullmatch(r"  (\d+)\)", line)
        start = re.fullmatch(r' *start (\d+) ([\d,]+)(?: (\d+) "\$\{nodes\[(\d+)\]\}")?', line)
        if label:
            node = int(label[1])
        if start:
            head = int(start[4]) if start[4] else node
            places.add((node, int(start[1]), start[2], int(start[3] or 0), head))
    return places


def plan_places(plan: Plan) -> set[tuple[int, int, str, int, int]]:
    """Return what a plan has where, as `script_places` does."""
    numbers = {node: i for i, node in enumerate(dict.fromkeys(rank.node for rank in plan.ranks))}
    places: set[tuple[int, int, str, int, int]] = set()
    held: dict[int, list[tuple[int, int]]] = {}
    for rank in plan.ranks:
        held.setdefault(rank.replica, []).append((rank.node, rank.gpu))
    for replica, ranks in held.items():
        nodes = list(dict.fromkeys(node for node, _ in ranks))
        for part, node in enumerate(nodes):
            gpus = ",".join(str(gpu) for place, gpu in ranks if place == node)
            places.add((numbers[node], replica, gpus, part, numbers[nodes[0]]))
    return places


def _check_steps(plan: Plan, script: str) -> None:
    """The steps of an MPI engine: a replica each, on its nodes and GPUs, a rank a GPU."""
    expected = {
        (replica, gpus): [n for n, r, g, _, _ in sorted(plan_places(plan)) if (r, g) == key]
        for replica, gpus in {(r, g) for _, r, g, _, _ in plan_places(plan)}
        for key in [(replica, gpus)]
    }
    found: dict[tuple[int, str], list[int]] = {}
    for words in re.findall(r"^  start (\d+ [\d,]+ [\d ]+)$", script, re.MULTILINE):
        replica, gpus, *nodes = words.split()
        found[int(replica), gpus] = [int(node) for node in nodes]
    expect("steps", found, expected)
    split = plan.split
    expect(
        "srun --ntasks",
        re.findall(r" --ntasks=(\d+) --ntasks-per-node", script)[-1:],
        [str(split.tp * split.pp * split.cp)],
    )


def _dp(plan: Plan) -> bool:
    return plan.split.attention == "dp"


def _moe(plan: Plan) -> bool:
    return any(run.layer.feed_forward.num_experts > 0 for run in plan.model.layer_runs)


def _each(plan: Plan, total: int) -> str:
    """The share of a data-parallel rank: together they hold the whole, and less than one more."""
    ranks = plan.split.tp if _dp(plan) else 1
    return str((total + ranks - 1) // ranks)


def _types(plan: Plan, cache: str) -> Flags:
    kv = "auto" if plan.model.kv_dtype == plan.model.dtype else cache
    return {"--dtype": plan.model.dtype, "--kv-cache-dtype": kv}


def _quantization(plan: Plan) -> Flags:
    weights = plan.model.weight_dtypes
    online = weights.method is None and weights.feed_forward == "float8"
    return {"--quantization": "fp8"} if online else {}


def _vllm(plan: Plan) -> Flags:
    split, limits = plan.split, plan.limits
    flags: Flags = {
        "--tensor-parallel-size": "1" if _dp(plan) else str(split.tp),
        "--pipeline-parallel-size": str(split.pp),
        "--max-num-seqs": _each(plan, limits.max_num_seqs),
        "--max-num-batched-tokens": _each(plan, limits.max_batched_tokens),
        "--enable-chunked-prefill": None,
        "--max-model-len": str(limits.max_model_len),
        "--shutdown-timeout": "60",
        **_types(plan, "fp8"),
        **_quantization(plan),
    }
    if _dp(plan):
        flags["--data-parallel-size"] = str(split.tp)
    if _moe(plan) and split.ep > 1:
        flags["--enable-expert-parallel"] = None
    return flags


def _sglang(plan: Plan) -> Flags:
    split, limits = plan.split, plan.limits
    cache = "bfloat16" if plan.model.kv_dtype == "bfloat16" else "fp8_e4m3"
    flags: Flags = {
        "--tp-size": str(split.tp),
        "--pp-size": str(split.pp),
        "--max-running-requests": str(limits.max_num_seqs),
        "--chunked-prefill-size": str(limits.max_batched_tokens),
        "--max-prefill-tokens": str(limits.max_batched_tokens),
        "--context-length": str(limits.max_model_len),
        "--enable-metrics": None,
        **_types(plan, cache),
        **_quantization(plan),
    }
    if _moe(plan):
        flags["--ep-size"] = str(split.ep)
    if _dp(plan):
        flags |= {"--enable-dp-attention": None, "--dp-size": str(split.tp)}
    return flags


EXPECTED: dict[str, Callable[[Plan], Flags]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "trtllm": lambda plan: {},
}


def stage_variable(plan: Plan, target: str) -> dict[str, str]:
    """Return the variable with the layers of each stage, where they are uneven."""
    names = {"vllm": "VLLM_PP_LAYER_PARTITION", "sglang": "SGLANG_PP_LAYER_PARTITION"}
    if target not in names or len(set(plan.split.stage_layers)) == 1:
        return {}
    return {names[target]: ",".join(map(str, plan.split.stage_layers))}


def _check_fraction(plan: Plan, fraction: float) -> None:
    """The fraction covers the predicted bytes to a thousandth, or what can be had of the free."""
    gpus = [
        gpu
        for rank in plan.ranks
        for gpu in plan.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    ]
    smallest = min(gpus, key=lambda gpu: gpu.total_memory_bytes)
    total, free = smallest.total_memory_bytes, smallest.memory_bytes
    memory = plan.prediction.memory_bytes_per_gpu
    wanted = min(memory.high, max(0.98 * free, min(memory.value, free)))
    if not wanted - total / 1000 <= fraction * total <= wanted + total / 1000:
        raise ManifestMismatchError(
            f"memory fraction: rendered {fraction}, the plan fills {wanted / total:.4f}"
        )


def check_trtllm_config(plan: Plan, text: str) -> None:
    """Compare TensorRT-LLM's configuration with `plan`.

    Raises:
        ManifestMismatchError: It says something else.
    """
    config = yaml.load(text, LOADER)
    split, limits = plan.split, plan.limits
    cache = config.pop("kv_cache_config")
    fraction = cache.pop("free_gpu_memory_fraction")
    if not 0 < fraction <= 1:
        raise ManifestMismatchError(f"free_gpu_memory_fraction is {fraction}")
    kv = "auto" if plan.model.kv_dtype == plan.model.dtype else "fp8"
    tokens = plan.kv_cache.num_tokens
    expect("kv_cache_config", cache, {"max_tokens": tokens, "dtype": kv})
    expected: dict[str, object] = {
        "tensor_parallel_size": split.tp,
        "pipeline_parallel_size": split.pp,
        "max_batch_size": int(_each(plan, limits.max_num_seqs)),
        "max_num_tokens": int(_each(plan, limits.max_batched_tokens)),
        "max_seq_len": limits.max_model_len,
        "enable_chunked_prefill": True,
        "dtype": plan.model.dtype,
    }
    if len(set(split.stage_layers)) > 1:
        expected["pp_partition"] = list(split.stage_layers)
    if _moe(plan):
        expected |= {
            "moe_tensor_parallel_size": split.tp // split.ep,
            "moe_expert_parallel_size": split.ep,
        }
    if _dp(plan):
        expected["enable_attention_dp"] = True
    expect(_CONFIG, config, expected)
