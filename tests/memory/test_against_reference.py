"""The fast path against the dense reference in float64, on random shapes and options."""

import dataclasses

import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from megatron_fwpkm.memory import FastState, MemoryConfig, fast_memory
from megatron_fwpkm.memory.overlay import Overlay
from megatron_fwpkm.memory.reference import reference_memory
from tests.memory.support import Inputs, assert_same, clone_state, configs, make_inputs, run_fast, run_reference

relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
brief = settings(relaxed, max_examples=40)


@relaxed
@given(
    config=configs(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 23),
    gates=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_call_equals_reference(
    config: MemoryConfig, batch: int, tokens: int, gates: bool, mask: bool, seed: int
) -> None:
    state = FastState(config, seed=seed, dtype=torch.float64)
    inputs = make_inputs(config, batch, tokens, seed + 1, gates=gates, mask=mask)
    cotangent = torch.randn(
        batch, tokens, config.v_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    wanted = run_reference(config, state, inputs, cotangent)
    found = run_fast(config, state, inputs, cotangent)
    assert_same(found, wanted)


@brief
@given(
    config=configs(), batch=st.integers(1, 3), tokens=st.integers(1, 19), mask=st.booleans(), seed=st.integers(0, 2**31)
)
def test_memory_per_sequence_equals_one_call_each(
    config: MemoryConfig, batch: int, tokens: int, mask: bool, seed: int
) -> None:
    config = MemoryConfig(**{**config.__dict__, "reset": "per_sequence"})
    state = FastState(config, seed=seed, dtype=torch.float64)
    inputs = make_inputs(config, batch, tokens, seed + 1, mask=mask)
    cotangent = torch.randn(batch, tokens, config.v_dim, dtype=torch.float64)
    leaves = inputs.leaves()
    view = state.view(batch, training=True)
    assert isinstance(view, Overlay)
    fast_memory(leaves["query"], leaves["target"], leaves["gate"], inputs.mask, view, config).backward(cotangent)
    for b in range(batch):
        single = slice(b, b + 1)
        wanted = run_reference(config, state, inputs[single], cotangent[single]).arrays
        assume(max(float(wanted[name].abs().max()) for name in ("read", "values_final", "keys_final", "d_query")) < 1e4)
        for name, leaf in leaves.items():
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(gradient[single], wanted["d_" + name], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(view.values_ND(b), wanted["values_final"], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(view.keys_MH2nd[b], wanted["keys_final"], rtol=1e-9, atol=1e-11)


@relaxed
@given(config=configs(), seed=st.integers(0, 2**31), copies=st.integers(2, 6))
@example(config=MemoryConfig(n_subkeys=8, topk=4, k_dim=4, v_dim=3, chunk_size=4), seed=0, copies=6)
def test_equal_subkeys_resolve_to_the_lowest_index(config: MemoryConfig, seed: int, copies: int) -> None:
    """Duplicate sub-keys: the same slots in the reference, in any batch and in single tokens.

    One chunk: a write can part equal sub-keys by less than a rounding, and then no two ways of adding need agree.
    """
    config = dataclasses.replace(config, chunk_size="sequence")
    state = FastState(config, seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, config.n_subkeys, (copies,), generator=generator)
    keys = state.keys_H2nd.clone()
    keys[:, :, targets] = keys[:, :, targets[:1]]
    state.replace(keys, state.table_ND)
    inputs = make_inputs(config, 2, 11, seed)
    cotangent = torch.randn(2, 11, config.v_dim, dtype=torch.float64, generator=generator)
    single = reference_memory(
        inputs.query[1:, 3:4], inputs.target[1:, 3:4], None, None, state.keys_H2nd, state.values_ND(), config
    )
    cache = MemoryCacheFor(state)
    assert torch.equal(single.slots_BTHK, cache.slots_of(inputs.query[1:, 3:4], inputs.target[1:, 3:4]))
    wanted = run_reference(config, state, inputs, cotangent)
    assert_same(run_fast(config, state, inputs, cotangent), wanted)


class MemoryCacheFor:
    """Slots that a fresh cache reads."""

    def __init__(self, state: FastState) -> None:
        from megatron_fwpkm.memory import CacheTrace, MemoryCache

        self.cache = MemoryCache(state, 1)
        self.cache.trace = CacheTrace()

    def slots_of(self, query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.cache(query, target)
        assert self.cache.trace is not None and self.cache.trace.slots_BTHK is not None
        return self.cache.trace.slots_BTHK


def test_exact_gradient_is_the_true_derivative() -> None:
    """values_only=False: central differences of the fast path itself."""
    config = MemoryConfig(
        n_subkeys=6, topk=3, k_dim=6, v_dim=4, chunk_size=4, heads=2, values_only=False, key_gradient="exact"
    )
    state = FastState(config, seed=3, dtype=torch.float64)
    inputs = make_inputs(config, 2, 11, 5)
    cotangent = torch.randn(2, 11, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(9))

    def objective(query: torch.Tensor, target: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return (fast_memory(query, target, gate, None, clone_state(state), config) * cotangent).sum()

    leaves = inputs.leaves()
    objective(**leaves).backward()
    generator = torch.Generator().manual_seed(1)
    for name, leaf in leaves.items():
        direction = torch.randn(leaf.shape, dtype=torch.float64, generator=generator)
        values = []
        for step in (1e-6, -1e-6):
            moved = {k: v.detach() + (step * direction if k == name else 0) for k, v in leaves.items()}
            values.append(objective(**moved))
        numeric = float((values[0] - values[1]) / 2e-6)
        assert leaf.grad is not None
        assert abs(numeric - float((leaf.grad * direction).sum())) <= 1e-7 * max(abs(numeric), 1.0), name


def test_two_runs_are_bitwise_equal() -> None:
    config = MemoryConfig(n_subkeys=64, topk=8, k_dim=64, v_dim=64, chunk_size=64, heads=2, weight_decay=0.01)
    inputs = make_inputs(config, 2, 300, 1, dtype=torch.float32)
    cotangent = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(2))
    first, second = (run_fast(config, FastState(config, seed=4), inputs, cotangent).arrays for _ in range(2))
    for name, array in first.items():
        assert torch.equal(array, second[name]), name


def test_float32_stays_close_to_float64() -> None:
    config = MemoryConfig(n_subkeys=64, topk=8, k_dim=64, v_dim=32, chunk_size=64)
    state = FastState(config, seed=4)
    wide = FastState(config, dtype=torch.float64)
    wide.replace(state.keys_H2nd, state.table_ND)
    inputs = make_inputs(config, 2, 256, 1, dtype=torch.float32)
    assert inputs.gate is not None
    doubled = Inputs(inputs.query.double(), inputs.target.double(), inputs.gate.double(), None)
    cotangent = torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(2))
    found = run_fast(config, state, inputs, cotangent).arrays
    wanted = run_fast(config, wide, doubled, cotangent.double()).arrays
    assert torch.equal(found["slots"], wanted["slots"])
    for name, array in wanted.items():
        if array.is_floating_point():
            error = float((found[name].double() - array).abs().max() / array.abs().max())
            assert error < 2e-5, f"{name}: {error:.1e}"
