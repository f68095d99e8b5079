"""Readers of one source each: NVML, the text of nvidia-smi, the CPU."""
