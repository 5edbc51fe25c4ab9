"""What the memories of a model sent to other ranks in a step, as metrics.

Per memory over several ranks, "memory/block_<i>/traffic/..." (of a product-key memory with slow values
"pkm/block_<i>/traffic/..."):

    <phase>_bytes       bytes that all ranks together sent, per token
    <phase>_messages    messages that a rank sent, mean over ranks
    imbalance           reads of the owner that had most of them / mean over owners
    distinct_ratio      distinct rows / reads at an owner, mean over ranks
"""

from __future__ import annotations

from megatron_fwpkm.memory.traffic import PHASES
from megatron_fwpkm.model.decoder import BlockStack


def traffic_statistics(model: BlockStack, tokens: float) -> tuple[dict[str, float], dict[str, float]]:
    """This rank's metrics of which the mean over ranks is wanted, and those of which the largest is.

    `tokens` is this rank's share of the tokens of the time since the last call.
    """
    means: dict[str, float] = {}
    largest: dict[str, float] = {}
    for name, layer in model.spread_layers():
        traffic, tag = layer.traffic(), f"{name}/traffic"
        if traffic is None:
            continue
        for phase in PHASES:
            means[f"{tag}/{phase}_bytes"] = traffic.sent_bytes[phase] / tokens
            means[f"{tag}/{phase}_messages"] = float(traffic.messages[phase])
        means[f"{tag}/distinct_ratio"] = traffic.distinct_ratio
        largest[f"{tag}/imbalance"] = traffic.load
    return means, largest
