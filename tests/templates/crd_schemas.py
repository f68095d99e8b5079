"""Objects against the schemas of the API server and of custom resources, as a server would admit.

Built-in kinds: the strict OpenAPI schemas of `kubernetes-validate`. Custom kinds: their CRDs, read
from the folder that `RANKWRIGHT_CRDS` names or from `../shared/rigs/kubernetes/crds`, with unknown
fields refused, keys of list maps compared and CEL rules evaluated. The schemas are third-party
data, and not part of this repository.
"""

import functools
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VERSIONS = ("1.31", "1.37")
_SHARED = Path(__file__).parents[3] / "shared/rigs/kubernetes/crds"
_KEPT = (
    *("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "required"),
    *("minItems", "maxItems", "minProperties", "maxProperties"),
)


def crds_folder() -> Path | None:
    """The folder with CRDs as JSON; None where there is none."""
    named = os.environ.get("RANKWRIGHT_CRDS")
    for folder in [Path(named)] if named else [_SHARED, *_beside_main()]:
        if any(folder.glob("*.json")):
            return folder
    return None


def _beside_main() -> list[Path]:
    # A worktree lies elsewhere than the repository, whose `.git` its own file names.
    pointer = Path(__file__).parents[2] / ".git"
    if not pointer.is_file():
        return []
    main = Path(pointer.read_text().removeprefix("gitdir: ").strip()).parents[2]
    return [main.parent / "shared/rigs/kubernetes/crds"]


@functools.cache
def custom_schemas() -> dict[tuple[str, str], dict[str, Any]]:
    """The schema of each custom kind by API version and kind."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    folder = crds_folder()
    for path in sorted(folder.glob("*.json")) if folder else []:
        spec = json.loads(path.read_text())["spec"]
        for version in spec["versions"]:
            key = f"{spec['group']}/{version['name']}", spec["names"]["kind"]
            found[key] = version["schema"]["openAPIV3Schema"]
    return found


@functools.cache
def keep_schemas() -> Any:
    """`kubernetes_validate`, which reads 5 MB of JSON for every object unless told to keep it."""
    utils: Any = importlib.import_module("kubernetes_validate.utils")
    utils.schema_contents = functools.cache(utils.schema_contents)
    return importlib.import_module("kubernetes_validate")


def problems(item: dict[str, Any]) -> list[str]:
    """What a server would refuse `item` for."""
    checker = keep_schemas()
    schema = custom_schemas().get((item["apiVersion"], item["kind"]))
    if schema is None:
        for version in VERSIONS if item["apiVersion"] != "resource.k8s.io/v1" else ["1.37"]:
            try:
                checker.validate(item, version, strict=True)
            except (checker.ValidationError, checker.SchemaNotFoundError) as error:
                return [f"{version}: {error}"]
        return []
    validator = _validator(item["apiVersion"], item["kind"])
    bare = {key: value for key, value in item.items() if key != "metadata"}
    found = [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(bare)]
    return found + list(_broken_rules(schema, bare)) + list(_double_keys(schema, bare, "$"))


@functools.cache
def _validator(version: str, kind: str) -> Any:
    schema = _strict(custom_schemas()[version, kind])
    return importlib.import_module("jsonschema").Draft202012Validator(schema)


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema as JSON schema, with fields it does not name refused."""
    strict = {key: schema[key] for key in _KEPT if key in schema}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["type"] = ["integer", "string"]
    if "properties" in schema:
        names = {name: _strict(value) for name, value in schema["properties"].items()}
        strict["properties"] = names | {
            name: {} for name in ("apiVersion", "kind") if name in names
        }
    if isinstance(schema.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(schema["additionalProperties"])
    elif strict.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    if isinstance(schema.get("items"), dict):
        strict["items"] = _strict(schema["items"])
    return strict


def _children(schema: dict[str, Any], item: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    if isinstance(item, dict):
        for name, value in item.items():
            inner = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
            if isinstance(inner, dict):
                yield name, inner, value
    elif isinstance(item, list) and isinstance(schema.get("items"), dict):
        for index, value in enumerate(item):
            yield str(index), schema["items"], value


def _broken_rules(schema: dict[str, Any], item: Any, path: str = "$") -> Iterator[str]:
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and not _holds(rule["rule"], item):
            yield f"{path}: {rule.get('message') or rule['rule']}"
    for name, inner, value in _children(schema, item):
        yield from _broken_rules(inner, value, f"{path}.{name}")


@functools.cache
def _program(rule: str) -> Any:
    celpy = importlib.import_module("celpy")
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _holds(rule: str, item: Any) -> bool:
    celpy = importlib.import_module("celpy")
    try:
        return bool(_program(rule).evaluate({"self": celpy.json_to_cel(item)}))
    except (celpy.CELEvalError, celpy.CELParseError):
        return True  # a function that only the server has


def _double_keys(schema: dict[str, Any], item: Any, path: str) -> Iterator[str]:
    if schema.get("x-kubernetes-list-type") == "map" and isinstance(item, list):
        names = schema["x-kubernetes-list-map-keys"]
        keys = [tuple(each.get(name) for name in names) for each in item]
        if len(set(keys)) < len(keys):
            yield f"{path}: two entries with the same {names}"
    for name, inner, value in _children(schema, item):
        yield from _double_keys(inner, value, f"{path}.{name}")
