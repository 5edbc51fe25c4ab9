"""Documents packed into sequences equal each document alone, for every mixer and for memories reset at documents."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import MIXERS
from tests.model.support import MEMORY, numbered, random_tokens, small_decoder

ROWS = ([9, 1, 23, 7], [40])
MEMORIES: dict[str, Any] = {"memory_layers": (1, 2), "memory": dataclasses.replace(MEMORY, reset="per_document")}


def spans() -> list[tuple[int, int, int]]:
    """(row, first, last) of every document."""
    found = []
    for row, lengths in enumerate(ROWS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        found += [(row, end - length, end) for end, length in zip(ends, lengths, strict=True)]
    return found


def loss_and_gradients(model: Decoder, alone: bool, positions: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Losses [B, T] and gradients of their mean, from packed documents or from each alone."""
    tokens, labels, documents = random_tokens(2, 40), random_tokens(2, 40, seed=1), numbered(*ROWS)
    labels[1, 5:9] = -100
    model.zero_grad()
    if alone:
        loss = torch.zeros(2, 40, dtype=torch.float64)
        for row, first, last in spans():
            part = (slice(row, row + 1), slice(first, last))
            loss[part] = model(tokens[part], labels[part], documents[part])
    else:
        places = torch.cat([torch.arange(last - first) for _, first, last in spans()]).view(2, 40)
        loss = model(tokens, labels, documents, places if positions else None)
    loss.mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return loss.detach(), [gradient.to_dense().clone() for gradient in gradients if gradient is not None]


@pytest.mark.parametrize(
    "changes",
    [
        *({"mixers": (mixer,), "layers": 1} for mixer in MIXERS),
        {"mixers": ("sliding_attention",), "layers": 1, "window": 3},
        {"pkm_layers": (1,)},
        {**MEMORIES},
    ],
    ids=[*MIXERS, "short_window", "all", "memories"],
)
def test_packed_equals_alone(changes: dict) -> None:
    model = small_decoder(**changes).train()
    packed, gradients = loss_and_gradients(model, alone=False, positions=True)
    alone, others = loss_and_gradients(model, alone=True, positions=False)
    assert torch.allclose(packed, alone, rtol=0, atol=1e-9)
    assert len(gradients) == len(others) == len(list(model.parameters()))
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10 + 1e-8 * float(other.abs().max()))
    without_positions, _ = loss_and_gradients(model, alone=False, positions=False)
    assert torch.equal(without_positions, packed)


def test_without_documents_a_sequence_is_one_text() -> None:
    model = small_decoder().eval()
    tokens = random_tokens(2, 40)
    whole = model.logits(tokens)
    assert torch.allclose(model.logits(tokens, documents_BT=numbered([40], [40])), whole, atol=1e-12)
    assert not torch.allclose(model.logits(tokens, documents_BT=numbered(*ROWS))[0], whole[0])


def test_in_float32_through_the_library() -> None:
    model = small_decoder(torch.float32).eval()
    tokens, documents = random_tokens(2, 40), numbered(*ROWS)
    with torch.no_grad():
        packed = model.logits(tokens, documents_BT=documents)
        for row, first, last in spans():
            alone = model.logits(tokens[row : row + 1, first:last])
            assert torch.allclose(packed[row : row + 1, first:last], alone, atol=2e-4)


def test_what_does_not_fit_is_refused() -> None:
    model, tokens = small_decoder(), random_tokens(2, 10)
    with pytest.raises(ValueError, match="documents_BT has shape"):
        model.logits(tokens, documents_BT=torch.zeros(2, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"torch\.bool"):
        model.logits(tokens, mask_BT=torch.ones(2, 10))
    with pytest.raises(ValueError, match="takes no documents"):
        model.logits(tokens, documents_BT=torch.zeros(2, 10, dtype=torch.int64), cache=model.make_cache(2))
    with pytest.raises(ValueError, match="per_document needs"):
        small_decoder(**MEMORIES).logits(tokens)
