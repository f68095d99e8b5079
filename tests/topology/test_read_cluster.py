"""Clusters as files."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwright.topology.cluster import Cluster
from rankwright.topology.read_cluster import read_cluster, write_cluster
from rankwright.topology.shorthand import parse_cluster


@pytest.mark.parametrize("name", ["c.yaml", "c.yml", "c.json"])
@pytest.mark.parametrize("text", ["2x8xh100-sxm+ib400", "2xrtx4090+2xrtx3090", "4xcpu"])
def test_a_cluster_survives_its_file(tmp_path: Path, name: str, text: str) -> None:
    cluster = parse_cluster(text)
    write_cluster(cluster, tmp_path / name)
    assert read_cluster(str(tmp_path / name)) == cluster
    assert [path.name for path in tmp_path.iterdir()] == [name]  # no temporary file is left


def test_auto_is_this_machine_and_anything_else_is_shorthand() -> None:
    assert read_cluster(" auto ").source == "probe"
    assert read_cluster("8xh100-sxm") == parse_cluster("8xh100-sxm")


def test_a_hand_written_file_may_leave_defaults_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "nodes:\n"
        "- name: box\n"
        "  gpus:\n"
        "  - {index: 0, device: l4, name: L4, memory_bytes: 23000000000,"
        " total_memory_bytes: 24000000000}\n"
    )
    cluster = read_cluster(str(path))
    assert cluster.num_gpus == 1
    assert cluster.source == str(path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "nodes: [", "is no YAML"),
        ("a.json", "{", "is no JSON"),
        ("a.yaml", "- 1\n", "holds a list"),
        ("a.yaml", "", "holds nothing"),
        ("a.yaml", "nodes: []\n", "nodes: "),
        ("a.yaml", "nodez: []\n", "a.yaml': nodes: Field required"),
        ("a.json", '{"nodes": [{"name": "n", "gpus": [{"index": -1}]}]}', "nodes.0.gpus.0.index"),
        ("a.json", '{"nodes": [{"name": "n", "gpus": []}]}', "no GPU and no CPU rank"),
        ("a.yaml", "a: !!python/object:os.system x\n", "is no YAML"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line_that_names_the_field(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says) as caught:
        read_cluster(str(tmp_path / name))
    assert len(str(caught.value).splitlines()) == 1
    assert type(caught.value) is ValueError


def test_a_missing_file_and_an_unknown_type_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No such file"):
        read_cluster(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match="no known type"):
        read_cluster(str(tmp_path / "none.toml"))
    with pytest.raises(ValueError, match="expected"):
        write_cluster(parse_cluster("1xl4"), tmp_path / "c.toml")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.mkdir()
    (path / "kept").write_text("x")
    with pytest.raises(OSError):  # noqa: PT011 (its subclass differs by platform)
        write_cluster(parse_cluster("1xl4"), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_any_yaml_is_a_cluster_or_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"fuzz\.yaml"):
        read_cluster(str(path))


def test_yaml_of_many_machines_is_in_braces_and_still_yaml(tmp_path: Path) -> None:
    base = parse_cluster("2x2xl4+eth100")
    node = base.nodes[0].model_copy(update={"count": 1})
    nodes = tuple(node.model_copy(update={"name": f"n{at}"}) for at in range(100))
    cluster = base.model_copy(update={"nodes": nodes})
    path = tmp_path / "many.yaml"
    write_cluster(cluster, path)
    assert read_cluster(str(path)) == cluster
    assert Cluster.model_validate(yaml.safe_load(path.read_text())) == cluster
    # Braces of YAML that JSON does not know are read too.
    path.write_text("{nodes: " + path.read_text().split('"nodes": ', 1)[1])
    assert read_cluster(str(path)).nodes == nodes
