"""What the figures were measured on."""

import os
import platform
from pathlib import Path

import torch


def describe() -> dict[str, str | int | float]:
    """Return the processor, its cores, the threads in use, the load and the versions."""
    return {
        "processor": _processor(),
        "vnni": bool({"avx512_vnni", "avx_vnni"} & set(_entry("flags").split())),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    return _entry("model name") or platform.processor() or platform.machine()


def _entry(name: str) -> str:
    """Return what Linux says of the first processor under a name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
    return found[0] if found else ""
