"""What is running, for `status` and `stop`: one small file a launch, below the user's state folder.

A record says where a launch is, not how it does: that is asked of the process, of Slurm or of
Kubernetes each time, so that no file can be out of date. Records are written under another name and
then renamed; a launch that ends takes its own away, and `status` those of launches that are gone.
"""

import os
import secrets
import socket
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from rankwright.planner.parts_plan import PartsPlan
from rankwright.planner.plan import Plan
from rankwright.templates.options import default_name
from rankwright.topology.value import Value


class ProcessPlace(Value):
    """A launch whose parent is a process of some machine: local and Ray."""

    kind: Literal["process"] = "process"
    host: str
    pid: int
    started_ticks: int | None = Field(
        default=None, description="start of the process since boot: process ids are used again"
    )


class SlurmPlace(Value):
    """A launch that is a Slurm job."""

    kind: Literal["slurm"] = "slurm"
    job: str
    folder: Path = Field(description="where it was submitted: script and output")
    run_dir: Path = Field(description="of the job: URL and logs, as soon as it runs")


class KubernetesPlace(Value):
    """A launch that is a set of Kubernetes objects."""

    kind: Literal["kubernetes"] = "kubernetes"
    name: str
    namespace: str
    context: str | None = None
    manifest: Path
    port: int
    num_pods: int = Field(description="machines of the plan, and on Ray its head")
    on_ray: bool = Field(default=False, description="whether it is a RayService")
    made_key: bool = Field(description="whether the secret is ours to delete")


Place = Annotated[ProcessPlace | SlurmPlace | KubernetesPlace, Field(discriminator="kind")]


class LaunchRecord(Value):
    """One launch: what it is and where."""

    schema_version: Literal[1] = 1
    id: str
    backend: Literal["local", "ray", "slurm", "kubernetes"]
    model: str
    split: str
    num_ranks: int
    num_replicas: int
    created_s: float = Field(description="Unix time")
    url: str | None = None
    place: Place


def make_record(
    plan: Plan | PartsPlan,
    backend: Literal["local", "ray", "slurm", "kubernetes"],
    place: ProcessPlace | SlurmPlace | KubernetesPlace,
) -> LaunchRecord:
    """Return the record of a launch of `plan` that starts now, under a name of its own."""
    return LaunchRecord(
        id=f"{default_name(plan)}-{secrets.token_hex(2)}",
        backend=backend,
        model=plan.model.name,
        split=plan.label(),
        num_ranks=plan.num_gpus,
        num_replicas=plan.num_replicas,
        created_s=time.time(),
        place=place,
    )


def this_process() -> ProcessPlace:
    """Return the place of a launch whose parent is this process."""
    pid = os.getpid()
    return ProcessPlace(host=socket.gethostname(), pid=pid, started_ticks=started_ticks(pid))


def started_ticks(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot; None if it has ended.

    None, too, where there is no /proc. Source: proc(5), /proc/pid/stat: field 3 is the state, 22
    the start; field 2 may hold blanks and brackets.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])  # a zombie only waits for its parent


def state_directory() -> Path:
    """Return the folder of records: below `XDG_STATE_HOME`, as that specification says."""
    named = os.environ.get("XDG_STATE_HOME")
    base = Path(named) if named else Path.home() / ".local" / "state"
    return base / "rankwright" / "launches"


def write_record(record: LaunchRecord) -> None:
    """Write `record` to its file, whole or not at all.

    Raises:
        OSError: The folder cannot be written to.
    """
    folder = state_directory()
    folder.mkdir(parents=True, exist_ok=True)
    # mkstemp's file is for its owner alone, as a record should be.
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{record.id}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(record.model_dump_json(indent=2) + "\n")
        os.replace(temporary, _file(record.id))
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_record(record_id: str) -> None:
    """Take a record away; one that is not there is fine."""
    _file(record_id).unlink(missing_ok=True)


def read_records() -> list[LaunchRecord]:
    """Return the records there are, oldest first.

    Raises:
        ValueError: A file in the folder is none.
    """
    found: list[LaunchRecord] = []
    for path in sorted(state_directory().glob("*.json")):
        try:
            found.append(LaunchRecord.model_validate_json(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue  # its launch has just ended
        except ValidationError:
            raise ValueError(
                f"{path} is no record of a launch that this version reads; remove it"
            ) from None
    return sorted(found, key=lambda record: record.created_s)


def _file(record_id: str) -> Path:
    return state_directory() / f"{record_id}.json"
