"""Held-out loss under conditions of the memory: as trained, reads off, reset for each document."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.model.decoder import BlockStack, Decoder
from megatron_fwpkm.parallel.topology import sum_over_ranks

Condition = Literal["memory", "reads_off", "reset_per_document"]
"""As trained; every read is 0 and nothing is written; the memory starts as trained at the start of every document."""
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
FIRST_BUCKET = 64
"""Tokens in the first bucket of positions; each further one ends at the next power of two."""


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross entropy in nats per token over all ranks' held-out tokens."""

    with_reads: float
    without_reads: float
    tokens: int


@dataclass(frozen=True)
class BucketLosses:
    """Loss of sequences by position: sums in nats and numbers of tokens, one row a sequence, one column a bucket."""

    losses: list[list[float]]
    counts: list[list[int]]


LossSum = Callable[[Sequence[TokenBatch]], torch.Tensor]
"""Reads batches one after the other; float64 [2]: their cross entropy in nats and number of counted labels."""


def held_out_loss(
    model: BlockStack, batches: Sequence[TokenBatch], counted: bool = True, loss_sum: LossSum | None = None
) -> HeldOutLoss:
    """Measure this rank's batches twice, with memory reads on and off; all ranks call this together.

    Of the ranks of one replica, which read the same batches together, one is `counted`. `loss_sum` reads them where
    `model`, a stage of a pipeline, is not a whole decoder.

    The memory is written while it reads, batch after batch, as in training, and both measurements start from the
    same fast state, which is as before afterwards.
    """
    read = loss_sum or partial(_loss_sum, cast(Decoder, model))
    with_reads, tokens = _mean_loss(model, batches, "memory", counted, read)
    without_reads, _ = _mean_loss(model, batches, "reads_off", counted, read)
    return HeldOutLoss(with_reads, without_reads, tokens)


def _mean_loss(
    model: BlockStack, batches: Sequence[TokenBatch], condition: Condition, counted: bool, read: LossSum
) -> tuple[float, int]:
    device = next(model.parameters()).device
    with measuring(model, condition):
        total = read([batch.to(device) for batch in batches])
    loss_sum, tokens = sum_over_ranks(total * counted).tolist()
    return loss_sum / tokens, int(tokens)


def _loss_sum(model: Decoder, batches: Sequence[TokenBatch]) -> torch.Tensor:
    total = torch.zeros(2, dtype=torch.float64, device=batches[0].tokens_BT.device)
    for batch in batches:
        total[0] += batch_loss(model, batch).double().sum()
        total[1] += (batch.labels_BT != IGNORED_LABEL).sum()
    return total


def bucket_edges(length: int, first: int = FIRST_BUCKET) -> list[int]:
    """Edges 0, first, 2 first, 4 first, ..., length of the buckets of positions 0 .. length - 1."""
    edges = [0]
    while (edge := first * 2 ** (len(edges) - 1)) < length:
        edges.append(edge)
    return [*edges, length]


def stream_losses(model: Decoder, batches: Sequence[TokenBatch], condition: Condition) -> BucketLosses:
    """Loss of each sequence by position in it. One memory reads all sequences of a batch, batch after batch.

    The memory starts as the fast state is, which is as before afterwards. Other ranks need not take part.
    """
    device = next(model.parameters()).device
    losses: list[list[float]] = []
    counts: list[list[int]] = []
    with measuring(model, condition):
        for batch in (batch.to(device) for batch in batches):
            loss_BT = batch_loss(model, batch).double()
            counted_BT = batch.labels_BT != IGNORED_LABEL
            edges = bucket_edges(loss_BT.shape[1])
            widths = [after - before for before, after in itertools.pairwise(edges)]
            losses += torch.stack([part.sum(1) for part in loss_BT.split(widths, 1)], 1).tolist()
            counts += torch.stack([part.sum(1) for part in counted_BT.split(widths, 1)], 1).tolist()
    return BucketLosses(losses, counts)


def batch_loss(model: Decoder, batch: TokenBatch) -> torch.Tensor:
    """Cross entropy in nats per token [B, T] of a batch on the model's device.

    A batch with documents but no positions is read as one text, as training on joined documents does: only memories
    hear of the documents.
    """
    joined = batch.positions_BT is None
    with ExitStack() as hooks:
        if joined and batch.documents_BT is not None:
            for _, layer in model.memory_layers():
                hooks.callback(layer.register_forward_pre_hook(_with_documents(batch.documents_BT)).remove)
        documents_BT = None if joined else batch.documents_BT
        return model(batch.tokens_BT, batch.labels_BT, documents_BT, batch.positions_BT)


def _with_documents(documents_BT: torch.Tensor) -> Any:
    def hook(layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BTE, mask_BT, cache, _ = inputs
        return hidden_BTE, mask_BT, cache, documents_BT

    return hook


@contextmanager
def measuring(model: BlockStack, condition: Condition) -> Iterator[None]:
    """Evaluation mode without gradients, fast states guarded, the memory as the condition says; restored at the end."""
    was_training = model.training
    layers: list[Any] = [layer for _, layer in model.memory_layers()]
    before = [(layer, layer.memory_reads, layer.reset) for layer in layers]
    try:
        model.eval()
        for layer in layers:
            layer.memory_reads = condition != "reads_off"
            if condition == "reset_per_document":
                layer.reset = "per_document"
        with ExitStack() as guards, torch.no_grad():
            for _, fast_state in model.fast_states():
                guards.enter_context(fast_state.evaluation())
            yield
    finally:
        for layer, reads, reset in before:
            layer.memory_reads, layer.reset = reads, reset
        model.train(was_training)
