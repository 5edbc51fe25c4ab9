"""Benchmark of the memory layer: the touched-rows path against the dense reference.

Every measurement runs in a process of its own, so that its peak memory is its own: `peak_extra_bytes` is the process's
high-water mark less what it held when the memory and the inputs existed. `bytes_moved` counts what operations on value
rows really touched (see `traffic.RowTraffic`); `bytes_floor` is the least that the method needs: rows touched * bytes
of a row * passes, with one read and one write of each touched row of a chunk forward, and one read of the saved row
and one read and one write of its gradient backward.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PASSES_FORWARD = 2
PASSES_BACKWARD = 3


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured: sizes n, tokens, chunk, width (k_dim = v_dim), topk, timed repeats."""

    sizes: tuple[int, ...]
    tokens: int
    chunk: int
    width: int
    topk: int
    repeats: int


@dataclass
class BenchmarkRow:
    """One path at one size. Times in seconds (medians), sizes in bytes."""

    path: str
    n: int
    tokens: int
    forward_s: float
    total_s: float
    peak_extra_bytes: int
    bytes_moved: int
    bytes_floor: int
    touched_rows: int
    raw_rows_s: float


def _peak_reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def _make(settings: BenchmarkSettings, n: int) -> tuple[Any, Any, list[torch.Tensor]]:
    from megatron_fwpkm.memory import FastState, MemoryConfig

    config = MemoryConfig(
        n_subkeys=n,
        k_dim=settings.width,
        v_dim=settings.width,
        topk=settings.topk,
        chunk_size=settings.chunk,
    )
    state = FastState(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, settings.tokens, 1, settings.width, generator=generator, requires_grad=True)
    target = torch.randn(1, settings.tokens, settings.width, generator=generator, requires_grad=True)
    gate = torch.rand(1, settings.tokens, generator=generator, requires_grad=True)
    return config, state, [query, target, gate]


def _runner(path: str, config: Any, state: Any, leaves: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    from megatron_fwpkm.memory import fast_memory
    from megatron_fwpkm.memory.reference import reference_memory

    query, target, gate = leaves
    if path == "fast":
        return lambda: fast_memory(query, target, gate, None, state, config)
    keys, values = state.keys_H2nd, state.table_ND
    return lambda: reference_memory(query, target, gate, None, keys, values, config, matmul_scores=True).read_BTD


def measure_row(settings: BenchmarkSettings, path: str, n: int) -> BenchmarkRow:
    """Measure one path at one size in this process (which must be fresh for the peak to mean something)."""
    from megatron_fwpkm.memory import FastState, MemoryTrace, fast_memory
    from megatron_fwpkm.profiling.traffic import RowTraffic

    config, state, leaves = _make(settings, n)
    forward = _runner(path, config, state, leaves)
    cotangent = torch.randn(1, settings.tokens, settings.width)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward().backward(cotangent)

    small = BenchmarkSettings((16,), 32, 16, settings.width, 4, 1)
    small_parts = _make(small, 16)
    _runner(path, *small_parts)().sum().backward()  # libraries load their code outside the measurement
    gc.collect()
    _peak_reset()
    baseline = _status("VmRSS")
    both()
    peak = _status("VmHWM") - baseline
    repeats = settings.repeats if path == "fast" else max(1, settings.repeats // 5)
    for _ in range(3 if path == "fast" else 0):  # the allocator settles; the peak above is of the first pass
        both()
    forward_times, total_times = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        out = forward()
        middle = time.perf_counter()
        out.backward(cotangent)
        total_times.append(time.perf_counter() - start)
        forward_times.append(middle - start)
        del out
    with RowTraffic(settings.width) as traffic:
        both()
    fresh = FastState(config, seed=0)  # all paths are asked about the same slots
    state.replace(fresh.keys_H2nd, fresh.table_ND)
    del fresh
    trace = MemoryTrace()
    with torch.no_grad():
        fast_memory(leaves[0], leaves[1], leaves[2], None, state, config, trace=trace)
    assert trace.slots_BTHK is not None
    per_chunk = [int(piece.unique().numel()) for piece in trace.slots_BTHK.split(settings.chunk, 1)]
    touched = sum(per_chunk)
    return BenchmarkRow(
        path,
        n,
        settings.tokens,
        statistics.median(forward_times),
        statistics.median(total_times),
        peak,
        traffic.bytes_moved,
        touched * settings.width * 4 * (PASSES_FORWARD + PASSES_BACKWARD),
        touched,
        _raw_rows(state.table_ND, trace.slots_BTHK, settings),
    )


def _raw_rows(table_ND: torch.Tensor, slots: torch.Tensor, settings: BenchmarkSettings) -> float:
    """Seconds of nothing but index_select and index_add_ of the touched rows: what memory and caches allow."""
    chunks = [piece.unique() for piece in slots.split(settings.chunk, 1)]
    change = [torch.zeros(c.numel(), settings.width) for c in chunks]
    times = []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        for index, rows in zip(chunks, change, strict=True):
            table_ND.index_select(0, index)
            table_ND.index_add_(0, index, rows)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _reference_fits(settings: BenchmarkSettings, n: int) -> bool:
    """The reference keeps several tables for each chunk until its backward pass."""
    table = n * n * settings.width * 4
    chunks = -(-settings.tokens // settings.chunk)
    available = int(_meminfo("MemAvailable"))
    return table * (4 * chunks + 6) < 0.8 * available


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/meminfo has no {name}")


def _in_fresh_process(settings: BenchmarkSettings, path: str, n: int) -> BenchmarkRow:
    request = json.dumps({"settings": asdict(settings), "path": path, "n": n})
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fwpkm.profiling.memory_benchmark", request],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the measurement of {path} at n = {n} failed:\n{done.stderr[-2000:]}")
    return BenchmarkRow(**json.loads(done.stdout.splitlines()[-1]))


def run_benchmark(settings: BenchmarkSettings, out: Path) -> list[BenchmarkRow]:
    """Measure all sizes, print a table and the ratios, and write the rows as JSON."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140)
    rows: list[BenchmarkRow] = []
    for n in settings.sizes:
        for path in ("fast", "reference"):
            if path == "reference" and not _reference_fits(settings, n):
                console.print(f"n = {n}: the reference does not fit into this machine's memory", highlight=False)
                continue
            with console.status(f"n = {n}, {path}"):
                rows.append(_in_fresh_process(settings, path, n))
    console.print(_table(rows))
    for line in _ratios(rows):
        console.print(line, highlight=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console.print(
        f"rows in {out}; {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        highlight=False,
    )
    return rows


def _table(rows: list[BenchmarkRow]) -> Any:
    from rich.table import Table

    columns = ("path", "n", "tokens", "forward ms", "total ms", "peak MiB", "moved MiB", "floor MiB", "rows", "raw ms")
    table = Table(*columns, box=None, title="memory layer, forward + backward")
    for row in rows:
        sizes = (row.peak_extra_bytes, row.bytes_moved, row.bytes_floor)
        table.add_row(
            row.path,
            str(row.n),
            str(row.tokens),
            f"{row.forward_s * 1e3:.1f}",
            f"{row.total_s * 1e3:.1f}",
            *(f"{size / 2**20:.0f}" for size in sizes),
            str(row.touched_rows),
            f"{row.raw_rows_s * 1e3:.1f}",
        )
    return table


def _ratios(rows: list[BenchmarkRow]) -> list[str]:
    fast = {row.n: row for row in rows if row.path == "fast"}
    lines = []
    for row in rows:
        if row.path == "reference" and row.n in fast:
            mine = fast[row.n]
            lines.append(
                f"n = {row.n}: {row.total_s / mine.total_s:.1f}x faster than the reference, "
                f"{row.peak_extra_bytes / max(mine.peak_extra_bytes, 1):.1f}x less peak memory, "
                f"{row.bytes_moved / mine.bytes_moved:.0f}x fewer bytes moved"
            )
    largest = max(fast)
    lines += [
        f"n = {largest} takes {fast[largest].total_s / row.total_s:.2f}x the time of n = {n}"
        for n, row in fast.items()
        if n < largest
    ]
    lines += [f"n = {n}: {row.bytes_moved / row.bytes_floor:.2f}x the floor of bytes" for n, row in fast.items()]
    return lines


def _main() -> None:
    request = json.loads(sys.argv[1])
    settings = BenchmarkSettings(**{**request["settings"], "sizes": tuple(request["settings"]["sizes"])})
    print(json.dumps(asdict(measure_row(settings, request["path"], request["n"]))))


if __name__ == "__main__":
    _main()
