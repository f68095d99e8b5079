"""How often each expert was chosen, as `rankwright launch --record-expert-load` writes it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from rankwright.topology.value import Value
from rankwright.topology.whole_file import write_whole


class ExpertLoad(Value):
    """Tokens that chose each expert of each layer with experts, while one replica served."""

    schema_version: Literal[1] = 1
    model: str
    layers: tuple[tuple[int, ...], ...] = Field(min_length=1)


def read_expert_loads(paths: Sequence[Path], model: str) -> tuple[tuple[int, ...], ...]:
    """Return the loads in `paths` added up, of each layer of `model`.

    Raises:
        ValueError: A file is missing or malformed, or of another model or shape; names it.
    """
    total: list[list[int]] = []
    for path in paths:
        try:
            found = ExpertLoad.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"--expert-load {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            line = _complaint(error)
            raise ValueError(
                f"--expert-load {path} is not what launch --record-expert-load writes: {line}"
            ) from None
        if found.model != model:
            raise ValueError(f"--expert-load {path} is of {found.model}, and the plan of {model}")
        if any(count < 0 for layer in found.layers for count in layer):
            raise ValueError(f"--expert-load {path} has a count below 0")
        if total and [len(layer) for layer in found.layers] != [len(layer) for layer in total]:
            raise ValueError(f"--expert-load {path} has other layers or experts than {paths[0]}")
        if not total:
            total = [[0] * len(layer) for layer in found.layers]
        total = [
            [a + b for a, b in zip(old, new, strict=True)]
            for old, new in zip(total, found.layers, strict=True)
        ]
    return tuple(map(tuple, total))


def _complaint(error: ValueError) -> str:
    """Return what is wrong with a file, in one line: of pydantic's complaints the first."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else first["msg"]


def write_expert_load(load: ExpertLoad, path: Path) -> None:
    """Write `load` to `path`, whole or not at all."""
    write_whole(path, load.model_dump_json() + "\n")


def path_of_replica(path: Path, replica: int) -> Path:
    """Return where replica `replica` writes: `path` is the first one's.

    >>> str(path_of_replica(Path("load.json"), 2))
    'load.2.json'
    """
    return path if replica == 0 else path.with_name(f"{path.stem}.{replica}{path.suffix}")
