"""How far each memory layer's gate opens at each token of a text."""

from __future__ import annotations

import torch

from megatron_fwpkm.evaluate.perplexity import measuring
from megatron_fwpkm.memory.backward import MemoryTrace
from megatron_fwpkm.model.decoder import Decoder


def gates_of(model: Decoder, tokens_BT: torch.Tensor) -> dict[int, torch.Tensor]:
    """Gates [B, T] in [0, 1] by block index (semantics D): the text is read as trained, as one document a sequence."""
    layers = dict(model.memory_layers())
    try:
        with measuring(model, "memory"):
            for layer in layers.values():
                layer.trace = MemoryTrace()
                if layer.reset == "per_document":
                    layer.reset = "per_sequence"
            model.logits(tokens_BT.to(next(model.parameters()).device))
        traces = {block: layer.trace for block, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.trace = None
    return {
        block: trace.gate_BT.float().cpu()
        for block, trace in traces.items()
        if trace is not None and trace.gate_BT is not None
    }
