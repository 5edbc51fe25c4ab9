"""What `doctor` asks of the machine itself: shared memory, file descriptors, disk, cores and memory."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

GIB = 1024**3
SHARED_MEMORY = Path("/dev/shm")
# Loader workers and process groups share batches here; containers often get 64 MiB.
LEAST_SHARED_MEMORY = GIB
LEAST_FILE_DESCRIPTORS = 4096
LEAST_DISK = 10 * GIB
LEAST_MEMORY = 4 * GIB

Status = Literal["ok", "warning", "missing", "broken"]

# Names that mosaicml-streaming gives its segments: a six-digit prefix and what the segment is for.
_STREAMING_SEGMENT = re.compile(
    r"\d{6}_(locals|barrier|next_epoch|cache_usage|shard_states|shard_access_times|resume|epoch_shape|epoch_data)"
)


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        area: group of checks that it belongs to: python, library, backend or machine.
        name: what was checked.
        status: ok; warning (works, but may hurt); missing; broken (there, but does not work).
        detail: what was found.
        hint: what to install or do, empty where nothing needs doing.
        required: whether the main job on a CPU needs it.
    """

    area: str
    name: str
    status: Status
    detail: str
    hint: str = ""
    required: bool = False


def check_machine(folder: Path) -> list[Check]:
    """Check the machine as a job started in `folder` would find it; works on Linux, elsewhere in part."""
    return [
        check_shared_memory(),
        check_stale_segments(),
        check_file_descriptors(),
        check_disk(folder),
        check_cores(),
        check_memory(),
    ]


def check_shared_memory(folder: Path = SHARED_MEMORY) -> Check:
    """Size and free space of shared memory."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return Check("machine", "shared memory", "warning", f"no {folder}", f"mount a tmpfs on {folder}")
    detail = f"{_gib(usage.free)} of {_gib(usage.total)} free in {folder}"
    if usage.free < LEAST_SHARED_MEMORY:
        hint = "data loaders may die with a bus error; free or enlarge it (containers: --shm-size=8g)"
        return Check("machine", "shared memory", "warning", detail, hint)
    return Check("machine", "shared memory", "ok", detail)


def check_stale_segments(folder: Path = SHARED_MEMORY) -> Check:
    """Number of streaming's shared-memory segments that no process uses any more."""
    stale = stale_segments(folder)
    if not stale:
        return Check("machine", "stale segments", "ok", "none")
    size = sum(path.stat().st_size for path in stale if path.exists())
    detail = f"{len(stale)} left behind by killed data loaders, {size / 1024**2:.1f} MiB"
    names = " ".join(str(path) for path in stale[:3]) + (" ..." if len(stale) > 3 else "")
    return Check("machine", "stale segments", "warning", detail, f"remove them when no job is starting: rm {names}")


def stale_segments(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Streaming's segments in `folder` that no live process has mapped, as far as this user may see."""
    try:
        segments = [path for path in folder.iterdir() if _STREAMING_SEGMENT.fullmatch(path.name)]
    except OSError:
        return []
    used = mapped_files(folder) if segments else set()
    return sorted(path for path in segments if str(path) not in used)


def mapped_files(folder: Path) -> set[str]:
    """Paths below `folder` that live processes have mapped, from their memory maps; other users' are not readable."""
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text(errors="replace").splitlines()
        except OSError:  # the process ended, or is another user's
            continue
        for line in lines:
            position = line.find(f"{folder}/")
            if position >= 0:
                mapped.add(line[position:].removesuffix(" (deleted)"))
    return mapped


def check_file_descriptors() -> Check:
    """Limits on open files: loaders and sockets of many ranks use thousands."""
    try:
        import resource  # not on every platform
    except ImportError:
        return Check("machine", "open files", "warning", "this platform does not tell its limit")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def shown(limit: int) -> str:
        return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)

    detail = f"soft limit {shown(soft)}, hard limit {shown(hard)}"
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILE_DESCRIPTORS:
        possible = hard == resource.RLIM_INFINITY or hard >= LEAST_FILE_DESCRIPTORS
        target = "65536" if hard == resource.RLIM_INFINITY else str(hard)
        hint = f"ulimit -n {target}" if possible else "have an administrator raise the hard limit (nofile)"
        return Check("machine", "open files", "warning", detail, hint)
    return Check("machine", "open files", "ok", detail)


def check_disk(folder: Path) -> Check:
    """Free disk space where runs and data go."""
    free = shutil.disk_usage(folder).free
    detail = f"{_gib(free)} free for {folder}"
    if free < LEAST_DISK:
        hint = f"checkpoints and data need room: less than {_gib(LEAST_DISK)} is left"
        return Check("machine", "disk", "warning", detail, hint)
    return Check("machine", "disk", "ok", detail)


def check_cores() -> Check:
    """Cores that this process may use, which affinity masks and containers limit below what the machine has."""
    total = os.cpu_count() or 1
    usable = float(len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else float(total)
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        usable = min(usable, int(quota[0]) / int(quota[1]))
    return Check("machine", "cores", "ok", f"{usable:g} usable of {total}")


def check_memory() -> Check:
    """Memory that is available to new processes, within the container's limit where it has one."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Check("machine", "memory", "warning", "this platform does not tell its free memory")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    if limit.isdigit() and used.isdigit():
        total, available = min(total, int(limit)), min(available, max(0, int(limit) - int(used)))
    detail = f"{_gib(available)} of {_gib(total)} available"
    if available < LEAST_MEMORY:
        return Check("machine", "memory", "warning", detail, f"a small CPU job wants about {_gib(LEAST_MEMORY)}")
    return Check("machine", "memory", "ok", detail)


def _cgroup(name: str) -> str:
    """A control file of this process's container (cgroup version 2), '' where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
