"""Benchmark of the memory layer: `make bench`, or `python launch/bench_memory.py --help`.

Compares the touched-rows path with the dense reference in one run, prints a table and writes
build/bench/memory_layer.json.
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_fwpkm.profiling.memory_benchmark import BenchmarkSettings, run_benchmark
from megatron_fwpkm.profiling.operations_benchmark import run_operations_benchmark


def main(
    n: Annotated[list[int] | None, typer.Option(help="Sub-keys per half; repeat for several.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the call.")] = 2048,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens between writes.")] = 512,
    width: Annotated[int, typer.Option(help="k_dim and v_dim.")] = 512,
    topk: Annotated[int, typer.Option(help="Slots read per token.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of the fast path; medians are reported.")] = 15,
    operations: Annotated[bool, typer.Option(help="Time candidates for each sparse operation instead.")] = False,
    out: Annotated[Path, typer.Option(help="Where the rows go, as JSON.")] = Path("build/bench/memory_layer.json"),
) -> None:
    """Time, peak memory and bytes moved of the memory layer's forward and backward pass."""
    if operations:
        run_operations_benchmark(chunk, topk, width, max(n or (512,)) ** 2, repeats=20)
        return
    run_benchmark(BenchmarkSettings(tuple(n or (128, 256, 512, 1024)), tokens, chunk, width, topk, repeats), out)


if __name__ == "__main__":
    typer.run(main)
