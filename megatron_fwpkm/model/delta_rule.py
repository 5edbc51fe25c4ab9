"""The gated delta rule: a slow obvious recurrence, and the libraries' chunked forms of it behind one signature.

For every head, with a state S [K, V] that starts at 0 or at a given one (semantics E):

    S <- exp(decay_t) S;   S <- S + k_t (beta_t (v_t - S^T k_t))^T;   o_t = S^T q_t / sqrt(K)

Shape legend: B batch, T sequence, H value heads, K key width, V value width, P padded length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fwpkm.compatibility import mend_torchvision

CHUNK = 32
"""Tokens of a chunk of the library's form on CPU: the fastest of 16, 32 and 64 for heads of 32 to 64 columns."""

_FORGET = -1e4
"""Log decay after which nothing is left: exp of it is exactly 0 in float32."""


@dataclass(frozen=True)
class DeltaRuleInputs:
    """What the rule takes, of every value head; queries and keys are normalized already."""

    q_BTHK: Tensor
    k_BTHK: Tensor
    v_BTHV: Tensor
    decay_BTH: Tensor
    """Log of the factor by which the state shrinks before each token; at most 0."""
    beta_BTH: Tensor
    """Strength of each token's write, in 0..1."""

    def map(self, change: Callable[[Tensor], Tensor]) -> DeltaRuleInputs:
        """The same change to all tensors."""
        return DeltaRuleInputs(
            *(change(t) for t in (self.q_BTHK, self.k_BTHK, self.v_BTHV, self.decay_BTH, self.beta_BTH))
        )


class DeltaRule(Protocol):
    """Outputs [B, T, H, V] in the values' dtype, and the state [B, H, K, V] after the last token.

    At a token where `starts_BT` is true the state starts anew (then there is no initial state, and the state returned
    may be that of nobody). None: nowhere.
    """

    def __call__(
        self, inputs: DeltaRuleInputs, state_BHKV: Tensor | None = None, starts_BT: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def recurrent_delta_rule(
    inputs: DeltaRuleInputs, state_BHKV: Tensor | None = None, starts_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token after token, in float32 or wider: the yardstick, and what decodes single tokens."""
    dtype = torch.promote_types(inputs.v_BTHV.dtype, torch.float32)
    q, k, v, decay, beta = _tensors(inputs.map(lambda t: t.to(dtype)))
    batch, tokens, heads, width = k.shape
    state = k.new_zeros(batch, heads, width, v.shape[-1]) if state_BHKV is None else state_BHKV.to(dtype)
    factor_BTH = decay.exp()
    if starts_BT is not None:
        factor_BTH = factor_BTH.masked_fill(starts_BT.unsqueeze(-1), 0)
    outputs = []
    for t in range(tokens):
        state = state * factor_BTH[:, t, :, None, None]
        missing_BHV = v[:, t] - (k[:, t].unsqueeze(-2) @ state).squeeze(-2)
        state = state + k[:, t].unsqueeze(-1) @ (beta[:, t].unsqueeze(-1) * missing_BHV).unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    output = torch.stack(outputs, 1) * width**-0.5 if outputs else torch.zeros_like(v)
    return output.to(inputs.v_BTHV.dtype), state


def chunked_delta_rule(
    inputs: DeltaRuleInputs, state_BHKV: Tensor | None = None, starts_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """transformers' chunked form in plain torch: matrix products over chunks, float32 inside.

    It knows no documents. They are laid out one after the other, each padded to whole chunks with at least one token
    that writes nothing and after which nothing of the state is left.
    """
    if starts_BT is None:
        return _run(_transformers_rule(), inputs, state_BHKV, chunk_size=CHUNK)
    places_BT, length = _padded_places(starts_BT, CHUNK)
    row_B1 = torch.arange(starts_BT.shape[0], device=starts_BT.device).unsqueeze(1)

    def lay_out(tensor: Tensor, filling: float = 0.0) -> Tensor:
        padded = tensor.new_full((tensor.shape[0], length, *tensor.shape[2:]), filling)
        return padded.index_put((row_B1, places_BT), tensor)

    q, k, v, decay, beta = _tensors(inputs)
    padded = DeltaRuleInputs(lay_out(q), lay_out(k), lay_out(v), lay_out(decay.float(), _FORGET), lay_out(beta))
    output, state = _run(_transformers_rule(), padded, None, chunk_size=CHUNK)
    return output[row_B1, places_BT], state


def fla_delta_rule(
    inputs: DeltaRuleInputs, state_BHKV: Tensor | None = None, starts_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """flash-linear-attention's Triton kernels. Needs a GPU; documents are given to it as one packed sequence."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    if starts_BT is None:
        return _run(chunk_gated_delta_rule, inputs, state_BHKV)
    first_BT = starts_BT.clone()
    first_BT[:, 0] = True
    bounds = torch.cat(
        [first_BT.flatten().nonzero().view(-1), first_BT.new_tensor([first_BT.numel()], dtype=torch.int64)]
    )
    packed = inputs.map(lambda t: t.flatten(0, 1).unsqueeze(0))
    output, state = _run(chunk_gated_delta_rule, packed, None, cu_seqlens=bounds)
    return output.view(inputs.v_BTHV.shape), state


def _run(
    rule: Callable[..., Any], inputs: DeltaRuleInputs, state: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Both libraries' functions have the same first arguments and scale queries by the root of their width."""
    q, k, v, decay, beta = _tensors(inputs)
    with torch.autocast(q.device.type, enabled=False):
        output, state = rule(q, k, v, g=decay, beta=beta, initial_state=state, output_final_state=True, **options)
    assert state is not None
    return output.to(v.dtype), state


def _tensors(inputs: DeltaRuleInputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return inputs.q_BTHK, inputs.k_BTHK, inputs.v_BTHV, inputs.decay_BTH, inputs.beta_BTH


def _padded_places(starts_BT: Tensor, chunk: int) -> tuple[Tensor, int]:
    """Where tokens stand when every document begins at a multiple of `chunk` behind padding; and the length needed."""
    tokens = starts_BT.shape[1]
    index_T = torch.arange(tokens, device=starts_BT.device)
    first_BT = torch.where(starts_BT, index_T, 0).cummax(1).values
    # What a document's padding adds stands at the start of the next one, and adds up from there.
    before_BT = first_BT.roll(1, 1)
    length_BT = index_T - before_BT  # of the document that ends before a start
    added_BT = torch.where(starts_BT & (index_T > 0), chunk - length_BT % chunk, 0)
    places_BT = index_T + added_BT.cumsum(1)
    needed = int(places_BT[:, -1].max()) + 1
    return places_BT, -(-needed // chunk) * chunk


@functools.cache
def _transformers_rule() -> Callable[..., Any]:
    mend_torchvision()
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    rule: Callable[..., Any] = torch_chunk_gated_delta_rule
    return rule
