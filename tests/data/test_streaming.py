"""The token loader: order, epochs, cursor, documents, and the cache that processes share."""

from __future__ import annotations

import collections
import fcntl
import gc
import itertools
import json
import os
import select
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fwpkm.data.batch import IGNORED_LABEL, Loader
from megatron_fwpkm.data.corpus import prepare_corpus
from megatron_fwpkm.data.manifest import Manifest
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.streaming import ReadingPlan, TokenLoader, held_out_batches
from megatron_fwpkm.data.token_stream import read_stream, stream_tokens
from megatron_fwpkm.errors import UserError

Corpus = tuple[Path, Manifest]
PLAN = ReadingPlan(sequence_length=64, shuffle_seed=5, stretch_tokens=256, group=3)
SPLIT = "train"


@pytest.fixture
def make(corpus: Corpus, tmp_path: Path) -> Callable[..., TokenLoader]:
    """Builds loaders that share a cache."""

    def build(batch_size: int = 3, plan: ReadingPlan = PLAN, split: str = SPLIT, **others: Any) -> TokenLoader:
        cache = others.pop("cache", tmp_path / "cache")
        return TokenLoader(*corpus, split, cache=cache, plan=plan, batch_size=batch_size, **others)

    return build


Make = Callable[..., TokenLoader]


def _rows(loader: TokenLoader, batches: int) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in itertools.islice(loader, batches) for row in batch.tokens_BT.tolist()]


@pytest.mark.parametrize("length", [16, 64, 100, 250, 3000])
def test_any_length_reads_every_token_of_an_epoch_once(make: Make, corpus: Corpus, length: int) -> None:
    stream = read_stream(corpus[0], SPLIT, 0, stream_tokens(corpus[0], SPLIT)).tokens.tolist()
    loader = make(1, replace(PLAN, sequence_length=length))
    assert loader.sequences == (len(stream) - 1) // length > 3
    read = []
    for batch in itertools.islice(loader, loader.sequences):
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (1, length)
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == torch.int64
        assert batch.documents_BT is None and batch.positions_BT is None
        read.append((*batch.tokens_BT[0].tolist(), int(batch.labels_BT[0, -1])))
        assert torch.equal(batch.tokens_BT[:, 1:], batch.labels_BT[:, :-1])
    wanted = [tuple(stream[first * length : (first + 1) * length + 1]) for first in range(loader.sequences)]
    assert collections.Counter(read) == collections.Counter(wanted)
    assert read != wanted  # shuffled


def test_epochs_follow_in_orders_of_their_own_and_nothing_is_dropped(make: Make) -> None:
    loader = make(1)
    first, second = _rows(loader, loader.sequences), _rows(loader, loader.sequences)
    assert sorted(first) == sorted(second) and first != second
    assert _rows(make(7), 20) == (first + second)[:140]  # batches lie across the border between epochs
    assert _rows(make(1, replace(PLAN, shuffle_seed=6)), loader.sequences) != first


def test_cursor_means_the_same_for_any_replicas_batches_and_workers(make: Make) -> None:
    everything = _rows(make(1), 120)
    state = {}
    shares = [make(2, replica=replica, replicas=3) for replica in range(3)]
    read = []
    for _ in range(4):
        for share in shares:
            read += _rows(share, 1)
        assert len({json.dumps(share.state_dict()) for share in shares}) == 1
        state = json.loads(json.dumps(shares[0].state_dict()))
    assert read == everything[:24] and state["sample"] == 24
    for batch_size, replicas, workers in [(1, 1, 0), (5, 2, 0), (4, 1, 2), (3, 2, 1)]:
        loaders = [make(batch_size, replica=each, replicas=replicas, workers=workers) for each in range(replicas)]
        for loader in loaders:
            loader.load_state_dict(state)
        rows = [_rows(loader, 4) for loader in loaders]
        wanted = everything[24 : 24 + 4 * batch_size * replicas]
        together = [row for step in range(4) for share in rows for row in share[step * batch_size :][:batch_size]]
        assert together == wanted, (batch_size, replicas, workers)
        assert loaders[0].state_dict()["sample"] == 24 + 4 * batch_size * replicas


@pytest.mark.parametrize("workers", [0, 1])
def test_cursor_can_be_set_at_any_time(make: Make, workers: int) -> None:
    loader: Loader = make(2, workers=workers)
    state = loader.state_dict()
    first = next(loader).tokens_BT
    next(loader)
    loader.load_state_dict(state)
    assert torch.equal(next(loader).tokens_BT, first)
    loader.load_state_dict(state | {"sample": 10**12 * 2})
    far = next(loader).tokens_BT
    assert far.shape == first.shape and loader.state_dict()["sample"] == 10**12 * 2 + 2


def test_cursor_of_another_order_is_refused(make: Make) -> None:
    state = make().state_dict()
    with pytest.raises(UserError, match=r"another order of samples \(then, now\): sequence_length \(64, 128\)"):
        make(plan=replace(PLAN, sequence_length=128)).load_state_dict(state)
    with pytest.raises(UserError, match=r"split \('train', 'validation'\)"):
        make(split="validation").load_state_dict(state)
    with pytest.raises(UserError, match="shuffle_seed"):
        make(plan=replace(PLAN, shuffle_seed=None)).load_state_dict(state)
    with pytest.raises(UserError, match="shuffle_stretch"):
        make(plan=replace(PLAN, stretch_tokens=128)).load_state_dict(state)
    with pytest.raises(UserError, match="shuffle_group"):
        make(plan=replace(PLAN, group=PLAN.group + 1)).load_state_dict(state)
    with pytest.raises(UserError, match="sample"):
        make().load_state_dict({key: value for key, value in state.items() if key != "sample"})


@pytest.mark.parametrize("workers", [0, 1])
def test_separate_documents(make: Make, corpus: Corpus, workers: int) -> None:
    stream = read_stream(corpus[0], SPLIT, 0, stream_tokens(corpus[0], SPLIT))
    plan = replace(PLAN, documents="separate", shuffle_seed=None)
    loader = make(2, plan, workers=workers)
    ends = 0
    for number, batch in enumerate(itertools.islice(loader, loader.sequences // 2)):
        assert batch.documents_BT is not None and batch.positions_BT is not None
        for place in range(2):
            begin = (2 * number + place) * 64
            assert batch.tokens_BT[place].tolist() == stream.tokens[begin : begin + 64].tolist()
            assert batch.documents_BT[place].tolist() == stream.documents[begin : begin + 64].tolist()
            # Counted from the sequence's beginning in a document that began before it.
            inside = stream.documents[begin : begin + 64] == stream.documents[begin]
            first = stream.positions[begin] * inside
            assert batch.positions_BT[place].tolist() == (stream.positions[begin : begin + 64] - first).tolist()
            for column in range(64):
                here = begin + column
                is_last = stream.documents[here + 1] != stream.documents[here]
                ends += is_last
                wanted = IGNORED_LABEL if is_last else stream.tokens[here + 1]
                assert batch.labels_BT[place, column] == wanted
                assert not is_last or stream.tokens[here] == 0  # the end token
    assert ends > 30


def test_held_out_batches_are_the_first_of_the_split(corpus: Corpus, tmp_path: Path) -> None:
    stream = read_stream(corpus[0], "validation", 0, 64 * 12 + 1).tokens.tolist()
    shares = [
        held_out_batches(
            *corpus, "validation", cache=tmp_path, plan=PLAN, sequences=13, batch_size=2, replica=each, replicas=2
        )
        for each in range(2)
    ]
    rows = [row for step in range(3) for share in shares for row in share[step].tokens_BT.flatten().tolist()]
    assert [len(share) for share in shares] == [3, 3]
    assert rows == stream[:-1]
    (only,) = held_out_batches(*corpus, "validation", cache=tmp_path, plan=PLAN, sequences=1, batch_size=4)
    assert only.tokens_BT.shape == (4, 64)


def test_too_few_tokens_for_a_sequence_is_an_error(make: Make) -> None:
    with pytest.raises(UserError, match=r"the train split has [\d,]+ tokens, fewer than one sequence"):
        make(plan=replace(PLAN, sequence_length=1 << 20))


def test_plan_of_settings() -> None:
    plan = ReadingPlan.of(DataConfig(sequence_length=99, documents="separate", cache_gigabytes=0.5), shuffle=True)
    assert plan == ReadingPlan(99, "separate", 17, 1 << 16, 64, 1 << 29)
    assert ReadingPlan.of(DataConfig(), shuffle=False).shuffle_seed is None


# The cache


def _unpacked(cache: Path) -> set[Path]:
    return set(cache.rglob("*.mds"))


def test_shards_are_kept_or_removed_by_the_size_they_may_have(make: Make, tmp_path: Path) -> None:
    shards = {"keep": 0, "remove": 0}
    for name, plan in (("keep", PLAN), ("remove", replace(PLAN, cache_bytes=1000, group=1))):
        loader = make(1, plan, cache=tmp_path / name)
        for _ in range(loader.sequences):
            next(loader)
            shards[name] = max(shards[name], len(_unpacked(tmp_path / name)))
        assert not list((tmp_path / name).rglob("*.zstd"))
    assert shards["keep"] > 3
    assert shards["remove"] == 2  # a stretch may lie in two


def test_a_cache_serves_no_other_corpus(
    make: Make, corpus: Corpus, settings: Callable[..., DataConfig], tmp_path: Path
) -> None:
    """The same documents with other tokens, under the name that the first has given to its folder."""
    loader = make(1)
    folder, manifest = prepare_corpus(settings(tmp_path / "other", vocab_size=290), seed=3)
    named_alike = replace(manifest, fingerprint=corpus[1].fingerprint)
    assert manifest.corpus_sha256 == corpus[1].corpus_sha256
    next(loader)
    other = TokenLoader(folder, named_alike, SPLIT, cache=tmp_path / "cache", plan=PLAN, batch_size=1)
    fresh = TokenLoader(folder, manifest, SPLIT, cache=tmp_path / "fresh", plan=PLAN, batch_size=1)
    assert _rows(other, 20) == _rows(fresh, 20)


def test_a_shard_in_use_elsewhere_is_not_removed(make: Make, tmp_path: Path) -> None:
    cache = tmp_path / "shared"
    plan = replace(PLAN, cache_bytes=0, group=1)
    loader, other = make(1, plan, cache=cache), make(1, replace(plan, shuffle_seed=None), cache=cache)
    wanted = _rows(other, 1)
    (used,) = _unpacked(cache)
    for _ in range(loader.sequences):
        next(loader)
        assert used in _unpacked(cache)
    other.load_state_dict(other.state_dict() | {"sample": 0})
    assert _rows(other, 1) == wanted
    loader._samples._stream._shards.close()
    assert _unpacked(cache) == {used}
    other._samples._stream._shards.close()
    assert not _unpacked(cache)


def _fork(action: Callable[[], bool]) -> int:
    """Run an action in a forked process, which ends with status 0 if it returns true."""
    gc.collect()  # a loader's destructor must not run in the child: its processes are the parent's
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        gc.disable()
        status = 0 if action() else 1
    finally:
        os._exit(status)


def test_processes_share_a_cache(make: Make) -> None:
    """Readers that unpack and remove the same shards at once: each must read what one alone reads."""
    plan = replace(PLAN, cache_bytes=0, group=1)
    wanted = _rows(make(1, plan), 30)
    children = [_fork(lambda: _rows(make(1, plan), 30) == wanted) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


@pytest.mark.timeout(60)
def test_readers_wait_for_nobody_who_has_the_shard_in_use(make: Make, tmp_path: Path) -> None:
    """Ranks take a step together: one that waited until another lets go of a shard would wait for ever."""
    loader = make(1)
    (locks,) = tmp_path.rglob(".locks")
    in_use = [open(locks / str(shard), "a") for shard in range(64)]  # noqa: SIM115
    for file in in_use:
        fcntl.flock(file, fcntl.LOCK_SH)
    assert not _unpacked(tmp_path / "cache")
    next(loader)
    assert _unpacked(tmp_path / "cache")
    for file in in_use:
        file.close()


def test_killed_readers_leave_nothing_that_blocks(make: Make, tmp_path: Path) -> None:
    receiving, sending = os.pipe()

    def hold_all_locks() -> bool:
        next(make(1))
        files = [open(path, "a") for path in tmp_path.rglob(".locks/*")]  # noqa: SIM115
        for file in files:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(sending, b"x")
        signal.pause()
        return True

    child = _fork(hold_all_locks)
    assert os.read(receiving, 1) == b"x"
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert len(_rows(make(1), 5)) == 5


def test_loader_processes_end_with_a_killed_rank_at_once(make: Make) -> None:
    """What a rank and its loader processes hold is free when the rank is dead: here the end of a pipe."""
    receiving, sending = os.pipe()

    def read_and_wait() -> bool:
        loader = make(1, workers=2)
        next(loader)
        os.write(sending, b"x")
        signal.pause()
        return True

    rank = _fork(read_and_wait)
    os.close(sending)
    assert os.read(receiving, 1) == b"x"
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    freed, _, _ = select.select([receiving], [], [], 2.0)
    assert freed and os.read(receiving, 1) == b""


def test_damage_is_named_with_what_to_do(corpus: Corpus, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(corpus[0], copy)
    shard = copy / "train" / "000000" / "shard.00000.mds.zstd"
    intact = shard.read_bytes()
    shard.write_bytes(intact[:100] + bytes([intact[100] ^ 1]) + intact[101:])
    for workers in (0, 1):
        loader = TokenLoader(
            copy, corpus[1], "train", cache=tmp_path / "cache", plan=PLAN, batch_size=8, workers=workers
        )
        with pytest.raises(UserError, match=rf"^{shard} is damaged; delete {copy} to prepare"):
            for _ in range(loader.sequences):
                next(loader)
    shard.write_bytes(intact)
    loader = TokenLoader(copy, corpus[1], "train", cache=tmp_path / "cache", plan=PLAN, batch_size=8)
    assert len(_rows(loader, 3)) == 24  # nothing of the damaged one is left
    for unpacked in _unpacked(tmp_path / "cache"):
        unpacked.write_bytes(b"")
    loader = TokenLoader(copy, corpus[1], "train", cache=tmp_path / "cache", plan=PLAN, batch_size=8)
    with pytest.raises(UserError, match=r"unpacked shard .* is damaged; delete the cache"):
        next(loader)


def test_unusable_cache_is_an_error(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"give a data.cache that can be written"):
        make(cache=tmp_path / "file" / "cache")


def test_no_space_for_unpacked_shards_is_one_message(make: Make, small_disk: Path) -> None:
    loader = make(1, cache=small_disk / "cache")
    with pytest.raises(UserError, match=rf"^no space left for unpacked shards in {small_disk}.*data\.cache"):
        for _ in range(loader.sequences):
            next(loader)
