"""Look at checkpoints, verify them, write them in another layout, delete superfluous ones."""

import sys
from pathlib import Path

# Let the repository be found from a checkout too, and keep this folder's file names from hiding other modules.
_ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "launch":
    sys.path[0:1] = [str(_ROOT), str(_ROOT / "kernels")]

import typer  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
_PLACE = typer.Argument(..., help="A run directory, or one checkpoint in it: runs/nano/checkpoints/step_00000600.")


@app.command()
def inspect(place: Path = _PLACE) -> None:
    """Show a run's checkpoints, or what is in one: step, tokens, layout, tensors, sizes."""
    from megatron_fwpkm.checkpoint.show import show
    from megatron_fwpkm.terminal import new_console
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        show(place, new_console())


@app.command()
def verify(place: Path = _PLACE) -> None:
    """Read every file and compare it with its hash; status 1 if a checkpoint is damaged."""
    from megatron_fwpkm.checkpoint.show import verify_all
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        raise typer.Exit(0 if verify_all(place) else 1)


@app.command()
def prune(
    run: Path = typer.Argument(..., help="A run directory."),
    keep_last_k: int = typer.Option(..., min=1, help="Newest whole checkpoints to keep."),
    keep_every: int = typer.Option(None, min=1, help="Also keep those of multiples of so many steps."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would be deleted; delete nothing."),
) -> None:
    """Delete whole checkpoints that are neither among the newest nor milestones; refuses while a job runs there."""
    from megatron_fwpkm.checkpoint.show import prune_run
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        prune_run(run, keep_last_k, keep_every, dry_run=dry_run)


@app.command()
def reshard(
    run: Path = typer.Argument(..., help="Run directory of a training run."),
    out: Path = typer.Argument(..., help="Run directory to write: the checkpoint and a config.yaml to go on with."),
    overrides: list[str] = typer.Argument(None, help="The new layout: parallel.tensor=4 training.zero_stage=1 ..."),
    checkpoint: str = typer.Option(None, help="Checkpoint of the run, step_...; default: the newest complete one."),
) -> None:
    """Write a checkpoint as a job of another layout would. (Any layout loads any checkpoint: this is no need.)"""
    from megatron_fwpkm.checkpoint.catalogue import choose_checkpoint
    from megatron_fwpkm.parallel.topology import started_by_launcher
    from megatron_fwpkm.train.launcher import ending_with_a_status, start_processes
    from megatron_fwpkm.train.reshard import RESHARDING, reshard_config
    from megatron_fwpkm.train.reshard import reshard as reshard_as_rank

    with ending_with_a_status():
        source = choose_checkpoint(run, checkpoint)
        config = reshard_config(run, out, overrides or [], source)
        if started_by_launcher():
            reshard_as_rank(config, source)
            return
        raise typer.Exit(start_processes(["--", *sys.argv], config.parallel.processes, out, RESHARDING))


if __name__ == "__main__":
    app()
