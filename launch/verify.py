"""Replay reference cases: `python launch/verify.py --cases tests/golden --cases tests/golden_model`.

A folder may hold cases of the memory layer and of whole models. With `--ranks 4` the cases of the memory layer run in
four processes, with tokens and slots divided among them. Prints a table case -> worst relative error of every array,
and exits with 1 when one is out of tolerance, 2 when the cases can't be read.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_fwpkm.convert.golden import is_model_case, replay_model_case
from megatron_fwpkm.memory.golden import CaseResult, GoldenCaseError, find_cases, replay_case
from megatron_fwpkm.memory.golden_ranks import replay_over_ranks

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Columns = Mapping[str, tuple[str, ...]]
# Table columns and the beginnings of the arrays' names that they gather.
LAYER_COLUMNS: Columns = {
    "output": ("output",),
    "slots": ("indices",),
    "weights": ("scores",),
    "losses": ("losses",),
    "addressing": ("addr_loss",),
    "keys": ("keys_final", "keys_after"),
    "values": ("values_final", "values_after"),
    "d query": ("d_q",),
    "d value": ("d_ref_v",),
    "d gate": ("d_gates",),
    "d keys": ("d_keys0",),
    "d values": ("d_values0",),
}
MODEL_COLUMNS: Columns = {
    "logits": ("logits",),
    "loss": ("loss",),
    "gates": ("fwpkm_gates",),
    "memory losses": ("fwpkm_losses",),
    "fast state": ("layer",),
    "statistics": ("statistics",),
    "gradients": ("grad/",),
    "gradient norms": ("gradnorm/",),
}


def _cells(result: CaseResult, columns: Columns) -> list[str]:
    cells = []
    for names in columns.values():
        arrays = [a for a in result.arrays if a.name.startswith(names)]
        if not arrays:
            cells.append("")
            continue
        worst = max(arrays, key=lambda a: (not a.passed, a.error))
        text = f"{worst.error:.0e}" if worst.error else "0"
        cells.append(text if all(a.passed for a in arrays) else f"[bold red]{text}![/]")
    return cells


def _is_model(path: Path) -> bool:
    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise GoldenCaseError(f"{path}: not readable as JSON ({error})") from error
    return isinstance(description, dict) and is_model_case(description)


def _show(results: list[CaseResult], dtype: str, columns: Columns, title: str, console: Console) -> list[str]:
    """Print the table of one kind of case; returns a line for every failure."""
    failed: list[str] = []
    table = Table("case", *columns, "", title=f"{title}, {dtype}: max|a - b| / max|b|", box=None, header_style="bold")
    for result in results:
        table.add_row(result.name, *_cells(result, columns), "ok" if result.passed else "[bold red]FAILED[/]")
        failed += [
            f"{dtype} {result.name} {a.name}: error {a.error:.3e}, tolerance {a.tolerance:.1e}"
            for a in result.arrays
            if not a.passed
        ]
        if not result.arrays:
            failed.append(f"{dtype} {result.name}: nothing to compare")
    console.print(table)
    return failed


def main(
    cases: Annotated[list[Path] | None, typer.Option(help="Folder of cases; may be given several times.")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32 or both.")] = "both",
    ranks: Annotated[int, typer.Option(help="Processes that divide tokens and slots of layer cases.", min=1)] = 1,
) -> None:
    """Replay every case of the folders (tests/golden if none is given) against this implementation."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if dtype not in (*DTYPES, "both"):
        console.print(f"--dtype is {dtype!r}; allowed: float64, float32, both")
        raise typer.Exit(2)
    failed: list[str] = []
    try:
        paths = [path for folder in cases or [Path("tests/golden")] for path in find_cases(folder)]
        models = [path for path in paths if _is_model(path)]
        layers = [path for path in paths if path not in models]
        for name in DTYPES if dtype == "both" else (dtype,):
            if layers and ranks == 1:
                results = [replay_case(path, DTYPES[name]) for path in layers]
                failed += _show(results, name, LAYER_COLUMNS, "memory layer", console)
            elif layers:
                results = replay_over_ranks(layers, DTYPES[name], ranks)
                failed += _show(results, name, LAYER_COLUMNS, f"memory layer on {ranks} ranks", console)
            if models:
                results = [replay_model_case(path, DTYPES[name]) for path in models]
                failed += _show(results, name, MODEL_COLUMNS, "whole models", console)
    except GoldenCaseError as error:
        console.print(f"verify: {error}", style="bold red", markup=False)
        raise typer.Exit(2) from None
    for line in failed:
        console.print(line, markup=False)
    console.print(f"{len(paths)} cases, {len(failed)} arrays out of tolerance")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
