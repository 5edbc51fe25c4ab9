"""Prepare a corpus by hand: tokenizer, token shards and manifest. `launch/train.py` does it when it is missing."""

import sys
from pathlib import Path

# Python puts this script's folder first on the path, where this file would hide the standard library's `tokenize`.
_ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "data_prep":
    sys.path[0:1] = [str(_ROOT), str(_ROOT / "kernels")]

import typer  # noqa: E402

from megatron_fwpkm.errors import UserError  # noqa: E402


def main(
    config: Path = typer.Option(Path("configs/data/stdlib.yaml"), help="A data configuration."),
    seed: int = typer.Option(1234, min=0, help="Seed of the document split; training uses its `seed`."),
    processes: int = typer.Option(None, min=1, help="Processes; default: one a core. The result doesn't depend on it."),
    overrides: list[str] = typer.Argument(None, help="key=value pairs that override the file."),
) -> None:
    """Tokenize a corpus into MDS shards; what is finished is reused, and a killed preparation goes on."""
    from megatron_fwpkm.config import load_data_config
    from megatron_fwpkm.data.corpus import prepare_corpus
    from megatron_fwpkm.data.prepare import PreparationStopped
    from megatron_fwpkm.terminal import print_line

    try:
        settings = load_data_config(config, overrides or [])
        if settings.recall is not None:
            raise UserError(f"{config}: source recall is drawn as it is read, there is nothing to prepare")
        prepare_corpus(settings, seed, print_line, processes)
    except PreparationStopped as stopped:
        typer.echo(str(stopped), err=True)
        raise typer.Exit(128 + stopped.signal_number) from None
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
