"""AdamW over the slow weights and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NOT_DECAYED = ("bias", "ln", "norm")


def is_decayed(name: str) -> bool:
    """Whether a parameter has weight decay: its name contains none of "bias", "ln" and "norm".

    The rule of the paper's code, taken literally (docs/semantics.md, section H). It decays embeddings, the keys and
    values of PKM layers, and the `A_log` and convolution of delta nets; it spares `dt_bias`, all biases and all norms.
    Our names keep those three words exactly where that code's names have them.
    """
    return not any(word in name for word in _NOT_DECAYED)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups with and without weight decay of all parameters (values of PKM layers are none: train/tables.py)."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if is_decayed(name) else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float
) -> torch.optim.AdamW:
    """torch's AdamW: on CPU DeepSpeed's own variants would be compiled first, for over a minute."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of all parameter groups, through DeepSpeed's wrapper too."""
    for group in optimizer.param_groups:
        group["lr"] = value
