"""Held-out loss with memory reads on and off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel.topology import sum_over_ranks


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross entropy in nats per token over all ranks' held-out tokens."""

    with_reads: float
    without_reads: float
    tokens: int


def held_out_loss(model: Decoder, batches: Sequence[TokenBatch]) -> HeldOutLoss:
    """Measure this rank's batches twice, with memory reads on and off; all ranks call this together.

    The memory is written while it reads, batch after batch, as in training, and both measurements start from the
    same fast state, which is as before afterwards.
    """
    with_reads, tokens = _mean_loss(model, batches, reads=True)
    without_reads, _ = _mean_loss(model, batches, reads=False)
    return HeldOutLoss(with_reads, without_reads, tokens)


def _mean_loss(model: Decoder, batches: Sequence[TokenBatch], reads: bool) -> tuple[float, int]:
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    with _measuring(model, reads):
        for batch in (batch.to(device) for batch in batches):
            loss_BT = model(batch.tokens_BT, batch.labels_BT)
            total[0] += loss_BT.double().sum()
            total[1] += loss_BT.numel()
    loss_sum, tokens = sum_over_ranks(total).tolist()
    return loss_sum / tokens, int(tokens)


@contextmanager
def _measuring(model: Decoder, reads: bool) -> Iterator[None]:
    """Evaluation mode without gradients, fast states guarded, memory reads as asked; all restored at the end."""
    was_training = model.training
    before = [(layer, layer.memory_reads) for _, layer in model.memory_layers()]
    try:
        model.eval()
        for layer, _ in before:
            layer.memory_reads = reads
        with ExitStack() as guards, torch.no_grad():
            for _, fast_state in model.fast_states():
                guards.enter_context(fast_state.evaluation())
            yield
    finally:
        for layer, value in before:
            layer.memory_reads = value
        model.train(was_training)
