"""Find the folder that holds a model's files: a path, or the Hugging Face cache, never the network.

Weights are read by the ranks; this module only says where they are, before any process starts, so
that a wrong name costs a second and not a minute.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

INDEX_NAME = "model.safetensors.index.json"

# Formats we do not read, with what to do about them.
_OTHER_FORMATS = {
    "*.gguf": "GGUF weights; convert them to safetensors first",
    "pytorch_model*.bin": "pickled weights; save them again with safe_serialization=True",
    "consolidated*.pth": "Meta's own format; use the Hugging Face version of the model",
}


def find_checkpoint(
    name: str,
    model_path: Path | str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Return the folder with the safetensors weights of model `name`.

    Args:
        name: Name in the plan: a hub id such as `org/model`, or a folder.
        model_path: Folder to use instead.
        environment: Where `HF_HUB_CACHE` and `HF_HOME` are looked up; None: `os.environ`.

    Raises:
        ValueError: There is no such folder, or its weights are missing or incomplete.
    """
    folder = find_model_folder(name, model_path, environment=environment)
    if folder is None:
        cache = _hub_cache(os.environ if environment is None else environment)
        raise ValueError(
            f"no weights for {name!r}: it is no folder, and {cache} does not hold it; "
            "give the folder with --model-path DIR, or use --load-format dummy for random weights"
        )
    check_weights(folder)
    return folder


def find_model_folder(
    name: str,
    model_path: Path | str | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Path | None:
    """Return the folder of model `name` (see `find_checkpoint`), or None where there is none.

    Raises:
        ValueError: `model_path` is given and is no folder.
    """
    if model_path is not None:
        folder = Path(model_path).expanduser()
        if not folder.is_dir():
            raise ValueError(f"--model-path {str(model_path)!r} is no folder")
        return folder.resolve()
    if name and Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    return _cached_snapshot(name, _hub_cache(os.environ if environment is None else environment))


def check_weights(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of `folder`, all of which exist.

    Raises:
        ValueError: There are none, or the index names one that is not there.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            weight_map = cast("dict[str, str]", json.loads(index.read_text())["weight_map"])
            names = sorted(set(weight_map.values()))
            paths = [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is malformed ({error!r}); download it again") from None
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; "
                "download them again"
            )
        return tuple(paths)
    files = tuple(sorted(folder.glob("*.safetensors")))
    if files:
        return files
    for pattern, remedy in _OTHER_FORMATS.items():
        if any(folder.glob(pattern)):
            raise ValueError(f"{folder} has no *.safetensors but {remedy}")
    raise ValueError(
        f"{folder} has no *.safetensors; give a folder with weights in --model-path, or use "
        "--load-format dummy for random weights"
    )


def read_sampling_defaults(folder: Path | None) -> tuple[dict[str, float | int], list[str]]:
    """Return what the model's authors advise for sampling, and a note on what we cannot follow.

    From `generation_config.json`, whose fields are used as vLLM uses them: what a request says
    comes first. Empty where there is no folder or no such file.

    Raises:
        ValueError: The file is malformed.
    """
    config = {} if folder is None else read_json(folder / "generation_config.json")
    defaults: dict[str, float | int] = {}
    for name in ("temperature", "top_k", "top_p"):
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            defaults[name] = max(0, value)  # top_k -1: all tokens
    notes = [
        f"generation_config.json asks for {name}={config[name]}, which is not supported: left out"
        for name, neutral in (("repetition_penalty", 1), ("min_p", 0))
        if config.get(name) not in (None, neutral)
    ]
    return defaults, notes


def read_json(path: Path) -> dict[str, object]:
    """Return the JSON object in `path`; empty where there is no such file.

    Raises:
        ValueError: It is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, a JSON object was expected")
    return cast("dict[str, object]", value)


def _hub_cache(environment: Mapping[str, str]) -> Path:
    # The order of huggingface_hub/constants.py, which is not imported: it takes 0.3 s.
    if environment.get("HF_HUB_CACHE"):
        return Path(environment["HF_HUB_CACHE"]).expanduser()
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _cached_snapshot(name: str, cache: Path) -> Path | None:
    if name.count("/") != 1 or not all(name.split("/")):
        return None
    repository = cache / f"models--{name.replace('/', '--')}"
    main = repository / "refs" / "main"
    if main.is_file():
        snapshot = repository / "snapshots" / main.read_text().strip()
        if snapshot.is_dir():
            return snapshot
    # A download by commit leaves no refs/main; the newest snapshot is then what the user has.
    snapshots = sorted(
        (path for path in (repository / "snapshots").glob("*") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
    )
    return snapshots[-1] if snapshots else None
