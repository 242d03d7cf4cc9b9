"""What a machine is, as far as a result may depend on it."""

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch


def describe_machine() -> dict[str, Any]:
    """This one: host, system, processor, memory, Python, torch, and its NVIDIA GPUs with driver and torch's CUDA."""
    facts = {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(), "cpu": _cpu()}
    facts |= {"memory_gib": _memory_gib(), "python": platform.python_version(), "torch": torch.__version__}
    gpus = _gpus()
    if not gpus:
        return facts
    cuda = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}  # type: ignore[no-untyped-call]
    return {**facts, "gpus": [name for name, _ in gpus], "driver": gpus[0][1], **cuda}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> int:
    """All of it, in whole GiB: machines of one kind differ by some pages."""
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _gpus() -> list[tuple[str, str]]:
    """Name and driver of each. Asked of nvidia-smi, since torch would take some of a GPU's memory to answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return []
    pairs = (line.rpartition(",") for line in said.splitlines() if "," in line)
    return [(name.strip(), driver.strip()) for name, _, driver in pairs]
