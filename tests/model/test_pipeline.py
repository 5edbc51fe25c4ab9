"""The division of a decoder into pipeline stages, and what goes between them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.model.pipeline import message_of, stage_bounds


def largest_share(flops: list[int], bounds: list[int]) -> int:
    """Work of the busiest stage; `flops` are those of the blocks and of the head."""
    costs = [0, *flops[:-1], 0, flops[-1]]  # embedding, blocks, norm, head
    return max(sum(costs[begin:end]) for begin, end in itertools.pairwise(bounds))


def smallest_possible(flops: list[int], stages: int) -> int:
    """Of all divisions that keep the head with the norm and every stage from being the embedding alone."""
    cuts = itertools.combinations(range(2, len(flops) + 1), stages - 1)
    return min(largest_share(flops, [0, *inner, len(flops) + 2]) for inner in cuts)


def test_stages_have_about_equal_work() -> None:
    draw = random.Random(4)
    ratios = []
    for _ in range(60):
        blocks = draw.randint(4, 9)
        stages = draw.randint(2, 4)
        flops = [draw.choice([10, 12, 25]) for _ in range(blocks)] + [draw.randint(1, 40)]
        bounds = stage_bounds(flops, stages)
        assert bounds[0] == 0 and bounds[-1] == blocks + 3 and len(bounds) == stages + 1
        assert bounds[1] >= 2  # never the embedding alone
        assert bounds[-2] <= blocks + 1  # norm and head together
        assert sorted(set(bounds)) == bounds
        ratios.append(largest_share(flops, bounds) / smallest_possible(flops, stages))
    assert max(ratios) < 1.35
    assert sum(ratio == 1 for ratio in ratios) > 40


def test_the_smallest_stage_is_a_block() -> None:
    assert stage_bounds([5, 5, 1], 2) == [0, 2, 5]
    assert stage_bounds([5, 5, 100], 2)[1] == 3  # a head as heavy as that stays alone


def test_more_stages_than_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 blocks can't be divided into 3 pipeline stages"):
        stage_bounds([5, 5, 1], 3)
    with pytest.raises(ValueError, match=r"parallel.pipeline \(9\) must be at most model.layers \(4\)"):
        TrainConfig.model_validate({"parallel": {"pipeline": 9}})


def test_stages_of_zero_that_divide_gradients_are_refused() -> None:
    for stage in (2, 3):
        with pytest.raises(ValueError, match=f"training.zero_stage {stage} divides gradients"):
            TrainConfig.model_validate({"parallel": {"pipeline": 2}, "training": {"zero_stage": stage}})


def test_documents_go_with_their_positions() -> None:
    tokens = torch.arange(5).unsqueeze(0)
    documents = torch.tensor([[3, 3, 4, 4, 4]])
    assert message_of(tokens, None, None) == (tokens,)
    _, same, positions = message_of(tokens, documents, None)
    assert same is documents and positions.tolist() == [[0, 1, 0, 1, 2]]
    assert message_of(tokens, documents, tokens)[2] is tokens
    with pytest.raises(ValueError, match="positions_BT come with documents_BT"):
        message_of(tokens, None, tokens)
