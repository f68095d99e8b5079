"""Files of a plan with separate pools against the plan: GPUs, ranks, batch, lengths of each pool.

As for one pool, what every flag must say stands here once more, apart from the renderer's tables.
"""

import re
from collections import Counter

from rankwright.planner.disaggregated_plan import DisaggregatedPlan
from rankwright.planner.plan import Plan
from rankwright.templates.checks.commands import (
    check_flags,
    command_flags,
    plan_places,
    stage_variable,
)
from rankwright.templates.checks.mismatch import (
    ManifestMismatchError,
    expect,
    heredoc,
    shell_words,
    variables,
)
from rankwright.templates.checks.pools_objects import check_pools_objects
from rankwright.templates.checks.pools_parts import (
    check_pool_config,
    check_router_config,
    check_transfer_flags,
)
from rankwright.templates.checks.sbatch import slurm_headers

_SCRIPT, _ROUTER = "disaggregated.sh", "disagg_config.yaml"
_ROLES = ("prefill", "decode")
Places = set[tuple[int, int, str, int, int]]


def check_pools(
    plan: DisaggregatedPlan, target: str, files: dict[str, str], on: str | None
) -> None:
    """Compare rendered files with `plan`.

    Raises:
        ManifestMismatchError: They say something else.
    """
    if on == "slurm":
        job = files["rankwright.sbatch"]
        _check_job(plan, job)
        carried: dict[str, str] = {}
        if target == "trtllm":
            names = (*(f"{role}_config" for role in _ROLES), "disagg_config")
            carried = {f"{name}.yaml": heredoc(job, f"RANKWRIGHT_{name.upper()}") for name in names}
        check_pools_script(plan, target, heredoc(job, "RANKWRIGHT_DISAGGREGATED"), carried)
        return
    if on == "kubernetes":
        check_pools_objects(plan, target, files["rankwright.yaml"])
        return
    check_pools_script(plan, target, files[_SCRIPT], files)


def check_pools_script(
    plan: DisaggregatedPlan, target: str, script: str, files: dict[str, str]
) -> None:
    """Compare the script of both pools, and its configurations, with `plan`.

    Raises:
        ManifestMismatchError: It says something else.
    """
    http: dict[int, int] = {}
    for role, pool in plan.pools.items():
        flags = command_flags(script, role)
        check_transfer_flags(target, role, flags)
        if target == "trtllm":
            name = f"{role}_config.yaml"
            expect("--config", flags.pop("--config", None), f"$(dirname $0)/{name}")
            check_pool_config(pool, role, files[name])
        first = re.search(rf"^{role}=\(\n(.*)$", script, re.MULTILINE)
        check_flags(pool, target, flags, first and shell_words(first[1])[-1])
        body = _function(script, f"start_{role}")
        _check_environment(pool, target, body)
        expect(f"{role}: places", _places(script, role), _expected_places(plan, role))
        port = re.search(r"--port \"\$\(\((\d+) \+ \$1\)\)\"", body)
        base = int(port[1]) if port else 0
        http |= {worker: base + worker for worker, _ in _heads(plan, role)}
    _check_router(plan, target, script, files, http)
    _check_side_ports(plan, target, script)


def _numbers(plan: DisaggregatedPlan) -> dict[int, int]:
    """Return the node rank of every machine: prefill's first."""
    ranks = [rank for pool in plan.pools.values() for rank in pool.ranks]
    return {node: i for i, node in enumerate(dict.fromkeys(rank.node for rank in ranks))}


def _expected_places(plan: DisaggregatedPlan, role: str) -> Places:
    """Return node, worker, GPUs, part and first node of every part of a pool's workers."""
    pool, numbers = plan.pools[role], _numbers(plan)
    order = list(dict.fromkeys(rank.node for rank in pool.ranks))
    before = plan.prefill.split.dp if role == "decode" else 0
    return {
        (numbers[order[node]], before + worker, gpus, part, numbers[order[head]])
        for node, worker, gpus, part, head in plan_places(pool)
    }


def _heads(plan: DisaggregatedPlan, role: str) -> list[tuple[int, int]]:
    """Return number and first node of each worker."""
    return sorted({(worker, head) for _, worker, _, _, head in _expected_places(plan, role)})


def _places(script: str, role: str) -> Places:
    found: Places = set()
    node = 0
    for line in script.splitlines():
        label = re.fullmatch(r"  (\d+)\)", line)
        node = int(label[1]) if label else node
        start = re.fullmatch(
            rf' *start_{role} (\d+) ([\d,]+)(?: (\d+) "\$\{{nodes\[(\d+)\]\}}")?', line
        )
        if start:
            head = int(start[4]) if start[4] else node
            found.add((node, int(start[1]), start[2], int(start[3] or 0), head))
    return found


def _function(script: str, name: str) -> str:
    body = re.search(rf"^{name}\(\) \{{\n(.*?)^\}}$", script, re.MULTILINE | re.DOTALL)
    if body is None:
        raise ManifestMismatchError(f"no {name}")
    return body[1]


def _check_environment(pool: Plan, target: str, body: str) -> None:
    given = _settings(body)
    expect("GPUs of a worker", given.pop("CUDA_VISIBLE_DEVICES", None), "$2")
    if target == "vllm":
        expect("side channel", given.pop("VLLM_NIXL_SIDE_CHANNEL_HOST", None), "$address")
        expect("side channel", given.pop("VLLM_NIXL_SIDE_CHANNEL_PORT", None), "$side")
    expect("environment", given, variables(pool) | stage_variable(pool, target))


def _settings(body: str) -> dict[str, str]:
    """Return the variables of a worker."""
    array = re.search(r"^  local settings=\(\n(.*?)^  \)$", body, re.MULTILINE | re.DOTALL)
    found: dict[str, str] = {}
    for name, word in re.findall(r"^ {4}([A-Za-z_]\w*)=(.*)$", array[1] if array else "", re.M):
        if name in found:
            raise ManifestMismatchError(f"{name} is given twice")
        words = shell_words(word)
        found[name] = words[0] if words else ""
    return found


def _check_router(
    plan: DisaggregatedPlan,
    target: str,
    script: str,
    files: dict[str, str],
    http: dict[int, int],
) -> None:
    """The router knows every worker of each pool by its address, and runs once, on node 0."""
    expect("routers", len(re.findall(r"^ +start_router$", script, re.MULTILINE)), 1)
    first = script.partition("  0)\n")[2].partition("    ;;\n")[0]
    expect("router on node 0", "    start_router\n" in first, True)
    body = _function(script, "start_router")
    port = min(http.values()) - 1
    if target == "trtllm":
        urls = {
            role: [f"node{head}:{http[worker]}" for worker, head in _heads(plan, role)]
            for role in _ROLES
        }
        check_router_config(plan, files[_ROUTER], urls, port)
        expect("router", "trtllm-serve disaggregated -c " in body, True)
        return
    words = body.replace('"$((', "").replace('))"', "")
    for role in _ROLES:
        found = re.findall(rf'--{role} "http://\$\{{nodes\[(\d+)\]\}}:(\d+)"', words)
        wanted = [(str(head), str(http[worker])) for worker, head in _heads(plan, role)]
        expect(f"{role} workers of the router", found, wanted)
    expect("port of the router", re.findall(r"--port (\d+)", words), [str(port)])
    mode = {"vllm": "--vllm-pd-disaggregation", "sglang": "--pd-disaggregation"}[target]
    expect("mode of the router", mode in words, True)


def _check_side_ports(plan: DisaggregatedPlan, target: str, script: str) -> None:
    """No two workers of a node share a port; SGLang's router knows those of prefill."""
    sides: dict[int, int] = {}
    taken: Counter[int] = Counter()
    for role, pool in plan.pools.items():
        line = re.search(
            r"side=\$\(\(meet_port \+ (\d+) \+ (\d+) \* \(\$1 - (\d+)\)\)\)",
            _function(script, f"start_{role}"),
        )
        if line is None:
            expect("side ports", target, "trtllm")
            return
        first, each, least = (int(number) for number in line.groups())
        ranks = pool.split.tp if pool.split.attention == "dp" and target == "vllm" else 1
        expect(f"{role}: side ports of a worker", each, ranks)
        for worker, _ in _heads(plan, role):
            sides[worker] = first + each * (worker - least)
            taken.update(range(sides[worker], sides[worker] + each))
    workers = plan.prefill.split.dp + plan.decode.split.dp
    expect("side ports beside meeting ports", min(taken) >= workers, True)
    expect("side ports of two workers", max(taken.values()), 1)
    if target == "sglang":
        router = _function(script, "start_router")
        found = re.findall(r'--prefill "[^"]*" "\$\(\(meet_port \+ (\d+)\)\)"', router)
        expect(
            "bootstrap ports", found, [str(sides[worker]) for worker, _ in _heads(plan, "prefill")]
        )
        flag = re.findall(r'(--disaggregation-bootstrap-port) "\$side"', script)
        expect("bootstrap port of prefill", len(flag), 1)


def _check_job(plan: DisaggregatedPlan, script: str) -> None:
    """The job asks for the machines of both pools, each with the GPUs of both."""
    counts = Counter(rank.node for pool in plan.pools.values() for rank in pool.ranks)
    kinds: dict[int, frozenset[str]] = {}
    for node in counts:
        used = {r.gpu for p in plan.pools.values() for r in p.ranks_of_node(node)}
        devices = {gpu.device for gpu in plan.cluster.node(node).gpus if gpu.index in used}
        kinds[node] = frozenset(devices)
    order = list(_numbers(plan))
    gpus: list[int] = []
    types: list[str] = []
    for header in slurm_headers(script):
        kind, _, count = header.get("gpus-per-node", "0").rpartition(":")
        gpus += [int(count)] * int(header["nodes"])
        types += [kind] * int(header["nodes"])
    expect("GPUs a node", gpus, [counts[node] for node in order])
    named = {kinds[node]: types[order.index(node)] for node in order}
    expect("GPU types by node", types, [named[kinds[node]] for node in order])
    expect("names of GPU types", len(set(named.values())), len(named))
    carried = DisaggregatedPlan.model_validate_json(heredoc(script, "RANKWRIGHT_PLAN"))
    if carried.model_dump_json() != plan.model_dump_json():
        raise ManifestMismatchError("the embedded plan.json is not the plan")
