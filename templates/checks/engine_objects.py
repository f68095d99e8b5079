"""Another engine's Kubernetes objects against the plan."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rankwright.planner.plan import Plan
from rankwright.templates.checks.commands import (
    Flags,
    check_flags,
    check_trtllm_config,
    plan_places,
    stage_variable,
)
from rankwright.templates.checks.mismatch import (
    ManifestMismatchError,
    expect,
    expect_plan,
    variables,
)
from rankwright.templates.checks.objects import (
    HOST_INTERFACES,
    claimed_gpus,
    pod_gpus,
    read_objects,
)

_CONFIG = "parallel_config.yaml"
# What pods have besides the plan's variables.
_OWN = frozenset({"HEAD", "NODE_RANK", "HF_TOKEN", "HOME", "USER"})


@dataclass(frozen=True, slots=True)
class Part:
    """Pods of one template: numbers `start` to `start + count - 1` of each of `copies` replicas."""

    replica: str  # what tells it apart from other workloads' replicas
    copies: int
    start: int
    count: int
    pod: dict[str, Any]
    head: str | None  # address of the first of a replica


def check_engine_objects(plan: Plan, target: str, text: str) -> None:
    """Compare objects that run `target` with `plan`: pods, GPUs, command, environment, files.

    Raises:
        ManifestMismatchError: They say something else.
    """
    check_read_objects(plan, target, read_objects(text))


def check_read_objects(
    plan: Plan,
    target: str,
    objects: list[dict[str, Any]],
    *,
    check_config: Callable[[Plan, str], None] = check_trtllm_config,
    take_flags: Callable[[Flags], None] = lambda flags: None,
) -> None:
    """Compare objects that were read, as `check_engine_objects`.

    Args:
        plan: What is served.
        target: With what.
        objects: That serve it.
        check_config: Compares TensorRT-LLM's configuration.
        take_flags: Takes flags that are no plan's out of those of a pod, and checks them.

    Raises:
        ManifestMismatchError: They say something else.
    """
    (config,) = [item for item in objects if item["kind"] == "ConfigMap"]
    expect_plan(plan, config["data"]["plan.json"])
    if target == "trtllm":
        check_config(plan, config["data"][_CONFIG])
    parts = list(engine_parts(objects))
    _check_pods(plan, parts)
    claims = claimed_gpus(objects)
    gpus_each = {len(gpus.split(",")) for _, _, gpus, _, _ in plan_places(plan)}
    services = {port["port"] for item in objects for port in _http_ports(item)}
    for part in parts:
        expect("GPUs of a pod", {pod_gpus(plan, part.pod, claims)}, gpus_each)
        expect("port of the Service", services, {_check_command(plan, target, part, take_flags)})
    _check_gpu_types(plan, parts)


def engine_parts(objects: list[dict[str, Any]]) -> Iterator[Part]:
    """Yield the pods of every workload."""
    first = {
        item["spec"]["selector"]["matchLabels"]["replica"]: item
        for item in objects
        if item["kind"] == "StatefulSet" and item["spec"]["ordinals"]["start"] == 0
    }
    for item in objects:
        name, spec = item["metadata"]["name"], item.get("spec", {})
        match item["kind"]:
            case "Deployment":
                yield Part(name, spec["replicas"], 0, 1, spec["template"], None)
            case "StatefulSet":
                labels = spec["selector"]["matchLabels"]
                expect("labels of pods", labels.items() <= _labels(spec["template"]).items(), True)
                own = first[labels["replica"]]
                head = f"{own['metadata']['name']}-0.{own['spec']['serviceName']}"
                start, count = spec["ordinals"]["start"], spec["replicas"]
                yield Part(labels["replica"], 1, start, count, spec["template"], head)
            case "LeaderWorkerSet":
                group, copies = spec["leaderWorkerTemplate"], spec["replicas"]
                head = "$(LWS_LEADER_ADDRESS)"
                yield Part(name, copies, 0, 1, group["leaderTemplate"], head)
                if group["size"] > 1:
                    rest = group["size"] - 1
                    yield Part(name, copies, 1, rest, group["workerTemplate"], head)
            case _:
                pass


def _labels(pod: dict[str, Any]) -> dict[str, str]:
    return dict(pod["metadata"]["labels"])


def _http_ports(item: dict[str, Any]) -> list[dict[str, Any]]:
    ports: list[dict[str, Any]] = item["spec"]["ports"] if item["kind"] == "Service" else []
    return [port for port in ports if port["name"] == "http"]


def _check_pods(plan: Plan, parts: list[Part]) -> None:
    """As many replicas as the plan has, each with a pod for each of its machines."""
    numbers: dict[str, list[int]] = {}
    copies: dict[str, int] = {}
    for part in parts:
        numbers.setdefault(part.replica, []).extend(range(part.start, part.start + part.count))
        expect("copies", copies.setdefault(part.replica, part.copies), part.copies)
    expect("replicas", sum(copies.values()), plan.split.dp)
    for own in numbers.values():
        expect("pods of a replica", sorted(own), list(range(_nodes_each(plan))))


def _nodes_each(plan: Plan) -> int:
    return 1 + max(part for _, _, _, part, _ in plan_places(plan))


def _check_gpu_types(plan: Plan, parts: list[Part]) -> None:
    """Where labels name GPUs, as many pods have one name as the plan has places of one kind."""
    found: Counter[str | None] = Counter()
    for part in parts:
        selector = part.pod["spec"].get("nodeSelector", {})
        found[selector.get("nvidia.com/gpu.product")] += part.copies * part.count
    order = list(dict.fromkeys(rank.node for rank in plan.ranks))
    kinds = {
        rank.node: gpu.device
        for rank in plan.ranks
        for gpu in plan.cluster.node(rank.node).gpus
        if gpu.index == rank.gpu
    }
    wanted = Counter(kinds[order[node]] for node, *_ in plan_places(plan))
    expect("pods of each kind of GPU", sorted(found.values()), sorted(wanted.values()))


def _check_command(plan: Plan, target: str, part: Part, take_flags: Callable[[Flags], None]) -> int:
    """Compare the command and the environment of a pod; return its HTTP port."""
    (container,) = part.pod["spec"]["containers"]
    environment = container_environment(container)
    words = [expanded(word, environment) for word in container["args"]]
    num_nodes = _nodes_each(plan)
    if num_nodes > 1:
        shell = container["command"]
        expect("command of a pod", shell[:2], ["sh", "-c"])
        expect("address of the head", environment.get("HEAD"), part.head)
        _check_span(plan, target, num_nodes, shell[2])
    else:
        words = [*container["command"], *words]
    flags = word_flags(words)
    first = next(i for i, word in enumerate(words) if word.startswith("--"))
    port = int(flags.pop("--port", None) or 0)
    config = flags.pop("--config", None)
    take_flags(flags)
    expect("--config", config, f"/etc/rankwright/{_CONFIG}" if target == "trtllm" else None)
    check_flags(plan, target, flags, words[first - 1])
    expected = {
        name: value
        for name, value in (variables(plan) | stage_variable(plan, target)).items()
        if name not in HOST_INTERFACES or value == "lo"
    }
    given = {k: v for k, v in environment.items() if k not in _OWN or k in expected}
    expect("environment", given, expected)
    return port


def word_flags(words: list[str]) -> Flags:
    """Return the flags among `words` of a command, as `--flag` or `--flag=value`.

    >>> word_flags(["vllm", "serve", "m", "--a=1", "--b"])
    {'--a': '1', '--b': None}
    """
    flags: Flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            continue
        if name in flags:
            raise ManifestMismatchError(f"{name} is given twice")
        flags[name] = value if equals else None
    return flags


def container_environment(container: dict[str, Any]) -> dict[str, str]:
    """Return the variables of a container that have a value, as it will see them."""
    found: dict[str, str] = {}
    for variable in container["env"]:
        if variable["name"] in found:
            raise ManifestMismatchError(f"{variable['name']} is given twice")
        if "value" in variable:
            found[variable["name"]] = expanded(variable["value"], found)
    return found


def expanded(text: str, environment: dict[str, str]) -> str:
    """Return `text` of a container's command or environment as Kubernetes makes it.

    >>> expanded("$(A) $$(A) $(B) $A", {"A": "x"})
    'x $(A) $(B) $A'
    """

    def replaced(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replaced, text)


def _check_span(plan: Plan, target: str, num_nodes: int, shell: str) -> None:
    """The part of a command by which the pods of a replica find each other."""
    given = word_flags_of_shell(shell)
    expected = {"--nnodes": str(num_nodes), "--node-rank": "$part"}
    if target == "sglang":
        expected["--dist-init-addr"] = "$head:$meet"
    elif plan.split.attention == "dp":
        each = plan.split.tp // num_nodes
        expected = {
            "--data-parallel-size-local": str(each),
            "--data-parallel-address": "$head",
            "--data-parallel-rpc-port": "$meet",
            "--headless": "",
            "--data-parallel-start-rank": f"$(({each} * part))",
        }
    else:
        expected |= {"--master-addr": "$head", "--master-port": "$meet", "--headless": ""}
    expect("flags of several machines", given, expected)
    workers = shell.partition('if [ "$part" -gt 0 ]; then\n')[2].partition("\nfi\n")[0]
    expect("--headless, of workers alone", "--headless" in workers, "--headless" in expected)


def word_flags_of_shell(shell: str) -> dict[str, str]:
    r"""Return the flags that lines such as `set -- "$@" --a 1 --b "$x"` add; '' for a switch.

    >>> word_flags_of_shell('set -- "$@" --a 1 --b "$x"\n  set -- "$@" --c\n')
    {'--a': '1', '--b': '$x', '--c': ''}
    """
    flags: dict[str, str] = {}
    for line in re.findall(r'^ *set -- "\$@" (.*)$', shell, re.MULTILINE):
        for name, quoted, bare in re.findall(r'(--[a-z-]+)(?: "([^"]*)"| ([^-\s]\S*))?', line):
            flags[name] = quoted or bare
    return flags
