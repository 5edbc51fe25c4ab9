"""A run of an earlier program, kept in the repository, is read as it was meant (make_kept.py has written it)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_fwpkm.checkpoint.catalogue import choose_checkpoint, describe_layout, verify
from megatron_fwpkm.checkpoint.store import read_state
from megatron_fwpkm.convert.source import model_of_run
from tests.checkpoints import whole_tensors

KEPT = Path(__file__).parent / "kept"


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of each tensor's type, shape and bits."""
    found = {}
    for name, tensor in sorted(tensors.items()):
        about = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
        found[name] = hashlib.sha256(about + tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def tokens_of() -> Tensor:
    """What the kept logits are of."""
    return torch.arange(80).view(1, 80) * 3 % 270


def test_a_kept_checkpoint_is_read_as_it_was_written() -> None:
    checkpoint = choose_checkpoint(KEPT)
    verify(checkpoint)
    state = read_state(checkpoint)
    assert (state.step, describe_layout(state)) == (2, "TP2 PP1 DP1 ZeRO-1, memories over 2 ranks (slots)")
    tensors = whole_tensors(checkpoint)
    kinds = {name.split("/")[0] for name in tensors}
    optimizer = {"first_moment", "second_moment", "optimizer_steps", "updates", "clock", "clock_now"}
    assert kinds == {"slow", "fast_state"} | optimizer
    assert hashes(tensors) == json.loads((KEPT / "hashes.json").read_text())


def test_a_kept_model_computes_what_it_did() -> None:
    with torch.no_grad():
        found = model_of_run(KEPT).decoder.eval().logits(tokens_of())
    wanted = torch.from_numpy(np.load(KEPT / "logits.npy"))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
