"""Measuring recall: readings through caches are what one long call computes, and questions leave no trace."""

from __future__ import annotations

import pytest
import torch

from megatron_fwpkm.data.recall import MEASUREMENT, RecallConfig, draw_parts
from megatron_fwpkm.evaluate import recall as measurement
from megatron_fwpkm.evaluate.recall import Figure, Reader, RecallTask, claims, gate_means, measure
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import TorchBackend

CHUNK = 8
CONFIG = RecallConfig(pairs=4, questions=4, keys=20, values=8, fillers=6)
FILLER = 24


def _model(memory_layers: tuple[int, ...] = (0,), window: int = 4, chunk_size: int = CHUNK) -> Decoder:
    """Random weights, large enough that the memory has a say in what is answered."""
    memory = MemoryConfig(topk=4, n_subkeys=8, k_dim=16, v_dim=16, chunk_size=chunk_size, reset="per_sequence")
    config = DecoderConfig(
        hidden_size=16,
        layers=2,
        attention_heads=2,
        key_value_heads=1,
        head_dim=8,
        window=window,
        mlp_size=24,
        memory_layers=memory_layers,
        memory=memory,
        initial_std=0.3,
    )
    return Decoder(config, 64, TorchBackend(config.initial_std), seed=2).eval()


def _parts(count: int, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return draw_parts(CONFIG, FILLER, MEASUREMENT, first, count)


def _other_values(context_BT: torch.Tensor) -> torch.Tensor:
    """The same keys with other values."""
    changed_BT = context_BT.clone()
    changed_BT[:, 1 : 2 * CONFIG.pairs : 2] = (changed_BT[:, 1 : 2 * CONFIG.pairs : 2] + 1) % CONFIG.values
    return changed_BT


@pytest.mark.parametrize("readings", [1, 2, 3])
def test_readings_equal_one_call_over_the_context_repeated(readings: int) -> None:
    """Contexts are whole chunks and the questions one, so that a training call reads them before it writes them."""
    model = _model()
    context_BT, questions_BT = _parts(6)
    assert context_BT.shape[1] % CHUNK == 0 and questions_BT.shape[1] == CHUNK
    reader = Reader(model, 6)
    for _ in range(readings):
        answers_BT = reader.read_and_answer(context_BT, questions_BT)
    tokens_BT = torch.cat([context_BT] * readings + [questions_BT], dim=1)
    with torch.no_grad():
        expected_BT = model.logits(tokens_BT)[:, -CHUNK:].argmax(-1)
    assert torch.equal(answers_BT, expected_BT)


def test_readings_change_the_answers() -> None:
    """Else the test above would hold for a reader that reads once only, or not at all."""
    model = _model()
    context_BT, questions_BT = _parts(64)
    reader = Reader(model, 64)
    answers = [reader.read_and_answer(part_BT, questions_BT) for part_BT in (context_BT[:, :0], context_BT, context_BT)]
    assert not torch.equal(answers[0], answers[1]) and not torch.equal(answers[1], answers[2])


def test_a_reading_writes_its_last_short_chunk() -> None:
    """Else pairs beyond the windows, in a chunk that never fills, could not matter."""
    model = _model(chunk_size=1000)
    context_BT, questions_BT = _parts(64)
    contexts = (context_BT, _other_values(context_BT))
    answers = [Reader(model, 64).read_and_answer(part_BT, questions_BT) for part_BT in contexts]
    assert not torch.equal(*answers)


def test_attention_starts_anew_with_every_reading() -> None:
    """Attention over all of a context and its questions, and no memory: reading again changes nothing."""
    model = _model(memory_layers=(), window=1000)
    context_BT, questions_BT = _parts(64)
    reader = Reader(model, 64)
    answers = [reader.read_and_answer(context_BT, questions_BT) for _ in range(2)]
    with torch.no_grad():
        expected_BT = model.logits(torch.cat([context_BT, questions_BT], 1))[:, -CHUNK:].argmax(-1)
    assert torch.equal(answers[0], expected_BT) and torch.equal(answers[1], expected_BT)


@pytest.mark.parametrize("chunk_size", [CHUNK, 5])
def test_batch_equals_sequences_one_by_one(chunk_size: int) -> None:
    model = _model(memory_layers=(0, 1), chunk_size=chunk_size)
    context_BT, questions_BT = _parts(5)
    together = Reader(model, 5)
    alone = [Reader(model, 1) for _ in range(5)]
    for _ in range(2):
        answers_BT = together.read_and_answer(context_BT, questions_BT)
        single = [
            reader.read_and_answer(context_BT[row : row + 1], questions_BT[row : row + 1])
            for row, reader in enumerate(alone)
        ]
        assert torch.equal(answers_BT, torch.cat(single))


def test_questions_are_not_remembered() -> None:
    model = _model(memory_layers=(0, 1))
    context_BT, questions_BT = _parts(4)
    other_BT = _parts(4, first=50)[1]
    asked, differently = Reader(model, 4), Reader(model, 4)
    asked.read_and_answer(context_BT, questions_BT)
    differently.read_and_answer(context_BT, other_BT)
    assert torch.equal(
        asked.read_and_answer(context_BT, questions_BT), differently.read_and_answer(context_BT, questions_BT)
    )
    before = [state.values_ND() for _, state in model.fast_states()]
    measure(model, CONFIG, FILLER, 2, 16)
    assert all(torch.equal(a, b.values_ND()) for a, (_, b) in zip(before, model.fast_states(), strict=True))


def test_without_memory_pairs_beyond_the_windows_change_nothing() -> None:
    """The filler is longer than what attention reaches through all blocks; with a memory the pairs do matter."""
    context_BT, questions_BT = _parts(16)
    changed_BT = _other_values(context_BT)
    for memory_layers, same in (((), True), ((0,), False)):
        model = _model(memory_layers)
        assert model.config.window is not None and 2 * (model.config.window - 1) < FILLER
        with torch.no_grad():
            one, other = (model.logits(torch.cat([part, questions_BT], 1)) for part in (context_BT, changed_BT))
        assert torch.equal(one[:, -CHUNK:], other[:, -CHUNK:]) is same


def test_counts_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    expected = measure(model, CONFIG, FILLER, 2, 50)
    assert [one.readings for one in expected] == [0, 1, 2]
    assert all(one.asked == 52 and one.memory for one in expected)  # 13 sequences of 4 questions
    monkeypatch.setattr(measurement, "SEQUENCES_AT_ONCE", 3)
    monkeypatch.setattr(measurement, "TOKENS_AT_ONCE", 10)
    assert measure(model, CONFIG, FILLER, 2, 50) == expected


def test_gate_means_are_those_of_the_tokens_of_a_kind() -> None:
    model = _model()
    task = RecallTask(CONFIG, 2 * (CONFIG.pairs + CONFIG.questions) + FILLER)
    [found] = gate_means(model, task, sequences=3).values()
    layer = dict(model.memory_layers())[0]
    for kind, first, count in (("values", 0, 8), ("fillers", 8, 6), ("keys", 14, 20)):
        context_BT, _ = _parts(3)
        tokens = context_BT[(context_BT >= first) & (context_BT < first + count)]
        with torch.no_grad():
            model.logits(tokens.unsqueeze(0))  # the memory of block 0 sees tokens alone
        assert found[kind] == pytest.approx(layer.statistics()["gate_mean"].item(), rel=1e-5)


def test_measuring_leaves_the_model_in_its_mode() -> None:
    model = _model().train()
    measure(model, CONFIG, FILLER, 1, 4)
    assert model.training


def _figure(accuracy: float, memory: bool, pairs: int, filler_tokens: int, readings: int) -> Figure:
    half = 0.01
    return Figure(memory, pairs, filler_tokens, readings, 0, 1, accuracy, accuracy - half, accuracy + half)


def test_claims_are_held_against_the_intervals() -> None:
    task = RecallTask(RecallConfig(pairs=64, questions=64, keys=256, values=64), 384)

    def found(near: float, far: float, plain: float, most: tuple[float, ...]) -> list[bool]:
        figures = [_figure(near, True, 64, 128, 1), _figure(far, True, 64, 2816, 1), _figure(plain, False, 64, 128, 1)]
        figures += [_figure(0.0, memory, 64, filler, 0) for memory in (True, False) for filler in (128, 2816)]
        figures += [_figure(share, True, 256, 128, number) for number, share in enumerate(most)]
        return [claim.holds for claim in claims(figures, task)]

    assert found(0.97, 0.95, 0.015, (0, 0.5, 0.6, 0.7)) == [True] * 5
    assert found(0.97, 0.95, 0.023, (0, 0.5, 0.6, 0.7)) == [True, False, True, True, True]  # measured too loosely
    assert found(0.955, 0.905, 0.03, (0, 0.5, 0.515, 0.7)) == [False, False, False, False, True]
    assert found(0.97, 0.95, 0.015, (0, 0.5, 0.6, 0.4)) == [True, True, True, True, False]
