"""The plan of a job against the job's real parts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_fwpkm.config import TrainConfig, UserError, load_train_config
from megatron_fwpkm.memory import FastState, MemoryConfig
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.train.dry_run import (
    make_plan,
    memory_activation_bytes,
    padded_vocabulary,
    print_plan,
    readable_bytes,
)

ROOT = Path(__file__).parents[2]
NANO = ROOT / "configs" / "train" / "nano.yaml"


def _nano(*overrides: str) -> TrainConfig:
    return load_train_config(NANO, overrides)


def test_plan_counts_what_the_model_has() -> None:
    config = _nano("training.gradient_accumulation=3", "training.precision=bf16")
    plan = make_plan(config)
    model = Decoder(config.model, padded_vocabulary(4096, 1), TorchBackend(), config.seed)
    slow = sum(weight.numel() for weight in model.parameters())
    assert plan.slow == slow
    assert plan.fast * 4 == plan.fast_bytes == sum(state.num_bytes for _, state in model.fast_states())
    assert plan.flops_per_token == model.num_flops_per_token(1024)
    assert sum(kind.flops_per_token for kind in plan.kinds) == plan.flops_per_token
    assert {kind.layers for kind in plan.kinds if "FwPKM" in kind.name} == {2}
    assert plan.active_per_token == model.num_parameters().active_per_token
    assert plan.tokens_per_step == 2 * 3 * 1024 and plan.total_flops == plan.flops_per_token * 2 * 3 * 1024 * 560
    assert (plan.weight_bytes, plan.gradient_bytes, plan.optimizer_bytes) == (2 * slow, 4 * slow, 6 * slow)


def test_plan_counts_untied_embeddings_as_the_model_does() -> None:
    config = _nano("model.tied_embeddings=false")
    plan = make_plan(config)
    count = Decoder(config.model, padded_vocabulary(4096, 1), TorchBackend(), config.seed).num_parameters()
    assert (plan.slow, plan.fast, plan.active_per_token) == (count.slow, count.fast, count.active_per_token)


@pytest.mark.parametrize(
    "changes",
    [{}, {"heads": 2, "topk": 2}, {"chunk_size": "sequence"}, {"gradient_clip": True}, {"reset": "per_sequence"}],
)
def test_activation_bound_holds_and_is_close(changes: dict[str, object]) -> None:
    """Against the tensors that autograd really keeps; few slots meet here, so the bound is nearly reached."""
    settings = {"heads": 1, "topk": 2, "n_subkeys": 64, "k_dim": 16, "v_dim": 24, "chunk_size": 16, **changes}
    config = MemoryConfig(**settings)  # type: ignore[arg-type]
    state = FastState(config)
    state.begin_step()
    batch, length = 2, 40
    query = torch.randn(batch, length, config.heads, config.k_dim, requires_grad=True)
    value = torch.randn(batch, length, config.v_dim, requires_grad=True)
    gate = torch.rand(batch, length, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(storage)
        return tensor

    alive: list[torch.UntypedStorage] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fast_memory(query, value, gate, None, state.view(batch, training=True), config)
    bound, found = memory_activation_bytes(config, batch, length), sum(kept.values())
    assert 0.6 * bound < found <= bound


def test_largest_models_are_planned_without_allocating() -> None:
    sizes = {"hidden_size": 8192, "layers": 48, "attention_heads": 64, "key_value_heads": 8, "head_dim": 128}
    overrides = [f"model.{name}={value}" for name, value in {**sizes, "mlp_size": 28672}.items()]
    overrides += ["model.memory.n_subkeys=4096", "model.memory.v_dim=1024", "data.vocab_size=131072"]
    overrides += ["parallel.processes=64", "evaluation.sequences=64"]
    plan = make_plan(_nano(*overrides))
    assert plan.slow > 30e9 and plan.fast_bytes > 2 * 64 * 2**30  # hundreds of GB, had they been allocated
    console = Console(width=120, record=True, quiet=True)
    print_plan(_nano(*overrides), plan, console)


def test_plan_refuses_processes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = _nano().parallel.model_copy(update={"tensor": 2})
    config = _nano().model_copy(update={"parallel": parallel})
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes can't be divided into .* parallel\.tensor=2"):
        make_plan(config)


def test_dry_run_command_starts_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(NANO), "--dry-run"]
    overrides = [f"run_directory={tmp_path / 'run'}", f"data.directory={tmp_path / 'data'}", "training.steps=77"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in ("steps: 77", "FwPKMLayer", "optimizer (ZeRO-1 over 2 replicas)", "replica 1", "FLOP in all"):
        assert words in done.stdout, words
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], "no configuration file nowhere.yaml"),
        (["--config", str(NANO), "checkpoint.evry=3"], "did you mean `checkpoint.every`?"),
    ],
)
def test_mistakes_of_the_command_line(arguments: list[str], words: str) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1 and words in done.stderr and "Traceback" not in done.stderr


def test_readable_bytes() -> None:
    assert [readable_bytes(size) for size in (5, 2048, 3 << 20, 5 << 30)] == ["5 B", "2.00 KiB", "3.00 MiB", "5.00 GiB"]
