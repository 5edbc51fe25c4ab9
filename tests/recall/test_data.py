"""Sequences of pairs and questions: what they hold, and that their order is a function of seed and number alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_fwpkm.config import UserError, differing_keys, load_train_config
from megatron_fwpkm.data.batch import IGNORED_LABEL
from megatron_fwpkm.data.recall import HELD_OUT, MEASUREMENT, TRAINING, RecallConfig, RecallLoader, draw_parts

ROOT = Path(__file__).parents[2]
SMALL = RecallConfig(pairs=6, questions=4, keys=20, values=8, fillers=5, seed=3)
LENGTH = 2 * (6 + 4) + 7


def _loader(replica: int = 0, replicas: int = 1, batch: int = 2, stream: int = TRAINING) -> RecallLoader:
    return RecallLoader(SMALL, LENGTH, batch, stream, replica, replicas)


def _rows(loader: RecallLoader, batches: int) -> list[torch.Tensor]:
    return [row for _ in range(batches) for row in next(loader).tokens_BT]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_parts_of_a_sequence() -> None:
    context_BT, questions_BT = draw_parts(SMALL, 7, TRAINING, 0, 200)
    for context, questions in zip(context_BT.tolist(), questions_BT.tolist(), strict=True):
        keys, values, filler = context[0:12:2], context[1:12:2], context[12:]
        assert len(filler) == 7 and all(8 <= token < 13 for token in filler)
        assert all(0 <= token < 8 for token in values)
        assert all(13 <= token < SMALL.vocab_size for token in keys) and len(set(keys)) == 6
        answers = dict(zip(keys, values, strict=True))
        assert len(set(questions[0::2])) == 4
        assert [answers[key] for key in questions[0::2]] == questions[1::2]
    # Every kind of token occurs, and values are independent of their place.
    assert set(context_BT.flatten().tolist()) == set(range(SMALL.vocab_size))
    counts = torch.bincount(context_BT[:, 1:12:2].flatten(), minlength=8)
    assert counts.min() > 0.7 * 200 * 6 / 8


def test_questions_are_in_random_order_and_ask_for_any_pair() -> None:
    context_BT, questions_BT = draw_parts(SMALL, 0, TRAINING, 0, 300)
    places = (context_BT[:, 0::2].unsqueeze(1) == questions_BT[:, 0::2].unsqueeze(2)).int().argmax(2)
    for question in range(4):
        assert torch.bincount(places[:, question], minlength=6).min() > 25  # 50 each are expected


def test_labels_stand_at_the_keys_of_questions_alone() -> None:
    batch = next(_loader())
    first_question = LENGTH - 2 * SMALL.questions
    labelled = (batch.labels_BT != IGNORED_LABEL).nonzero()[:, 1].view(2, -1)
    assert labelled.tolist() == [list(range(first_question, LENGTH, 2))] * 2
    assert torch.equal(batch.labels_BT[:, first_question::2], batch.tokens_BT[:, first_question + 1 :: 2])


def test_no_answer_is_seen_between_its_pair_and_its_question() -> None:
    """A key occurs twice in a sequence: in its pair and in its question."""
    config = RecallConfig(pairs=6, questions=6, keys=20, values=8, fillers=5)
    context_BT, questions_BT = draw_parts(config, 7, TRAINING, 0, 50)
    tokens_BT = torch.cat([context_BT, questions_BT], dim=1)
    for row in tokens_BT:
        keys, counts = row[row >= 13].unique(return_counts=True)
        assert len(keys) == 6 and (counts == 2).all()


def test_the_same_seed_and_number_give_the_same_sequence() -> None:
    assert _same(_rows(_loader(), 5), _rows(_loader(), 5))
    other = RecallLoader(SMALL.model_copy(update={"seed": 4}), LENGTH, 2)
    assert not _same(_rows(_loader(), 2), _rows(other, 2))
    streams = [tuple(map(tuple, draw_parts(SMALL, 7, stream, 0, 50)[0].tolist())) for stream in range(3)]
    assert {TRAINING, HELD_OUT, MEASUREMENT} == {0, 1, 2}
    assert len({row for stream in streams for row in stream}) == 150


def test_longer_filler_keeps_pairs_and_questions() -> None:
    short, long = draw_parts(SMALL, 3, MEASUREMENT, 8, 4), draw_parts(SMALL, 300, MEASUREMENT, 8, 4)
    assert torch.equal(short[0][:, :12], long[0][:, :12]) and torch.equal(short[1], long[1])


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_the_sequences_of_one_process(replicas: int) -> None:
    together = _loader(batch=2 * replicas)
    shares = [_loader(replica, replicas) for replica in range(replicas)]
    for _ in range(4):
        expected = next(together)
        parts = [next(share) for share in shares]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), expected.tokens_BT)
        assert torch.equal(torch.cat([part.labels_BT for part in parts]), expected.labels_BT)
    assert [share.state_dict() for share in shares] == [together.state_dict()] * replicas


def test_cursor_continues_on_any_number_of_replicas() -> None:
    before = [_loader(replica, 2) for replica in range(2)]
    for _ in range(3):
        for loader in before:
            next(loader)
    cursor = json.loads(json.dumps(before[0].state_dict()))
    expected = [row for loader in before for row in next(loader).tokens_BT]
    used = _loader(batch=4)
    next(used)
    used.load_state_dict(cursor)
    assert _same(list(next(used).tokens_BT), expected)


def test_resuming_far_ahead_takes_no_longer() -> None:
    """O(1): the cursor may be far beyond what could be drawn one after the other."""
    loader = _loader()
    loader.load_state_dict({"sequence": 10**15})
    assert next(loader).tokens_BT.shape == (2, LENGTH)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"questions": 7}, "questions"), ({"pairs": 21}, "keys"), ({"values": 1}, "values"), ({"seed": -1}, "seed")],
)
def test_impossible_settings(change: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        RecallConfig(**{**SMALL.model_dump(), **change})


def test_too_short_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="20 tokens"):
        RecallLoader(SMALL, 19, 2)
    config = ROOT / "configs" / "train" / "recall.yaml"
    with pytest.raises(UserError, match="256 tokens"):
        load_train_config(config, ["data.sequence_length=200"])
    with pytest.raises(UserError, match="belong together"):
        load_train_config(config, ["data.source=stdlib"])
    with pytest.raises(UserError, match=r"did you mean `data\.recall\.pairs`"):
        load_train_config(config, ["data.recall.pair=3"])


def test_presets_differ_in_the_memory_alone_and_attention_cannot_reach_the_pairs() -> None:
    presets = ROOT / "configs" / "train"
    config, plain = load_train_config(presets / "recall.yaml"), load_train_config(presets / "recall-plain.yaml")
    differing = differing_keys(config.model_dump(mode="json"), plain.model_dump(mode="json"))
    assert [text.split()[0] for text in differing] == ["model.memory_layers", "name", "run_directory"]
    assert config.model.memory_layers and not plain.model.memory_layers
    assert config.data.recall is not None and config.model.window is not None
    filler = config.data.recall.filler_tokens(config.data.sequence_length)
    assert config.model.layers * (config.model.window - 1) < filler + 1
    assert config.model.memory.reset == "per_sequence"
    # No pair is cut by the end of a chunk: its value would then not be written.
    assert config.model.memory.chunk_size % 2 == 0
