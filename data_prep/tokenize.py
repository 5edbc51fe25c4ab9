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
    overrides: list[str] = typer.Argument(None, help="key=value pairs that override the file."),
) -> None:
    """Tokenize a corpus into MDS shards; a finished preparation of the same request is reused."""
    from megatron_fwpkm.config import load_data_config
    from megatron_fwpkm.data.prepare import corpus_request, prepare_corpus

    try:
        settings = load_data_config(config, overrides or [])
        prepare_corpus(corpus_request(settings, seed), Path(settings.directory), report=print)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(main)
