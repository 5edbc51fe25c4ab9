"""Pieces of work: done once, kept, gone on with after an end at any byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch.distributed

from megatron_fwpkm.config import load_train_config
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.evaluate.loading import TrainedRun
from megatron_fwpkm.evaluate.measure import Measurement
from megatron_fwpkm.evaluate.needles import Needle, NeedlePrompt
from megatron_fwpkm.evaluate.pieces import Piece, PieceStore, run_pieces
from megatron_fwpkm.evaluate.plan import needle_pieces
from megatron_fwpkm.evaluate.settings import NeedleConfig
from megatron_fwpkm.parallel.topology import Topology

NANO = Path(__file__).parents[2] / "configs" / "train" / "nano.yaml"

ALONE = Topology(0, 1, 0, 1, 0, 1)
PIECES = [Piece({"name": name}, cost) for name, cost in (("a", 1), ("b", 3), ("c", 2), ("d", 3))]


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Work:
    """Notes what it computes; asks to stop, or fails, after so many pieces."""

    def __init__(self, stop_after: int | None = None, fail_after: int | None = None) -> None:
        self.done: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self._stop_after, self._fail_after = stop_after, fail_after

    def __call__(self, piece: Piece) -> Any:
        if len(self.done) == self._fail_after:
            raise UserError("broken")
        self.done.append(piece.content["name"])
        return {"value": len(piece.content["name"]) / 3}

    def run(self, path: Path) -> Any:
        stop = lambda: self._stop_after is not None and len(self.done) >= self._stop_after  # noqa: E731
        store = PieceStore(path)
        try:
            return run_pieces(PIECES, self, store, ALONE, stop, lambda *seen: self.progress.append(seen))
        finally:
            store.close()


def test_dearest_first_then_reused(tmp_path: Path) -> None:
    first, second = Work(), Work()
    results = first.run(tmp_path / "pieces.jsonl")
    assert first.done == ["b", "d", "c", "a"]
    assert first.progress == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert second.run(tmp_path / "pieces.jsonl") == results == {piece.key: {"value": 1 / 3} for piece in PIECES}
    assert second.done == [] and second.progress == [(4, 4)]


def test_stopped_and_failed_runs_go_on_where_they_ended(tmp_path: Path) -> None:
    path = tmp_path / "pieces.jsonl"
    stopped, failed, last = Work(stop_after=1), Work(fail_after=1), Work()
    assert stopped.run(path) is None and stopped.done == ["b"]
    with pytest.raises(SharedUserError, match="broken"):
        failed.run(path)
    assert failed.done == ["d"]
    assert last.run(path) is not None and last.done == ["c", "a"]
    assert Work(stop_after=0).run(path) is not None  # nothing left to stop


def test_a_file_cut_at_any_byte_loses_the_last_piece_alone(tmp_path: Path) -> None:
    path = tmp_path / "pieces.jsonl"
    expected = Work().run(path)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):
        path.write_bytes(whole[:cut])
        again = Work()
        assert again.run(path) == expected
        assert again.done == ["a"]
        assert len([json.loads(line) for line in path.read_text().splitlines()]) == len(PIECES)


def test_one_evaluation_at_a_time_and_no_guessing_at_damage(tmp_path: Path) -> None:
    path = tmp_path / "pieces.jsonl"
    first = PieceStore(path)
    with pytest.raises(UserError, match="another evaluation has"):
        PieceStore(path)
    first.close()
    path.write_text('{"key": 1}\n')
    with pytest.raises(UserError, match=r"damaged.*delete it"):
        PieceStore(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        PieceStore(tmp_path / "file" / "pieces.jsonl")


def test_other_content_is_other_work(tmp_path: Path) -> None:
    assert len({piece.key for piece in PIECES}) == 4
    assert Piece({"x": 1, "y": 2}, 1).key == Piece({"y": 2, "x": 1}, 7, work="other").key
    assert Piece({"x": 1, "y": 2}, 1).key != Piece({"x": 1, "y": 2.5}, 1).key


def test_whatever_determines_a_measurement_is_in_its_key() -> None:
    prompts = {8: [NeedlePrompt(0, numpy.arange(6), numpy.arange(2), 6, (Needle("0000", "123456"),), 0, (0,))]}

    def keys(iterations: tuple[int, ...] = (0,), identity: str = "x", **needles: Any) -> set[str]:
        config = NeedleConfig(**needles)
        return {piece.key for piece in needle_pieces("run", lambda _: {"model": identity}, prompts, iterations, config)}

    found = [keys(), keys(iterations=(1,)), keys(protocol="official"), keys(identity="y")]
    assert all(len(key) == 1 for key in found) and len(set().union(*found)) == len(found)


def test_a_measurement_is_that_of_one_checkpoint_one_replica_and_one_way_of_stretching(tmp_path: Path) -> None:
    config = load_train_config(NANO)
    model = dataclasses.replace(config.model, mixers=("full_attention",))
    config = config.model_copy(update={"model": model})

    def identity(checkpoint: str = "one", **changes: Any) -> str:
        run = TrainedRun(tmp_path, config, tmp_path, 1, 1, {}, checkpoint)
        evaluation = config.evaluation.model_copy(update=changes)
        measurement = Measurement(config.model_copy(update={"evaluation": evaluation}), [run], None)  # type: ignore[arg-type]
        return json.dumps(measurement._identity("run", 4096), sort_keys=True)

    assert len({identity(), identity(checkpoint="two"), identity(replica=1), identity(rope_scaling=2.0)}) == 4
