"""A memory that starts anew at every document of a sequence (reset policy `per_document`).

Every document of every sequence is a call of its own on a throw-away memory over the fast state: chunks begin with the
document. Documents of equal length share a call, so the passes run over groups of documents, never over tokens.

Letters: B sequences, T tokens, N documents of a group, L tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fwpkm.memory.fast_state import FastState
from megatron_fwpkm.memory.functional import fast_memory
from megatron_fwpkm.memory.statistics import MemoryStatistics


def remember_documents(
    query_BTHk: Tensor,
    target_BTD: Tensor,
    gate_BT: Tensor | None,
    mask_BT: Tensor | None,
    documents_BT: Tensor,
    state: FastState,
    statistics: MemoryStatistics,
) -> Tensor:
    """As `fast_memory`, for documents told apart by their numbers; returns the reads [B, T, D].

    Raises:
        ValueError: documents of another shape than the tokens, or as `fast_memory` does.
    """
    if documents_BT.shape != target_BTD.shape[:2]:
        raise ValueError(
            f"documents have shape {tuple(documents_BT.shape)}; expected {tuple(target_BTD.shape[:2])} to go with the "
            "tokens"
        )
    parts = [None if t is None else t.flatten(0, 1) for t in (query_BTHk, target_BTD, gate_BT, mask_BT)]
    reads, places = [target_BTD[:0].flatten(0, 1)], []
    with statistics.together():
        for token_NL in groups_of_documents(documents_BT):
            group = [None if t is None else t[token_NL] for t in parts]
            query, target, gate, mask = group
            assert query is not None and target is not None
            view = state.view(token_NL.shape[0], training=True, reset="per_document")
            reads.append(
                fast_memory(query, target, gate, mask, view, state.config, statistics=statistics).flatten(0, 1)
            )
            places.append(token_NL.flatten())
    if not places:
        return target_BTD.clone()
    order = torch.cat(places)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    return torch.cat(reads)[back].view_as(target_BTD)


def groups_of_documents(documents_BT: Tensor) -> list[Tensor]:
    """Numbers [N, L] (sequence · T + token) of the tokens of N documents of L tokens, for each L that there is."""
    tokens = documents_BT.shape[1]
    first_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    torch.ne(documents_BT[:, 1:], documents_BT[:, :-1], out=first_BT[:, 1:])
    first = first_BT.flatten().nonzero().view(-1)
    length = torch.diff(first, append=first.new_tensor([documents_BT.numel()]))
    if tokens == 0:
        return []
    return [
        first[length == size].unsqueeze(1) + torch.arange(int(size), device=first.device)
        for size in torch.unique(length).tolist()
    ]
