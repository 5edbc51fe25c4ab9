"""Benchmark of saving checkpoints: `python launch/bench_checkpoint.py --help`.

Trains a model in several processes and saves its checkpoints in turns beside training and while training waits; prints
how long training waited and how fast files were written, and writes build/bench/checkpoint.json.
"""

import sys
from pathlib import Path
from typing import Annotated

# Let the repository be found from a checkout too, and keep this folder's file names from hiding other modules.
_ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "launch":
    sys.path[0:1] = [str(_ROOT), str(_ROOT / "kernels")]

import typer  # noqa: E402


def main(
    config: Annotated[Path, typer.Option(help="Training configuration.")] = Path("configs/train/nano.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value pairs that override the file.")] = None,
    folder: Annotated[
        Path, typer.Option(help="Where checkpoints are written, on the disk to measure; removed at the end.")
    ] = Path("build/bench/checkpoints"),
    repeats: Annotated[int, typer.Option(min=1, help="Saves of each kind, in turns; medians are reported.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps after each save.")] = 8,
    out: Annotated[Path, typer.Option(help="Where the figures go, as JSON.")] = Path("build/bench/checkpoint.json"),
) -> None:
    """Pause of training and bandwidth of saving, beside training against while it waits."""
    from megatron_fwpkm.parallel.topology import started_by_launcher
    from megatron_fwpkm.profiling.checkpoint_benchmark import CheckpointSettings, run_as_rank, start_benchmark
    from megatron_fwpkm.train.launcher import ending_with_a_status

    settings = CheckpointSettings(config, tuple(overrides or ()), folder, repeats, steps, out)
    with ending_with_a_status():
        if started_by_launcher():
            run_as_rank(settings)
            return
        raise typer.Exit(start_benchmark(settings, ["--", *sys.argv]))


if __name__ == "__main__":
    typer.run(main)
