"""AdamW over the slow weights and its parameter groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
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


class WholeAdamW(torch.optim.AdamW):
    """AdamW of weights that no ZeRO stage divides; clips, and skips what is not finite, as ZeRO's optimizers do.

    DeepSpeed reads `overflow` and `_global_grad_norm` after a step.

    Args:
        parameters: groups as torch takes them, whose gradients are reduced over the replicas
        clipping: largest global gradient norm, 0 for none
        group: the ranks that hold one model together
        options: AdamW's
    """

    def __init__(self, parameters: Any, clipping: float, group: torch.distributed.ProcessGroup, **options: Any) -> None:
        super().__init__(parameters, **options)
        self._clipping, self._group = clipping, group
        self.overflow = False
        self._global_grad_norm: torch.Tensor | float = 0.0

    def scaled_global_norm(self, norm_type: float = 2) -> torch.Tensor:
        """L2 norm of all gradients of a model; what several of its ranks have alike counts once."""
        from deepspeed.runtime.utils import is_model_parallel_parameter
        from megatron.core import parallel_state

        leads = parallel_state.get_tensor_model_parallel_rank() == 0
        counted = [
            parameter.grad
            for parameter in self._all()
            if parameter.grad is not None
            and (leads or is_model_parallel_parameter(parameter))
            and not getattr(parameter, "ds_pipe_replicated", False)
        ]
        like = next(self._all())
        squares = nn.utils.get_total_norm(counted).square() if counted else torch.zeros((), dtype=like.dtype)
        squares = squares.to(like.device)
        torch.distributed.all_reduce(squares, group=self._group)
        return squares.sqrt()

    def _all(self) -> Iterator[nn.Parameter]:
        return (p for group in self.param_groups for p in group["params"] if p.grad is not None)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update, unless a gradient on any rank is not finite."""
        norm = self.scaled_global_norm()
        self.overflow = not bool(torch.isfinite(norm))
        self._global_grad_norm = math.inf if self.overflow else norm
        if self.overflow:
            return
        if self._clipping > 0:
            nn.utils.clip_grads_with_norm_(list(self._all()), self._clipping, norm)
        super().step()


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float,
    whole: tuple[float, torch.distributed.ProcessGroup] | None = None,
) -> torch.optim.AdamW:
    """torch's AdamW: on CPU DeepSpeed's own variants would be compiled first, for over a minute.

    `whole` are clipping and group of WholeAdamW, where no ZeRO stage does what that does.
    """
    groups = parameter_groups(model, weight_decay)
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": epsilon}
    return torch.optim.AdamW(groups, **options) if whole is None else WholeAdamW(groups, *whole, **options)


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of all parameter groups, through DeepSpeed's wrapper too."""
    for group in optimizer.param_groups:
        group["lr"] = value
