"""Work in pieces that is done once: finished pieces lie in a file, under a hash of everything that determines them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed

from megatron_fwpkm.errors import UserError
from megatron_fwpkm.parallel.topology import Topology, agree_on_errors


@dataclass(frozen=True)
class Piece:
    """One piece of work."""

    content: dict[str, Any]
    """Everything that determines the result, as JSON values."""
    cost: int
    """Tokens to read; pieces of like cost are done at the same time."""
    work: Any = field(compare=False, repr=False, default=None)
    """Whatever the computation needs besides; determined by `content`."""

    @property
    def key(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()


class PieceStore:
    """Finished pieces in a JSONL file, one a line: {"key": ..., "content": ..., "result": ...}.

    The file is locked until close(): one process reads and writes. Raises UserError if another has it, or it can't be
    written or read.
    """

    def __init__(self, path: Path) -> None:
        self.results: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror}; make its folder writable") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            self.close()
            raise UserError(f"another evaluation has {path}; wait for it or stop it") from None
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise UserError(f"{path} is damaged ({error}); delete it to measure again") from error

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) != len(content):  # the last line was cut short by a crash
            self._file.truncate(len(whole))
        for line in whole.decode().splitlines():
            record = json.loads(line)
            self.results[record["key"]] = record["result"]

    def close(self) -> None:
        """Let others have the file."""
        self._file.close()

    def add(self, piece: Piece, result: Any) -> None:
        """Append a finished piece and force it to the disk."""
        self.results[piece.key] = result
        line = json.dumps({"key": piece.key, "content": piece.content, "result": result}) + "\n"
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def run_pieces(
    pieces: Sequence[Piece],
    compute: Callable[[Piece], Any],
    store: PieceStore | None,
    ranks: Topology,
    stop_requested: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> dict[str, Any] | None:
    """Do the pieces that are not in the store, shared among the ranks; all ranks call this with the same pieces.

    Rank 0 alone has the store, and after every round, in which each rank does one piece, keeps what the ranks found.
    `progress` gets the numbers of finished pieces and of all. Returns the results by key on every rank, or None if
    some rank was asked to stop before the end. An error on one rank ends all.
    """
    shared: list[Any] = [dict(store.results) if store is not None else None]
    torch.distributed.broadcast_object_list(shared, src=0)
    known: dict[str, Any] = shared[0]
    todo = [piece for piece in dict((piece.key, piece) for piece in pieces).values() if piece.key not in known]
    todo.sort(key=lambda piece: -piece.cost)  # stable: equal ones keep their order
    progress(len(pieces) - len(todo), len(pieces))
    for first in range(0, len(todo), ranks.world_size):
        round_pieces = todo[first : first + ranks.world_size]
        own = round_pieces[ranks.rank] if ranks.rank < len(round_pieces) else None
        result = agree_on_errors(lambda own=own: None if own is None else compute(own), "measuring")  # type: ignore[misc]
        gathered: list[Any] = [None] * ranks.world_size
        torch.distributed.all_gather_object(gathered, (result, stop_requested()))
        for piece, (found, _) in zip(round_pieces, gathered, strict=False):
            known[piece.key] = found
        agree_on_errors(
            lambda: _keep(store, round_pieces, known),  # noqa: B023 - called at once
            "writing what was measured",
        )
        progress(len(pieces) - len(todo) + first + len(round_pieces), len(pieces))
        if any(stop for _, stop in gathered) and first + ranks.world_size < len(todo):
            return None
    return {piece.key: known[piece.key] for piece in pieces}


def _keep(store: PieceStore | None, pieces: Sequence[Piece], known: dict[str, Any]) -> None:
    if store is not None:
        for piece in pieces:
            store.add(piece, known[piece.key])
