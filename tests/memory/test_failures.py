"""What goes wrong half-way: failing calls, folds, interrupted caches, stale overlays, inference mode, empty inputs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_fwpkm.memory import (
    FastState,
    FwPKMLayer,
    MemoryCache,
    MemoryConfig,
    MemoryStatistics,
    PKMConfig,
    PKMLayer,
    StateFileError,
    fast_memory,
)
from megatron_fwpkm.memory import chunk as chunk_module
from megatron_fwpkm.memory.state_file import FORMAT, _checksum
from tests.memory.support import make_inputs, remember

CONFIG = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4, heads=2)
DECAYING = dataclasses.replace(CONFIG, weight_decay=0.9)


def write(state: FastState, seed: int, tokens: int = 14) -> None:
    inputs = make_inputs(state.config, 2, tokens, seed, dtype=state.dtype)
    with torch.no_grad():
        fast_memory(*inputs.tensors(), state.view(2, training=True), state.config)


def bits(state: FastState) -> list[torch.Tensor]:
    return [state.keys_H2nd.clone(), state.table_ND.clone(), torch.tensor(state.scale, dtype=torch.float64)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the n-th write of sub-keys from now on raise."""
    original = chunk_module.write_keys

    def arm(number: int) -> None:
        left = [number]

        def write_keys(*args: object) -> object:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(chunk_module, "write_keys", write_keys)

    return arm


@pytest.mark.parametrize("config", [CONFIG, DECAYING], ids=["plain", "folding"])
@pytest.mark.parametrize(("tokens_before", "fails_at"), [(14, 3), (60, 1), (60, 2), (14, 14), (60, 12)])
def test_failing_call_in_a_step_takes_back_itself_alone(
    config: MemoryConfig, tokens_before: int, fails_at: int, fail_at: Callable[[int], None]
) -> None:
    state = FastState(config, seed=1)
    start = bits(state)
    state.begin_step()
    write(state, 0, tokens_before)
    before = bits(state)
    fail_at(fails_at)
    with pytest.raises(KeyboardInterrupt):
        write(state, 1, 60)
    assert same(before, bits(state))
    state.begin_microbatch()
    fail_at(10**9)
    write(state, 2)
    after = bits(state)
    state.commit_step()
    assert same(after, bits(state)) and not same(before, after)
    again = FastState(config, seed=1)
    again.begin_step()
    write(again, 0, tokens_before)
    write(again, 2)
    assert same(after, bits(again))
    again.rollback_step()
    assert same(start, bits(again))


def test_saving_in_a_step_is_refused_after_a_fold_too(tmp_path: Path) -> None:
    state = FastState(DECAYING, seed=1)
    state.begin_step()
    write(state, 0, 60)
    state.begin_microbatch()
    assert state.num_folds > 0
    with pytest.raises(RuntimeError, match="between steps"):
        state.save(tmp_path / "a.safetensors")


def test_steps_out_of_order_are_refused() -> None:
    state = FastState(CONFIG)
    for action in (state.commit_step, state.rollback_step):
        with pytest.raises(RuntimeError, match="needs a begin_step"):
            action()
    state.begin_step()
    with pytest.raises(RuntimeError, match="called twice"):
        state.begin_step()
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        state.restore(FastState(CONFIG).snapshot())


def test_undo_log_stays_within_the_distinct_rows() -> None:
    state = FastState(CONFIG, seed=1)
    before = bits(state)
    state.begin_step()
    for seed in range(12):
        state.begin_microbatch()
        write(state, seed)
    state.begin_microbatch()
    assert state._log is not None
    assert sum(entry.rows_UD.shape[0] for entry in state._log.entries) <= CONFIG.num_slots
    state.rollback_step()
    assert same(before, bits(state))


@pytest.mark.parametrize("change", ["write", "load", "restore", "rollback"])
def test_overlay_over_a_changed_state_is_refused(change: str, tmp_path: Path) -> None:
    state, other = FastState(CONFIG, seed=1), FastState(CONFIG, seed=2)
    inputs = make_inputs(CONFIG, 2, 9, 0, dtype=torch.float32)
    if change == "rollback":
        state.begin_step()
        write(state, 3)
    cache = MemoryCache(state, 2)
    cache(*inputs.tensors())
    if change == "write":
        write(state, 0)
    elif change == "load":
        other.version = state.version
        other.save(tmp_path / "a.safetensors")
        state.load(tmp_path / "a.safetensors")
    elif change == "restore":
        state.restore(other.snapshot())
    else:
        state.rollback_step()
    with pytest.raises(RuntimeError, match="make a new cache"):
        cache(*inputs.tensors())


@pytest.mark.parametrize("mode", ["aligned", "official"])
def test_interrupted_cache_says_so(mode: str, fail_at: Callable[[int], None]) -> None:
    state = FastState(CONFIG, seed=1)
    cache = MemoryCache(state, 2, mode=mode)  # type: ignore[arg-type]
    inputs = make_inputs(CONFIG, 2, 12, 0, dtype=torch.float32)
    fail_at(2)
    with pytest.raises(KeyboardInterrupt):
        cache(*inputs.tensors())
    with pytest.raises(RuntimeError, match="an earlier call failed"):
        cache(*inputs.tensors())


def test_interrupted_overlays_are_not_gone_on_with(fail_at: Callable[[int], None]) -> None:
    layer = FwPKMLayer(6, dataclasses.replace(CONFIG, reset="per_step"))
    hidden = torch.randn(2, 12, 6)
    layer.fast_state.begin_step()
    fail_at(2)
    with pytest.raises(KeyboardInterrupt):
        layer(hidden)
    fail_at(10**9)
    with pytest.raises(RuntimeError, match="an earlier call failed"):
        layer(hidden)
    layer.fast_state.rollback_step()
    layer.fast_state.begin_step()
    layer(hidden)


def test_statistics_forget_a_failed_call(fail_at: Callable[[int], None]) -> None:
    statistics = MemoryStatistics(CONFIG)
    inputs = make_inputs(CONFIG, 2, 12, 0, dtype=torch.float32)
    state = FastState(CONFIG, seed=1)
    fail_at(3)
    with pytest.raises(KeyboardInterrupt):
        fast_memory(*inputs.tensors(), state, CONFIG, statistics=statistics)
    fail_at(10**9)
    fast_memory(*inputs.tensors(), state, CONFIG, statistics=statistics)
    fresh = MemoryStatistics(CONFIG)
    fast_memory(*inputs.tensors(), FastState(CONFIG, seed=1), CONFIG, statistics=fresh)
    assert float(statistics.tensors()["reads_histogram"].sum()) == float(fresh.tensors()["reads_histogram"].sum())
    for name, value in fresh.tensors().items():
        assert torch.equal(value, statistics.tensors()[name]), name


def test_inference_mode_does_not_poison_training() -> None:
    layer = FwPKMLayer(6, CONFIG)
    hidden = torch.randn(2, 12, 6)
    with torch.inference_mode():
        layer(hidden)
        layer.eval()
        with layer.fast_state.evaluation(keep=True):
            layer(hidden)
        cache = layer.make_cache(2, memory="shared")
        layer(hidden, cache=cache)
        cache.commit()
    layer.train()
    layer(hidden).sum().backward()


def test_nothing_to_keep_is_refused() -> None:
    state = FastState(dataclasses.replace(CONFIG, reset="per_sequence"))
    with pytest.raises(ValueError, match="nothing to keep"), state.evaluation(keep=True):
        pass


def test_cache_copies_what_outlives_a_call() -> None:
    """Decoding with one buffer for all tokens, and a long prefill that must not be held on to."""
    inputs = make_inputs(CONFIG, 2, 30, 0, dtype=torch.float32)
    state = FastState(CONFIG, seed=1)
    for mode in ("aligned", "official"):
        plain, buffered = (MemoryCache(state, 2, mode=mode) for _ in range(2))  # type: ignore[arg-type]
        buffers = [None if t is None else t[:, :1].clone() for t in inputs.tensors()]
        for position in range(30):
            token = inputs[:, position : position + 1].tensors()
            for buffer, new in zip(buffers, token, strict=True):
                if buffer is not None and new is not None:
                    buffer.copy_(new)
            query, target, gate, mask = buffers
            assert query is not None and target is not None
            assert torch.equal(buffered(query, target, gate, mask), plain(*token)), mode
        long = MemoryCache(state, 2, mode=mode)  # type: ignore[arg-type]
        long(*inputs[:, :29].tensors())
        held = {t.query.untyped_storage().nbytes() for t in long._waiting}
        assert all(size <= 2 * 5 * 16 * 4 for size in held)


def test_tokens_after_finish_start_a_new_chunk() -> None:
    config = dataclasses.replace(CONFIG, reset="carry")
    state = FastState(config, seed=1, dtype=torch.float64)
    first, second = make_inputs(config, 2, 10, 0), make_inputs(config, 2, 7, 1)
    cache = MemoryCache(state, 2, memory="shared")
    found = [cache(*first.tensors())]
    cache.finish()
    found.append(cache(*second.tensors()))
    trained = FastState(config, seed=1, dtype=torch.float64)
    with torch.no_grad():
        wanted = [fast_memory(*part.tensors(), trained, config) for part in (first, second)]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_long_decaying_streams_keep_float32_overlays_in_range() -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.6)
    inputs = make_inputs(config, 1, 1200, 0, dtype=torch.float32)
    state = FastState(config, seed=1)
    cache = MemoryCache(state, 1)
    found = cache(*inputs.tensors())
    with torch.no_grad():
        wanted = fast_memory(*inputs.tensors(), FastState(config, seed=1), config)
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_empty_inputs_pass() -> None:
    layer, pkm = FwPKMLayer(6, CONFIG), PKMLayer(6, PKMConfig(heads=2, topk=3, n_subkeys=6, k_dim=8, v_dim=5))
    for shape in ((2, 0, 6), (0, 5, 6)):
        hidden = torch.zeros(shape, requires_grad=True)
        (layer(hidden).sum() + pkm(hidden).sum()).backward()
        assert hidden.grad is not None and hidden.grad.shape == shape
    for batch in (0, -1, 1.5):
        with pytest.raises(ValueError, match="1 sequence or more"):
            layer.make_cache(batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"input has shape \(4, 6\)"):
        pkm(torch.zeros(4, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pkm_trains_in_half_precision(dtype: torch.dtype) -> None:
    layer = PKMLayer(6, PKMConfig(heads=2, topk=3, n_subkeys=6, k_dim=8, v_dim=5)).to(dtype)
    layer(torch.randn(2, 4, 6, dtype=dtype)).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.is_sparse and layer.values.grad.dtype == dtype


def test_second_derivatives_are_refused_not_wrong() -> None:
    inputs = make_inputs(CONFIG, 2, 9, 0, dtype=torch.float32).leaves()
    pkm = PKMLayer(6, PKMConfig(heads=2, topk=3, n_subkeys=6, k_dim=8, v_dim=5))
    x = torch.randn(2, 4, 6, requires_grad=True)
    for out, leaf in ((remember(inputs, None, FastState(CONFIG), CONFIG), inputs["query"]), (pkm(x), x)):
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def _rewrite(path: Path, change: Callable[[dict[str, str]], None], *, sign: bool) -> None:
    """Change a state file's metadata, with a fitting checksum or without."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata)
    if sign:
        metadata["checksum"] = _checksum(tensors, metadata["description"], metadata["user"])
    save_file(tensors, path, metadata)


def _describe(key: str, value: object) -> Callable[[dict[str, str]], None]:
    def change(metadata: dict[str, str]) -> None:
        description = json.loads(metadata["description"])
        if value is None:
            del description[key]
        else:
            description[key] = value
        metadata["description"] = json.dumps(description)

    return change


@pytest.mark.parametrize(
    ("change", "sign", "message"),
    [
        (lambda m: m.update(user='{"layer": "4"}'), False, "checksum"),
        (lambda m: m.update(user="{"), False, "checksum"),
        (lambda m: m.update(format=FORMAT + "0"), False, "not a fast-state file"),
        (_describe("scale", None), True, "can't be used"),
        (_describe("version", None), True, "can't be used"),
        (_describe("scale", "nan"), True, "running scale of nan"),
        (_describe("scale", (0.0).hex()), True, "running scale of 0"),
        (_describe("config", {"score_type": "dot_product"}), True, "score_type 'dot_product'"),
    ],
)
def test_changed_descriptions_are_refused(
    tmp_path: Path, change: Callable[[dict[str, str]], None], sign: bool, message: str
) -> None:
    path = tmp_path / "a.safetensors"
    FastState(CONFIG, seed=1).save(path, {"layer": "3"})
    _rewrite(path, change, sign=sign)
    state = FastState(CONFIG, seed=2)
    before, version = bits(state), state.version
    with pytest.raises(StateFileError, match=message):
        state.load(path)
    assert same(before, bits(state)) and state.version == version
