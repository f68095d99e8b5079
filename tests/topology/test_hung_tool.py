"""A tool of the driver that never ends."""

from pathlib import Path

import pytest

from rankwright.topology.errors import ProbeError
from rankwright.topology.readers import nvidia_smi_tool


def test_an_nvidia_smi_that_hangs_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexec sleep 30\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert nvidia_smi_tool.SMI_TIMEOUT_S == 10
    monkeypatch.setattr(nvidia_smi_tool, "SMI_TIMEOUT_S", 0.3)
    with pytest.raises(ProbeError, match=r"hangs.*dmesg") as caught:
        nvidia_smi_tool.read_nvidia_smi()
    assert caught.value.kind == "tool_hung"
