"""Convert models: to Hugging Face and back, from the paper's code and back."""

import sys
from enum import StrEnum
from pathlib import Path

# Let the repository be found from a checkout too, and keep this folder's file names from hiding other modules.
_ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "launch":
    sys.path[0:1] = [str(_ROOT), str(_ROOT / "kernels")]

import typer  # noqa: E402

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)


class Dtype(StrEnum):
    """Types of slow weights in files."""

    float32 = "float32"
    bfloat16 = "bfloat16"


_PLACE = typer.Argument(..., help="A run directory, or one checkpoint in it: runs/nano/checkpoints/step_00000600.")
_NEW = typer.Argument(..., help="Folder to write; it must not be there yet.")
_CHECKPOINT = typer.Option(None, help="Checkpoint of the run, step_...; default: the newest complete one.")
_MEMORY = typer.Option(0, min=0, help="Which memory to take where replicas wrote one each.")
_SHARD = typer.Option("5GB", help="Largest size of one safetensors file.")
_DTYPE = typer.Option(Dtype.float32, help="Type of the slow weights; the memory stays float32.")
_TOKENIZER = typer.Option(None, help="tokenizer.json or a folder with one; default: that of the run's corpus.")
_NO_TOKENIZER = typer.Option(False, "--no-tokenizer", help="Write none.")
_SETTINGS = typer.Option(None, help="Settings to train with, like configs/train/nano.yaml; its model is not looked at.")
_OVERRIDES = typer.Argument(None, help="Settings of that training: key.sub=value ...")


@app.command()
def to_hf(
    place: Path = _PLACE,
    out: Path = _NEW,
    checkpoint: str = _CHECKPOINT,
    memory: int = _MEMORY,
    dtype: Dtype = _DTYPE,
    max_shard_size: str = _SHARD,
    tokenizer: str = _TOKENIZER,
    no_tokenizer: bool = _NO_TOKENIZER,
) -> None:
    """Export a run's model for transformers: weights, memory, tokenizer, model files, model card."""
    from megatron_fwpkm.convert.commands import run_to_hf
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        run_to_hf(
            place, out, checkpoint, memory, dtype.value, max_shard_size, tokenizer, with_tokenizer=not no_tokenizer
        )


@app.command()
def from_hf(
    folder: Path = typer.Argument(..., help="Exported folder: config.json and weights."),
    out: Path = typer.Argument(..., help="Run directory to write; it must not be there yet."),
    overrides: list[str] = _OVERRIDES,
    train_config: Path = _SETTINGS,
) -> None:
    """Begin a run with an exported model: launch/train.py goes on from it at any layout."""
    from megatron_fwpkm.convert.commands import hf_to_run
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        hf_to_run(folder, out, train_config, overrides or [])


@app.command()
def to_official(
    place: Path = _PLACE,
    out: Path = _NEW,
    checkpoint: str = _CHECKPOINT,
    memory: int = _MEMORY,
    max_shard_size: str = _SHARD,
) -> None:
    """Write a run's model as the paper's code reads it: config.json and safetensors."""
    from megatron_fwpkm.convert.commands import run_to_official
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        run_to_official(place, out, checkpoint, memory, max_shard_size)


@app.command()
def from_official(
    weights: Path = typer.Argument(
        ..., help="safetensors, pytorch_model.bin or mp_rank_00_model_states.pt, or a folder with one."
    ),
    config: Path = typer.Option(..., help="The config.json that belongs to them."),
    out: Path = typer.Option(None, help="Run directory to write, which begins with this model."),
    hf: Path = typer.Option(None, help="Folder to write for transformers."),
    overrides: list[str] = _OVERRIDES,
    train_config: Path = _SETTINGS,
    dtype: Dtype = _DTYPE,
    max_shard_size: str = _SHARD,
    tokenizer: str = typer.Option(None, help="tokenizer.json or a folder with one, for --hf."),
) -> None:
    """Bring weights of the paper's code here (--out), to Hugging Face (--hf), or only check that they fit."""
    from megatron_fwpkm.convert.commands import official_to_run
    from megatron_fwpkm.train.launcher import ending_with_a_status

    with ending_with_a_status():
        official_to_run(weights, config, out, hf, train_config, overrides or [], dtype.value, max_shard_size, tokenizer)


if __name__ == "__main__":
    app()
