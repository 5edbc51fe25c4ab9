"""Attention over windows, documents and padding against a full masked softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_fwpkm.model.attention import GatedAttention, attend, mean_tokens_seen
from megatron_fwpkm.parallel.backend import TorchBackend
from tests.model.support import numbered, plain_context, small_config


def reference_attention(
    q_BTHD: torch.Tensor,
    k_BSGD: torch.Tensor,
    v_BSGD: torch.Tensor,
    window: int | None,
    documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over all pairs; what is not visible has no share, and a query that sees nothing mixes nothing."""
    length, seen = q_BTHD.shape[1], k_BSGD.shape[1]
    k, v = (x.repeat_interleave(q_BTHD.shape[2] // x.shape[2], 2) for x in (k_BSGD, v_BSGD))
    distance = torch.arange(seen)[seen - length :, None] - torch.arange(seen)
    visible = ((distance >= 0) & (distance < (window or seen))).expand(q_BTHD.shape[0], 1, length, seen)
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    if mask is not None:
        visible = visible & mask[:, None, None, :]
    scores = torch.einsum("bthd,bshd->bhts", q_BTHD, k) / math.sqrt(q_BTHD.shape[-1])
    share = scores.masked_fill(~visible, -1e300).softmax(-1) * visible
    return torch.einsum("bhts,bshd->bthd", share, v)


def random_heads(length: int, seen: int | None = None) -> list[torch.Tensor]:
    shapes = [(2, length, 4, 4), (2, seen or length, 2, 4), (2, seen or length, 2, 4)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def check(tensors: list[torch.Tensor], window: int | None, **visibility: Any) -> None:
    q, k, v = tensors
    named: dict[str, Any] = {_NAMES[name]: value for name, value in visibility.items()}
    found = attend(q, k, v, window, **named)
    expected = reference_attention(q, k, v, window, **visibility)
    assert torch.allclose(found, expected, atol=1e-12)
    direction = torch.randn_like(expected)
    gradients, others = (torch.autograd.grad(output, tensors, direction) for output in (found, expected))
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


_NAMES = {"documents": "documents_BT", "mask": "mask_BS"}


@pytest.mark.parametrize("window", [None, 1, 2, 5, 8, 16, 21, 40])
@pytest.mark.parametrize("length", [1, 7, 16, 21])
def test_windows(window: int | None, length: int) -> None:
    check(random_heads(length), window)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
def test_documents_and_padding(window: int | None) -> None:
    documents = numbered([1, 9, 4, 7], [21])
    mask = torch.rand(2, 21) > 0.4
    mask[0, :3] = False  # these queries see nothing
    check(random_heads(21), window, documents=documents)
    check(random_heads(21), window, mask=mask)
    check(random_heads(21), window, documents=documents, mask=mask)


@pytest.mark.parametrize("window", [None, 1, 4, 6, 30])
@pytest.mark.parametrize(("length", "seen"), [(1, 12), (5, 12), (11, 13), (2, 25)])
def test_queries_behind_earlier_tokens(window: int | None, length: int, seen: int) -> None:
    check(random_heads(length, seen), window)
    check(random_heads(length, seen), window, mask=torch.rand(2, seen) > 0.3)


@pytest.mark.parametrize(("kind", "seen"), [("sliding", [9, 10, 11, 12]), ("full", list(range(9, 20)))])
def test_attention_is_causal_and_sliding_attention_local(kind: str, seen: list[int]) -> None:
    config = small_config(window=4)
    layer = GatedAttention(config, TorchBackend(initial_std=0.5), sliding=kind == "sliding")
    x = torch.randn(1, 20, 32)
    changed = x.clone()
    changed[0, 9] += 1.0
    context = plain_context(config, x)
    difference = (layer(x, context) - layer(changed, context)).abs().amax(dim=-1)[0]
    assert difference.nonzero().flatten().tolist() == seen


def test_limited_full_attention_is_sliding_attention() -> None:
    config = small_config(window=4)
    full, sliding = (GatedAttention(config, TorchBackend(0.5), sliding=sliding) for sliding in (False, True))
    sliding.load_state_dict(full.state_dict())
    x = torch.randn(2, 20, 32)
    context = plain_context(config, x)
    assert not torch.allclose(full(x, context), sliding(x, context))
    full.limited = True
    assert torch.equal(full(x, context), sliding(x, context))


@pytest.mark.parametrize(("length", "window"), [(1, None), (10, None), (10, 4), (4, 4), (3, 8), (100, 1)])
def test_mean_tokens_seen(length: int, window: int | None) -> None:
    seen = [min(t + 1, window or length) for t in range(length)]
    assert mean_tokens_seen(length, window) == pytest.approx(sum(seen) / length)
