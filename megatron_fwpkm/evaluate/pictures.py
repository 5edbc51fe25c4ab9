"""Pictures of a run: data in, figure out. Colours are Okabe's and Ito's, which everybody can tell apart."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from megatron_fwpkm.evaluate.intervals import Estimate
from megatron_fwpkm.evaluate.plan import NeedleRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DOTS_PER_INCH = 150
_CHARACTERS_PER_LINE = 100


def loss_curves(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], tokens_per_step: int | None) -> Figure:
    """Training loss of several runs: (steps, losses) by name. The line is a running mean, single steps lie behind."""
    figure, axes = _axes()
    for colour, (name, (steps, losses)) in zip(COLOURS, curves.items(), strict=False):
        window = max(1, len(losses) // 50)
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        axes.plot(*_running_mean(steps, losses, window), color=colour, linewidth=1.8, label=f"{name}, mean of {window}")
    per_step = f" ({tokens_per_step:,} tokens each)" if tokens_per_step else ""
    return _finish(figure, axes, "Training loss", f"optimizer step{per_step}", "loss (nats per token)")


def perplexity_by_position(edges: Sequence[int], lines: Mapping[str, Sequence[Estimate]], text: str) -> Figure:
    """Perplexity in buckets of positions, with 95 % bands; `text` names what was read."""
    figure, axes = _axes()
    places = numpy.arange(len(edges) - 1)
    for colour, marker, (name, estimates) in zip(COLOURS, MARKERS, lines.items(), strict=False):
        axes.plot(places, [e.value for e in estimates], color=colour, marker=marker, markersize=4, label=name)
        axes.fill_between(
            places, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15, linewidth=0
        )
    axes.set_xticks(places, [f"{low}–{high - 1}" for low, high in itertools.pairwise(edges)], rotation=20)
    return _finish(
        figure, axes, f"Perplexity by position, {text}", "position in the sequence (tokens)", "perplexity (95 % bands)"
    )


def needle_accuracy(rows: Sequence[NeedleRow], protocol: str) -> Figure:
    """Exact and digit matches over the number of readings, one line a length, with 95 % bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for axes, title in zip(panels, ("whole number right", "digits right"), strict=True):
        for colour, marker, length in zip(COLOURS, MARKERS, sorted({row.length for row in rows}), strict=False):
            own = sorted((row for row in rows if row.length == length), key=lambda row: row.readings)
            readings = [row.readings for row in own]
            estimates = [row.exact if title.startswith("whole") else row.digits for row in own]
            axes.plot(readings, [100 * e.value for e in estimates], color=colour, marker=marker, label=f"{length:,}")
            low, high = [100 * e.low for e in estimates], [100 * e.high for e in estimates]
            axes.fill_between(readings, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.set(title=title, xlabel="readings before the question", ylim=(-3, 103))
        axes.set_xticks(sorted({row.readings for row in rows}))
        axes.grid(alpha=0.25)
    panels[1].axhline(10, color="#666666", linestyle=":", linewidth=1, label="guessing")
    panels[0].set_ylabel("answers (%), 95 % bands")
    panels[1].legend(title="tokens", frameon=False)
    figure.suptitle(f"Needle in a haystack, {rows[0].samples} haystacks a length, protocol {protocol}")
    return figure


def gates_over_text(tokens: Sequence[str], gates: Mapping[int, Sequence[float]]) -> Figure:
    """A text whose tokens are coloured by the gate of each memory layer; `gates` has one value a token by block."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    places = _lay_out(tokens)
    rows = 1 + max((row for _, row, _, _ in places), default=0)
    figure = Figure(figsize=(11, 0.9 + len(gates) * (0.55 + 0.19 * rows)), layout="constrained")
    panels = numpy.atleast_1d(figure.subplots(len(gates), 1))
    colours, scale = colormaps["cividis"], Normalize(0.0, 1.0)
    for axes, (block, values) in zip(panels, gates.items(), strict=True):
        axes.set(xlim=(0, _CHARACTERS_PER_LINE), ylim=(rows, 0))
        axes.axis("off")
        axes.set_title(f"memory of block {block}, mean gate {numpy.mean(values):.2f}", fontsize=9, loc="left")
        for number, row, column, shown in places:
            value = values[number]
            axes.add_patch(Rectangle((column, row), max(len(shown), 0.4), 1, color=colours(scale(value)), linewidth=0))
            ink = "white" if value < 0.55 else "black"
            for offset, character in enumerate(shown):  # one by one: columns then fit whatever the font's width
                axes.text(
                    column + offset + 0.5, row + 0.5, character, color=ink, fontsize=8.5, family="DejaVu Sans Mono",
                    ha="center", va="center", parse_math=False,
                )  # fmt: skip
    bar = figure.colorbar(ScalarMappable(scale, colours), ax=list(panels), fraction=0.02, pad=0.01)
    bar.set_label("gate (0: own value, 1: memory)")
    return figure


def save_pictures(figures: Mapping[str, Figure], folder: Path, tensorboard: Path, step: int) -> list[Path]:
    """Write <folder>/<name>.png, and evaluation/<name> into TensorBoard's files; returns the paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with SummaryWriter(str(tensorboard)) as writer:
        for name, figure in figures.items():
            figure.set_dpi(DOTS_PER_INCH)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            path = folder / f"{name}.png"
            canvas.print_png(path)
            pixels = numpy.asarray(canvas.buffer_rgba())[..., :3].copy()
            writer.add_image(f"evaluation/{name}", pixels, step, dataformats="HWC")
            paths.append(path)
    return paths


def _axes() -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    return figure, figure.subplots()


def _finish(figure: Figure, axes: Any, title: str, x_label: str, y_label: str) -> Figure:
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _running_mean(steps: Sequence[int], values: Sequence[float], window: int) -> tuple[Any, Any]:
    """Means of `window` consecutive values, each at the last one's step."""
    sums = numpy.cumsum(numpy.concatenate([[0.0], values]))
    return numpy.asarray(steps)[window - 1 :], (sums[window:] - sums[:-window]) / window


def _lay_out(tokens: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """Token number, row, column and visible text of each token's parts; lines end as the text's do, or at the margin.

    What can't be seen becomes a sign.
    """
    places, row, column = [], 0, 0
    for number, token in enumerate(tokens):
        *ended, rest = token.split("\n")
        for part in [*(f"{line}¶" for line in ended), *([rest] if rest or not ended else [])]:
            shown = "".join(c if c.isprintable() else "·" for c in part.replace("\t", "→"))[:_CHARACTERS_PER_LINE]
            if column + len(shown) > _CHARACTERS_PER_LINE:
                row, column = row + 1, 0
            places.append((number, row, column, shown))
            column += max(len(shown), 1)
            if part.endswith("¶"):
                row, column = row + 1, 0
    return places
