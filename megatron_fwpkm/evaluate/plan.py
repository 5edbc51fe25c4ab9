"""What is measured, piece by piece, and what the finished pieces say together."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.evaluate.intervals import Estimate, SequenceBootstrap, wilson
from megatron_fwpkm.evaluate.needles import NeedlePrompt
from megatron_fwpkm.evaluate.perplexity import CONDITIONS, Condition
from megatron_fwpkm.evaluate.pieces import Piece
from megatron_fwpkm.evaluate.settings import NeedleConfig

FORMAT_VERSION = 1
"""Raise it when the same piece would be computed otherwise: pieces of older versions are then measured again."""


@dataclass(frozen=True)
class StreamWork:
    """A stretch of held-out sequences to be read by one model under one condition."""

    run: str
    condition: Condition
    batches: Sequence[TokenBatch]


@dataclass(frozen=True)
class NeedleWork:
    """Batches of prompts of one length to be answered after so many readings."""

    run: str
    readings: int
    length: int
    batches: Sequence[Sequence[NeedlePrompt]]


def stream_pieces(
    run: str,
    identity: Mapping[str, Any],
    conditions: Sequence[Condition],
    sequences: Sequence[TokenBatch],
    streams: int,
) -> list[Piece]:
    """Perplexity: a piece for each condition and stream. `identity` determines the model and its memory."""
    length = sequences[0].tokens_BT.shape[1]
    bounds = numpy.linspace(0, len(sequences), min(streams, len(sequences)) + 1).astype(int).tolist()
    pieces = []
    for condition, (first, end) in itertools.product(conditions, itertools.pairwise(bounds)):
        content = {
            "format_version": FORMAT_VERSION,
            "measure": "perplexity",
            **identity,
            "condition": condition,
            "text": _digest(
                part
                for batch in sequences[first:end]
                for part in (batch.tokens_BT, batch.labels_BT, batch.documents_BT, batch.positions_BT)
                if part is not None
            ),
        }
        pieces.append(Piece(content, (end - first) * length, StreamWork(run, condition, sequences[first:end])))
    return pieces


def needle_pieces(
    run: str,
    identity: Callable[[int], Mapping[str, Any]],
    prompts: Mapping[int, Sequence[NeedlePrompt]],
    iterations: Sequence[int],
    config: NeedleConfig,
) -> list[Piece]:
    """Needles: a piece for each length, number of readings and batch; under the official protocol one for all batches,
    because the memory is carried from one to the next. `prompts` has the samples by
    length; `identity` of a length determines the model and its memory."""
    pieces = []
    carried = config.protocol == "official"
    for (length, samples), readings in itertools.product(prompts.items(), iterations):
        size = _equal_batch(len(samples), config.batch) if carried else config.batch
        batches = [samples[first : first + size] for first in range(0, len(samples), size)]
        groups = [batches] if carried else [[batch] for batch in batches]
        for group in groups:
            content = {
                "format_version": FORMAT_VERSION,
                "measure": "needles",
                **identity(length),
                "protocol": config.protocol,
                "length": length,
                "readings": readings,
                "batches": [[prompt.sample for prompt in batch] for batch in group],
                "text": _digest(
                    part for batch in group for prompt in batch for part in (prompt.haystack, prompt.question)
                ),
            }
            count = sum(len(batch) for batch in group)
            work = NeedleWork(run, readings, length, group)
            pieces.append(Piece(content, count * length * (readings + 1), work))
    return pieces


def _digest(parts: Iterable[Any]) -> str:
    """Hash of the content of tensors or arrays."""
    digest = hashlib.sha256()
    for part in parts:
        array = numpy.ascontiguousarray(part)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _equal_batch(samples: int, most: int) -> int:
    """The largest batch that divides the samples: a carried memory is that of batches of one size."""
    return next(size for size in range(min(samples, most), 0, -1) if samples % size == 0)


@dataclass(frozen=True)
class PositionRow:
    """Perplexity of one condition: of all tokens, and by bucket of positions."""

    whole: Estimate
    buckets: list[Estimate]
    relative: Estimate
    """Perplexity divided by that with the memory as trained, on the same sequences (paired intervals)."""
    tokens: int


def perplexities(
    pieces: Sequence[Piece], results: Mapping[str, Any], resamples: int
) -> dict[str, dict[str, PositionRow]]:
    """Results of stream pieces as perplexities with intervals: by run, then by condition."""
    losses: dict[tuple[str, str], list[list[float]]] = {}
    counts: dict[tuple[str, str], list[list[int]]] = {}
    for piece in pieces:
        name = (piece.work.run, piece.work.condition)
        losses.setdefault(name, []).extend(results[piece.key]["losses"])
        counts.setdefault(name, []).extend(results[piece.key]["counts"])
    base_SK = numpy.array(losses[pieces[0].work.run, CONDITIONS[0]])
    bootstrap = SequenceBootstrap(len(base_SK), resamples)
    found: dict[str, dict[str, PositionRow]] = {}
    for (run, condition), rows in losses.items():
        loss_SK, count_SK = numpy.array(rows), numpy.array(counts[run, condition])
        found.setdefault(run, {})[condition] = PositionRow(
            bootstrap.perplexity(loss_SK.sum(1), count_SK.sum(1)),
            [bootstrap.perplexity(loss_SK[:, k], count_SK[:, k]) for k in range(loss_SK.shape[1])],
            bootstrap.ratio(loss_SK.sum(1), base_SK.sum(1), count_SK.sum(1)),
            int(count_SK.sum()),
        )
    return found


@dataclass(frozen=True)
class NeedleRow:
    """Accuracy at one length after one number of readings."""

    length: int
    readings: int
    samples: int
    exact: Estimate
    digits: Estimate
    candidate: Estimate


def needle_rows(pieces: Sequence[Piece], results: Mapping[str, Any], run: str) -> list[NeedleRow]:
    """Results of needle pieces of one run, by length and number of readings."""
    scores: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for piece in pieces:
        if piece.work.run == run:
            scores.setdefault((piece.work.length, piece.work.readings), []).extend(results[piece.key])
    return [
        NeedleRow(
            length,
            readings,
            len(found),
            *(
                wilson(sum(float(score[name]) for score in found), len(found))
                for name in ("exact", "digits", "candidate")
            ),
        )
        for (length, readings), found in sorted(scores.items())
    ]
