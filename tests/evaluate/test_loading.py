"""Opening runs: what a checkpoint holds is what is measured, and anything else is said."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch

from megatron_fwpkm.checkpoint.files import JOB_FILE, TENSORS
from megatron_fwpkm.checkpoint.parts import fast_name, memory_pieces
from megatron_fwpkm.checkpoint.pieces import Pieces, Staging
from megatron_fwpkm.checkpoint.store import JobState
from megatron_fwpkm.checkpoint.tensors import save_tensors
from megatron_fwpkm.checkpoint.whole_model import whole_model_pieces
from megatron_fwpkm.config import TrainConfig, load_train_config, to_yaml
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.evaluate.held_out import HeldOutText
from megatron_fwpkm.evaluate.loading import TrainedRun, load_decoder, open_run, read_run_config
from megatron_fwpkm.evaluate.measure import Measurement
from megatron_fwpkm.memory.pkm_layer import slow_tables
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend

CONFIG = """
model:
  {hidden_size: 16, layers: 2, mixers: [full_attention], attention_heads: 2, key_value_heads: 1, head_dim: 8,
   rotary_fraction: 1.0, mlp_size: 24, memory_layers: [1], pkm_layers: [0], initial_std: 0.3,
   pkm: {heads: 1, topk: 2, n_subkeys: 4, k_dim: 8, v_dim: 8},
   memory: {topk: 4, n_subkeys: 8, k_dim: 8, v_dim: 8, chunk_size: 16}}
data: {sequence_length: 32}
evaluation: {sequences: 8, needles: {samples: 0}}
"""
BACKEND = TorchBackend()


def tiny_config(folder: Path, *overrides: str) -> TrainConfig:
    path = folder / "tiny.yaml"
    path.write_text(CONFIG)
    return load_train_config(path, overrides)


def write_run(folder: Path, seed: int = 7) -> Decoder:
    """A run directory with one checkpoint, of a model whose weights and fast state are not those of its seed."""
    config = tiny_config(folder)
    model = Decoder(config.model, 64, BACKEND, seed=seed).eval()
    checkpoint = folder / "checkpoints" / "step_00000003"
    pieces = whole_model_pieces(model)
    for block, state in model.fast_states():
        state.table_ND.mul_(2)
        pieces |= memory_pieces(state, fast_name(1, block), Staging())
    write_checkpoint(checkpoint, pieces)
    (folder / "config.yaml").write_text(to_yaml(config))
    return model


def write_checkpoint(checkpoint: Path, pieces: dict[str, Pieces]) -> None:
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir(parents=True)
    save_tensors(checkpoint / TENSORS, pieces)
    state = JobState(3, 96, 0, None, [], {}, {"corpus": "c", "tokenizer": "t"}, {})
    (checkpoint / JOB_FILE).write_text(json.dumps(dataclasses.asdict(state)))
    write_manifest(checkpoint)


def write_manifest(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    entries = {
        str(path.relative_to(checkpoint)): {
            "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }  # fmt: skip
    (checkpoint / "manifest.json").write_text(json.dumps(entries))


def logits(model: Decoder, tokens: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(torch.arange(tokens).remainder(64).unsqueeze(0))


def test_the_model_is_the_one_that_was_saved(tmp_path: Path) -> None:
    saved = write_run(tmp_path)
    run = open_run(tmp_path, read_run_config(tmp_path, []), None)
    assert (run.step, run.tokens, run.corpus["corpus"], run.checkpoint.name) == (3, 96, "c", "step_00000003")
    assert torch.equal(logits(load_decoder(run, BACKEND, 1)), logits(saved))
    first = load_decoder(run, BACKEND, 0)
    assert not torch.equal(logits(first), logits(saved))
    for (_, one), (_, other) in zip(first.fast_states(), saved.fast_states(), strict=True):
        assert torch.equal(2 * one.table_ND, other.table_ND) and torch.equal(one.keys_H2nd, other.keys_H2nd)


def test_rope_and_chunks_are_as_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path)
    run = open_run(tmp_path, read_run_config(tmp_path, []), None)
    plain = load_decoder(run, BACKEND, 0)
    stretched = load_decoder(run, BACKEND, 0, rope_factor=4.0)
    assert stretched.config.rope_scaling is not None and stretched.config.rope_scaling.original_length == 32
    assert not torch.allclose(logits(stretched), logits(plain))
    whole = load_decoder(run, BACKEND, 0, chunk_size="sequence")
    assert {layer.config.chunk_size for _, layer in whole.memory_layers()} == {"sequence"}


def test_trained_tables_beside_the_weights_are_used(tmp_path: Path) -> None:
    saved = write_run(tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step_00000003"
    name = "blocks.0.mlp.values"
    table = 3 * slow_tables(saved)[name].values_ND.detach()
    with torch.no_grad():
        slow_tables(saved)[name].values_ND.copy_(table)
    write_checkpoint(checkpoint, whole_model_pieces(saved))
    loaded = load_decoder(open_run(tmp_path, read_run_config(tmp_path, []), None), BACKEND, 0)
    assert torch.equal(slow_tables(loaded)[name].values_ND, table)


def replace_weights(run: TrainedRun, content: bytes) -> TrainedRun:
    """The run as it was before it was damaged."""
    (weights,) = (run.checkpoint / TENSORS).glob("*.distcp")
    weights.write_bytes(content)
    return run


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read_run_config(tmp_path, [])
    write_run(tmp_path)
    with pytest.raises(UserError, match=r"'optimizer\.learning_rate=1'.*describe what was trained"):
        read_run_config(tmp_path, ["optimizer.learning_rate=1"])
    config = read_run_config(tmp_path, ["evaluation.sequences=9"])
    assert config.evaluation.sequences == 9
    with pytest.raises(UserError, match=r"'step_1'; there are step_00000003"):
        open_run(tmp_path, config, "step_1")
    run = open_run(tmp_path, config, None)
    with pytest.raises(UserError, match=r"no replica 2.*evaluation\.replica"):
        load_decoder(run, BACKEND, 2)
    (weights,) = (run.checkpoint / TENSORS).glob("*.distcp")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"is damaged \(tensors/__0_0\.distcp has"):
        open_run(tmp_path, config, None)
    pieces = whole_model_pieces(load_decoder(replace_weights(run, content), BACKEND, 0))
    del pieces["slow/norm.weight"]
    write_checkpoint(run.checkpoint, pieces)
    with pytest.raises(UserError, match=r"only one side has: slow/norm\.weight"):
        load_decoder(run, BACKEND, 0)
    (run.checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_run(tmp_path, config, None)


@pytest.mark.parametrize(
    ("mixers", "setting", "factors"),
    [
        ("[full_attention]", "auto", {32: None, 64: 2.0, 128: 4.0}),
        ("[sliding_attention]", "auto", {32: None, 64: None, 128: None}),
        ("[sliding_attention]", "3", {32: None, 64: 3.0, 128: 3.0}),
        ("[full_attention]", "none", {32: None, 64: None, 128: None}),
    ],
)
def test_rope_is_stretched_beyond_the_training_length(
    tmp_path: Path, mixers: str, setting: str, factors: dict[int, float | None]
) -> None:
    write_run(tmp_path)
    overrides = [f"evaluation.rope_scaling={setting}", f"model.mixers={mixers}"]
    config = tiny_config(tmp_path, *overrides)
    run = open_run(tmp_path, config, None)
    text = HeldOutText(None, numpy.zeros(1, numpy.int64), numpy.zeros(1, numpy.int64), False)  # type: ignore[arg-type]
    measurement = Measurement(config, [run], text)
    assert {length: measurement._identity("run", length)["rope_factor"] for length in factors} == factors
