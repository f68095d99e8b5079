"""Odd characters in names, paths, labels and options: refused, or data; never executed.

`RANKWRIGHT_FUZZ` is the number of cases (5,000): an odd text in one field of one way to render. A
round has one in every field of every way. Each is first looked at alone: refused in one line that
names the field, or taken. What is taken is rendered together and run: the sbatch script and the
engine's script in bash with stand-ins for every command, the pod's command in sh. A payload that is
executed makes a file. `test_quoting.py` has thousands more for the quoting by itself.
"""

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.templates.odd_texts import ATTACKS, MARK, odd, printable
from tests.templates.plans import cluster, plan, spec

from rankwright.planner.plan import EnvironmentVariable, Plan
from rankwright.templates.checks.engine_objects import container_environment, expanded
from rankwright.templates.checks.objects import read_objects
from rankwright.templates.engines.render_engine import model_argument
from rankwright.templates.engines.table import ENGINES
from rankwright.templates.kubernetes_options import EngineKubernetesOptions, KubernetesOptions
from rankwright.templates.options import EngineOptions, SlurmOptions, parse_options
from rankwright.templates.render import render
from rankwright.templates.variables import checked_environment
from rankwright.topology.value import Value

NUM_CASES = int(os.environ.get("RANKWRIGHT_FUZZ", "5000"))

# Of a plan: the model's name, a variable's name, its value, and the reason for it.
PLAN_FIELDS = ("model", "variable", "value", "reason")
# Either of two, never both.
RIVALS = (("container_image", "venv"), ("model_pvc", "model_host_path"))


@dataclass(frozen=True)
class Way:
    """A target on a scheduler, the options that it takes, and the program that must be reached."""

    target: str
    on: str | None
    options: type[Value]
    program: str

    @property
    def fields(self) -> tuple[str, ...]:
        """Everything that a user may say, of the plan and as options."""
        return (*PLAN_FIELDS, *self.options.model_fields)

    @property
    def pods(self) -> bool:
        """Whether it runs as pods."""
        return "kubernetes" in (self.target, self.on)

    @property
    def ours(self) -> bool:
        """Whether our own executor is what runs."""
        return self.target not in ENGINES


WAYS = (
    Way("slurm", None, SlurmOptions, "rankwright"),
    Way("kubernetes", None, KubernetesOptions, "rankwright"),
    Way("vllm", None, EngineOptions, "vllm"),
    Way("sglang", None, EngineOptions, "python3"),
    Way("trtllm", None, EngineOptions, "trtllm-serve"),
    Way("vllm", "slurm", SlurmOptions, "vllm"),
    Way("trtllm", "slurm", SlurmOptions, "trtllm-llmapi-launch"),
    Way("vllm", "kubernetes", EngineKubernetesOptions, "vllm"),
)
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
ROUNDS = math.ceil(NUM_CASES / sum(len(way.fields) for way in WAYS))
pytestmark = pytest.mark.timeout(300 + 2 * ROUNDS)

RECORDS = """\
#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$RECORD"
"""
# Runs what it is given, as the node would: the health check, and what starts the program.
SRUN = f"""{RECORDS}
while [ "$#" -gt 0 ] && [[ "$1" != @(sh|bash|apptainer) ]]; do shift; done
"$@"
exit 0
"""
STAND_INS = {
    **dict.fromkeys(("scancel", "apptainer", *(way.program for way in WAYS)), RECORDS),
    "srun": SRUN,
    "scontrol": "#!/bin/sh\necho node1\n",
    "getent": "#!/bin/sh\necho 10.0.0.1\n",
}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A folder with stand-ins for what scripts call."""
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
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
        "SLURMD_NODENAME": "node1",
        **variables,
    }
    subprocess.run(words, cwd=box, env=environment, capture_output=True, timeout=60, check=False)
    assert not list(box.rglob(MARK)), "a payload was executed"
    return record.read_text().split("\0") if record.exists() else []


def made_of(said: dict[str, str], *, num_nodes: int = 1) -> Plan:
    """A plan of a GPU a node with what `said` has of it."""
    variable = EnvironmentVariable(
        name=said["variable"], value=said["value"], reason=said["reason"]
    )
    machines = cluster((1,) * num_nodes)
    model = spec(said["model"], num_layers=2)
    return plan(
        (1,) * num_nodes, tp=1, pp=num_nodes, machines=machines, model=model,
        environment=(variable,),
    )  # fmt: skip


PLAIN = {"model": "m", "variable": "NCCL_X", "value": "1", "reason": "r"}


def refused(look: Callable[[], object], *words: str) -> bool:
    """Whether `look` refuses, in one line with `words` in it."""
    try:
        look()
    except ValueError as error:
        message = str(error)
    else:
        return False
    assert message.isprintable(), "a message of one line"
    assert all(word in message for word in words), message
    return True


def taken(way: Way, said: dict[str, str]) -> dict[str, str]:
    """What of `said` is not refused by itself."""
    found: dict[str, str] = {}
    for field, text in said.items():
        alone = {**PLAIN, field: text}
        if field in ("variable", "value"):
            no = refused(lambda: checked_environment(made_of(alone)), "the plan sets")  # noqa: B023
        elif field == "model":
            needs_printable = not way.ours
            no = needs_printable and refused(lambda: model_argument(made_of(alone), None))  # noqa: B023
        elif field == "reason":
            no = False
        else:
            given = {**needs(field), field: text}
            look = lambda: parse_options(way.options, way.target, given)  # noqa: B023, E731
            no = refused(look, field)
        if not no:
            found[field] = text
    return found


def needs(field: str) -> dict[str, object]:
    """Options without which `field` says nothing."""
    also: dict[str, dict[str, object]] = {
        "container_runtime": {"container_image": "x"},
        "prometheus": {"max_replicas": 2},
    }
    return also.get(field, {})


def texts(way: Way, box: Path) -> st.SearchStrategy[dict[str, str]]:
    """An odd text for every field of `way`."""
    clean = odd.map(printable)
    below = {
        # These are written to, and looked in for commands, so they stay in the box.
        "venv": clean.map(lambda text: f"{box}/venv/{text}"),
        "log_dir": clean.map(lambda text: f"{box}/{text.replace('..', '')}"),
        "model_path": clean.map(("/models/{}" if way.pods else "/{}").format),
    }
    anywhere = odd | clean | clean.map("/{}".format)
    return st.fixed_dictionaries({name: below.get(name, anywhere) for name in way.fields})


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"{way.target}-{way.on}")
def test_nothing_that_a_user_says_is_executed(way: Way, box: Path) -> None:
    cases = carried = 0

    @given(said=texts(way, box), first=st.booleans())
    @settings(max_examples=ROUNDS, deadline=None, suppress_health_check=SLOW)
    def each(said: dict[str, str], first: bool) -> None:
        nonlocal cases, carried
        good = taken(way, said)
        cases += len(said)
        for rivals in RIVALS:
            if all(name in good for name in rivals):
                del good[rivals[first]]
        carried += carry(way, box, good)

    each()
    assert cases >= ROUNDS * len(way.fields)
    # Of the plan alone two fields take everything.
    assert carried >= 2 * ROUNDS, "what is refused as a whole shows nothing of its parts"
    print(f"{cases} cases, of which {carried} were rendered and run and the others refused")


def carry(way: Way, box: Path, good: dict[str, str]) -> int:
    """Render what was taken, run it, and see all of it arrive; return how many fields that is."""
    made = made_of(PLAIN | good, num_nodes=2 if way.pods else 1)
    options: dict[str, object] = {n: text for n, text in good.items() if n not in PLAN_FIELDS}
    if way.pods and "model_host_path" not in options:
        options.setdefault("model_pvc", "weights")
    files: dict[str, str] = {}

    def look() -> None:
        files.update(render(made, way.target, None, on=way.on, **options))

    if refused(look):
        return 0
    (run_pod if way.pods else run_script)(way, box, files, made, options)
    return len(good)


def run_script(
    way: Way, box: Path, files: dict[str, str], made: Plan, options: dict[str, object]
) -> None:
    for name, text in files.items():
        (box / name).write_text(text)
    (name,) = (name for name in files if name.endswith((".sbatch", ".sh")))
    subprocess.run(["bash", "-n", str(box / name)], check=True, capture_output=True)
    words = run(box, ["bash", str(box / name)])
    runtime = "apptainer" if "apptainer" in words else way.program
    assert runtime in words, "the script ran to its end"
    if way.ours:
        assert "launch" in words
    else:
        path = options.get("model_path")
        assert (made.model.name if path is None else str(PurePosixPath(str(path)))) in words
    if way.ours and "model_path" in options:
        assert words[words.index("--model-path") + 1] == options["model_path"]
    if "container_image" in options:
        image = str(options["container_image"])
        assert image in words or f"--container-image={image}" in words
    if way.ours or way.on == "slurm":
        folder = Path(str(options.get("log_dir", box / "rankwright-logs"))) / "7"
        saved = Plan.model_validate_json((folder / "plan.json").read_text())
        assert saved.model.name == made.model.name


KINDS = {
    *("ConfigMap", "Service", "StatefulSet", "NetworkPolicy", "PodDisruptionBudget"),
    *("ResourceClaimTemplate", "PodMonitor"),
}


def run_pod(
    way: Way, box: Path, files: dict[str, str], made: Plan, options: dict[str, object]
) -> None:
    objects = read_objects(files["rankwright.yaml"])
    assert {item["kind"] for item in objects} <= KINDS
    (config,) = [item for item in objects if item["kind"] == "ConfigMap"]
    assert json.loads(config["data"]["plan.json"])["model"]["name"] == made.model.name
    head = next(item for item in objects if item["kind"] == "StatefulSet")
    (container,) = head["spec"]["template"]["spec"]["containers"]
    environment = container_environment(container)
    (variable,) = made.environment
    assert environment[variable.name] == variable.value
    command = [expanded(word, environment) for word in container["command"] + container["args"]]
    subprocess.run(["sh", "-n", "-c", command[2]], check=True, capture_output=True)
    words = run(box, command, HEAD="x", NODE_RANK="0")
    assert way.program in words
    path = str(options.get("model_path", "/models"))
    if way.ours:
        assert words[words.index("--model-path") + 1] == path
    else:
        assert made.model.name in words or f"--served-model-name={made.model.name}" in words
        assert str(PurePosixPath(path)) in words


def test_a_payload_that_is_executed_would_be_seen(box: Path) -> None:
    with pytest.raises(AssertionError, match="was executed"):
        run(box, ["sh", "-c", ATTACKS[0]])
    with pytest.raises(AssertionError, match="was executed"):
        run(box, ["bash", "-c", 'srun --label bash -c "$1"', "x", ATTACKS[0]])


def test_numbers_are_numbers() -> None:
    numbers: dict[str, Any] = {"port": "80; touch x", "rdma_count": "$(id)", "max_replicas": "1 "}
    for name, value in numbers.items():
        with pytest.raises(ValueError, match=f"option {name}="):
            render(plan(), "kubernetes", None, **{name: value + "x"})
