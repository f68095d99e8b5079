"""Clusters from wherever the user has one: this machine, a file, or shorthand."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rankwright.topology.cluster import Cluster
from rankwright.topology.shorthand import parse_cluster
from rankwright.topology.whole_file import write_whole

_FILE_TYPES = (".yaml", ".yml", ".json")
# YAML of more machines that differ is written in braces, which is JSON and read as such: 1,024 of 8
# GPUs load in 0.3 s instead of 4 (30 without libyaml). Nobody edits so many by hand.
_BLOCK_NODES = 64


def read_cluster(text_or_path: str) -> Cluster:
    """Return the cluster that the user means: `auto` (this machine), a file, or shorthand.

    >>> read_cluster("8xh100-sxm").num_gpus
    8

    Raises:
        ProbeError: `auto`, and the machine cannot be read.
        ValueError: The file is missing or malformed, or the shorthand does not parse.
    """
    text = text_or_path.strip()
    if text == "auto":
        # Its readers take 60 ms to import, and a plan for a shorthand needs none of them.
        from rankwright.topology.probe import probe

        return probe()
    path = Path(text)
    if path.suffix.lower() in _FILE_TYPES:
        return _read_file(path)
    if "/" in text or path.is_file():
        raise ValueError(
            f"cluster file {text!r} has no known type; expected {', '.join(_FILE_TYPES)}, as "
            "`rankwright probe -o cluster.yaml` writes"
        )
    return parse_cluster(text)


def check_cluster_name(path: str | Path) -> None:
    """Raise ValueError where no cluster can be written to a file named so."""
    if Path(path).suffix.lower() not in _FILE_TYPES:
        raise ValueError(f"cannot write a cluster to {str(path)!r}; expected *.yaml or *.json")


def write_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster as YAML, or as JSON if the path says so; the file appears whole or not.

    Raises:
        ValueError: The path has another type.
        OSError: It cannot be written.
    """
    target = Path(path)
    check_cluster_name(target)
    kind = target.suffix.lower()
    value = cluster.model_dump(mode="json", exclude_defaults=True)
    value = {"schema_version": cluster.schema_version, **value}
    text = json.dumps(value, indent=2) + "\n" if kind == ".json" else _to_yaml(value)
    write_whole(target, text)


def _read_file(path: Path) -> Cluster:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"cannot read cluster file {str(path)!r}: {reason}; write one with "
            "`rankwright probe -o cluster.yaml`"
        ) from None
    value = _from_json(path, text) if path.suffix.lower() == ".json" else _from_yaml(path, text)
    if not isinstance(value, dict):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise ValueError(
            f"cluster file {str(path)!r} holds {found}; expected fields such as `nodes`"
        )
    try:
        cluster = Cluster.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the cluster"
        raise ValueError(
            f"cluster file {str(path)!r}: {where}: {first['msg'].removeprefix('Value error, ')}"
        ) from None
    return cluster if cluster.source else cluster.model_copy(update={"source": str(path)})


def _from_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is the former
        raise ValueError(f"cluster file {str(path)!r} is no JSON: {error}") from None


def _from_yaml(path: Path, text: str) -> Any:
    if text.startswith("{"):  # in braces YAML is JSON, or close to it
        with suppress(ValueError, RecursionError):
            return json.loads(text)
    import yaml  # here, so that planning from shorthand does not load it

    # Ten times as fast where PyYAML was built with libyaml, as its wheels are.
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader
    try:
        return yaml.load(text, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"cluster file {str(path)!r} is no YAML: {line}") from None


def _to_yaml(value: dict[str, Any]) -> str:
    if len(value["nodes"]) > _BLOCK_NODES:
        return json.dumps(value, indent=1) + "\n"
    import yaml  # here, so that planning from shorthand does not load it

    return str(yaml.safe_dump(value, sort_keys=False, width=100))
