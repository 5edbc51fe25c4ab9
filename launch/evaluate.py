"""Measure a trained run: perplexity with and without its memory, needles in haystacks, pictures, a summary."""

import sys
from pathlib import Path

# Let the repository be found from a checkout too, and keep this folder's file names from hiding other modules.
_ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "launch":
    sys.path[0:1] = [str(_ROOT), str(_ROOT / "kernels")]

import typer  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    run: Path = typer.Option(..., help="Run directory of a training run."),
    overrides: list[str] = typer.Argument(None, help="evaluation.sub=value pairs that override the run's config.yaml."),
    against: Path = typer.Option(None, help="Run directory of a twin trained on the same corpus, to compare with."),
    checkpoint: str = typer.Option(None, help="Checkpoint of the run, step_...; default: the newest complete one."),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Given by the deepspeed launcher; unused."),
) -> None:
    """Evaluate. Under torchrun this is one process of the job; otherwise it starts one a core."""
    from megatron_fwpkm.evaluate.measure import Request, processes_to_start, run_evaluation
    from megatron_fwpkm.parallel.topology import started_by_launcher
    from megatron_fwpkm.train.launcher import ending_with_a_status, start_processes

    request = Request(run, against, checkpoint, overrides or [])
    with ending_with_a_status():
        if started_by_launcher():
            run_evaluation(request)
            return
        # Without "--" torch.distributed.run would take --run for an option of its own.
        raise typer.Exit(start_processes(["--", *sys.argv], processes_to_start(request), run))


if __name__ == "__main__":
    app()
