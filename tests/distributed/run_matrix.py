"""The whole equivalence matrix: `python -m tests.distributed.run_matrix`; writes docs/matrix.md.

One launch for each number of processes, in which groups are built anew for every cell. Of eight processes there is a
pairwise cover. Results are kept in build/matrix as they are found: run again on the same commit, it goes on where it
ended. Exits with 1 when a cell is out of tolerance.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.cells import KINDS, SMALLEST_MARGIN, TOLERANCES, Cell, all_cells, complaints, pairwise_cover

ROOT = Path(__file__).parents[2]
HEADER = """# The equivalence matrix

Written by `make matrix`. Every row is a layout in which a tiny hybrid model (full attention, delta net, sliding window;
memories in the first and in the last of four blocks) is trained for 5 steps, and compared with one rank in plain torch:
loss and gradient norm of every step, all gradients of every step before clipping and optimizer, the weights at the end,
and of all memories sub-keys and values at the end and the losses in the last microbatch. Numbers are the norm of the
difference over the norm, the worst of all tensors, steps and ranks. Limits: {float32:g} in float32, {float64:g} in
float64.

The yardstick sees the same microbatches in the same order. Replicas that are `synced` are one rank whose microbatches
are theirs put together; independent ones are one process with a memory for each, whose gradients are added up.
"margin" is the smallest distance in any top-k of the run between what was chosen and what was not, above {margin:g}
everywhere in float32, so that no slot was chosen by rounding; seeds are searched for that, and so that nothing nearly
cancels (`tests/distributed/find_seeds.py`).

TP, PP, DP: tensor-, pipeline- and data-parallel size; SP: sequence parallelism; xN: microbatches of a step. Unusual:
all queries to one owner (one_owner), a measurement in the middle and a step that is not finite (incidents), sublayers
computed again in the backward pass (recompute), untied embeddings, other resets, messages of known size
(routing=static).

{count} cells, {wrong} errors out of tolerance.

| cell | loss | norm | gradients | weights | fast state | margin |
| --- | --- | --- | --- | --- | --- | --- |
"""


def run_cells(cells: list[Cell], processes: int, results: Path) -> None:
    """Let equivalence.py add what it finds of each cell to `results`. Raises CalledProcessError if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.json"
        path.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
        script = str(Path(__file__).parent / "workers" / "equivalence.py")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [*launcher, script, "unused", str(path), str(results)]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def results_file() -> Path:
    """Where results of this commit are kept; those of a changed working tree are not, they begin anew."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    folder = ROOT / "build" / "matrix"
    folder.mkdir(parents=True, exist_ok=True)
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    path = folder / f"{'changed' if changed else git('rev-parse', 'HEAD')}.jsonl"
    if changed:
        path.unlink(missing_ok=True)
    return path


def read_results(path: Path) -> dict[str, Any]:
    """What was found, by name of the cell; a line that was cut off counts for nothing."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {result["cell"]: result for result in found}


def main() -> None:
    """Run everything and write the table."""
    matrix = {processes: all_cells((processes,)) for processes in (1, 2, 4, 8)}
    matrix[8] = pairwise_cover(matrix[8])
    path = results_file()
    path.write_text("".join(json.dumps(result) + "\n" for result in read_results(path).values()))  # whole lines only
    for processes, cells in matrix.items():
        if missing := [cell for cell in cells if cell.name not in read_results(path)]:
            run_cells(missing, processes, path)
    found, cells = read_results(path), [cell for part in matrix.values() for cell in part]
    wrong = [text for cell in cells for text in complaints(cell, found[cell.name])]
    rows = []
    for cell in cells:
        result = found[cell.name]
        errors = " | ".join(f"{result[kind]:.0e}" for kind in KINDS)
        rows.append(f"| {cell.name} | {errors} | {result['margin']:.0e} |")
    header = HEADER.format(**TOLERANCES, margin=SMALLEST_MARGIN, count=len(cells), wrong=len(wrong))
    (ROOT / "docs" / "matrix.md").write_text(header + "\n".join(rows) + "\n")
    print("\n".join(wrong), f"{len(cells)} cells, {len(wrong)} errors out of tolerance", sep="\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
