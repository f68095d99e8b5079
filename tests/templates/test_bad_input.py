"""Odd characters in names, paths, labels and options: refused, or data; never executed.

`RANKWRIGHT_FUZZ` is the number of cases of each target (100). What is rendered is run: the sbatch
script and the engine's script in bash with stand-ins for every command, the pod's command in sh. A
payload that is executed makes a file.
"""

import json
import os
import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.templates.plans import plan, spec

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates.checks.engine_objects import container_environment, expanded
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.render import render

NUM_CASES = int(os.environ.get("RANKWRIGHT_FUZZ", "100"))
pytestmark = pytest.mark.timeout(300 + 2 * NUM_CASES)
fuzzed = settings(
    max_examples=NUM_CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

MARK = "executed-by-mistake"
ATTACKS = [
    f"$(touch {MARK})",
    f"`touch {MARK}`",
    f"; touch {MARK} #",
    f"'; touch {MARK}; '",
    f'"; touch {MARK}; "',
    f"\\$(touch {MARK})",
    f'\\"; touch {MARK}; \\"',
    f"\ntouch {MARK}\n",
    f"\n#SBATCH --nodes=9\ntouch {MARK}\n",
    f"\nRANKWRIGHT_PLAN\ntouch {MARK}\n",
    f"\nRANKWRIGHT_VLLM\ntouch {MARK}\n",
    f"| touch {MARK}",
    f"${{IFS}}$(touch${{IFS}}{MARK})",
    f"x]; touch {MARK}; [",
    f"a=$(touch {MARK})",
    "{{ 7 * 7 }}{% raw %}",
    "\n---\nkind: Secret\n",
    "- a: &b [*b]",
    '", "command": ["sh"]',
    "!!python/object/apply:os.system ['true']",
    ": #\t%@|>",
    "\x00\x1b[2J\u2028\x85",
    "../../../etc",
    "~root$HOME*?",
]
odd = st.one_of(
    st.sampled_from(ATTACKS),
    st.tuples(st.sampled_from(["", "/", "a", "/m/", "x/"]), st.sampled_from(ATTACKS)).map("".join),
    st.text(max_size=12),
    st.text(alphabet="a/-.$`\"'\\;&|<>(){}[]*?!#~ \n\t:,=@%", min_size=1, max_size=24),
)
# What is refused for one field says nothing of the others: most variables are printable.
printable = odd.map(lambda text: "".join(c for c in text if c.isprintable()))


def options_of(*names: str) -> st.SearchStrategy[dict[str, str]]:
    """No options, or odd values of up to two of `names`."""
    return st.just(dict[str, str]()) | st.dictionaries(st.sampled_from(names), odd, max_size=2)


RUNS = """\
#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORD"
"""


def made_with(name: str, value: str, reason: str) -> Plan:
    variable = EnvironmentVariable(name="NCCL_X", value=value, reason=reason)
    return plan((8,), tp=8, pp=1, model=spec(name), environment=(variable,))


def rendered(made: Plan, target: str, **options: object) -> dict[str, str] | None:
    """The files; None if the input was refused, in one line."""
    try:
        files = render(made, target, None, **options)
    except ValueError as error:
        message = str(error)
    else:
        event("rendered")
        return files
    event("refused")
    assert message.isprintable(), "a message of one line"
    return None


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder with stand-ins for what scripts call."""
    (tmp_path / "bin").mkdir()
    for name in ("srun", "scancel", "vllm", "rankwright"):
        (tmp_path / "bin" / name).write_text(RUNS)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho node1\n")
    (tmp_path / "bin" / "getent").write_text("#!/bin/sh\necho 10.0.0.1\n")
    for path in (tmp_path / "bin").iterdir():
        path.chmod(0o755)
    return tmp_path


def run(box: Path, words: list[str], **variables: str) -> list[str]:
    """The words that the stand-ins were called with, after running `words` in `box`."""
    record = box / "record"
    record.unlink(missing_ok=True)
    environment = {
        "PATH": f"{box / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(box),
        "RECORD": str(record),
        "SLURM_SUBMIT_DIR": str(box),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        **variables,
    }
    subprocess.run(words, cwd=box, env=environment, capture_output=True, timeout=60, check=False)
    assert not list(box.rglob(MARK)), "a payload was executed"
    return record.read_text().split("\0") if record.exists() else []


@given(
    name=odd,
    value=printable,
    reason=odd,
    options=options_of(
        "name", "partition", "account", "qos", "constraint", "switches", "time_limit",
             "container_image", "venv", "model_path", "gpu_types", "mpi", "reservation"
    ),
)  # fmt: skip
@fuzzed
def test_an_sbatch_script_executes_none_of_it(
    box: Path, name: str, value: str, reason: str, options: dict[str, str]
) -> None:
    files = rendered(made_with(name, value, reason), "slurm", **options)
    if files is None:
        return
    script = box / "job.sbatch"
    script.write_text(files["rankwright.sbatch"])
    words = run(box, ["bash", str(script)])
    assert "launch" in words, "the script ran to its end"
    saved = (box / "rankwright-logs/7/plan.json").read_text()
    assert Plan.model_validate_json(saved).model.name == name


@given(
    name=odd | printable,
    value=printable,
    reason=odd,
    model_path=st.none() | printable.map("/{}".format),
)
@fuzzed
def test_an_engines_script_executes_none_of_it(
    box: Path, name: str, value: str, reason: str, model_path: str | None
) -> None:
    options = {} if model_path is None else {"model_path": model_path}
    files = rendered(made_with(name, value, reason), "vllm", **options)
    if files is None:
        return
    script = box / "vllm.sh"
    script.write_text(files["vllm.sh"])
    words = run(box, ["bash", str(script)])
    assert words[:2] == ["vllm", "serve"]
    assert name in words, "the model is one word, as it is"


@given(
    name=odd,
    value=printable,
    reason=odd,
    options=options_of(
        "name", "namespace", "image", "model_pvc", "model_host_path", "gpu_resource",
             "gpu_types", "device_class", "rdma_resource", "topology_key", "node_selector",
             "prometheus", "token_secret", "image_pull_secret", "flavor"
    ),
    inside=st.none() | printable,
)  # fmt: skip
@fuzzed
def test_pods_execute_none_of_it_and_objects_stay_those_of_the_plan(
    box: Path, name: str, value: str, reason: str, options: dict[str, str], inside: str | None
) -> None:
    if inside is not None:
        options = {**options, "model_pvc": "weights", "model_path": f"/models/{inside}"}
    # Several machines, so that the pod's command is a shell's.
    variable = EnvironmentVariable(name="NCCL_X", value=value, reason=reason)
    made = plan(model=spec(name), environment=(variable,))
    files = rendered(made, "kubernetes", **options)
    if files is None:
        return
    objects = read_objects(files["rankwright.yaml"])
    assert {item["kind"] for item in objects} <= {
        *("ConfigMap", "Service", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"),
        "ResourceClaimTemplate",
    }
    (config,) = [item for item in objects if item["kind"] == "ConfigMap"]
    assert json.loads(config["data"]["plan.json"])["model"]["name"] == name
    (pod,) = [
        item["spec"]["template"]
        for item in objects
        if item["kind"] == "StatefulSet" and item["metadata"]["name"].endswith("-head")
    ]
    (container,) = pod["spec"]["containers"]
    environment = container_environment(container)
    assert environment["NCCL_X"] == value
    command = [expanded(word, environment) for word in container["command"] + container["args"]]
    words = run(box, command, HEAD="x", NODE_RANK="0")
    assert words[:2] == ["rankwright", "launch"]
    if inside is not None:
        assert words[words.index("--model-path") + 1] == f"/models/{inside}"


@given(
    name=odd | printable,
    value=printable,
    reason=odd,
    options=options_of(
        "name", "namespace", "image", "model_pvc", "model_host_path", "gpu_resource",
             "gpu_types", "device_class", "rdma_resource", "topology_key", "node_selector",
             "token_secret", "image_pull_secret", "flavor", "run_as_user"
    ),
    inside=st.none() | printable,
)  # fmt: skip
@fuzzed
def test_pods_of_an_engine_execute_none_of_it(
    box: Path, name: str, value: str, reason: str, options: dict[str, str], inside: str | None
) -> None:
    if inside is not None:
        options = {**options, "model_pvc": "weights", "model_path": f"/models/{inside}"}
    variable = EnvironmentVariable(name="NCCL_X", value=value, reason=reason)
    made = plan(model=spec(name), environment=(variable,))
    files = rendered(made, "vllm", on="kubernetes", **options)
    if files is None:
        return
    objects = read_objects(files["rankwright.yaml"])
    assert {item["kind"] for item in objects} <= {
        *("ConfigMap", "Service", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"),
        "ResourceClaimTemplate",
    }
    head = next(item for item in objects if item["kind"] == "StatefulSet")
    (container,) = head["spec"]["template"]["spec"]["containers"]
    environment = container_environment(container)
    assert environment["NCCL_X"] == value
    command = [expanded(word, environment) for word in container["command"] + container["args"]]
    words = run(box, command, HEAD="x", NODE_RANK="0")
    assert words[:2] == ["vllm", "serve"]
    assert name in words or f"--served-model-name={name}" in words
    if inside is not None:
        assert words[2] == str(PurePosixPath(f"/models/{inside}"))


def test_a_payload_that_is_executed_would_be_seen(box: Path) -> None:
    with pytest.raises(AssertionError, match="was executed"):
        run(box, ["sh", "-c", ATTACKS[0]])


def test_every_option_of_a_kind_is_fuzzed_or_checked_elsewhere(box: Path) -> None:
    numbers: dict[str, Any] = {"port": "80; touch x", "rdma_count": "$(id)", "max_replicas": "1 "}
    for name, value in numbers.items():
        with pytest.raises(ValueError, match=f"option {name}="):
            render(plan(), "kubernetes", None, **{name: value + "x"})
