"""Replay reference cases: `python launch/verify.py --cases tests/golden`.

Prints a table case -> worst relative error of every array, and exits with 1 when one is out of tolerance, 2 when the
cases can't be read.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from megatron_fwpkm.memory.golden import CaseResult, GoldenCaseError, find_cases, replay_case

DTYPES = {"float64": torch.float64, "float32": torch.float32}
# Table columns and the array names (less the call's suffix) that they gather.
COLUMNS = {
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


def _cells(result: CaseResult) -> list[str]:
    cells = []
    for names in COLUMNS.values():
        arrays = [a for a in result.arrays if a.name.startswith(names)]
        if not arrays:
            cells.append("")
            continue
        worst = max(arrays, key=lambda a: (not a.passed, a.error))
        text = f"{worst.error:.0e}" if worst.error else "0"
        cells.append(text if all(a.passed for a in arrays) else f"[bold red]{text}![/]")
    return cells


def main(
    cases: Annotated[Path, typer.Option(help="Folder of cases: .json and .npz pairs.")] = Path("tests/golden"),
    dtype: Annotated[str, typer.Option(help="float64, float32 or both.")] = "both",
) -> None:
    """Replay every case of a folder against the memory layer."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    if dtype not in (*DTYPES, "both"):
        console.print(f"--dtype is {dtype!r}; allowed: float64, float32, both")
        raise typer.Exit(2)
    failed: list[str] = []
    try:
        paths = find_cases(cases)
        for name in DTYPES if dtype == "both" else (dtype,):
            table = Table("case", *COLUMNS, "", title=f"{name}: max|a - b| / max|b|", box=None, header_style="bold")
            for path in paths:
                result = replay_case(path, DTYPES[name])
                table.add_row(result.name, *_cells(result), "ok" if result.passed else "[bold red]FAILED[/]")
                failed += [
                    f"{name} {result.name} {a.name}: error {a.error:.3e}, tolerance {a.tolerance:.1e}"
                    for a in result.arrays
                    if not a.passed
                ]
                if not result.arrays:
                    failed.append(f"{name} {result.name}: nothing to compare")
            console.print(table)
    except GoldenCaseError as error:
        console.print(f"verify: {error}", style="bold red", markup=False)
        raise typer.Exit(2) from None
    for line in failed:
        console.print(line, markup=False)
    console.print(f"{len(paths)} cases, {len(failed)} arrays out of tolerance")
    raise typer.Exit(1 if failed else 0)


if __name__ == "__main__":
    typer.run(main)
