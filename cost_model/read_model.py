"""`read_model`: any way to name a model, to its `ModelSpec`.

Reads no network: a hub id is looked up in the table that ships (`known_models.py`), anything else
is a folder or a `config.json` on this machine.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from rankwright.cost_model.families import reader_of
from rankwright.cost_model.families.config import Config
from rankwright.cost_model.known_models import known_config
from rankwright.cost_model.model_spec import ModelSpec


def read_model(source: str | Path | Mapping[str, object]) -> ModelSpec:
    """Return the spec of the model in `source`.

    Args:
        source: A well-known hub id such as `Qwen/Qwen3-8B`, a folder with a `config.json`, a path
            to such a file, or its content.

    Raises:
        ValueError: nothing is known under that name, or the config is unsound; the message names
            the nearest ids, or the key and what was expected in it.

    >>> read_model("Qwen/Qwen3-8B").num_layers
    36
    """
    name, values = _name_and_config(source)
    config = Config(values, name)
    architectures = config.texts("architectures")
    if not architectures:
        raise config.wrong("architectures", "a list with the model's class name")
    return reader_of(architectures[0])(config, name)


def read_config(source: str | Path | Mapping[str, object]) -> dict[str, object]:
    """Return the keys of the `config.json` of `source`, which is as in `read_model`.

    Where a folder has a `generation_config.json`, its `eos_token_id` wins, as in transformers: chat
    models end a turn with a token that `config.json` often leaves out.

    Raises:
        ValueError: nothing is known under that name, or the file is no JSON object.
    """
    return _name_and_config(source)[1]


def _name_and_config(source: str | Path | Mapping[str, object]) -> tuple[str, dict[str, object]]:
    if isinstance(source, Mapping):
        names = (source.get(key) for key in ("_name_or_path", "model_type"))
        texts = (name for name in names if isinstance(name, str) and name.isprintable() and name)
        return next(texts, "model"), dict(source)
    path = Path(source)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # too long for a path, or the home of no user
        is_folder = is_file = False
    if is_file and path.name == "config.json":
        path, is_folder = path.parent, True
    if is_folder:
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{str(source)!r} has no config.json; expected a Hugging Face model folder"
            )
        values = _read_json(path / "config.json")
        if (path / "generation_config.json").is_file():
            end = _read_json(path / "generation_config.json").get("eos_token_id")
            if end is not None:
                values["eos_token_id"] = end
        # Absolute, because a plan carries the name to where it is run.
        return str(path.resolve()), values
    if is_file:
        return str(path.resolve()), _read_json(path)
    return known_config(str(source))


def _read_json(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ValueError(f"{path} is no config: its JSON is thousands of levels deep") from None
    except ValueError as error:  # no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; expected the keys of a config.json")
    return cast("dict[str, object]", values)
