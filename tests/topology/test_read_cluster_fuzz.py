"""Any cluster file, however broken, is a cluster or one line that names the file."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster
from rankwright.topology.read_cluster import read_cluster
from rankwright.topology.shorthand import parse_cluster

_CLUSTERS = [
    json.loads(parse_cluster(text).model_dump_json(exclude_defaults=True))
    for text in ("2x2xh100-sxm+ib400", "2xl4+1xrtx4090", "2xcpu")
]
_DROP = object()
_ABSURD: list[Any] = [
    *(_DROP, None, True, 0, 1, -1, 2, 10**6, 10**9, 10**18, 10**400, 0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "x\n", "l4", [], {}, [1], [[]], [{}], {"a": 1}),
]


def _places(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in `value`."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, item in inside:
        yield (*at, key)
        yield from _places(item, (*at, key))


@st.composite
def broken_clusters(draw: st.DrawFn) -> Any:
    """A cluster with one to three of its values dropped, or of another type, or absurd."""
    value = json.loads(json.dumps(draw(st.sampled_from(_CLUSTERS))))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        holder = value
        for key in way:
            holder = holder[key]
        new = draw(st.sampled_from(_ABSURD))
        if new is _DROP:
            del holder[last]
        else:
            holder[last] = json.loads(json.dumps(new))
    return value


def _read(path: Path) -> tuple[Cluster | None, str]:
    try:
        return read_cluster(str(path)), ""
    except ValueError as error:
        return None, str(error)


@settings(deadline=None, max_examples=150)
@given(value=broken_clusters())
@example(
    value=json.loads(json.dumps(_CLUSTERS[2]).replace('"memory_bytes": ', '"memory_bytes": 9'))
)
def test_any_cluster_file_is_a_cluster_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, value: Any
) -> None:
    path = tmp_path_factory.mktemp("cluster") / "cluster.json"
    path.write_text(json.dumps(value))
    cluster, message = _read(path)
    if cluster is None:
        assert "cluster.json" in message
        assert "\n" not in message
        return
    assert cluster.num_gpus >= 1
    assert cluster.describe()
    assert len(cluster.fingerprint) == 16
    assert Cluster.model_validate_json(cluster.model_dump_json()) == cluster


@pytest.mark.parametrize("name", ["cluster.json", "cluster.yaml"])
def test_numbers_too_long_to_read_name_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"nodes": [{"name": "a", "count": ' + "9" * 5000 + "}]}")
    with pytest.raises(ValueError, match=name):
        read_cluster(str(path))
