"""What stands beside a number so that it can be made again: versions, commit, machine, threads."""

import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "torchvision", "lightning", "timm", "albumentations", "numpy")


def provenance() -> dict[str, Any]:
    """Return commit, library versions and thread count as plain types."""
    return {
        "commit": current_commit(),
        "versions": {name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        # what scores somebody's detections does without torch, and in one thread
        "threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1,
    }


def current_commit() -> str | None:
    """Return the commit of this package's checkout, `+` if files differ; None outside of git."""
    folder = Path(__file__).parent
    try:
        _git(
            folder, "ls-files", "--error-unmatch", Path(__file__).name
        )  # a wheel in somebody else's project
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        return commit + (
            "+" if _git(folder, "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware(device: "torch.device", processes: int = 1) -> str:
    """Return the name of the GPUs, one a process, or of the CPU and its number of usable cores."""
    if device.type == "cuda":
        import torch

        return f"{processes} x {torch.cuda.get_device_name(device)}"
    return f"{available_cpus()} x {_cpu_name()}"


def available_cpus() -> int:
    """Return how many CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_digest(path: Path) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
