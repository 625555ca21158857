"""The machine that a benchmark runs on: its name, its versions, and how many operations a second it can do at most."""

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

# Dense bfloat16 operations a second on tensor cores, accumulated in float32, without sparsity, in 10^12: NVIDIA's data
# sheets of each card (H200 and GH200 have the H100's cores; where a sheet gives the number with sparsity, half of it;
# RTX 4090 and 3090: the whitepapers of Ada, table 2, and of GA102, appendix A). By a part of the device's name, the
# longer first.
PEAKS = {
    "B200": 2250.0,
    "GH200": 989.5,
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H100": 989.5,
    "A100": 312.0,
    "L40S": 362.05,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")


def described(device: str) -> dict[str, Any]:
    """A device and the versions of what runs on it, for the record of a benchmark.

    Args:
        device: "cuda" or "cpu".
    """
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU ({_processor()}, {threads} threads)"
    packages = {package: version(package) for package in PACKAGES}
    return {"device": name, "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **packages}}


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    if (file := Path("/proc/cpuinfo")).exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return platform.machine()


def peak(device: torch.device) -> tuple[float, str]:
    """Floating-point operations a second that a device does at most, and where that is known from.

    Of a GPU in the table the vendor's number for dense bfloat16. Of any other device, what the product of two large
    matrices reaches: float32 on a CPU, bfloat16 on a GPU.

    Args:
        device: the one that a benchmark runs on.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if entry := listed(name):
            return PEAKS[entry] * 1e12, f"data sheet of {entry}, dense bfloat16"
    return _measured(device), f"the product of two matrices on this {device.type}"


def listed(name: str) -> str | None:
    """The entry of `PEAKS` that a device's name belongs to.

    Args:
        name: as CUDA gives it, such as "NVIDIA H100 80GB HBM3".
    """
    words = name.replace("-", " ").split()
    for entry in sorted(PEAKS, key=len, reverse=True):
        wanted = entry.split()
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return entry
    return None


def _measured(device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        begun = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best
