"""Checkpoints in FP8, INT8 and MXFP4: logits equal those of transformers on the widened weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.executor.conftest import COMMON, Reference
from tests.executor.moe_models import MOE_MODELS
from tests.executor.plans import cpu_plan
from tests.executor.ranks import Ranks
from tests.executor.test_parallel_equality import prompts

from rankwright.cost_model.held_weights import held_by
from rankwright.cost_model.read_model import read_model
from rankwright.executor.check_tensors import check_tensors
from rankwright.executor.checkpoint import check_weights
from rankwright.executor.dequantize import View, read_mxfp4, read_scaled
from rankwright.executor.weights import SafetensorsSource

CPU = torch.device("cpu")
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
Tensors = dict[str, torch.Tensor]


def whole(tensor: torch.Tensor) -> View:
    """A tensor as a file shows it."""

    def read(*parts: tuple[int, int] | None) -> torch.Tensor:
        return tensor[tuple(slice(*part) if part else slice(None) for part in parts)]

    return View(tuple(tensor.shape), read)


def part_of(data: st.DataObject, size: int) -> tuple[int, int]:
    start = data.draw(st.integers(0, size - 1))
    return start, data.draw(st.integers(start + 1, size))


@settings(deadline=None, max_examples=30)  # a busy machine
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.data())
def test_any_part_has_the_scales_of_its_blocks(
    num_rows: int, num_columns: int, height: int, width: int, data: st.DataObject
) -> None:
    weight = torch.arange(num_rows * num_columns).view(num_rows, num_columns) % 100
    scale = torch.rand(-(-num_rows // height), -(-num_columns // width)) + 0.5
    expected = weight.float().clone()
    for row in range(num_rows):
        for column in range(num_columns):
            expected[row, column] *= scale[row // height, column // width]
    rows, columns = part_of(data, num_rows), part_of(data, num_columns)
    found = read_scaled(
        whole(weight.to(torch.int8)), whole(scale), rows, columns,
        block=(height, width), dtype=torch.float32, where="w",
    )  # fmt: skip
    assert torch.equal(found, expected[slice(*rows), slice(*columns)])


@settings(deadline=None, max_examples=30)  # a busy machine
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.data())
def test_any_part_of_mxfp4_is_values_times_powers_of_two(
    experts: int, outputs: int, groups: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    blocks = torch.randint(
        0, 256, (experts, outputs, groups, 16), dtype=torch.uint8, generator=generator
    )
    scales = torch.randint(
        100, 150, (experts, outputs, groups), dtype=torch.uint8, generator=generator
    )
    wide = torch.empty(experts, outputs, groups * 32)
    for expert, output, column in np.ndindex(*wide.shape):
        byte = int(blocks[expert, output, column // 32, column % 32 // 2])
        code = byte >> 4 if column % 2 else byte & 15
        value = float(FP4[code & 7]) * (-1 if code & 8 else 1)
        power = int(scales[expert, output, column // 32]) - 127
        wide[expert, output, column] = value * 2.0**power
    parts = [part_of(data, size) for size in (experts, groups * 32, outputs)]
    found = read_mxfp4(whole(blocks), whole(scales), *parts, dtype=torch.float32)
    expert, inputs, output = (slice(*part) for part in parts)
    assert torch.equal(found, wide.transpose(1, 2)[expert, inputs, output])


def scaled(
    weight: torch.Tensor, height: int, width: int, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix in 8 bits, and a scale for each block."""
    most = 127.0 if kind == torch.int8 else torch.finfo(kind).max
    rows, columns = weight.shape
    grid = torch.empty(-(-rows // height), -(-columns // width))
    spread = torch.empty_like(weight)
    for i, j in np.ndindex(*grid.shape):
        at = (slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width))
        grid[i, j] = weight[at].abs().max() / most
        spread[at] = grid[i, j]
    values = weight / spread
    return (values.round() if kind == torch.int8 else values).to(kind), grid


def is_matrix(name: str) -> bool:
    """Whether recipes quantise it: the products of attention and feed-forward blocks."""
    return name.endswith("_proj.weight") or (".experts." in name and name.endswith(".weight"))


def in_fp8_blocks(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """As DeepSeek-V3 is published, in smaller blocks; the same tensors widened; the settings."""
    out, wide = dict(tensors), dict(tensors)
    for name in filter(is_matrix, tensors):
        value, scale = scaled(tensors[name], 16, 8, torch.float8_e4m3fn)
        out |= {name: value, f"{name}_scale_inv": scale}
        spread = scale.repeat_interleave(16, 0).repeat_interleave(8, 1)
        wide[name] = value.float() * spread[: value.shape[0], : value.shape[1]]
    return out, wide, {"quant_method": "fp8", "weight_block_size": [16, 8]}


def a_row(kind: torch.dtype) -> Callable[[Tensors], tuple[Tensors, Tensors, dict[str, Any]]]:
    def quantise(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """As llm-compressor writes a scale for each row."""
        out, wide = dict(tensors), dict(tensors)
        for name in filter(is_matrix, tensors):
            value, scale = scaled(tensors[name], 1, tensors[name].shape[1], kind)
            out |= {name: value, f"{name}_scale": scale}
            wide[name] = value.float() * scale
        weights = {"num_bits": 8, "strategy": "channel"}
        weights["type"] = "int" if kind == torch.int8 else "float"
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return out, wide, {"quant_method": "compressed-tensors", "config_groups": groups}

    return quantise


def in_mxfp4(tensors: Tensors) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """As gpt-oss is published: its experts."""
    out, wide = dict(tensors), dict(tensors)
    for name in tensors:
        if not name.endswith(("gate_up_proj", "experts.down_proj")):
            continue
        rows = out.pop(name).transpose(1, 2)  # [experts, outputs, inputs]
        grouped = rows.unflatten(-1, (-1, 32))
        power = (grouped.abs().amax(-1) / 6).log2().ceil()
        levels = torch.cat([FP4, -FP4])
        codes = (grouped / 2 ** power[..., None]).unsqueeze(-1).sub(levels).abs().argmin(-1)
        packed = codes[..., 0::2] | codes[..., 1::2] << 4
        out |= {
            f"{name}_blocks": packed.to(torch.uint8),
            f"{name}_scales": (power + 127).to(torch.uint8),
        }
        values = (levels[codes] * 2 ** power[..., None]).flatten(-2)
        wide[name] = values.transpose(1, 2).contiguous()
    return out, wide, {"quant_method": "mxfp4"}


GPT_OSS = MOE_MODELS["gpt_oss"] | {"hidden_size": 64, "intermediate_size": 96}
RECIPES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "DeepSeek-V3 in FP8 blocks": (
        {"model_type": "deepseek_v3", **MOE_MODELS["deepseek_v3"]},
        in_fp8_blocks,
        {"tp": 2, "ep": 2},
    ),
    "Mixtral in FP8 rows": (
        {"model_type": "mixtral", **MOE_MODELS["mixtral"]},
        a_row(torch.float8_e4m3fn),
        {"tp": 3, "ep": 1},
    ),
    "Qwen3 in INT8 rows": (
        {"model_type": "qwen3", "vocab_size": 150, "head_dim": 8},
        a_row(torch.int8),
        {"tp": 2},
    ),
    # Columns are cut inside groups of 32.
    "gpt-oss in MXFP4": ({"model_type": "gpt_oss", **GPT_OSS}, in_mxfp4, {"tp": 4, "ep": 2}),
}


def quantised(folder: Path, options: dict[str, Any], recipe: Any) -> Reference:
    """A random model's quantised checkpoint in `folder`, and transformers on the widened one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(**(COMMON | options))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    stored, wide, settings = recipe(load_file(path))
    save_file(stored, path)
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | {"quantization_config": settings}))
    (folder / "wide").mkdir()
    (folder / "wide" / "config.json").write_text(json.dumps(whole))
    save_file(wide, folder / "wide" / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(
        folder / "wide", attn_implementation="eager", experts_implementation="eager"
    )
    return Reference(folder, model.float().eval(), config.vocab_size)


@pytest.mark.parametrize("name", RECIPES)
def test_logits_are_those_of_the_widened_checkpoint(name: str, pool: Ranks, tmp_path: Path) -> None:
    options, recipe, split = RECIPES[name]
    reference = quantised(tmp_path, options, recipe)
    spec = read_model(tmp_path)
    check_tensors(spec, check_weights(tmp_path))
    plan = cpu_plan(held_by(spec, "rankwright"), **split)
    sequences = prompts(reference.vocab_size, (1, 23))
    results = pool.run(
        plan.num_gpus,
        "tests.executor.cases",
        "logits",
        plan.model_dump_json(),
        str(tmp_path),
        sequences,
    )
    (result,) = (result for result in results if result is not None)
    for ours, tokens in zip(result, sequences, strict=True):
        theirs = reference.logits(tokens).numpy()
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def folder_with(folder: Path, tensors: Tensors, settings: dict[str, Any] | None) -> Path:
    save_file(tensors, folder / "model.safetensors")
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8,
        "max_position_embeddings": 8,
    }  # fmt: skip
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_one_scale_for_a_matrix_is_enough(tmp_path: Path) -> None:
    weight = torch.randn(4, 6).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.tensor(0.25)}
    folder = folder_with(tmp_path, tensors, {"quant_method": "fp8"})
    source = SafetensorsSource(folder, torch.bfloat16, CPU)
    assert torch.equal(
        source.shard("a.weight", (4, 6), (1, 3)), (weight[1:3].float() / 4).bfloat16()
    )


def test_scales_of_another_grid_are_named(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": torch.ones(2, 2),
    }
    settings = {"quant_method": "fp8", "weight_block_size": [2, 2]}
    source = SafetensorsSource(folder_with(tmp_path, tensors, settings), torch.float32, CPU)
    with pytest.raises(ValueError, match=r"'a\.weight': scales of shape \(2, 2\) .* 2 x 3"):
        source.shard("a.weight", (4, 6))


def test_eight_bits_without_settings_are_refused(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(4, 6).to(torch.float8_e4m3fn),
        "a.weight_scale": torch.ones(4, 1),
    }
    source = SafetensorsSource(folder_with(tmp_path, tensors, None), torch.float32, CPU)
    with pytest.raises(ValueError, match=r"its config\.json has no quantization_config"):
        source.shard("a.weight", (4, 6))
