"""launch/checkpoint.py reshard: a run directory in another layout, from which training goes on as it would have."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from megatron_fwpkm.checkpoint.parts import WEIGHTS
from megatron_fwpkm.checkpoint.store import JobState, save_alone
from megatron_fwpkm.checkpoint.whole_model import whole_model_pieces
from megatron_fwpkm.config import load_train_config, to_yaml
from megatron_fwpkm.convert.official_names import official_weights
from megatron_fwpkm.convert.source import model_of_run
from megatron_fwpkm.convert.weight_files import write_weights
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.train.reshard import _content, reshard_config
from tests.checkpoints import differing, whole_tensors

if TYPE_CHECKING:
    from .conftest import TinyJob

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "launch" / "checkpoint.py"
MODEL = ("model.key_value_heads=2", "training.steps=6", "evaluation.every=0", "logging.samples=0", "checkpoint.every=3")
STAGES = ("parallel.pipeline=2", "training.micro_batch_size=4", "training.gradient_accumulation=2")
"""One replica that reads what the two of MODEL read; the memory is the second stage's alone."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[TinyJob]:
    """Three steps of two replicas, each with a memory of its own."""
    from tests.distributed.conftest import TinyJob

    job = TinyJob(tmp_path_factory.mktemp("trained"), tiny_data)
    job.train_ranks(*MODEL, "training.stop_after_step=3")
    yield job
    job.end()


def checkpoint(run: Path, step: int = 3) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def losses(job: TinyJob, run: str) -> list[float]:
    return [record["train/loss"] for record in job.records(run) if "train/loss" in record]


def weights_file(run: Path) -> bytes:
    """What an export of the run's first memory would hold."""
    write_weights(run, official_weights(model_of_run(run).decoder), "5GB", lambda num_bytes: None)
    return (run / "model.safetensors").read_bytes()


def test_a_resharded_run_goes_on_as_the_run_would_have(tiny_job: TinyJob, trained: TinyJob) -> None:
    before, out = trained.folder / "run", tiny_job.folder / "out"
    arguments = [sys.executable, str(COMMAND), "reshard", str(before), str(out), "parallel.processes=2", *STAGES]
    refused = tiny_job.start(*arguments)
    output, _ = refused.communicate(timeout=150)
    assert refused.returncode == 2 and output.count("error: ") == 1 and "Traceback" not in output, output
    assert "it has 2 memories a layer" in output and "checkpoint.memories=keep" in output
    assert not (out / "config.yaml").exists() and not list((out / "checkpoints").iterdir())

    process = tiny_job.start(*arguments, "checkpoint.memories=average")
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 0, output
    # Only the second stage, whose ranks are not the first, knows of it.
    assert output.count("2 memories a layer in the checkpoint became 1 (checkpoint.memories=average)") == 1
    assert f"saved {checkpoint(out)}" in output
    moved = whole_tensors(checkpoint(out))
    was = {name: tensor for name, tensor in whole_tensors(checkpoint(before)).items() if "/memory_00001/" not in name}
    values = "fast_state/memory_00000/block_001/"
    assert set(differing(was, moved)) <= {values + name for name in ("keys", "values.by_slot", "scale", "version")}

    here = f"run_directory={out}"
    tiny_job.train_ranks(*MODEL, *STAGES, here)
    tiny_job.begin_from(trained, 3)
    tiny_job.train_ranks(*MODEL, *STAGES, "checkpoint.memories=average")
    assert losses(tiny_job, "out") == losses(tiny_job, "run")[3:] and len(losses(tiny_job, "out")) == 3
    wanted = whole_tensors(checkpoint(tiny_job.folder / "run", 6))
    assert differing(wanted, whole_tensors(checkpoint(out, 6))) == []


def test_layouts_in_bfloat16_change_no_bit(tiny_job: TinyJob) -> None:
    """ZeRO keeps fp32 weights and moments beside bf16 ones: they go around, and the export stays byte for byte."""
    tiny_job.train_ranks(*MODEL, "training.precision=bf16", "training.stop_after_step=3")
    run = tiny_job.folder / "run"
    saved, exported = whole_tensors(checkpoint(run)), weights_file(run)
    assert saved[f"{WEIGHTS}embedding.weight"].dtype == torch.float32
    whole = ("parallel.tensor=2", "training.micro_batch_size=4")
    chain = {
        "stage 3": ("training.zero_stage=3",),
        "tensor": (*whole, "training.zero_stage=1", "checkpoint.memories=keep"),
        "back": (
            "parallel.tensor=1",
            "training.micro_batch_size=2",
            "training.zero_stage=2",
            "checkpoint.memories=keep",
        ),
    }
    for name, layout in chain.items():  # a policy that is set goes on in the config.yaml
        out = tiny_job.folder / name
        tiny_job.command_ranks(COMMAND, "reshard", str(run), str(out), *layout, processes=2)
        found = whole_tensors(checkpoint(out))
        if name != "stage 3":  # one memory is left, or copies of it are made
            first = {n: t for n, t in saved.items() if "/memory_00001/" not in n}
            found = {n: t for n, t in found.items() if "/memory_00001/" not in n}
            assert differing(first, found) == []
        else:
            assert differing(saved, found) == []
        assert weights_file(out) == exported
        run = out


def test_what_cannot_be_written_is_refused(tiny_job: TinyJob, trained: TinyJob) -> None:
    before, out = tiny_job.folder / "run", tiny_job.folder / "out"
    tiny_job.begin_from(trained, 3)
    source = checkpoint(before)
    with pytest.raises(UserError, match=r"'model\.layers=3': resharding can change parallel\., "):
        reshard_config(before, out, ["model.layers=3"], source)
    with pytest.raises(UserError, match="holds a run already"):
        reshard_config(before, before, [], source)
    for place in (before / "checkpoints", checkpoint(before), checkpoint(before) / "out", checkpoint(out)):
        with pytest.raises(UserError, match="is among the checkpoints of a run"):
            reshard_config(before, place, [], source)
    shutil.copytree(checkpoint(before), checkpoint(out))
    with pytest.raises(UserError, match=f"another command was killed there; delete {out}"):
        reshard_config(before, out, [], source)
    begun = out / ".config.yaml.partial"  # killed before its last step
    begun.write_text(_content(load_train_config(before / "config.yaml", [f"run_directory={out}"]), source))
    assert reshard_config(before, out, [], source).run_directory == str(out)
    tiny_job.command_ranks(COMMAND, "reshard", str(before), str(out), processes=2)
    assert (out / "config.yaml").read_text().startswith(f"# Resharded from {source}") and not begun.exists()
    assert reshard_config(out, tiny_job.folder / "next", [], checkpoint(out)).name == "tiny"
    shutil.rmtree(out)
    (file,) = checkpoint(before).glob("tensors/__1_*.distcp")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    process = tiny_job.start(sys.executable, str(COMMAND), "reshard", str(before), str(out))
    output, _ = process.communicate(timeout=150)
    assert process.returncode == 2 and output.count("error: ") == 1 and "Traceback" not in output, output
    assert f"the content of tensors/{file.name} doesn't match its hash" in output
    assert not (out / "config.yaml").exists() and not list((out / "checkpoints").iterdir())


def test_a_run_keeps_the_rows_that_its_weights_have(tiny_job: TinyJob) -> None:
    """Of weights that come from elsewhere, neither the tokenizer nor the layout says how many there are."""
    run = tiny_job.folder / "run"

    def begin(rows: int) -> None:
        shutil.rmtree(run, ignore_errors=True)
        config = load_train_config(tiny_job.config, MODEL)
        model = Decoder(config.model, rows, TorchBackend(), seed=1)
        save_alone(run / "checkpoints", JobState(0, 0, 0, None, [], {}, {}, {}), whole_model_pieces(model))
        (run / "config.yaml").write_text(to_yaml(config))

    begin(310)
    layout = (*MODEL, "training.stop_after_step=1", "parallel.tensor=2")
    assert "the optimizer begins anew" in tiny_job.train_ranks(*layout)
    assert whole_tensors(checkpoint(run, 1))[f"{WEIGHTS}embedding.weight"].shape == (310, 32)
    begin(299)
    refused = tiny_job.train(*layout, expected=2)
    assert "its embedding has 299 rows, which can't be split over parallel.tensor=2" in refused
