"""The load on vLLM, in its own environment: `python side_vllm.py MODEL_FOLDER JSON [--load ...]`.

Random weights, no tokenizer. Its bundle's folder is first on `PYTHONPATH`; `bench_side_by_side.py`
runs this. Only the standard library, vLLM and the load are imported.
"""

import argparse
import json
import os
import random
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from side_load import LOADS, Lengths, append_to, chosen, measure

# No network, no multicast (not every container's driver lets go of it cleanly), and DeepGEMM and
# FlashInfer's sampler left out because their compilers may not be there.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_USE_NCCL_SYMM_MEM": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_SKIP_P2P_CHECK": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_HOST_IP": "127.0.0.1",
        "NCCL_NVLS_ENABLE": "0",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
        "NVSHMEM_DISABLE_NVLS": "1",
    }
)


def main() -> None:
    """Start vLLM, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="with a config.json")
    parser.add_argument("json", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--load", choices=tuple(LOADS), default="full")
    parser.add_argument("--rows", default="*")
    arguments = parser.parse_args()
    begun_s = time.perf_counter()
    vllm: Any = import_module("vllm")  # here: a start begins with it
    engine = vllm.LLM(
        arguments.folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        tensor_parallel_size=arguments.tp,
        max_model_len=8192,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        max_num_seqs=arguments.max_batch,
        seed=0,
    )
    start_s = time.perf_counter() - begun_s
    rng = random.Random(0)

    def run(lengths: Lengths) -> float:
        prompts = [
            {"prompt_token_ids": [rng.randrange(10000) for _ in range(prompt)]}
            for prompt, _ in lengths
        ]
        sampling = [
            vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=output, detokenize=False)
            for _, output in lengths
        ]
        sent_s = time.perf_counter()
        answers = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - sent_s
        for (_, output), answer in zip(lengths, answers, strict=True):
            if len(answer.outputs[0].token_ids) != output:
                raise RuntimeError(f"{len(answer.outputs[0].token_ids)} tokens, not {output}")
        return seconds

    load = LOADS[arguments.load]
    rows = measure(
        run, load, chosen(load, arguments.rows), append_to(arguments.json.with_suffix(".jsonl"))
    )
    content = {"version": str(vllm.__version__), "start_s": start_s, "rows": rows}
    arguments.json.write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main()
