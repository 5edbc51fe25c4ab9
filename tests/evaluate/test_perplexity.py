"""Losses by position under the conditions of the memory, with a real, tiny decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy
import pytest
import torch
import torch.distributed

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.evaluate.gates import gates_of
from megatron_fwpkm.evaluate.held_out import HeldOutText
from megatron_fwpkm.evaluate.perplexity import (
    CONDITIONS,
    batch_loss,
    bucket_edges,
    held_out_loss,
    measuring,
    stream_losses,
)
from megatron_fwpkm.evaluate.plan import perplexities, stream_pieces
from tests.evaluate.tiny import VOCABULARY, fast_weights, same, tiny_decoder

LENGTH = 100


def held_out(separate: bool = False, tokens: int = 4 * LENGTH + 1) -> HeldOutText:
    draw = numpy.random.default_rng(0)
    documents = numpy.cumsum(draw.random(tokens) < 0.03)
    return HeldOutText(None, draw.integers(0, VOCABULARY, tokens), documents, separate)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("length", "first", "edges"),
    [
        (1024, 64, [0, 64, 128, 256, 512, 1024]),
        (1000, 64, [0, 64, 128, 256, 512, 1000]),
        (64, 64, [0, 64]),
        (65, 64, [0, 64, 65]),
        (10, 64, [0, 10]),
        (5, 1, [0, 1, 2, 4, 5]),
    ],
)
def test_buckets_cover_every_position_once(length: int, first: int, edges: list[int]) -> None:
    assert bucket_edges(length, first) == edges


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("separate", [False, True])
def test_bucket_sums_are_those_of_single_tokens(condition: str, separate: bool) -> None:
    model, batches = tiny_decoder(), held_out(separate).sequences(3, LENGTH)
    found = stream_losses(model, batches, condition)  # type: ignore[arg-type]
    with measuring(model, condition):  # type: ignore[arg-type]
        for row, batch in enumerate(batches):
            loss_T = batch_loss(model, batch)[0]
            kept_T = batch.labels_BT[0] != IGNORED_LABEL
            assert torch.all(loss_T[~kept_T] == 0)
            for column, (low, high) in enumerate([(0, 64), (64, 100)]):
                assert found.losses[row][column] == pytest.approx(float(loss_T[low:high].sum()), rel=1e-12)
                assert found.counts[row][column] == int(kept_T[low:high].sum())


def test_measuring_changes_nothing_and_conditions_differ() -> None:
    model, batches = tiny_decoder(), held_out().sequences(3, LENGTH)
    model.train()
    before = fast_weights(model)
    found = {condition: stream_losses(model, batches, condition) for condition in CONDITIONS}
    assert same(before, fast_weights(model)) and model.training
    assert all(layer.memory_reads and layer.reset == "carry" for _, layer in model.memory_layers())
    assert found == {condition: stream_losses(model, batches, condition) for condition in CONDITIONS}
    assert len({str(losses.losses) for losses in found.values()}) == 3


def test_reads_off_is_the_layer_passing_its_own_value() -> None:
    """Nothing is read or written, so no sequence depends on the one before."""
    model, batches = tiny_decoder(), held_out().sequences(3, LENGTH)
    together = stream_losses(model, batches, "reads_off").losses
    assert together == [stream_losses(model, [batch], "reads_off").losses[0] for batch in batches]
    carried = stream_losses(model, batches, "memory").losses
    assert carried[0] == stream_losses(model, batches[:1], "memory").losses[0]
    assert carried[1] != stream_losses(model, batches[1:2], "memory").losses[0]


def test_reset_per_document_reaches_the_memory_alone_where_documents_are_joined() -> None:
    model, plain = tiny_decoder(), tiny_decoder(memory_layers=())
    batch = held_out().sequences(1, LENGTH)[0]
    assert batch.documents_BT is not None and len(set(batch.documents_BT[0].tolist())) > 2
    one_document = TokenBatch(batch.tokens_BT, batch.labels_BT, torch.zeros_like(batch.documents_BT), None)
    # Mixers look across: a model without a memory takes no notice of documents.
    assert stream_losses(plain, [batch], "memory") == stream_losses(plain, [one_document], "memory")
    assert stream_losses(model, [batch], "memory") == stream_losses(model, [one_document], "memory")
    # One document is one memory that starts as trained, which a first sequence in a stream has anyway.
    alone = stream_losses(model, [one_document], "reset_per_document").losses
    assert alone[0] == pytest.approx(stream_losses(model, [one_document], "memory").losses[0], rel=1e-9)
    assert stream_losses(model, [batch], "reset_per_document").losses != alone


def test_sequences_of_joined_and_separate_documents() -> None:
    joined, separate = held_out().sequences(9, LENGTH), held_out(separate=True).sequences(9, LENGTH)
    assert len(joined) == len(separate) == 4
    for index, (one, other) in enumerate(zip(joined, separate, strict=True)):
        tokens = held_out().tokens[index * LENGTH : (index + 1) * LENGTH + 1]
        assert one.tokens_BT[0].tolist() == tokens[:-1].tolist() and one.labels_BT[0].tolist() == tokens[1:].tolist()
        assert one.positions_BT is None and other.positions_BT is not None and other.documents_BT is not None
        documents = held_out().documents[index * LENGTH : (index + 1) * LENGTH + 1]
        last = documents[1:] != documents[:-1]
        assert (other.labels_BT[0] == IGNORED_LABEL).tolist() == last.tolist()
        expected = [int((documents[:place] == documents[place]).sum()) for place in range(LENGTH)]
        assert other.positions_BT[0].tolist() == expected


def test_perplexities_from_pieces_are_those_of_all_tokens() -> None:
    model, sequences = tiny_decoder(), held_out().sequences(4, LENGTH)
    pieces = stream_pieces("run", {"checkpoint": "x"}, CONDITIONS, sequences, 3)
    assert len({piece.key for piece in pieces}) == len(pieces) == 9
    results = {p.key: vars(stream_losses(model, p.work.batches, p.work.condition)) for p in pieces}
    rows = perplexities(pieces, results, 200)["run"]
    total = sum(sum(map(sum, results[p.key]["losses"])) for p in pieces if p.work.condition == "reads_off")
    off = rows["reads_off"]
    assert off.tokens == 400 and off.whole.value == pytest.approx(math.exp(total / 400))
    assert off.whole.low < off.whole.value < off.whole.high
    assert off.relative.value == pytest.approx(off.whole.value / rows["memory"].whole.value)
    assert rows["memory"].relative.low == rows["memory"].relative.high == 1.0
    other = stream_pieces("run", {"checkpoint": "x"}, CONDITIONS, held_out(tokens=350).sequences(4, LENGTH), 3)
    assert not {piece.key for piece in pieces} & {piece.key for piece in other if piece.cost == 200}


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_training_measures_the_same(process_group: None) -> None:
    model, batches = tiny_decoder(), held_out(separate=True).sequences(4, LENGTH)
    found = held_out_loss(model, batches)
    for value, condition in ((found.with_reads, CONDITIONS[0]), (found.without_reads, CONDITIONS[1])):
        losses = stream_losses(model, batches, condition)
        assert value == pytest.approx(sum(map(sum, losses.losses)) / sum(map(sum, losses.counts)), rel=1e-12)
    assert found.tokens == sum(int((batch.labels_BT != IGNORED_LABEL).sum()) for batch in batches)


def test_gates_are_those_of_the_layer() -> None:
    model = tiny_decoder(layers=1, memory_layers=(0,))
    tokens_BT = held_out().sequences(1, LENGTH)[0].tokens_BT
    before = fast_weights(model)
    gates = gates_of(model, tokens_BT)
    layer = next(layer for _, layer in model.memory_layers())
    expected = torch.sigmoid(layer.gate_projection(layer.gate_norm(model.embedding(tokens_BT))).mean(-1))
    assert list(gates) == [0]
    assert torch.allclose(gates[0], expected.float(), atol=1e-6) and gates[0].std() > 0.01
    assert same(before, fast_weights(model)) and layer.trace is None
    assert gates_of(tiny_decoder({"reset": "per_document"}, layers=1, memory_layers=(0,)), tokens_BT).keys() == {0}
    assert gates_of(tiny_decoder(memory_layers=()), tokens_BT) == {}


@pytest.mark.parametrize(("reset", "carried"), [("carry", True), ("per_step", False), ("per_sequence", False)])
def test_a_stream_carries_the_memory_as_training_does(reset: str, carried: bool) -> None:
    """Sequences are read one by one: where training forgets after each step, none knows of the one before."""
    model, batches = tiny_decoder({"reset": reset}), held_out().sequences(3, LENGTH)
    together = stream_losses(model, batches, "memory").losses
    alone = [stream_losses(model, [batch], "memory").losses[0] for batch in batches]
    assert together[0] == alone[0] and (together[1:] != alone[1:]) == carried
