"""A memory that is reset at documents: each document of each sequence is a call of its own on the base state."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_fwpkm.memory import FwPKMLayer, MemoryConfig
from megatron_fwpkm.memory.documents import groups_of_documents

CONFIG = MemoryConfig(n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4, heads=2, reset="per_document")
LENGTHS = ([5, 1, 9, 5, 2], [22], [11, 11])


def make() -> tuple[FwPKMLayer, Tensor, Tensor, Tensor]:
    """Layer, hidden states [3, 22, 6], mask and documents."""
    torch.manual_seed(0)
    layer = FwPKMLayer(6, CONFIG, seed=3, dtype=torch.float64).double()
    documents = torch.stack([torch.repeat_interleave(torch.arange(len(n)) + 7, torch.tensor(n)) for n in LENGTHS])
    return layer, torch.randn(3, 22, 6, dtype=torch.float64), torch.rand(3, 22) > 0.2, documents


def spans() -> list[tuple[int, int, int]]:
    found = []
    for row, lengths in enumerate(LENGTHS):
        first = 0
        for length in lengths:
            found.append((row, first, first + length))
            first += length
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_packed_equals_alone_with_gradients(training: bool, masked: bool) -> None:
    layer, hidden, mask, documents = make()
    layer.train(training)
    cotangent = torch.randn_like(hidden)
    results = []
    for alone in (False, True):
        leaf = hidden.clone().requires_grad_()
        layer.zero_grad()
        if alone:
            layer.reset = "per_sequence"
            parts = []
            for row, first, last in spans():
                piece = (slice(row, row + 1), slice(first, last))
                parts.append(layer(leaf[piece], mask[piece] if masked else None)[0])
            output = torch.cat(parts).view(hidden.shape)
        else:
            output = layer(leaf, mask if masked else None, None, documents)
        (output * cotangent).sum().backward()
        results.append(
            [output.detach(), leaf.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
        )
    assert len(results[0]) == len(results[1]) == 2 + len(list(layer.parameters()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_fast_state_stays_as_it_is() -> None:
    layer, hidden, _, documents = make()
    before = layer.fast_state.snapshot()
    layer.train()(hidden, None, None, documents)
    assert torch.equal(layer.fast_state.table_ND, before.table_ND)
    assert torch.equal(layer.fast_state.keys_H2nd, before.keys_H2nd)


def test_documents_of_equal_length_share_a_call() -> None:
    groups = groups_of_documents(make()[3])
    assert sorted(tuple(group.shape) for group in groups) == [(1, 1), (1, 2), (1, 9), (1, 22), (2, 5), (2, 11)]
    assert torch.equal(torch.cat([g.flatten() for g in groups]).sort().values, torch.arange(66))


def test_statistics_are_those_of_all_documents() -> None:
    layer, hidden, _, documents = make()
    layer(hidden, None, None, documents)
    together = layer.statistics()
    layer.reset = "per_sequence"
    reads, gates, coverage, addressing = 0, [], 0.0, []
    for row, first, last in spans():
        layer(hidden[row : row + 1, first:last])
        alone = layer.statistics()
        histogram = alone["reads_histogram"]
        reads += int(histogram.sum())
        coverage += float(alone["coverage"])
        gates += [alone["gate_mean"] * (last - first)]
        addressing.append(float(alone["addressing_loss"]))
    assert int(together["reads_histogram"].sum()) == reads
    assert float(together["coverage"]) == pytest.approx(coverage / len(spans()))
    assert float(together["gate_mean"].detach()) == pytest.approx(float(sum(gates).detach()) / 66)  # type: ignore[union-attr]
    assert min(addressing) <= float(together["addressing_loss"]) <= max(addressing)


def test_carry_takes_no_notice_of_documents() -> None:
    layer, hidden, _, documents = make()
    layer.eval()
    layer.reset = "carry"
    assert torch.equal(layer(hidden, None, None, documents), layer(hidden))
    assert dataclasses.replace(CONFIG, reset="carry").reset == "carry"


def test_what_is_missing_is_named() -> None:
    layer, hidden, _, documents = make()
    with pytest.raises(ValueError, match="per_document needs to know the documents"):
        layer(hidden)
    with pytest.raises(ValueError, match="documents have shape"):
        layer(hidden, None, None, documents[:, :-1])
    empty = layer(hidden[:, :0], None, None, documents[:, :0])
    assert empty.shape == (3, 0, 6)
