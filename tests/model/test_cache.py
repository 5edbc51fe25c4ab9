"""Inference caches: any cut of a stream gives what one call gives."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fwpkm.model.attention import AttentionCache
from megatron_fwpkm.model.cache import DecoderCache
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import MIXERS
from tests.model.support import MEMORY, random_tokens, small_decoder

LENGTH = 40
MEMORIES: dict[str, Any] = {
    "memory_layers": (0, 2),
    "memory": dataclasses.replace(MEMORY, reset="per_sequence"),
    "pkm_layers": (1,),
}


def read(
    model: Decoder, tokens: torch.Tensor, cuts: list[int], cache: DecoderCache, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits from calls that end at the cuts and at the end of the tokens."""
    bounds = [0, *sorted(cuts), tokens.shape[1]]
    pieces = [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]
    masks = [None if mask is None else mask[:, piece] for piece in pieces]
    calls = zip(pieces, masks, strict=True)
    return torch.cat([model.logits(tokens[:, piece], mask_BT=part, cache=cache) for piece, part in calls], 1)


@pytest.fixture(scope="module")
def model() -> Decoder:
    return small_decoder(**MEMORIES).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return random_tokens(3, LENGTH)


@pytest.fixture(scope="module")
def whole(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(tokens)


@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=12))
@settings(max_examples=25)
def test_any_cut_equals_one_call(model: Decoder, tokens: torch.Tensor, whole: torch.Tensor, cuts: set[int]) -> None:
    found = read(model, tokens, list(cuts), model.make_cache(3))
    assert torch.allclose(found, whole, rtol=0, atol=1e-9)
    assert not found.requires_grad


def test_token_by_token_equals_one_call(model: Decoder, tokens: torch.Tensor, whole: torch.Tensor) -> None:
    cache = model.make_cache(3)
    assert torch.allclose(read(model, tokens, list(range(1, LENGTH)), cache), whole, rtol=0, atol=1e-9)
    assert cache.num_tokens == LENGTH


@pytest.mark.parametrize("mixer", MIXERS)
def test_each_mixer_continues(mixer: str) -> None:
    model, tokens = small_decoder(mixers=(mixer,), layers=1, window=5).eval(), random_tokens(2, 23)
    with torch.no_grad():
        expected = model.logits(tokens)
    for cuts in ([1], [22], [5, 6], [4, 11, 12, 13], list(range(1, 23))):
        assert torch.allclose(read(model, tokens, cuts, model.make_cache(2)), expected, rtol=0, atol=1e-9)


def test_in_float32_too() -> None:
    model, tokens = small_decoder(torch.float32).eval(), random_tokens(2, LENGTH)
    with torch.no_grad():
        expected = model.logits(tokens)
    found = read(model, tokens, [17, 18, 19, 30], model.make_cache(2))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("cuts", [[], [10], [1, 2, 3, 20], list(range(1, 30))])
def test_left_padded_rows_equal_rows_alone(cuts: list[int]) -> None:
    model, tokens = small_decoder(window=5).eval(), random_tokens(3, 30)
    mask = torch.ones(3, 30, dtype=torch.bool)
    mask[0, :11], mask[2, :3] = False, False
    found = read(model, tokens, cuts, model.make_cache(3), mask)
    with torch.no_grad():
        for row in range(3):
            first = int((~mask[row]).sum())
            alone = model.logits(tokens[row : row + 1, first:])
            assert torch.allclose(found[row, first:], alone[0], rtol=0, atol=1e-9)


def test_padding_may_come_in_some_calls_only() -> None:
    model, tokens = small_decoder().eval(), random_tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :4] = False
    cache = model.make_cache(2)
    parts = [model.logits(tokens[:, :6], mask_BT=mask[:, :6], cache=cache), model.logits(tokens[:, 6:], cache=cache)]
    with torch.no_grad():
        expected = model.logits(tokens, mask_BT=mask)
    assert torch.allclose(torch.cat(parts, 1)[mask], expected[mask], rtol=0, atol=1e-9)


def test_forgetting_mixers_keeps_memories() -> None:
    model = small_decoder(memory_layers=(0, 2)).eval()
    context, question = random_tokens(1, 21, seed=3), random_tokens(1, 13, seed=4)
    cache = model.make_cache(1, memory="shared")
    first = read(model, context, [5], cache)
    cache.finish()
    cache.forget_mixers()
    again = read(model, question, [2, 9], cache)
    assert cache.num_tokens == 13
    # The same as writing the memories into the model and reading the question with nothing else remembered.
    fresh = read(model, question, [2, 9], model.make_cache(1))
    assert not torch.allclose(again, fresh, atol=1e-3)
    other = model.make_cache(1, memory="shared")
    assert torch.equal(read(model, context, [5], other), first)
    other.finish()
    for memory in other.memories():
        memory.commit()
    assert torch.allclose(again, read(model, question, [], model.make_cache(1)), rtol=0, atol=1e-9)


def test_finish_writes_the_ragged_tail() -> None:
    model = small_decoder(memory_layers=(1,)).eval()
    cache = model.make_cache(1)
    model.logits(random_tokens(1, 11), cache=cache)
    (memory,) = cache.memories()
    before = memory.view.values_ND()
    cache.finish()
    assert not torch.equal(memory.view.values_ND(), before)


def test_limited_full_attention_with_a_cache(tokens: torch.Tensor) -> None:
    model = small_decoder(mixers=("full_attention",), window=6).eval()
    model.limit_full_attention = True
    with torch.no_grad():
        limited = model.logits(tokens)
    assert torch.allclose(read(model, tokens, [7, 8, 20], model.make_cache(3)), limited, rtol=0, atol=1e-9)
    model.limit_full_attention = False
    with torch.no_grad():
        assert not torch.allclose(model.logits(tokens), limited)


def test_sliding_layers_keep_a_window_of_keys() -> None:
    model = small_decoder(window=6).eval()
    cache = model.make_cache(1)
    for _ in range(5):
        model.logits(random_tokens(1, 9), cache=cache)
    kept = [len(layer.mixer) for layer in cache.layers if isinstance(layer.mixer, AttentionCache)]
    assert kept == [5, 45]


def test_another_batch_size_is_refused(model: Decoder) -> None:
    with pytest.raises(ValueError, match="made for 2 sequences"):
        model.logits(random_tokens(3, 4), cache=model.make_cache(2))
