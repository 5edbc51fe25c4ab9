"""Measure recall: `python launch/recall.py --run runs/recall --against runs/recall-plain` (`make recall` trains both).

Prints accuracies with 95 % intervals over readings, numbers of pairs and lengths, and whether the claims of
docs/recall.md hold; writes recall.json and pictures into the run. Exits with 2 if the runs can't be measured.
"""

import sys
from pathlib import Path
from typing import Annotated

# Let the repository be found from a checkout too, and keep this folder's file names from hiding other modules.
_ROOT = Path(__file__).resolve().parents[1]
if sys.path and Path(sys.path[0] or ".").resolve() == _ROOT / "launch":
    sys.path[0:1] = [str(_ROOT), str(_ROOT / "kernels")]

import torch  # noqa: E402
import typer  # noqa: E402
from rich.table import Table  # noqa: E402

from megatron_fwpkm.evaluate.recall import LENGTHS, LONG_FILLER, READINGS, select  # noqa: E402
from megatron_fwpkm.evaluate.recall_run import RecallReport, measure_recall_run  # noqa: E402
from megatron_fwpkm.terminal import new_console, print_line  # noqa: E402
from megatron_fwpkm.train.launcher import ending_with_a_status  # noqa: E402


def _print(report: RecallReport, run: Path) -> None:
    console = new_console()
    task = report.task

    def show(title: str, readings: int, cases: list[tuple[str, int, int]]) -> None:
        """A table with a row for each case: its name, pairs, tokens of filler."""
        table = Table(title=f"accuracy, % [95 % interval]: {title}", title_justify="left")
        table.add_column("")
        for number in range(1, readings + 1):
            table.add_column(f"{number} reading{'s' if number > 1 else ''}", justify="right")
        table.add_column("no memory", justify="right")
        for name, pairs, filler_tokens in cases:
            plain = select(report.figures, False, pairs, filler_tokens)
            cells = [str(one) for one in select(report.figures, True, pairs, filler_tokens)[1 : readings + 1]]
            table.add_row(name, *cells, str(plain[-1]) if plain else "-")
        console.print(table)

    for filler_tokens in (task.filler_tokens, LONG_FILLER):
        rows = [(f"{pairs} pairs", pairs, filler_tokens) for pairs in task.numbers_of_pairs]
        show(f"{filler_tokens} tokens of filler", READINGS, rows)
    pairs, length = task.config.pairs, task.sequence_length
    rows = [(f"{times * length} tokens", pairs, task.filler_at(times)) for times in LENGTHS]
    show(f"{pairs} pairs, longer sequences", 2, rows)
    for block, gates in report.gates.items():
        shown = ", ".join(f"{kind} {mean:.3f}" for kind, mean in gates.items())
        console.print(f"mean gate of the memory in block {block}: {shown}", markup=False)
    for claim in report.claims:
        console.print(f"{'PASS' if claim.holds else 'FAIL'}  {claim.text}: {claim.found}", markup=False)
    console.print(f"measured in {report.seconds:.0f} s; figures and pictures: {run}/recall*", markup=False)


def main(
    run: Annotated[Path, typer.Option(help="Run with memory.")] = Path("runs/recall"),
    against: Annotated[Path, typer.Option(help="Its twin without memory.")] = Path("runs/recall-plain"),
    answers: Annotated[int, typer.Option(min=1, help="Least number of answers behind a figure.")] = 2560,
) -> None:
    """Measure how much a run recalls, against its twin without memory."""
    torch.set_num_threads(1)  # small tensors gain nothing from more, and lose much where cores are busy
    with ending_with_a_status():
        report = measure_recall_run(run, against, answers, say=print_line)
    _print(report, run)


if __name__ == "__main__":
    typer.run(main)
