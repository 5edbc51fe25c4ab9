"""Inference: any cut of a stream into calls computes the same as one training call."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fwpkm.memory import FastState, MemoryCache, MemoryConfig, fast_memory
from megatron_fwpkm.memory.overlay import Overlay
from tests.memory.support import configs, make_inputs

relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def cut(tokens: int, places: list[int]) -> list[slice]:
    """Consecutive pieces of 0..tokens, cut at the given places."""
    edges = [0, *sorted({place % tokens for place in places if place % tokens}), tokens]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@relaxed
@given(
    config=configs(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 25),
    places=st.lists(st.integers(0, 100), max_size=12),
    memory=st.sampled_from(["per_sequence", "shared"]),
    gates=st.booleans(),
    mask=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_cut_equals_one_training_call(
    config: MemoryConfig, batch: int, tokens: int, places: list[int], memory: str, gates: bool, mask: bool, seed: int
) -> None:
    reset = "per_sequence" if memory == "per_sequence" else "carry"
    config = dataclasses.replace(config, reset=reset)  # type: ignore[arg-type]
    state = FastState(config, seed=seed, dtype=torch.float64)
    inputs = make_inputs(config, batch, tokens, seed + 1, gates=gates, mask=mask)
    cache = MemoryCache(state, batch, mode="aligned", memory=memory)  # type: ignore[arg-type]
    pieces = cut(tokens, places)
    found = torch.cat([cache(*inputs[:, piece].tensors()) for piece in pieces], 1)
    cache.finish()
    view = state.view(batch, training=True)
    with torch.no_grad():
        wanted = fast_memory(*inputs.tensors(), view, config)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(cache.view.keys_MH2nd, view.keys_MH2nd, rtol=1e-9, atol=1e-11)
    for index in range(cache.view.memories):
        values = view.values_ND(index) if isinstance(view, Overlay) else state.values_ND()
        if isinstance(view, Overlay):  # otherwise the training call wrote the state under the cache
            torch.testing.assert_close(cache.view.values_ND(index), values, rtol=1e-9, atol=1e-11)


def test_a_shared_cache_ends_in_the_training_calls_state() -> None:
    config = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4, weight_decay=0.1)
    trained, cached = (FastState(config, seed=1, dtype=torch.float64) for _ in range(2))
    inputs = make_inputs(config, 2, 18, 3)
    with torch.no_grad():
        fast_memory(*inputs.tensors(), trained, config)
    cache = MemoryCache(cached, 2, memory="shared")
    for start in range(0, 18, 5):
        cache(*inputs[:, start : start + 5].tensors())
    cache.finish()
    untouched = cached.values_ND()
    torch.testing.assert_close(cache.view.values_ND(), trained.values_ND(), rtol=1e-10, atol=1e-12)
    assert torch.equal(untouched, cached.values_ND())
    cache.commit()
    torch.testing.assert_close(cached.values_ND(), trained.values_ND(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(cached.keys_H2nd, trained.keys_H2nd, rtol=1e-10, atol=1e-12)


def test_sequence_chunk_is_written_once_at_the_end() -> None:
    config = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size="sequence")
    state = FastState(config, seed=1, dtype=torch.float64)
    inputs = make_inputs(config, 1, 40, 3)
    cache = MemoryCache(state, 1)
    for start in range(0, 40, 7):
        cache(*inputs[:, start : start + 7].tensors())
    assert cache.view.num_touched == 0
    cache.finish()
    assert cache.view.num_touched > 0
    with torch.no_grad():
        fast_memory(*inputs.tensors(), state, config)
    torch.testing.assert_close(cache.view.keys_MH2nd[0], state.keys_H2nd)


def test_frozen_cache_reads_without_writing() -> None:
    config = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4)
    state = FastState(config, seed=1, dtype=torch.float64)
    inputs = make_inputs(config, 2, 12, 3)
    cache = MemoryCache(state, 2)
    cache.frozen = True
    reads = cache(*inputs.tensors())
    cache.finish()
    assert cache.view.num_touched == 0
    one_chunk = MemoryCache(FastState(dataclasses.replace(config, chunk_size=12), seed=1, dtype=torch.float64), 2)
    torch.testing.assert_close(reads, one_chunk(*inputs.tensors()))


@pytest.mark.parametrize("mode", ["aligned", "official"])
def test_sequences_with_their_own_memory_do_not_meet(mode: str) -> None:
    config = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4)
    state = FastState(config, seed=1, dtype=torch.float64)
    inputs = make_inputs(config, 3, 17, 3, mask=True)
    together = MemoryCache(state, 3, mode=mode)(*inputs.tensors())  # type: ignore[arg-type]
    for b in range(3):
        alone = MemoryCache(state, 1, mode=mode)(*inputs[b : b + 1].tensors())  # type: ignore[arg-type]
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-13)


def test_wrong_batch_is_refused() -> None:
    config = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4)
    cache = MemoryCache(FastState(config, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="made for 2 sequences; this call has 3"):
        cache(*make_inputs(config, 3, 4, 0).tensors())


def test_cache_over_a_state_that_was_trained_meanwhile_is_refused() -> None:
    config = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4)
    state = FastState(config, dtype=torch.float64)
    cache = MemoryCache(state, 1)
    inputs = make_inputs(config, 1, 8, 0)
    cache(*inputs.tensors())
    with torch.no_grad():
        fast_memory(*inputs.tensors(), state, config)
    with pytest.raises(RuntimeError, match="make a new cache"):
        cache(*inputs.tensors())
