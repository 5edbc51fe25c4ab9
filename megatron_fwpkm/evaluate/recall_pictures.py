"""Pictures of recall: accuracy over readings, and over length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_fwpkm.evaluate.recall import LENGTHS, LONG_FILLER, Figure, RecallTask, select


def draw_readings(figures: list[Figure], task: RecallTask, path: Path) -> None:
    """Accuracy over readings, a line for each number of pairs, behind the filler of training and a long one."""
    pyplot = _pyplot()
    fillers = [task.filler_tokens, LONG_FILLER]
    figure, panels = pyplot.subplots(1, len(fillers), figsize=(10, 4), sharey=True, layout="constrained")
    shades = pyplot.get_cmap("viridis")
    for panel, filler_tokens in zip(panels, fillers, strict=True):
        for place, pairs in enumerate(task.numbers_of_pairs):
            found = select(figures, True, pairs, filler_tokens)
            colour = shades(0.9 * place / max(1, len(task.numbers_of_pairs) - 1))
            _line(panel, [one.readings for one in found], found, color=colour, label=f"{pairs} pairs")
        _chance(panel, task)
        panel.set_title(f"{filler_tokens} tokens of filler")
        panel.set_xlabel("readings")
        panel.set_xticks(range(len(select(figures, True, task.config.pairs, filler_tokens))))
    panels[0].set_ylabel("accuracy, %")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def draw_lengths(figures: list[Figure], task: RecallTask, path: Path) -> None:
    """Accuracy over the length of sequences with the pairs of training, a line for each number of readings."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    lengths = [multiple * task.sequence_length for multiple in LENGTHS]
    cases = [task.filler_at(multiple) for multiple in LENGTHS]
    for readings in (1, 2):
        found = [select(figures, True, task.config.pairs, tokens)[readings] for tokens in cases]
        label = f"with memory, {readings} reading{'s' if readings > 1 else ''}"
        _line(panel, lengths, found, label=label)
    found = [select(figures, False, task.config.pairs, tokens)[1] for tokens in cases]
    _line(panel, lengths, found, color="tab:red", label="without memory")
    _chance(panel, task)
    panel.axvline(task.sequence_length, color="grey", linewidth=0.8)
    panel.annotate("trained", (task.sequence_length, 50), rotation=90, ha="right", va="center", color="grey")
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [str(length) for length in lengths])
    panel.set_xlabel(f"tokens of a sequence with {task.config.pairs} pairs")
    panel.set_ylabel("accuracy, %")
    panel.legend(loc="center right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _line(panel: Any, x: list[int], found: list[Figure], **style: Any) -> None:
    accuracy = [100 * one.accuracy for one in found]
    below = [100 * (one.accuracy - one.low) for one in found]
    above = [100 * (one.high - one.accuracy) for one in found]
    panel.errorbar(x, accuracy, yerr=[below, above], marker="o", markersize=4, capsize=2, linewidth=1.2, **style)


def _chance(panel: Any, task: RecallTask) -> None:
    panel.axhline(100 * task.chance, color="black", linestyle=":", linewidth=1, label="chance")
    panel.set_ylim(-3, 103)
