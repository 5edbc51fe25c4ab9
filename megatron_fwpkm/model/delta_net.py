"""Gated delta net: linear attention whose state is decayed and corrected token by token (semantics E).

Shape legend: B batch, T sequence, E hidden size, G key heads, r value heads per key head, H = G r value heads, K key
width, V value width, J = 2 K + r V channels of a key head that the convolution mixes, C = G J, L convolution kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

from megatron_fwpkm.accounting import ParameterCount, dense
from megatron_fwpkm.model.cache import DeltaNetCache
from megatron_fwpkm.model.context import TokenContext, document_starts
from megatron_fwpkm.model.delta_rule import DeltaRuleInputs, recurrent_delta_rule
from megatron_fwpkm.model.settings import DecoderConfig
from megatron_fwpkm.parallel.backend import Backend

UNIT_EPSILON = 1e-6
LARGEST_INITIAL_DECAY = 16.0


def unit(x: Tensor) -> Tensor:
    """x / sqrt(sum of squares + 1e-6) over the last axis, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + UNIT_EPSILON)).to(x.dtype)


def causal_convolution(x_BTC: Tensor, kernel_CL: Tensor, past_BSC: Tensor | None, places_BT: Tensor | None) -> Tensor:
    """y_t = sum over lags l of kernel[L - 1 - l] · x_{t - l}, for each channel on its own; returns [B, T, C].

    Before the first token stands `past` (its last L - 1 tokens), else zeros. Tokens of an earlier document, those
    further back than `places`, count as zeros. A sum of shifted products: on CPU faster than torch's convolution.
    """
    lags, length = kernel_CL.shape[1], x_BTC.shape[1]
    before = pad(x_BTC, (0, 0, lags - 1, 0)) if past_BSC is None else torch.cat([past_BSC, x_BTC], 1)
    output = x_BTC * kernel_CL[:, lags - 1]
    for lag in range(1, lags):
        start = lags - 1 - lag
        shifted = before[:, start : start + length]
        if places_BT is not None:
            shifted = shifted * (places_BT >= lag).unsqueeze(-1)
        output = output + shifted * kernel_CL[:, start]
    return output


class GatedDeltaNet(nn.Module):
    """The mixer; its key heads, each with its value heads, are split over TP ranks.

    Projections and convolution are laid out key head after key head ([q | k | r values | r gates], [r betas | r
    decays]), so that a rank's share is contiguous.
    """

    def __init__(self, config: DecoderConfig, backend: Backend) -> None:
        super().__init__()
        self._config, sizes = config, config.delta_net
        self._ratio = sizes.value_heads // sizes.key_heads
        self._value_width = self._ratio * sizes.value_head_dim  # of one key head
        mixed = 2 * sizes.key_head_dim + self._value_width
        self.in_qkvz = backend.column_linear(config.hidden_size, sizes.key_heads * (mixed + self._value_width))
        self.in_ba = backend.column_linear(config.hidden_size, 2 * sizes.value_heads)
        self.convolution = backend.split_parameter(
            (sizes.key_heads * mixed, sizes.conv_kernel), lambda weight: nn.init.normal_(weight, std=config.initial_std)
        )
        self.dt_bias = backend.split_parameter((sizes.value_heads,), nn.init.ones_)
        self.A_log = backend.split_parameter((sizes.value_heads,), _log_uniform)
        self.output_norm = backend.share_norm(sizes.value_head_dim, zero_centred=False)
        self.output = backend.row_linear(sizes.value_heads * sizes.value_head_dim, config.hidden_size)
        self._rule = backend.delta_rule()

    def make_cache(self) -> DeltaNetCache:
        """An empty cache of this layer."""
        return DeltaNetCache()

    def forward(self, x_BTE: Tensor, context: TokenContext, cache: DeltaNetCache | None = None) -> Tensor:
        """Map normed hidden states [B, T, E] to what the delta net adds to the residual stream.

        With sequence parallelism both are this rank's tokens; the projections bring all tokens together.
        """
        qkvz_BTG, ba_BTG = self.in_qkvz(x_BTE), self.in_ba(x_BTE)
        if context.mask_BT is not None and (cache is not None or x_BTE.shape[0] > 1):
            qkvz_BTG, ba_BTG = (x * context.mask_BT.unsqueeze(-1) for x in (qkvz_BTG, ba_BTG))
        sizes = self._config.delta_net
        widths = (2 * sizes.key_head_dim + self._value_width, self._value_width)
        mixed_BTGJ, z_BTGV = qkvz_BTG.unflatten(-1, (-1, sum(widths))).split(widths, -1)
        mixed_BTGJ = silu(self._convolve(mixed_BTGJ.flatten(2), context, cache)).view(mixed_BTGJ.shape)
        inputs = self._rule_inputs(mixed_BTGJ, ba_BTG)
        # The libraries compute in float32: a float64 model is for comparisons and can wait.
        exact = x_BTE.dtype == torch.float64 or ba_BTG.shape[1] == 1
        starts_BT = None if context.documents_BT is None else document_starts(context.documents_BT)
        output_BTHV, state = (recurrent_delta_rule if exact else self._rule)(
            inputs, cache.state if cache is not None else None, starts_BT
        )
        if cache is not None:
            cache.state = state
        z_BTHV = z_BTGV.unflatten(-1, (self._ratio, -1)).flatten(2, 3)
        return self.output((self.output_norm(output_BTHV) * silu(z_BTHV)).flatten(2))

    def _convolve(self, x_BTC: Tensor, context: TokenContext, cache: DeltaNetCache | None) -> Tensor:
        past = None
        if cache is not None:
            lags = self._config.delta_net.conv_kernel - 1
            past = (
                x_BTC.new_zeros(x_BTC.shape[0], lags, x_BTC.shape[2]) if cache.inputs_BSC is None else cache.inputs_BSC
            )
            joined = torch.cat([past, x_BTC], 1)
            cache.inputs_BSC = joined[:, joined.shape[1] - lags :].clone()
        return causal_convolution(x_BTC, self.convolution, past, context.places_BT)

    def _rule_inputs(self, mixed_BTGJ: Tensor, ba_BTG: Tensor) -> DeltaRuleInputs:
        sizes, ratio = self._config.delta_net, self._ratio
        q_BTGK, k_BTGK, v_BTG = mixed_BTGJ.split((sizes.key_head_dim, sizes.key_head_dim, self._value_width), -1)
        beta_BTH, step_BTH = (part.flatten(2) for part in ba_BTG.unflatten(-1, (-1, 2 * ratio)).chunk(2, -1))
        wide = torch.promote_types(step_BTH.dtype, torch.float32)
        step_BTH = softplus(step_BTH.to(wide) + self.dt_bias.to(wide))
        return DeltaRuleInputs(
            unit(q_BTGK).repeat_interleave(ratio, 2),
            unit(k_BTGK).repeat_interleave(ratio, 2),
            v_BTG.unflatten(-1, (ratio, -1)).flatten(2, 3),
            -self.A_log.to(wide).exp() * step_BTH,
            torch.sigmoid(beta_BTH),
        )

    def num_parameters(self) -> ParameterCount:
        """All slow, all used for every token."""
        return dense(self)

    def num_flops_per_token(self, sequence_length: int) -> int:
        """Operations of forward and backward per token: 6 per weight, and the recurrence's three products per state.

        The chunked forms do more than that; it is not counted, as no model needs it.
        """
        sizes, hidden = self._config.delta_net, self._config.hidden_size
        keys, values = sizes.key_heads * sizes.key_head_dim, sizes.value_heads * sizes.value_head_dim
        projections = hidden * (2 * keys + 3 * values + 2 * sizes.value_heads)
        convolution = sizes.conv_kernel * (2 * keys + values)
        return 6 * (projections + convolution) + 18 * sizes.key_head_dim * values


def _log_uniform(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return nn.init.uniform_(weight, 0, LARGEST_INITIAL_DECAY).clamp_(min=1e-6).log_()
