"""Reading and answering with a real, tiny decoder: batches, protocols, readings, and what they leave unchanged."""

from __future__ import annotations

import numpy
import pytest
import torch

from megatron_fwpkm.evaluate import reading
from megatron_fwpkm.evaluate.needles import Needle, NeedlePrompt
from megatron_fwpkm.evaluate.reading import Reader
from megatron_fwpkm.model.decoder import Decoder
from tests.evaluate.tiny import VOCABULARY, fast_weights, same, tiny_decoder

REAL_VOCABULARY = 50


def prompts(count: int, haystack: int = 75, question: int = 6) -> list[NeedlePrompt]:
    draw = numpy.random.default_rng(1)
    needles = (Needle("0000", "123456"),)
    return [
        NeedlePrompt(n, draw.integers(0, REAL_VOCABULARY, haystack), draw.integers(0, REAL_VOCABULARY, question), 6,
                     needles, 0, (0,))
        for n in range(count)
    ]  # fmt: skip


def official_model(**memory: object) -> Decoder:
    return tiny_decoder({"chunk_size": "sequence", **memory})


@pytest.mark.parametrize("readings", [0, 1, 3])
def test_a_batch_answers_as_its_samples_alone(readings: int) -> None:
    model = tiny_decoder()
    together = Reader(model, "aligned", 5, REAL_VOCABULARY).answer(prompts(5), readings)
    alone = [Reader(model, "aligned", 1, REAL_VOCABULARY).answer([p], readings)[0] for p in prompts(5)]
    assert together == alone
    assert len({tuple(answer) for answer in together}) > 1
    assert all(len(answer) == 6 and max(answer) < REAL_VOCABULARY for answer in together)


@pytest.mark.parametrize("protocol", ["aligned", "official"])
def test_nothing_of_the_model_changes(protocol: reading.Protocol) -> None:
    model = official_model() if protocol == "official" else tiny_decoder()
    model.train()
    before = fast_weights(model)
    reader = Reader(model, protocol, 2, VOCABULARY)
    answers = reader.answer(prompts(2), 2)
    assert same(before, fast_weights(model)) and model.training
    assert Reader(model, protocol, 2, VOCABULARY).answer(prompts(2), 2) == answers


def scores_after(model: Decoder, readings: int, sample: NeedlePrompt) -> torch.Tensor:
    """The scores that the first answered token is chosen from."""
    kept: list[torch.Tensor] = []

    class Keeping(Reader):
        def _decode(self, logits_BV: torch.Tensor, new_tokens: int, cache: object) -> torch.Tensor:
            kept.append(logits_BV)
            return super()._decode(logits_BV, new_tokens, cache)

    Keeping(model, "aligned", 1, VOCABULARY).answer([sample], readings)
    return kept[0][0]


def test_readings_write_into_the_memory_and_reach_the_answer() -> None:
    model, plain = tiny_decoder(), tiny_decoder(memory_layers=())
    sample = prompts(1)[0]
    found = [scores_after(model, readings, sample) for readings in range(3)]
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])
    # Without a memory nothing of an earlier reading is left.
    assert torch.equal(scores_after(plain, 0, sample), scores_after(plain, 2, sample))


def test_reading_is_the_training_path_on_the_text_read_again_and_again() -> None:
    """Chunks of a whole number of readings: the memory's part is that of one long stream, semantics A."""
    model = tiny_decoder(layers=1, memory_layers=(0,), mixers=("sliding_attention",))
    sample = prompts(1, haystack=64)[0]  # four chunks of 16
    whole = torch.from_numpy(numpy.concatenate([sample.haystack, sample.haystack, sample.question])).unsqueeze(0)
    with torch.no_grad():
        streamed = model.logits(whole, cache=model.make_cache(1, mode="aligned", memory="per_sequence"))[0, -1]
    # The last token's window lies in the second reading, and RoPE sees distances alone.
    assert torch.allclose(scores_after(model, 1, sample), streamed, rtol=0, atol=1e-9)


def test_a_haystack_may_be_cut_into_calls_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = tiny_decoder(), prompts(1)[0]
    whole = scores_after(model, 2, sample)
    monkeypatch.setattr(reading, "TOKENS_PER_CALL", 7)
    assert torch.allclose(scores_after(model, 2, sample), whole, atol=1e-10)


def test_the_official_protocol_carries_one_memory_over_the_samples() -> None:
    model = official_model()
    samples = prompts(2)
    reader = Reader(model, "official", 1, VOCABULARY)
    first = reader.answer(samples[:1], 1)
    after = [memory.view.num_touched for memory in reader._carried.memories()]
    reader.answer(samples[1:], 1)
    assert all(count > 0 for count in after)
    fresh = Reader(model, "official", 1, VOCABULARY)
    assert fresh.answer(samples[:1], 1) == first
    with pytest.raises(ValueError, match="batches of 1"):
        reader.answer(samples, 0)


def test_prompts_of_unequal_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="of one length"):
        Reader(tiny_decoder(), "aligned", 2, VOCABULARY).answer([*prompts(1), *prompts(1, haystack=70)], 0)


def test_the_last_short_chunk_of_a_reading_is_written_at_its_end() -> None:
    """75 tokens in chunks of 16: a reading ends with a write of 11."""
    model, sample = tiny_decoder(), prompts(1)[0]
    haystack, question = (torch.from_numpy(part).unsqueeze(0) for part in (sample.haystack, sample.question))
    found = []
    for finished in (True, False):
        cache = model.make_cache(1, mode="aligned", memory="per_sequence")
        model.logits(haystack, cache=cache)
        if finished:
            cache.finish()
        cache.forget_mixers()
        model.logits(haystack, cache=cache)
        found.append(model.logits(question, cache=cache)[0, -1])
    assert torch.allclose(scores_after(model, 1, sample), found[0], rtol=0, atol=1e-10)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
