"""Random memories, inputs and configurations for the memory's tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from megatron_fwpkm.memory import FastState, MemoryConfig, MemoryTrace, fast_memory
from megatron_fwpkm.memory.fast_state import MemoryView
from megatron_fwpkm.memory.reference import ReferenceOutput, reference_memory


@dataclass
class Inputs:
    """Inputs of one call."""

    query: Tensor
    target: Tensor
    gate: Tensor | None
    mask: Tensor | None

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs, by name, made leaves."""
        named = {"query": self.query, "target": self.target, "gate": self.gate}
        return {name: t.detach().clone().requires_grad_() for name, t in named.items() if t is not None}

    def __getitem__(self, piece: Any) -> Inputs:
        gate = None if self.gate is None else self.gate[piece]
        return Inputs(self.query[piece], self.target[piece], gate, None if self.mask is None else self.mask[piece])

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.query, self.target, self.gate, self.mask


def make_inputs(
    config: MemoryConfig,
    batch: int,
    tokens: int,
    seed: int,
    *,
    gates: bool = True,
    mask: bool = False,
    dtype: torch.dtype = torch.float64,
    scale: float = 1.0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    query = scale * torch.randn(batch, tokens, config.heads, config.k_dim, generator=generator, dtype=dtype)
    target = torch.randn(batch, tokens, config.v_dim, generator=generator, dtype=dtype)
    gate = torch.rand(batch, tokens, generator=generator, dtype=dtype) if gates else None
    loss_mask = torch.rand(batch, tokens, generator=generator) > 0.3 if mask else None
    return Inputs(query, target, gate, loss_mask)


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> MemoryConfig:
    """Any configuration of small size."""
    n_subkeys = draw(st.integers(1, 12))
    lookahead = draw(st.integers(0, 2))
    values_only = draw(st.booleans())
    settings: dict[str, Any] = {
        "heads": draw(st.integers(1, 3)),
        "topk": draw(st.integers(1, min(5, n_subkeys))),
        "n_subkeys": n_subkeys,
        "k_dim": 2 * draw(st.integers(1, 5)),
        "v_dim": draw(st.integers(2, 6)),
        "chunk_size": draw(st.one_of(st.integers(lookahead + 1, 9), st.just("sequence"))),
        "lookahead": lookahead,
        "score_type": draw(st.sampled_from(["idw", "dot_product"])),
        "score_nonlinearity": draw(st.sampled_from(["softmax", "silu", "relu"])),
        "temperature": draw(st.sampled_from([1.0, 0.5, 2.0])),
        "learning_rate": draw(st.sampled_from([1.0, 0.5, 0.1])),
        "weight_decay": draw(st.sampled_from([0.0, 0.05, 0.5])),
        "gradient_clip": draw(st.booleans()),
        "addressing_loss": draw(st.sampled_from(["marginal_entropy", "none"])),
        "addressing_loss_weight": draw(st.sampled_from([0.0, 1.0, 0.3])),
        "values_only": values_only,
        "key_gradient": draw(st.sampled_from(["exact", "official"])),
        "weigh_write_by_gate": draw(st.booleans()),
    }
    return MemoryConfig(**(settings | fixed))


def remember(leaves: dict[str, Tensor], mask: Tensor | None, view: MemoryView, config: MemoryConfig) -> Tensor:
    """One call of the memory on leaves made by `Inputs.leaves`."""
    return fast_memory(leaves["query"], leaves["target"], leaves.get("gate"), mask, view, config)


@dataclass
class Outcome:
    """Everything that a call computes, under comparable names."""

    arrays: dict[str, Tensor]


def run_reference(config: MemoryConfig, state: FastState, inputs: Inputs, cotangent: Tensor) -> Outcome:
    """The reference, over one shared memory."""
    leaves = inputs.leaves()
    keys = state.keys_H2nd.clone().requires_grad_()
    values = state.values_ND().requires_grad_()
    out: ReferenceOutput = reference_memory(
        leaves["query"], leaves["target"], leaves.get("gate"), inputs.mask, keys, values, config
    )
    everything = [*leaves.values(), keys, values]
    gradients = torch.autograd.grad((out.read_BTD * cotangent).sum(), everything, allow_unused=True)
    arrays = {
        "read": out.read_BTD.detach(),
        "losses": out.losses,
        "addressing_loss": out.addressing_loss,
        "slots": out.slots_BTHK,
        "weights": out.weights_BTHK,
        "keys_final": out.keys_final.detach(),
        "values_final": out.values_final.detach(),
    }
    for name, leaf, gradient in zip([*leaves, "keys", "values"], everything, gradients, strict=True):
        arrays["d_" + name] = torch.zeros_like(leaf) if gradient is None else gradient
    return Outcome(arrays)


def run_fast(config: MemoryConfig, state: FastState, inputs: Inputs, cotangent: Tensor) -> Outcome:
    """The fast path, over one shared memory; writes the state."""
    leaves = inputs.leaves()
    trace = MemoryTrace()
    read = fast_memory(leaves["query"], leaves["target"], leaves.get("gate"), inputs.mask, state, config, trace=trace)
    read.backward(cotangent)
    memory = trace.memory_gradient
    assert memory is not None
    arrays = {
        "read": read.detach(),
        "losses": trace.losses,
        "addressing_loss": trace.addressing_loss,
        "slots": trace.slots_BTHK,
        "weights": trace.weights_BTHK,
        "keys_final": state.keys_H2nd,
        "values_final": state.values_ND(),
        "d_keys": memory.keys_MH2nd[0],
        "d_values": memory.values_ND(config.num_slots),
    }
    for name, leaf in leaves.items():
        arrays["d_" + name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return Outcome({name: t for name, t in arrays.items() if t is not None})


def assert_same(found: Outcome, wanted: Outcome, tolerance: float = 1e-9) -> None:
    """Every array within the tolerance relative to its largest element (or to 1e-3, whichever is larger).

    Settings under which the memory itself diverges (unbounded weights, large steps) prove nothing and are passed over.
    """
    largest = max(float(t.abs().max()) for t in wanted.arrays.values() if t.is_floating_point() and t.numel())
    assume(largest < 1e4)
    assert found.arrays.keys() == wanted.arrays.keys()
    for name, reference in wanted.arrays.items():
        array = found.arrays[name]
        assert array.shape == reference.shape, name
        if not reference.is_floating_point():
            assert torch.equal(array, reference), name
            continue
        if reference.numel() == 0:
            continue
        error = float((array - reference).abs().max()) / max(float(reference.abs().max()), 1e-3)
        assert error <= tolerance, f"{name}: relative error {error:.2e}"


def clone_state(state: FastState, **changes: Any) -> FastState:
    """An independent copy, optionally with other settings."""
    copy = FastState(replace(state.config, **changes), dtype=state.dtype)
    copy.restore(state.snapshot())
    return copy
