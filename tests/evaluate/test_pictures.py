"""Pictures show the data they are given, and reach files and TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_fwpkm.evaluate import pictures
from megatron_fwpkm.evaluate.intervals import Estimate, wilson
from megatron_fwpkm.evaluate.plan import NeedleRow


def needle_rows() -> list[NeedleRow]:
    return [
        NeedleRow(length, readings, 16, wilson(hits, 16), wilson(hits / 2 + 2, 16), wilson(hits, 16))
        for length in (1024, 4096)
        for readings, hits in enumerate((1, 5, 9, 12, 14 if length == 1024 else 11))
    ]


def test_loss_curves_have_a_smooth_line_for_each_run() -> None:
    steps = list(range(1, 201))
    figure = pictures.loss_curves({"one": (steps, [8 - s / 50 for s in steps]), "other": (steps[:3], [8, 7, 6])}, 2048)
    axes: Any = figure.axes[0]
    assert "2,048" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    smooth = [line for line in axes.lines if not line.get_label().startswith("_")]
    assert [line.get_label().split(",")[0] for line in smooth] == ["one", "other"]
    assert smooth[0].get_ydata()[-1] == pytest.approx(numpy.mean([8 - s / 50 for s in (197, 198, 199, 200)]))
    assert list(smooth[1].get_ydata()) == [8, 7, 6]


def test_perplexity_by_position_has_bands() -> None:
    lines = {"on": [Estimate(9.0, 8.0, 10.0), Estimate(7.0, 6.5, 7.6)], "off": [Estimate(9.5, 9, 10)] * 2}
    axes: Any = pictures.perplexity_by_position([0, 64, 100], lines, "validation text").axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0–63", "64–99"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[9.0, 7.0], [9.5, 9.5]]
    box = axes.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == (6.5, 10.0)


def test_needle_accuracy_is_in_percent_by_length() -> None:
    figure = pictures.needle_accuracy(needle_rows(), "aligned")
    whole: Any = figure.axes[0]
    assert [line.get_label() for line in whole.lines] == ["1,024", "4,096"]
    assert list(whole.lines[0].get_ydata()) == pytest.approx([100 * hits / 16 for hits in (1, 5, 9, 12, 14)])
    assert "aligned" in figure.get_suptitle() and "16 haystacks" in figure.get_suptitle()


def test_gates_colour_every_token_on_its_line() -> None:
    tokens = ["def", " f", "(", "x", "):", "\n    ", "return", " x", "\n"] * 30
    gates = {1: [index % 10 / 10 for index in range(len(tokens))], 3: [0.5] * len(tokens)}
    figure = pictures.gates_over_text(tokens, gates)
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [
        f"memory of block {block}, mean gate {numpy.mean(values):.2f}" for block, values in gates.items()
    ]
    patches: Any = panels[0].patches
    assert len(patches) == len(tokens) + 30  # an indentation stands on its own line, apart from the line's end
    lines = [patch.get_y() for patch in patches]
    assert lines[0] == lines[5] == 0 and lines[6] == lines[9] == 1 and max(lines) == 59
    assert patches[5].get_facecolor() == patches[6].get_facecolor()
    shown = "".join(text.get_text() for text in panels[0].texts)
    assert shown.replace(" ", "").startswith("deff(x):¶returnx¶def")
    assert patches[0].get_facecolor() != patches[5].get_facecolor()


def test_pictures_reach_files_and_tensorboard(tmp_path: Path) -> None:
    figures = {"needles": pictures.needle_accuracy(needle_rows(), "aligned")}
    paths = pictures.save_pictures(figures, tmp_path / "pictures", tmp_path / "tensorboard", 560)
    assert [path.name for path in paths] == ["needles.png"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("evaluation/needles")
    assert image.step == 560 and image.width > 800
