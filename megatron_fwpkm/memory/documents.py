"""The documents of a batch, for a memory that starts anew at each of them (reset policy `per_document`).

Every document of every sequence is read on a throw-away memory over the fast state: chunks begin with the document.
Documents of equal length share a call, so the passes run over groups of documents, never over tokens.

Letters: B sequences, T tokens, N documents of a group, L tokens of each.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
