"""A checkpoint that cannot be loaded is named from the headers of its files."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cost_model.configs import FAMILY_CONFIGS
from tests.executor.meta_stage import Asked, meta_stage

from rankwright.cost_model.model_spec import ModelSpec
from rankwright.cost_model.read_model import read_model
from rankwright.executor.check_tensors import check_tensors, read_header
from rankwright.executor.models import FAMILIES
from rankwright.executor.models.expected import expected_tensors

RUN = [
    name for name, config in FAMILY_CONFIGS.items() if read_model(config).architecture in FAMILIES
]


@pytest.mark.parametrize("family", RUN)
def test_what_is_expected_is_what_layers_ask_for(family: str) -> None:
    spec = read_model(FAMILY_CONFIGS[family])
    asked = Asked()
    meta_stage(spec, asked)
    assert dict(expected_tensors(spec)) == asked.shapes


SPEC = read_model(FAMILY_CONFIGS["deepseek v3"])


def tensors_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in expected_tensors(spec)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    tensors = tensors_of(SPEC)
    names = sorted(tensors)
    paths = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    for path, part in zip(paths, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, path)
    return paths


def test_a_whole_checkpoint_is_good(files: list[Path]) -> None:
    check_tensors(SPEC, files)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def an_error_page(path: Path) -> None:
    path.write_text("<html>404</html>")


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop("model.norm.weight")
    save_file(tensors, path)


def of_another_shape(path: Path) -> None:
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name][:-1].clone()}, path)


def of_another_format(path: Path) -> None:
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].to(torch.int32)}, path)


def without_a_scale(path: Path) -> None:
    tensors = load_file(path)
    name = "model.norm.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, r"has [\d,]+ bytes, and its header asks for [\d,]+: it is truncated"),
        (cut_in_the_header, r"is no safetensors file, or truncated; download it again"),
        (an_error_page, r"is no safetensors file, or truncated; download it again"),
        (without_a_tensor, r"lacks 1 of the tensors that .* asks for, first 'model\.norm\.weight'"),
        (of_another_shape, r"'model\.norm\.weight' has shape \(\d+,\), config\.json asks for"),
        (of_another_format, r"'model\.norm\.weight' is stored as I32, which the executor cannot"),
        (without_a_scale, r"is stored as I8 without its scale, .*weight_scale_inv or .*_scale;"),
    ],
)
def test_a_bad_checkpoint_is_named(
    files: list[Path], harm: Callable[[Path], None], message: str
) -> None:
    path = next(path for path in files if "model.norm.weight" in read_header(path))
    harm(path)
    with pytest.raises(ValueError, match=message) as caught:
        check_tensors(SPEC, files)
    assert str(path.parent) in str(caught.value)


QUANTISED = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [16, 16],
}
MATRIX = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("quantised", "name", "scale", "message"),
    [
        (
            QUANTISED,
            MATRIX,
            torch.ones(2, 2),
            r"scales of .* have shape \(2, 2\), .* asks for 3 x 5",
        ),
        (QUANTISED, MATRIX, torch.ones(4, 4, dtype=torch.int32), "is stored as I32; expected one"),
        (QUANTISED, "model.norm.weight", torch.ones(1), "reads only matrices in 8 bits"),
        (None, MATRIX, torch.ones(1), "has no quantization_config that says what its scales are"),
    ],
)
def test_scales_that_fit_nothing_are_named(
    files: list[Path],
    quantised: dict[str, Any] | None,
    name: str,
    scale: torch.Tensor,
    message: str,
) -> None:
    config = dict(FAMILY_CONFIGS["deepseek v3"]) | (
        {"quantization_config": quantised} if quantised else {}
    )
    (files[0].parent / "config.json").write_text(json.dumps(config))
    path = next(path for path in files if name in read_header(path))
    stored = {name: load_file(path)[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
    save_file(load_file(path) | stored, path)
    with pytest.raises(ValueError, match=message):
        check_tensors(SPEC, files)


@pytest.mark.parametrize(
    ("offsets", "shape"), [([0, 8], [3]), ([4, 12], [2]), ([0, 8], [-2]), ([8, 0], [2])]
)
def test_a_header_that_contradicts_itself_is_named(
    tmp_path: Path, offsets: list[int], shape: list[int]
) -> None:
    entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    header = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(max(0, offsets[1])))
    with pytest.raises(ValueError, match="contradicts itself: tensor 'a'"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}', b"{nothing", b"[" * 5000],
)
def test_a_header_that_is_none_is_named(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="has a header that is none"):
        read_header(path)


def test_headers_are_read_as_safetensors_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3, dtype=torch.float8_e4m3fn)}, path, {"format": "pt"})
    (found,) = read_header(path).items()
    assert (found[0], found[1].dtype, found[1].shape) == ("a", "F8_E4M3", (2, 3))


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_mxfp4_blocks_are_checked_with_their_scales(tmp_path: Path, part: str) -> None:
    config = json.loads(json.dumps(FAMILY_CONFIGS["gpt_oss"]))
    spec = read_model(config)
    tensors = tensors_of(spec)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = -(-inputs // 32)
        tensors[f"{name}_blocks"] = torch.zeros(experts, outputs, groups, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(experts, outputs, groups, dtype=torch.uint8)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    check_tensors(spec, [path])
    name = next(name for name in tensors if name.endswith(part))
    save_file(tensors | {name: tensors[name][:1].clone()}, path)
    with pytest.raises(ValueError, match=rf"MXFP4 tensor '{name}' is U8 of"):
        check_tensors(spec, [path])
