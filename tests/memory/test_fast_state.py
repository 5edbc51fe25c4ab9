"""Ownership, steps, resets, evaluation, and files of the fast state."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fwpkm.memory import FastState, FwPKMLayer, MemoryConfig, StateFileError, fast_memory
from megatron_fwpkm.profiling.traffic import RowTraffic
from tests.memory.support import configs, make_inputs

CONFIG = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4, heads=2)


def write(state: FastState, seed: int, tokens: int = 14) -> torch.Tensor:
    inputs = make_inputs(state.config, 2, tokens, seed, dtype=state.dtype)
    with torch.no_grad():
        return fast_memory(*inputs.tensors(), state.view(2, training=True), state.config)


def bits(state: FastState) -> tuple[torch.Tensor, torch.Tensor, float]:
    return state.keys_H2nd.clone(), state.table_ND.clone(), state.scale


def same(one: tuple[torch.Tensor, torch.Tensor, float], other: tuple[torch.Tensor, torch.Tensor, float]) -> bool:
    """Bitwise equality, NaN included (random settings may diverge)."""
    return one[2] == other[2] and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(one[:2], other[:2], strict=True)
    )


@settings(max_examples=40, deadline=None)
@given(config=configs(), calls=st.integers(1, 4), seed=st.integers(0, 1000))
def test_rolled_back_step_is_bitwise_gone(config: MemoryConfig, calls: int, seed: int) -> None:
    state = FastState(config, seed=seed)
    write(state, seed)
    before = bits(state)
    state.begin_step()
    for call in range(calls):
        state.begin_microbatch()
        write(state, seed + call)
    state.rollback_step()
    assert same(before, bits(state))
    state.begin_step()
    write(state, seed)
    state.commit_step()
    after = bits(state)
    state.begin_step()
    write(state, seed + 1)
    state.rollback_step()
    assert same(after, bits(state))


def test_rollback_is_exact_across_a_fold_of_the_scale() -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.9)
    state = FastState(config, seed=1)
    write(state, 0, tokens=6)
    before, folds = bits(state), state.num_folds
    assert before[2] != 1.0
    state.begin_step()
    write(state, 1, tokens=60)
    assert state.num_folds > folds
    state.rollback_step()
    assert same(before, bits(state))


def test_snapshot_and_restore_are_exact() -> None:
    state = FastState(dataclasses.replace(CONFIG, weight_decay=0.1), seed=1)
    write(state, 0)
    before, snapshot = bits(state), state.snapshot()
    write(state, 1)
    assert not same(before, bits(state))
    state.restore(snapshot)
    assert same(before, bits(state))


def test_failing_call_leaves_the_state_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = FwPKMLayer(6, CONFIG)
    layer(torch.randn(2, 12, 6))
    before = bits(layer.fast_state)
    from megatron_fwpkm.memory import chunk

    original, calls = chunk.write_keys, []

    def fail_at_third(*args: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(chunk, "write_keys", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        layer(torch.randn(2, 12, 6))
    assert same(before, bits(layer.fast_state))


def test_evaluation_never_changes_the_state_unless_asked() -> None:
    layer = FwPKMLayer(6, CONFIG)
    state = layer.fast_state
    before = bits(state)
    layer.eval()
    hidden = torch.randn(2, 20, 6)
    alone = layer(hidden)
    assert torch.equal(alone, layer(hidden))
    with state.evaluation():
        first, second = layer(hidden), layer(hidden)
    assert torch.equal(first, alone) and not torch.equal(first, second)
    assert same(before, bits(state))
    with state.evaluation(keep=True):
        layer(hidden)
    assert not same(before, bits(state))
    trained = FwPKMLayer(6, CONFIG)
    trained.load_state_dict(layer.state_dict())
    trained(hidden)
    torch.testing.assert_close(trained.fast_state.values_ND(), state.values_ND(), rtol=1e-6, atol=1e-7)


def test_evaluation_in_the_middle_of_a_step() -> None:
    layers = [FwPKMLayer(6, CONFIG) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    hidden = torch.randn(2, 20, 6)
    for evaluates, layer in enumerate(layers):
        layer.fast_state.begin_step()
        layer(hidden)
        if evaluates:
            layer.eval()
            with layer.fast_state.evaluation():
                layer(2 * hidden)
            layer.train()
        layer(hidden)
        layer.fast_state.commit_step()
    assert same(bits(layers[0].fast_state), bits(layers[1].fast_state))


@pytest.mark.parametrize("reset", ["per_step", "per_sequence"])
def test_reset_policies_forget(reset: str) -> None:
    config = dataclasses.replace(CONFIG, reset=reset)  # type: ignore[arg-type]
    state = FastState(config, seed=1)
    before = bits(state)
    state.begin_step()
    first = write(state, 0)
    again = write(state, 0)
    state.commit_step()
    assert torch.equal(first, again) == (reset == "per_sequence")
    state.begin_step()
    assert torch.equal(first, write(state, 0))
    state.commit_step()
    assert same(before, bits(state))


@pytest.mark.parametrize("reset", ["carry", "per_step", "per_sequence"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_steps_resets_evaluation_and_rollback_touch_only_touched_rows(reset: str, weight_decay: float) -> None:
    """Nothing of the table's size is made or passed over: 262144 slots, 64 tokens."""
    config = MemoryConfig(
        n_subkeys=512,
        topk=4,
        k_dim=16,
        v_dim=64,
        chunk_size=16,
        reset=reset,  # type: ignore[arg-type]
        weight_decay=weight_decay,
    )
    layer = FwPKMLayer(8, config)
    hidden = torch.randn(2, 32, 8)
    touched = hidden.shape[0] * hidden.shape[1] * config.reads_per_token * config.v_dim
    with RowTraffic(config.v_dim) as traffic:
        layer.fast_state.begin_step()
        layer(hidden).sum().backward()
        layer.fast_state.begin_microbatch()
        layer(hidden).sum().backward()
        layer.fast_state.rollback_step()
        layer.eval()
        with layer.fast_state.evaluation():
            layer(hidden)
    assert touched < config.num_slots // 2
    assert traffic.largest_result < config.num_slots  # not even one number for each slot
    assert traffic.bytes_moved < 200 * touched * 4


def test_dtype_conversion_leaves_the_state_alone() -> None:
    layer = FwPKMLayer(6, CONFIG)
    before = bits(layer.fast_state)
    layer.to(torch.bfloat16)
    assert layer.fast_state.dtype == torch.float32 and same(before, bits(layer.fast_state))
    assert layer(torch.randn(1, 5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    names = {name for name, _ in layer.named_parameters()} | {name for name, _ in layer.named_buffers()}
    assert not any("fast" in name or "table" in name or "keys" in name for name in names)
    with pytest.raises(ValueError, match="float32"):
        FastState(CONFIG, dtype=torch.bfloat16)


def test_replicas_start_equal_by_seed() -> None:
    assert same(bits(FastState(CONFIG, seed=5)), bits(FastState(CONFIG, seed=5)))
    assert not same(bits(FastState(CONFIG, seed=5)), bits(FastState(CONFIG, seed=6)))


# -- files ---------------------------------------------------------------------------------------------------------


def test_save_and_load_are_bitwise(tmp_path: Path) -> None:
    state = FastState(dataclasses.replace(CONFIG, weight_decay=0.05), seed=1)
    write(state, 0)
    path = tmp_path / "layer.safetensors"
    state.save(path, {"layer": "3"})
    other = FastState(state.config, seed=9)
    assert other.load(path) == {"layer": "3"}
    assert same(bits(state), bits(other)) and other.version == state.version
    write(state, 1), write(other, 1)
    assert same(bits(state), bits(other))
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def _flip(position: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 0x40
        path.write_bytes(bytes(content))

    return flip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "truncated or damaged"),
        (_flip(-5), "checksum"),
        (_flip(-600), "checksum"),
        (_flip(3), "truncated or damaged"),
        (lambda path: path.unlink(), "no fast-state file"),
        (lambda path: path.write_bytes(b"hello"), "truncated or damaged"),
    ],
)
def test_damaged_files_are_refused_and_nothing_changes(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    state = FastState(CONFIG, seed=1)
    path = tmp_path / "layer.safetensors"
    state.save(path)
    damage(path)
    other = FastState(CONFIG, seed=2)
    before = bits(other)
    with pytest.raises(StateFileError, match=message) as caught:
        other.load(path)
    assert str(path) in str(caught.value)
    assert same(before, bits(other))


def test_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    FastState(CONFIG, seed=1).save(tmp_path / "a.safetensors")
    other = FastState(dataclasses.replace(CONFIG, n_subkeys=9), seed=2)
    with pytest.raises(StateFileError, match=r"\(2, 2, 8, 4\).*\(2, 2, 9, 4\)"):
        other.load(tmp_path / "a.safetensors")


def test_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"keys": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(StateFileError, match="not a fast-state file"):
        FastState(CONFIG).load(tmp_path / "a.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up: a small file-size limit makes the kernel refuse the write, as a full disk does."""
    import resource
    import signal

    state = FastState(MemoryConfig(n_subkeys=32, topk=3, k_dim=8, v_dim=64), seed=1)
    path = tmp_path / "layer.safetensors"
    state.save(path)
    content = path.read_bytes()
    write(state, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
        with pytest.raises(StateFileError, match="could not write"):
            state.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]


def test_saving_in_the_middle_of_a_step_is_refused(tmp_path: Path) -> None:
    state = FastState(CONFIG, seed=1)
    state.begin_step()
    write(state, 0)
    with pytest.raises(RuntimeError, match="between steps"):
        state.save(tmp_path / "a.safetensors")
