"""Which code measured, when, and on which machine: what a number is worth nothing without."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch


def machine(device: torch.device | str = "") -> dict[str, Any]:
    """What times depend on besides the code; without a `device`, of the one that targets take."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    packages = {name: _version(name) for name in ("torch", "transformers", "triton")}
    return {"device": _device_name(chosen), "threads": torch.get_num_threads()} | packages


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@cache  # files that change later are not the code that runs
def commit() -> str:
    """The commit this code is of, with "+changes" where files differ; empty outside its history."""
    if not _git("ls-files", Path(__file__).name):
        return ""
    # figures are what a run writes, so they do not make its code another
    changes = _git("status", "--porcelain", "--untracked-files=no", ":/", ":(exclude,top)figures")
    return (_git("rev-parse", "HEAD") or "") + ("+changes" if changes else "")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says about this folder; nothing where there is no git or no repository."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
