"""Benchmark of memories spread over ranks: `python launch/bench_traffic.py --help`.

Compares slots in messages of any size and padded ones, columns, and naive row shipping over 1, 2 and 4 processes on
this machine (gloo); prints tables and writes build/bench/traffic.json.
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron_fwpkm.profiling.traffic_benchmark import TrafficSettings, run_traffic_benchmark


def main(
    ranks: Annotated[list[int] | None, typer.Option(help="Ranks of the memory group; repeat for several.")] = None,
    n: Annotated[int, typer.Option(min=8, help="Sub-keys per half.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the call.")] = 1024,
    chunk: Annotated[int, typer.Option(min=2, help="Tokens between writes.")] = 256,
    width: Annotated[int, typer.Option(min=4, help="k_dim and v_dim.")] = 256,
    topk: Annotated[int, typer.Option(min=1, help="Slots read per token.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each way, in turns; medians are reported.")] = 9,
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("build/bench/traffic.json"),
) -> None:
    """Bytes, messages and time of a memory's forward and backward pass over ranks; a model of faster links."""
    settings = TrafficSettings(tuple(ranks or (1, 2, 4)), n, tokens, chunk, width, topk, repeats)
    run_traffic_benchmark(settings, out)


if __name__ == "__main__":
    typer.run(main)
