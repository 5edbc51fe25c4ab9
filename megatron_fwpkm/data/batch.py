"""What a loader yields and a model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

IGNORED_LABEL = -100
"""Label of a position that has no loss."""


@dataclass(frozen=True)
class TokenBatch:
    """One microbatch of B sequences of T tokens.

    `documents_BT` and `positions_BT` are there only where documents are kept apart: numbers that tell the documents of
    a sequence apart (not decreasing along a sequence), and each token's place in its document.
    """

    tokens_BT: torch.Tensor
    """int64 token ids."""
    labels_BT: torch.Tensor
    """int64 ids of the tokens that follow; IGNORED_LABEL where there is no loss."""
    documents_BT: torch.Tensor | None = None
    positions_BT: torch.Tensor | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on a device."""
        parts = (self.tokens_BT, self.labels_BT, self.documents_BT, self.positions_BT)
        return TokenBatch(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]


class Loader(Protocol):
    """Endless microbatches of one rank, with a cursor."""

    def __next__(self) -> TokenBatch:
        """The next microbatch."""

    def state_dict(self) -> dict[str, Any]:
        """Where reading stands: the global cursor, the same on all ranks, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved cursor, at any time; the next batch starts there. Raises UserError if it can't."""

    def close(self) -> None:
        """End what runs beside, if anything does: before the process does."""
