"""The whole equivalence matrix: `python -m tests.distributed.run_matrix`; writes docs/matrix.md.

One launch for each number of processes, in which groups are built anew for every cell. Exits with 1 when a cell is out
of tolerance.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.cells import KINDS, SMALLEST_MARGIN, TOLERANCES, Cell, all_cells, complaints

ROOT = Path(__file__).parents[2]
HEADER = """# The equivalence matrix

Written by `make matrix`. Every row is a layout in which a tiny hybrid model (full attention, delta net, sliding window;
memories in the first and in the last block, both stages of a pipeline among them) is trained for 5 steps, and compared
with one rank in plain torch: the loss of every step, all gradients of every step before clipping and optimizer, the
weights at the end, sub-keys and values of all memories at the end. Numbers are the norm of the difference over the
norm, the worst of all tensors, steps and ranks. Limits: {float32:g} in float32, {float64:g} in float64.

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

| cell | loss | gradients | weights | fast state | margin |
| --- | --- | --- | --- | --- | --- |
"""


def run_cells(cells: list[Cell], processes: int) -> dict[str, Any]:
    """What equivalence.py found in so many processes, by name of the cell. Raises CalledProcessError if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.json"
        path.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
        script = str(Path(__file__).parent / "workers" / "equivalence.py")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        output = subprocess.run(
            [*launcher, script, "unused", str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    found: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    return found


def main() -> None:
    """Run everything and write the table."""
    rows, wrong, count = [], [], 0
    for processes in (1, 2, 4, 8):
        cells = all_cells((processes,))
        found = run_cells(cells, processes)
        for cell in cells:
            result = found[cell.name]
            wrong += complaints(cell, result)
            errors = " | ".join(f"{result[kind]:.0e}" for kind in KINDS)
            rows.append(f"| {cell.name} | {errors} | {result['margin']:.0e} |")
        count += len(cells)
    header = HEADER.format(**TOLERANCES, margin=SMALLEST_MARGIN, count=count, wrong=len(wrong))
    (ROOT / "docs" / "matrix.md").write_text(header + "\n".join(rows) + "\n")
    print("\n".join(wrong), f"{count} cells, {len(wrong)} errors out of tolerance", sep="\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
