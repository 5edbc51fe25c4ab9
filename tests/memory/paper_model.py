"""The paper's decoder around our memory layers, in obvious torch, for the whole-model reference cases.

Only what those cases need: one class for the decoder, functions for attention and the gated delta net (semantics D, E).
The memory sublayers and the PKM layer are the library's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fwpkm.memory import FwPKMLayer, MemoryCache, MemoryConfig, PKMConfig, PKMLayer, RMSNorm

_MEMORY_NAMES = {
    "query_norm": "fw_q_norm",
    "query_projection": "fw_q_proj",
    "value_norm": "fw_v_norm",
    "value_projection": "fw_v_proj",
    "gate_norm": "fw_out_gate_norm",
    "gate_projection": "fw_out_gate",
    "output_norm": "fw_out_norm",
    "output_projection": "fw_out_proj",
}
_PKM_NAMES = {
    "query_projection.weight": "query_proj.query_mlps.0.weight",
    "query_projection.bias": "query_proj.query_mlps.0.bias",
    "query_norm.weight": "query_proj.norm.weight",
    "gate_projection.weight": "swilu_projection.weight",
    "gate_projection.bias": "swilu_projection.bias",
    "output_projection.weight": "value_proj.weight",
    "output_projection.bias": "value_proj.bias",
    "values": "values.weight",
    "keys": "keys",
}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + weight)


def rotate(x: Tensor, positions: Tensor, width: int, theta: float) -> Tensor:
    frequency = (1.0 / theta ** (torch.arange(0, width, 2).float() / width)).double()
    angle = positions.double().unsqueeze(-1) * frequency
    cos, sin = (torch.cat([f(angle)] * 2, -1).unsqueeze(2) for f in (torch.cos, torch.sin))
    turned, rest = x[..., :width], x[..., width:]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)


class PaperModel:
    """A model of the reference cases in float64, with the case's weights."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: t.double().requires_grad_("fwpkm." not in name) for name, t in weights.items()}
        self.memory: dict[int, FwPKMLayer] = {}
        self.pkm: dict[int, PKMLayer] = {}
        self.caches: dict[int, MemoryCache] = {}
        for index in config["fwpkm_layers"]:
            self.memory[index] = self._memory(index)
        for index in config["pkm_layers"]:
            self.pkm[index] = self._pkm(index)

    def _memory(self, index: int) -> FwPKMLayer:
        c = self.config
        settings = MemoryConfig(
            heads=c["fwpkm_heads"],
            topk=c["fwpkm_topk"],
            n_subkeys=c["fwpkm_n_subkeys"],
            k_dim=c["fwpkm_k_dim"],
            v_dim=c["fwpkm_v_dim"],
            chunk_size=c["fwpkm_update_chunk_size"],
        )
        layer = FwPKMLayer(c["hidden_size"], settings, dtype=torch.float64).double()
        prefix = f"model.layers.{index}."
        parts = [(ours, theirs, part) for ours, theirs in _MEMORY_NAMES.items() for part in ("weight", "bias")]
        loaded = {
            f"{ours}.{part}": self.weights[f"{prefix}{theirs}.{part}"]
            for ours, theirs, part in parts
            if f"{prefix}{theirs}.{part}" in self.weights
        }
        layer.load_state_dict(loaded)
        keys = self.weights[prefix + "fwpkm.keys"].view(layer.fast_state.keys_H2nd.shape)
        layer.fast_state.replace(keys, self.weights[prefix + "fwpkm.values"])
        return layer

    def _pkm(self, index: int) -> PKMLayer:
        c, prefix = self.config, f"model.layers.{index}.pkm."
        settings = PKMConfig(
            heads=c["pkm_heads"],
            topk=c["pkm_topk"],
            n_subkeys=c["pkm_n_subkeys"],
            k_dim=c["pkm_k_dim"],
            v_dim=c["pkm_v_dim"],
        )
        layer = PKMLayer(c["hidden_size"], settings).double()
        shapes = {name: p.shape for name, p in layer.named_parameters()}
        layer.load_state_dict({o: self.weights[prefix + t].detach().view(shapes[o]) for o, t in _PKM_NAMES.items()})
        return layer

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the names of the paper's code."""
        found: dict[str, Tensor | None] = {name: t.grad for name, t in self.weights.items() if t.grad is not None}
        for index, layer in self.memory.items():
            for ours, theirs in _MEMORY_NAMES.items():
                for part, p in getattr(layer, ours).named_parameters():
                    found[f"model.layers.{index}.{theirs}.{part}"] = p.grad
        for index, pkm in self.pkm.items():
            for name, p in pkm.named_parameters():
                grad = p.grad.to_dense() if p.grad is not None and p.grad.is_sparse else p.grad
                theirs = f"model.layers.{index}.pkm.{_PKM_NAMES[name]}"
                found[theirs] = None if grad is None else grad.reshape(self.weights[theirs].shape)
        return {name: grad for name, grad in found.items() if grad is not None}

    def logits(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, calls: list[int] | None = None
    ) -> Tensor:
        """[B, T, V]; `mask` [B, T] marks real tokens.

        With `calls` the memory takes the tokens in calls of these lengths, through the paper's cached path. All else
        is causal and so the same as in one call.
        """
        w, eps = self.weights, self.config["rms_norm_eps"]
        h = w["model.embed_tokens.weight"][ids]
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        for index, kind in enumerate(self.config["layer_types"]):
            prefix = f"model.layers.{index}."
            if index in self.memory:
                h = h + self._remember(index, h, mask, calls)
            x = norm(h, w[prefix + "input_layernorm.weight"], eps)
            if kind == "linear_attention":
                h = h + self._delta_net(prefix + "linear_attn.", x, mask)
            else:
                h = h + self._attention(prefix + "self_attn.", x, mask, positions, kind)
            x = norm(h, w[prefix + "post_attention_layernorm.weight"], eps)
            h = h + (self.pkm[index](x) if index in self.pkm else self._mlp(prefix + "mlp.", x))
        head = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        return norm(h, w["model.norm.weight"], eps) @ w[head].T

    def _remember(self, index: int, h: Tensor, mask: Tensor | None, calls: list[int] | None) -> Tensor:
        layer = self.memory[index]
        if calls is None:
            return layer(h, None if mask is None else mask > 0)
        self.caches[index] = cache = layer.make_cache(h.shape[0], mode="official", memory="shared")
        return torch.cat([layer(part, cache=cache) for part in h.split(calls, 1)], 1)

    def _mlp(self, p: str, x: Tensor) -> Tensor:
        gate, up, down = (self.weights[f"{p}{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def _attention(self, p: str, x: Tensor, mask: Tensor | None, positions: Tensor, kind: str) -> Tensor:
        c, w = self.config, self.weights
        heads, groups, size = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        batch, tokens = x.shape[:2]
        query, gate = (x @ w[p + "q_proj.weight"].T).view(batch, tokens, heads, 2 * size).chunk(2, -1)
        key, value = ((x @ w[f"{p}{n}_proj.weight"].T).view(batch, tokens, groups, size) for n in "kv")
        width = int(size * c["partial_rotary_factor"])
        query, key = (
            rotate(norm(t, w[f"{p}{n}_norm.weight"], c["rms_norm_eps"]), positions, width, c["rope_theta"])
            for t, n in ((query, "q"), (key, "k"))
        )
        key, value = (t.repeat_interleave(heads // groups, 2) for t in (key, value))
        distance = torch.arange(tokens).unsqueeze(1) - torch.arange(tokens)
        seen = distance >= 0
        if kind == "sliding_attention":
            seen = seen & (distance < c["sliding_window"])
        seen = seen.expand(batch, 1, tokens, tokens)
        if mask is not None:
            seen = seen & (mask > 0)[:, None, None]
        scores = torch.einsum("bthd,bshd->bhts", query, key) / size**0.5
        # A padded query sees nothing and mixes nothing in; -1e300 keeps its softmax finite.
        share = scores.masked_fill(~seen, -1e300).softmax(-1) * seen
        mixed = torch.einsum("bhts,bshd->bthd", share, value)
        return (mixed * gate.sigmoid()).flatten(2) @ w[p + "o_proj.weight"].T

    def _delta_net(self, p: str, x: Tensor, mask: Tensor | None) -> Tensor:
        c, w = self.config, self.weights
        if mask is not None and x.shape[0] > 1:
            x = x * mask.unsqueeze(-1)
        nk, nv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        dk, dv, ratio = c["linear_key_head_dim"], c["linear_value_head_dim"], nv // nk
        batch, tokens = x.shape[:2]
        mixed = (x @ w[p + "in_proj_qkvz.weight"].T).view(batch, tokens, nk, -1)
        q, k, v, z = mixed.split([dk, dk, ratio * dv, ratio * dv], -1)
        b, a = (x @ w[p + "in_proj_ba.weight"].T).view(batch, tokens, nk, 2 * ratio).split(ratio, -1)
        kernel = w[p + "conv1d.weight"]
        joined = torch.cat([t.flatten(2) for t in (q, k, v)], -1).transpose(1, 2)
        padded = F.pad(joined, (kernel.shape[-1] - 1, 0))
        joined = F.silu(F.conv1d(padded, kernel, groups=kernel.shape[0])).transpose(1, 2)
        q, k, v = joined.split([nk * dk, nk * dk, nv * dv], -1)
        q, k = (t.view(batch, tokens, nk, dk).repeat_interleave(ratio, 2) for t in (q, k))
        q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
        v, z = v.view(batch, tokens, nv, dv), z.reshape(batch, tokens, nv, dv)
        beta = b.reshape(batch, tokens, nv).sigmoid()
        decay = -w[p + "A_log"].exp() * F.softplus(a.reshape(batch, tokens, nv) + w[p + "dt_bias"])
        state, outputs = x.new_zeros(batch, nv, dk, dv), []
        for t in range(tokens):
            state = state * decay[:, t].exp()[..., None, None]
            error = beta[:, t].unsqueeze(-1) * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], error)
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / dk**0.5)
        out_norm = RMSNorm(dv, c["rms_norm_eps"], zero_centred=False).double()
        scaled = torch.func.functional_call(out_norm, {"weight": w[p + "norm.weight"]}, (torch.stack(outputs, 1),))
        return (scaled * F.silu(z)).flatten(2) @ w[p + "out_proj.weight"].T
