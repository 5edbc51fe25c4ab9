"""Whole jobs whose layers and memories are split over ranks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from megatron_fwpkm.checkpoint.parts import fast_name
from megatron_fwpkm.convert.commands import hf_to_run, run_to_hf
from megatron_fwpkm.convert.source import model_of_run
from megatron_fwpkm.memory.traffic import PHASES
from tests.checkpoints import differing, whole_tensors
from tests.exports import load_exported

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed

MODEL = (
    "model.memory_layers=[0,1]",
    "model.key_value_heads=2",
    "model.mixers=[gated_delta_net,full_attention]",
    "training.steps=4",
    "evaluation.every=2",
)
SPLIT = ("parallel.tensor=2", "parallel.sequence_parallel=true", "training.activation_checkpointing=sublayers")
SYNCED = ("parallel.memory.replicas=synced",)
"""One memory over both replicas."""


def records_of(job: TinyJob) -> dict[tuple[int, str], dict[str, Any]]:
    """What each step and each measurement computed, without times and what was sent."""
    kept = {}
    for record in job.records():
        kind = "step" if "train/loss" in record else "measurement"
        kept[record["step"], kind] = {
            name: value
            for name, value in record.items()
            if not name.startswith("speed/") and "/traffic/" not in name and name != "evaluation/seconds"
        }
    return kept


def traffic_of(job: TinyJob) -> list[dict[str, float]]:
    """What the memories of each step sent."""
    return [{n: v for n, v in r.items() if "/traffic/" in n} for r in job.records() if "train/loss" in r]


def check_resumed(job: TinyJob, *overrides: str) -> None:
    """The last two steps made again are bitwise the same, and so are the memories."""
    first, checkpoints = records_of(job), job.folder / "run" / "checkpoints"
    before = whole_tensors(checkpoints / "step_00000004")
    shutil.rmtree(checkpoints / "step_00000004")
    assert "step 2" in job.train_ranks(*overrides)
    assert records_of(job) == first
    assert len([name for name in before if name.startswith("fast_state/") and name.endswith("values.by_slot")]) == 2
    assert differing(before, whole_tensors(checkpoints / "step_00000004")) == []


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[TinyJob]:
    """A job over two tensor-parallel ranks that divide the tokens and the slots."""
    from tests.distributed.conftest import TinyJob

    job = TinyJob(tmp_path_factory.mktemp("split"), tiny_data)
    assert "weights a process" in job.train(*MODEL, *SPLIT)
    yield job
    job.end()


def test_a_split_job_trains_as_one_process_does(tiny_job: TinyJob, split: TinyJob) -> None:
    """Steps, held-out loss between them, and what both ranks together say of the prompts.

    Until the third step: later on, rounding may move a read to another slot.
    """
    tiny_job.train_ranks(*MODEL, "training.stop_after_step=3", processes=1)
    wanted, found = records_of(tiny_job), records_of(split)
    steps = [(1, "step"), (2, "step"), (2, "measurement"), (3, "step")]
    assert list(wanted) == steps
    assert list(found) == [*steps, (4, "step"), (4, "measurement")]
    for key, record in wanted.items():
        single = {name: value for name, value in record.items() if not isinstance(value, list)}
        assert {name: found[key][name] for name in single} == pytest.approx(single, rel=2e-5, abs=1e-6), key
    name = "run/samples/step_00000002.txt"
    assert (split.folder / name).read_text() == (tiny_job.folder / name).read_text()


def test_a_split_job_records_what_its_memories_send(split: TinyJob) -> None:
    for sent in traffic_of(split):
        for block in (0, 1):
            tag = f"memory/block_{block}/traffic"
            names = {f"{tag}/{phase}_{what}" for phase in PHASES for what in ("bytes", "messages")}
            assert names | {f"{tag}/imbalance", f"{tag}/distinct_ratio"} <= sent.keys()
            # A vector of 16 numbers, at most once for each token on the other rank, and the error's further column.
            assert 0 < sent[f"{tag}/read_bytes"] <= 16 * 4 and 0 < sent[f"{tag}/write_bytes"] <= 17 * 4 + 8
            # Two microbatches of 4 chunks on each rank, and as many messages from it.
            assert sent[f"{tag}/read_messages"] == 2 * 4
            assert 1 <= sent[f"{tag}/imbalance"] < 2 and 0 < sent[f"{tag}/distinct_ratio"] <= 1
    assert len(traffic_of(split)) == 4


def test_stages_of_split_layers_record_what_their_memories_send(tiny_job: TinyJob, split: TinyJob) -> None:
    """Each stage tells of its own memory; in the first step, from the same tokens, the same as one stage."""
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "training.stop_after_step=1")
    tiny_job.train_ranks(*MODEL, *layout, processes=4)
    assert traffic_of(tiny_job) == [pytest.approx(traffic_of(split)[0], rel=1e-12)]


def test_a_split_job_resumes_bitwise(split: TinyJob) -> None:
    check_resumed(split, *MODEL, *SPLIT)


def test_a_split_job_goes_on_in_another_layout(tiny_job: TinyJob, split: TinyJob) -> None:
    """What does not fit is said before anything is taken over; then the next step is the one that would have been."""
    tiny_job.begin_from(split, 2)
    refused = tiny_job.train(*MODEL, expected=2)
    assert "4 sequences a step and this one has 8" in refused and "micro_batch_size" in refused
    refused = tiny_job.train(*MODEL, "training.gradient_accumulation=1", expected=2)
    assert "it has 1 memory a layer" in refused and "checkpoint.memories=keep" in refused
    layout = ("training.zero_stage=3", "training.micro_batch_size=1", *SYNCED)
    output = tiny_job.train_ranks(*MODEL, *layout)
    assert "step 2" in output and "read in microbatches" not in output
    wanted, found = records_of(split)[3, "step"], records_of(tiny_job)[3, "step"]
    assert found["train/loss"] == pytest.approx(wanted["train/loss"], rel=1e-5)
    assert found["train/gradient_norm"] == pytest.approx(wanted["train/gradient_norm"], rel=1e-4)


def test_a_split_job_exports_what_it_has_and_comes_back_bitwise(split: TinyJob, tmp_path: Path) -> None:
    """To Hugging Face: logits of held-out text, memory written; back: the same weights and memories."""
    run, back = split.folder / "run", tmp_path / "back"
    no_options = {"checkpoint": None, "memory": 0, "dtype": "float32", "max_shard_size": "5GB", "tokenizer": None}
    run_to_hf(run, tmp_path / "hf", **no_options, with_tokenizer=True)  # type: ignore[arg-type]
    hf_to_run(tmp_path / "hf", back, None, [])
    before = whole_tensors(run / "checkpoints" / "step_00000004", "slow/", "fast_state/")
    after = whole_tensors(back / "checkpoints" / "step_00000000")
    assert differing(before, after) == [f"{fast_name(0, block)}/version" for block in (0, 1)]  # writes, counted anew
    run_to_hf(back, tmp_path / "again", **no_options, with_tokenizer=False)  # type: ignore[arg-type]
    files = [tmp_path / name / "model.safetensors" for name in ("hf", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    exported = load_exported(tmp_path / "hf", tmp_path / "modules")
    ours = model_of_run(run).decoder.train()
    text = (run / "samples" / "step_00000004.txt").read_text()
    tokens_BT = exported.tokenizer(text, return_tensors="pt")["input_ids"][:, :100]
    assert tokens_BT.shape[1] == 100 and exported.tokenizer.eos_token == "<|end|>"
    with torch.no_grad():
        wanted, found = ours.logits(tokens_BT), exported.model(tokens_BT).logits
        cache = exported.model.make_cache(1)
        pieces = [exported.model(tokens_BT[:, i : i + 1], past_key_values=cache).logits for i in range(100)]
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float((torch.cat(pieces, 1) - wanted).norm() / wanted.norm()) < 1e-5


def test_a_job_with_one_memory_over_its_replicas_resumes_bitwise(tiny_job: TinyJob) -> None:
    """Replicas measure together, too: each call on a memory is one of all its ranks."""
    printed = tiny_job.train_ranks(*MODEL, *SYNCED)
    assert "no prompts are continued at evaluations: a memory is spread over several replicas" in printed
    measured = [record["evaluation/loss"] for (_, kind), record in records_of(tiny_job).items() if kind != "step"]
    assert len(measured) == 2 and measured[1] < measured[0]
    assert all(sent["memory/block_1/traffic/read_bytes"] > 0 for sent in traffic_of(tiny_job))
    check_resumed(tiny_job, *MODEL, *SYNCED)
