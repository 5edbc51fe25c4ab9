"""environment.json: what a run runs on, so that its figures can be read later."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_fwpkm.profiling.peak import Peak

_LIBRARIES = (
    *(
        "torch",
        "deepspeed",
        "megatron-core",
        "mosaicml-streaming",
        "tokenizers",
        "transformers",
        "safetensors",
        "numpy",
    ),
    *("triton", "transformer-engine", "flash-linear-attention"),
)
_GIT_SECONDS = 10


def describe_environment(world_size: int, peak: Peak) -> dict[str, Any]:
    """Python, libraries, machine (this one), processes, commit of the checkout, command line, peak behind MFU."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "processes": world_size,
        "threads_per_process": torch.get_num_threads(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "git": git_state(Path(__file__).resolve().parents[2]),
        "command": sys.argv,
        "peak_flops_per_process": peak.flops,
        "peak_source": peak.source,
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Commit of a checkout and whether files differ from it; None where there is no checkout or no git."""
    if not (checkout / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(checkout), *arguments],
                capture_output=True,
                text=True,
                timeout=_GIT_SECONDS,
                check=True,
            ).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
