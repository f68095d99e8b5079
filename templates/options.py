"""What a user may say about a target, beyond the plan: names, places, ports.

One frozen model a target. An option that is unknown or malformed is refused in one line that says
what would be valid; each field's description is the "expected" half of that line.
"""

import difflib
import hashlib
import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan
from rankwright.topology.value import Value


def _path(text: str) -> str:
    """Return `text` if it can stand in shell words, YAML and `SOURCE:TARGET,...` mounts."""
    if not text.startswith("/") or not text.isprintable() or set(text) & set(":,"):
        raise ValueError("not an absolute path without ':', ',' and control characters")
    return text


AbsolutePath = Annotated[str, AfterValidator(_path)]
Image = Annotated[str, Field(pattern=r"^[A-Za-z0-9/_][!-~]*$")]

# Unprivileged users cannot bind lower ports.
Port = Annotated[int, Field(ge=1024, le=65535)]
DEFAULT_PORT = 8000

# Ranks meet here, and leaders on the next port. Slurm jobs may share a node, so each takes its own
# pair out of a range, by job id; a pod has the whole port space to itself.
SLURM_PORTS = range(20000, 30000)
KUBERNETES_PORT = 29500

# A Service name is a DNS label of 63 characters, but a StatefulSet's becomes a label value together
# with an 11-character revision hash: longer than 52 and its pods are never made. The longest suffix
# appended to the name is '-from-' and five digits.
MAX_KUBERNETES_NAME = 52 - len("-from-99999")


# `a=b,c=d`: what a scheduler calls each kind of GPU.
PAIRS = r"^[a-z0-9-]+=[A-Za-z0-9_.-]+(,[a-z0-9-]+=[A-Za-z0-9_.-]+)*$"


def _told_apart(text: str) -> str:
    """Return `text` if every kind has one name, and no two the same."""
    pairs = [pair.split("=") for pair in text.split(",")]
    if any(len({pair[side] for pair in pairs}) < len(pairs) for side in (0, 1)):
        raise ValueError("two kinds of GPU of one name, or two names of one kind")
    return text


GpuTypes = Annotated[str, Field(pattern=PAIRS), AfterValidator(_told_apart)]


class EngineOptions(Value):
    """Options of `render(plan, "vllm", ...)` and of the other engines, without a scheduler."""

    model_path: AbsolutePath | None = Field(
        default=None, description="the absolute path of the weights, which every node sees"
    )
    port: Port = Field(default=DEFAULT_PORT, description="a port from 1024 to 65535 for HTTP")


class SlurmOptions(Value):
    """Options of `render(plan, "slurm", ...)`."""

    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="a job name of letters, digits, '.', '_' and '-', at most 64",
    )
    partition: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.,-]+$",
        description="a partition, or several with commas, as `sinfo` lists them",
    )
    account: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.@-]+$", description="an account to charge"
    )
    qos: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.-]+$", description="a quality of service"
    )
    reservation: str | None = Field(
        default=None, pattern=r"^[A-Za-z0-9_.,-]+$", description="a reservation to run in"
    )
    constraint: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_.&|()*\[\]-]+$",
        description="features of nodes, such as h100&ib",
    )
    switches: str | None = Field(
        default=None,
        pattern=r"^[1-9]\d*(@\d+(:\d{2}){0,2})?$",
        description="the most leaf switches, and how long to wait for so few, such as 1@00:10:00",
    )
    time_limit: str | None = Field(
        default=None,
        pattern=r"^(\d+(:\d{2}){0,2}|\d+-\d{1,2}(:\d{2}){0,2}|UNLIMITED)$",
        description="a time such as 30 (minutes), 08:00:00 or 2-00:00:00; None: the partition's",
    )
    exclusive: bool = Field(
        default=True, description="true: whole nodes; false: as many CPUs and GiB as are needed"
    )
    requeue: bool = Field(
        default=True, description="true: start again after a node has failed; or false"
    )
    health_check: bool = Field(
        default=True, description="true: look at every node before anything is loaded; or false"
    )
    gpu_types: GpuTypes | None = Field(
        default=None,
        description="what Slurm calls the GPUs of the plan, each kind by a name of its own, such "
        "as h100-sxm=h100,a10=a10",
    )
    container_image: Image | None = Field(
        default=None,
        description="an image, such as docker://registry/rankwright:1.0 or a .sqsh or .sif file",
    )
    container_runtime: Literal["pyxis", "apptainer"] = Field(
        default="pyxis", description="pyxis or apptainer, which runs `container_image`"
    )
    venv: AbsolutePath | None = Field(
        default=None,
        description="the absolute path of a virtual environment that every node sees",
    )
    log_dir: AbsolutePath | None = Field(
        default=None,
        description="an absolute path that every node sees; None: rankwright-logs where sbatch ran",
    )
    model_path: AbsolutePath | None = Field(
        default=None, description="the absolute path of the weights, which every node sees"
    )
    mpi: str = Field(
        default="pmix",
        pattern=r"^[a-z0-9_]+$",
        description="what `srun --mpi=list` names, for engines that need MPI, such as pmix",
    )
    port: Port = Field(default=DEFAULT_PORT, description="a port from 1024 to 65535 for HTTP")

    @model_validator(mode="after")
    def _consistent(self) -> "SlurmOptions":
        if self.container_image is not None and self.venv is not None:
            raise ValueError("give container_image or venv, not both: the image has its own Python")
        if self.container_image is None and self.container_runtime != "pyxis":
            raise ValueError("container_runtime says what runs container_image; give that too")
        if self.port in SLURM_PORTS:
            raise ValueError(
                f"port={self.port} may be the port where the job's ranks meet (20000 to 29999, by "
                f"job id); expected another, such as {DEFAULT_PORT}"
            )
        return self


Options = TypeVar("Options", bound=Value)


def parse_options(model: type[Options], target: str, given: dict[str, object]) -> Options:
    """Return `given` as a `model`.

    Raises:
        ValueError: An option is unknown or its value is not valid; one line.

    >>> parse_options(SlurmOptions, "slurm", {"partitoin": "gpu"})
    Traceback (most recent call last):
    ValueError: target 'slurm' has no option 'partitoin'; did you mean 'partition'?
    """
    known = list(model.model_fields)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"target {target!r} has no option {name!r}; {hint}")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ValueError(first["msg"].removeprefix("Value error, ")) from None
        field = str(first["loc"][0])
        expected = model.model_fields[field].description
        raise ValueError(
            f"option {field}={given[field]!r} of target {target!r} is not valid; "
            f"expected {expected}"
        ) from None


def default_name(plan: Plan | PartsPlan) -> str:
    """Return a name for the deployment that every target accepts, made from the model's.

    `meta-llama/Llama-3.1-405B` becomes `llama-3-1-405b`.
    """
    base = plan.model.name.rstrip("/").rpartition("/")[2].lower()
    slug = re.sub(r"[^a-z0-9]+", "-", base).strip("-")
    if not slug or not slug[0].isalpha():
        slug = f"rankwright-{slug}".rstrip("-")
    if len(slug) <= MAX_KUBERNETES_NAME:
        return slug
    # Two long names must not become one: the end is a hash of the whole.
    end = hashlib.sha256(plan.model.name.encode()).hexdigest()[:8]
    return f"{slug[: MAX_KUBERNETES_NAME - 9].rstrip('-')}-{end}"
