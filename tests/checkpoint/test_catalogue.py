"""Which checkpoints there are, what is in them, and which go: by the commands that tell it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed

from megatron_fwpkm.checkpoint import files, folder
from megatron_fwpkm.checkpoint.catalogue import choose_checkpoint, describe, find_checkpoints, prune, verify
from megatron_fwpkm.checkpoint.files import JOB_FILE, MANIFEST_FILE
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.store import CheckpointStore, JobState, layout_of
from megatron_fwpkm.checkpoint.tensors import SavedTensors
from megatron_fwpkm.errors import SharedUserError, UserError
from megatron_fwpkm.parallel.topology import Topology
from megatron_fwpkm.train.run_directory import lock_run_directory
from tests.commands import run_command

ALONE = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, replica=0, replicas=1)


class Numbers:
    """State of 1000 numbers."""

    value = 0.0

    def pieces(self, staging: Staging) -> dict[str, Pieces]:
        return {"slow/numbers": Pieces.whole(torch.full((1000,), self.value))}

    def load(self, source: SavedTensors) -> list[str]:
        self.value = float(source.whole("slow/numbers")[0])
        return []

    def finish_loading(self) -> None:
        pass


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def state_of(step: int) -> JobState:
    layout = layout_of(ALONE, zero_stage=1, micro_batch_size=2, accumulation=1)
    return JobState(step, 100 * step, 0, None, [], {"sample": 2 * step}, {"corpus": "c"}, layout)


@pytest.fixture
def run(tmp_path: Path, one_rank: None) -> Path:
    """A run with the checkpoints of steps 10 to 50."""
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, {"numbers": Numbers()}, keep_last_k=9)
    for step in range(10, 60, 10):
        store.save(state_of(step))
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def command(*arguments: str, expected: int = 0) -> str:
    return run_command("checkpoint", *arguments, expected=expected)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_the_newest_are_kept_and_milestones_for_good(tmp_path: Path, one_rank: None) -> None:
    store = CheckpointStore(
        tmp_path / "checkpoints", ALONE, {"numbers": Numbers()}, keep_last_k=2, keep_every=20, asynchronous=True
    )
    for step in range(10, 80, 10):
        store.save(state_of(step))
    store.finish()
    assert names(tmp_path) == [f"step_{step:08d}" for step in (20, 40, 60, 70)]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000070\n"
    reports = store.take_reports()
    assert len(reports) == 7 and all(report.num_bytes > 4000 for report in reports)
    assert all(report.pause_seconds <= report.seconds for report in reports)


def test_a_state_that_changes_while_it_is_written_is_saved_as_it_was(tmp_path: Path, one_rank: None) -> None:
    numbers = Numbers()
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, {"numbers": numbers}, asynchronous=True)
    held = torch.full((1000,), 1.0)
    numbers.pieces = lambda staging: {"slow/numbers": Pieces.whole(held)}  # type: ignore[method-assign]
    path = store.save(state_of(10))
    held.fill_(2.0)
    store.finish()
    assert store.load(path, lambda line: None) == state_of(10) and numbers.value == 1.0


def test_a_failed_save_is_told_by_the_next_call(tmp_path: Path, one_rank: None) -> None:
    numbers = Numbers()
    store = CheckpointStore(tmp_path / "checkpoints", ALONE, {"numbers": numbers}, asynchronous=True)
    gap = Pieces((4,), torch.float32, [((0,), torch.ones(3)), ((2,), torch.ones(2))])
    numbers.pieces = lambda staging: {"slow/numbers": gap}  # type: ignore[method-assign]
    store.save(state_of(10))
    with pytest.raises(RuntimeError, match=r"writing a checkpoint failed on rank 0: ValueError: .*overlapping"):
        store.finish()
    assert not store.has_failed
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []


def test_a_disk_that_is_too_full_is_told_before_anything_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(run / "checkpoints", ALONE, {"numbers": Numbers()}, keep_last_k=9)
    usage = shutil.disk_usage(run)
    enough = 2 * 1000 * 4 + (1 << 20) + 2048
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(SharedUserError, match=r"no space left .* has 1\.0 MiB free and one takes about 1\.0 MiB; free"):
        store.save(state_of(60))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", *names(run)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=enough))
    assert store.save(state_of(60)).name in names(run)


def test_all_is_on_the_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as one process can tell: what was forced to the disk, and when."""
    done: list[str] = []
    forced = lambda path: done.append(str(path.relative_to(tmp_path)).replace(".step_00000010.partial", "it"))  # noqa: E731
    renamed = folder.rename

    def rename(before: Path, after: Path) -> None:
        done.append("renamed")
        renamed(before, after)

    monkeypatch.setattr(files, "sync_path", forced)
    monkeypatch.setattr(folder, "sync_path", forced)
    monkeypatch.setattr(folder, "rename", rename)
    CheckpointStore(tmp_path / "checkpoints", ALONE, {"numbers": Numbers()}).save(state_of(10))
    last = done.index("renamed")
    content = {"it/job.json", "it/tensors/.metadata", "it/tensors/__0_0.distcp", "it/tensors", "it"}
    assert {name.removeprefix("checkpoints/") for name in done[:last]} >= content - {"it"}
    assert done[last + 1] == "checkpoints"


def test_a_checkpoint_that_is_there_is_pointed_at(run: Path) -> None:
    """Killed between the two, a job makes the same step again, and saves it again."""
    latest = run / "checkpoints" / "latest"
    latest.write_text("step_00000040\n")
    content = (run / "checkpoints" / "step_00000050" / MANIFEST_FILE).read_bytes()
    store = CheckpointStore(run / "checkpoints", ALONE, {"numbers": Numbers()}, keep_last_k=2)
    store.save(state_of(50))
    assert latest.read_text() == "step_00000050\n" and names(run) == ["step_00000040", "step_00000050"]
    assert (run / "checkpoints" / "step_00000050" / MANIFEST_FILE).read_bytes() == content


def test_the_newest_whole_one_is_found(run: Path, tmp_path: Path) -> None:
    place, said = run / "checkpoints", list[str]()
    assert folder.newest_whole(place, ALONE, said.append) == place / "step_00000050" and said == []
    flip(next((place / "step_00000050").rglob("*.distcp")))
    (place / "step_00000040" / MANIFEST_FILE).unlink()
    (place / "damaged_step_00000050").mkdir()
    assert folder.newest_whole(place, ALONE, said.append) == place / "step_00000030"
    assert (place / "latest").read_text() == "step_00000030\n"
    assert "renamed to damaged_step_00000050.2, going on from step_00000030" in said[0]
    assert "step_00000040 is damaged (manifest.json is missing): renamed to damaged_step_00000040" in said[1]
    assert names(run) == ["step_00000010", "step_00000020", "step_00000030"]
    assert folder.newest_whole(tmp_path / "none", ALONE, said.append) is None
    for path in place.glob("step_*"):
        (path / JOB_FILE).unlink()
    with pytest.raises(
        SharedUserError, match=r"no checkpoint in .* is whole: step_00000030 \(job\.json is missing\); "
    ):
        folder.newest_whole(place, ALONE, said.append)


def test_checkpoints_are_found_and_chosen(run: Path) -> None:
    assert [path.name for path in find_checkpoints(run)] == names(run)
    assert find_checkpoints(run / "checkpoints") == find_checkpoints(run)
    newest = run / "checkpoints" / "step_00000050"
    assert find_checkpoints(newest) == [newest] == [choose_checkpoint(run)] == [choose_checkpoint(newest)]
    assert choose_checkpoint(run, "step_00000020").name == "step_00000020"
    (newest / MANIFEST_FILE).unlink()
    assert choose_checkpoint(run).name == "step_00000040"
    with pytest.raises(UserError, match=r"'step_9'; there are step_00000010, "):
        choose_checkpoint(run, "step_9")
    for nothing in (run / "none", run / "none" / "step_00000001"):
        with pytest.raises(UserError, match="is no checkpoint and has none"):
            find_checkpoints(nothing)


def test_damage_is_named(run: Path) -> None:
    newest = run / "checkpoints" / "step_00000050"
    found = describe(newest)
    assert found.wrong == [] and found.state == state_of(50) and found.num_bytes > 4000
    (tensors,) = newest.rglob("*.distcp")
    flip(tensors)
    assert describe(newest).wrong == []  # sizes only
    with pytest.raises(UserError, match=r"is damaged \(the content of tensors/__0_0\.distcp doesn't match its hash\)"):
        verify(newest)
    tensors.unlink()
    assert describe(newest).wrong == ["tensors/__0_0.distcp is missing"]
    (newest / JOB_FILE).write_text("{")
    assert describe(newest).state is None
    state = dataclasses.asdict(state_of(50)) | {"format_version": 2}
    (newest / JOB_FILE).write_text(json.dumps(state))
    (newest / MANIFEST_FILE).write_text(json.dumps({JOB_FILE: {"bytes": (newest / JOB_FILE).stat().st_size}}))
    assert "format version 2, this program reads 3" in describe(newest).wrong[0]


def test_what_is_superfluous_is_deleted_unless_a_job_runs(run: Path) -> None:
    assert [path.name for path in prune(run, 1, 20, dry_run=True)] == ["step_00000010", "step_00000030"]
    assert len(names(run)) == 5
    with lock_run_directory(run):
        assert "another job is running" in command("prune", str(run), "--keep-last-k", "1", expected=2)
    assert "would delete" in command("prune", str(run), "--keep-last-k", "1", "--keep-every", "20", "--dry-run")
    assert len(names(run)) == 5
    assert command("prune", str(run), "--keep-last-k", "1", "--keep-every", "20").count("deleted ") == 2
    assert names(run) == [f"step_{step:08d}" for step in (20, 40, 50)]


def test_what_is_damaged_does_not_count_as_kept(run: Path) -> None:
    flip(next((run / "checkpoints" / "step_00000050").rglob("*.distcp")))
    (run / "checkpoints" / "step_00000030" / "manifest.json").unlink()
    assert [path.name for path in prune(run, 1, None)] == ["step_00000010", "step_00000020"]
    assert names(run) == [f"step_{step:08d}" for step in (30, 40, 50)]
    flip(next((run / "checkpoints" / "step_00000040").rglob("*.distcp")))
    assert prune(run, 1, None) == [] and len(names(run)) == 3


def test_commands_show_what_there_is_and_what_is_damaged(run: Path) -> None:
    newest = run / "checkpoints" / "step_00000050"
    shown = command("inspect", str(run))
    assert "TP1 PP1 DP1 ZeRO-1" in shown and shown.count("as listed") == 5
    content = command("inspect", str(newest))
    assert "1,000" in content and "data sample: 100" in content
    assert command("verify", str(run)).count(": whole") == 5
    index = newest / "tensors" / ".metadata"
    genuine = index.read_bytes()
    index.write_bytes(genuine.replace(b"StorageMeta", b"storageMeta"))
    assert "storageMetadata', which is in no index of tensors" in command("inspect", str(newest), expected=2)
    index.write_bytes(genuine)
    flip(next(newest.rglob("*.distcp")))
    told = command("verify", str(run), expected=1)
    assert told.count(": whole") == 4 and "step_00000050: damaged: the content of" in told
    assert "is no checkpoint and has none" in command("inspect", str(run / "nothing"), expected=2)
