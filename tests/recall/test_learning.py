"""Recall is learned with a memory, and cannot be without."""

from __future__ import annotations

from itertools import islice

import torch

from megatron_fwpkm.data.recall import TRAINING, RecallConfig, RecallLoader
from megatron_fwpkm.evaluate.recall import Figure, measure
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend
from megatron_fwpkm.train.optimizer import build_optimizer

CONFIG = RecallConfig(pairs=16, questions=16, keys=32, values=16, fillers=8)
FILLER = 16
STEPS = 70


def _train(memory_layers: tuple[int, ...]) -> tuple[list[Figure], list[Figure]]:
    """Figures at the training length and with 8 times the filler, after 0, 1 and 2 readings."""
    memory = MemoryConfig(topk=4, n_subkeys=16, k_dim=32, v_dim=32, chunk_size=16, reset="per_sequence")
    config = DecoderConfig(
        hidden_size=32,
        layers=1,
        attention_heads=2,
        key_value_heads=1,
        head_dim=16,
        window=8,
        mlp_size=48,
        memory_layers=memory_layers,
        memory=memory,
        initial_std=0.05,
    )
    model = Decoder(config, 64, TorchBackend(config.initial_std), seed=1)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.95), 1e-8, 0.0)
    for batch in islice(RecallLoader(CONFIG, 2 * (16 + 16) + FILLER, 8, TRAINING), STEPS):
        loss_BT = model(batch.tokens_BT, batch.labels_BT)
        optimizer.zero_grad()
        (loss_BT.sum() / (8 * CONFIG.questions)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return tuple(measure(model, CONFIG, FILLER * times, 2, 1024) for times in (1, 8))  # type: ignore[return-value]


def test_a_memory_learns_recall_and_its_twin_without_stays_at_chance() -> None:
    near, far = _train((0,))
    assert near[1].accuracy > 0.9 and far[1].accuracy > 0.8
    assert abs(near[0].accuracy - 1 / CONFIG.values) < 0.04  # nothing was read: a guess
    plain_near, _ = _train(())
    assert plain_near[1].low <= 1 / CONFIG.values
