"""Train a model: prepares data, starts the processes it needs, resumes by itself."""

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
    config: Path = typer.Option(Path("configs/train/nano.yaml"), help="Training configuration (YAML)."),
    overrides: list[str] = typer.Argument(None, help="key.sub=value pairs that override the file."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print the resolved configuration, what it costs and its layout; start nothing."
    ),
    device_memory: str = typer.Option(
        None,
        "--device-memory",
        help="With --dry-run: memory of one GPU, as 80GiB; tells whether the job fits and how long sequences may be.",
    ),
    processes: int = typer.Option(
        None,
        "--processes",
        min=1,
        help="With --dry-run: processes of a job that a launcher starts, on many machines.",
    ),
    local_rank: int = typer.Option(0, "--local_rank", hidden=True, help="Given by the deepspeed launcher; unused."),
) -> None:
    """Train. Under torchrun or the deepspeed launcher this is one process of the job; otherwise it starts them."""
    from megatron_fwpkm.config import load_train_config
    from megatron_fwpkm.parallel.topology import started_by_launcher
    from megatron_fwpkm.train.launcher import ending_with_a_status, start_processes

    with ending_with_a_status():
        settings = load_train_config(config, overrides or [])
        if dry_run:
            _print_plan(settings, device_memory, processes)
            return
        if started_by_launcher():
            from megatron_fwpkm.train.job import run_job

            run_job(settings)
            return
        # No more than is needed here: ranks import what they compute with.
        from megatron_fwpkm.terminal import print_line
        from megatron_fwpkm.train.job_data import prepare_data
        from megatron_fwpkm.train.layout import check_processes
        from megatron_fwpkm.train.run_directory import check_run_directory

        check_processes(settings, settings.parallel.processes)
        check_run_directory(settings)
        prepare_data(settings, report=print_line)
        status = start_processes(sys.argv, settings.parallel.processes, Path(settings.run_directory))
        raise typer.Exit(status)


def _print_plan(settings: "TrainConfig", device_memory: str | None, processes: int | None) -> None:  # type: ignore[name-defined]  # noqa: F821 - imported late
    from megatron_fwpkm.terminal import new_console
    from megatron_fwpkm.train.dry_run import make_plan, parse_bytes, print_plan

    size = None if device_memory is None else parse_bytes(device_memory)
    print_plan(settings, make_plan(settings, size, processes), new_console())


if __name__ == "__main__":
    app()
