"""The library's chunked delta rule against the recurrence: values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_fwpkm.model.delta_rule import CHUNK, DeltaRuleInputs, chunked_delta_rule, recurrent_delta_rule
from tests.model.support import numbered

NAMES = ("q", "k", "v", "decay", "beta", "state")


def random_inputs(length: int, strength: float = 1.0, keys: int = 16, values: int = 12) -> list[Tensor]:
    """q, k, v, decay, beta and an initial state, in float64 with float32 values."""
    batch, heads = 2, 3
    q, k = (torch.nn.functional.normalize(torch.randn(batch, length, heads, keys), dim=-1) for _ in "qk")
    v, beta = torch.randn(batch, length, heads, values), torch.rand(batch, length, heads)
    decay = -strength * torch.rand(batch, length, heads)
    state = torch.randn(batch, heads, keys, values)
    return [t.double() for t in (q, k, v, decay, beta, state)]


def run(
    rule: object, tensors: list[Tensor], dtype: torch.dtype, starts: Tensor | None, with_state: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs (and the state where there are no documents), and gradients of a fixed projection of them."""
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    inputs = DeltaRuleInputs(*leaves[:5])
    output, state = rule(inputs, leaves[5] if with_state else None, starts)  # type: ignore[operator]
    results = [output] if starts is not None else [output, state]
    generator = torch.Generator().manual_seed(7)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=torch.float64).to(dtype)).sum() for r in results)
    used = leaves if with_state else leaves[:5]
    return [r.detach() for r in results], list(torch.autograd.grad(loss, used))  # type: ignore[arg-type]


def check(
    tensors: list[Tensor], starts: Tensor | None = None, with_state: bool = False, tolerance: float = 2e-6
) -> None:
    expected, expected_gradients = run(recurrent_delta_rule, tensors, torch.float64, starts, with_state)
    found, gradients = run(chunked_delta_rule, tensors, torch.float32, starts, with_state)
    assert all(t.dtype == torch.float32 for t in found)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < tolerance
    for name, one, other in zip(NAMES, gradients, expected_gradients, strict=False):
        assert error(one, other) < 5 * tolerance, name


def error(found: Tensor, wanted: Tensor) -> float:
    largest = (found.double() - wanted).abs().max()
    return float(largest / wanted.abs().max()) if bool(wanted.any()) else float(largest)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 5, CHUNK, CHUNK + 1, 77, 3 * CHUNK - 1])
def test_chunked_equals_recurrent(length: int, with_state: bool) -> None:
    check(random_inputs(length), with_state=with_state)


@pytest.mark.parametrize("strength", [0.0, 0.01, 30.0])
def test_weak_and_strong_decay(strength: float) -> None:
    # The library adds logs of decays up over a chunk: the stronger the decay, the coarser their differences.
    check(random_inputs(70, strength), with_state=True, tolerance=2e-6 if strength <= 1 else 1e-5)


@pytest.mark.parametrize(
    "rows", [([70], [1, 69]), ([32, 38], [31, 1, 33, 5]), ([1] * 70, [64, 6]), ([3, 67], [40, 30])]
)
def test_chunked_documents_equal_recurrent_ones(rows: tuple[list[int], list[int]]) -> None:
    documents = numbered(*rows)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    check(random_inputs(70), starts)


@pytest.mark.parametrize("rule", [recurrent_delta_rule, chunked_delta_rule])
def test_each_document_is_as_if_alone(rule: object) -> None:
    tensors = [t[:1] for t in random_inputs(50)]
    starts = torch.zeros(1, 50, dtype=torch.bool)
    bounds = [0, 7, 40, 41, 50]
    starts[0, bounds[:-1]] = True
    whole, _ = run(rule, tensors, torch.float32, starts, False)
    for first, last in itertools.pairwise(bounds):
        alone, _ = run(rule, [t[:, first:last] for t in tensors[:5]], torch.float32, None, False)
        assert torch.allclose(whole[0][:, first:last], alone[0], atol=1e-6)


def test_recurrence_is_the_equation() -> None:
    q, k, v, decay, beta, state = random_inputs(6)
    output, last = recurrent_delta_rule(DeltaRuleInputs(q, k, v, decay, beta), state)
    matrix = state[1, 2]
    for t in range(6):
        matrix = decay[1, t, 2].exp() * matrix
        matrix = matrix + torch.outer(k[1, t, 2], beta[1, t, 2] * (v[1, t, 2] - matrix.T @ k[1, t, 2]))
        assert torch.allclose(output[1, t, 2], matrix.T @ q[1, t, 2] / 4, atol=1e-12)
    assert torch.allclose(last[1, 2], matrix, atol=1e-12)
    assert output.dtype == torch.float64


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    tensors = [t.bfloat16() for t in random_inputs(40)]
    inputs = DeltaRuleInputs(*tensors[:5])
    output, state = chunked_delta_rule(inputs)
    expected, _ = recurrent_delta_rule(inputs.map(Tensor.double))
    assert output.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert error(output, expected) < 1e-2
