"""A call's gradients do not depend on what happens to the memory between its forward and its backward."""

import pytest
import torch

from megatron_fwpkm.memory import FastState, FwPKMLayer, MemoryConfig, fast_memory
from tests.memory.support import clone_state, make_inputs, remember

CONFIG = MemoryConfig(
    n_subkeys=8, topk=3, k_dim=8, v_dim=5, chunk_size=4, heads=2, weight_decay=0.1, gradient_clip=True
)


def backward_in_order(schedule: str) -> tuple[list[dict[str, torch.Tensor]], FastState]:
    """Runs microbatches by a schedule such as "F0 F1 B0 F2 B1 B2"; returns their gradients and the state."""
    state = FastState(CONFIG, seed=1, dtype=torch.float64)
    leaves: dict[int, dict[str, torch.Tensor]] = {}
    reads: dict[int, torch.Tensor] = {}
    for action in schedule.split():
        index = int(action[1:])
        if action[0] == "F":
            inputs = make_inputs(CONFIG, 2, 14, index, mask=True)
            leaves[index] = inputs.leaves()
            reads[index] = remember(leaves[index], inputs.mask, state, CONFIG)
        else:
            generator = torch.Generator().manual_seed(100 + index)
            cotangent = torch.randn(reads[index].shape, dtype=torch.float64, generator=generator)
            reads.pop(index).backward(cotangent)
    gradients = []
    for index in sorted(leaves):
        named = {name: leaf.grad for name, leaf in leaves[index].items()}
        gradients.append({name: grad for name, grad in named.items() if grad is not None})
    return gradients, state


def test_pipeline_schedule_equals_one_after_the_other() -> None:
    plain, plain_state = backward_in_order("F0 B0 F1 B1 F2 B2 F3 B3")
    # The order of the first stage of a pipeline of two under 1F1B with four microbatches, and all at once.
    for schedule in ("F0 F1 B0 F2 B1 F3 B2 B3", "F0 F1 F2 F3 B0 B1 B2 B3", "F0 F1 F2 F3 B3 B1 B2 B0"):
        mixed, mixed_state = backward_in_order(schedule)
        for one, other in zip(plain, mixed, strict=True):
            assert one.keys() == other.keys() == {"query", "target", "gate"}
            for name, gradient in one.items():
                assert float(gradient.abs().max()) > 0
                assert torch.equal(gradient, other[name]), (schedule, name)
        assert torch.equal(plain_state.table_ND, mixed_state.table_ND)
        assert torch.equal(plain_state.keys_H2nd, mixed_state.keys_H2nd)


def test_rollback_before_backward_does_not_change_gradients() -> None:
    inputs = make_inputs(CONFIG, 2, 14, 0)
    gradients = []
    for rolled_back in (False, True):
        state = FastState(CONFIG, seed=1, dtype=torch.float64)
        leaves = inputs.leaves()
        state.begin_step()
        read = remember(leaves, None, state, CONFIG)
        if rolled_back:
            state.rollback_step()
        read.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves.values()])
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


def test_no_gradient_flows_into_an_earlier_call() -> None:
    state = FastState(CONFIG, seed=1, dtype=torch.float64)
    first = make_inputs(CONFIG, 2, 12, 0).leaves()
    remember(first, None, state, CONFIG)
    second = make_inputs(CONFIG, 2, 12, 1).leaves()
    remember(second, None, state, CONFIG).sum().backward()
    assert all(leaf.grad is None for leaf in first.values())
    assert all(leaf.grad is not None for leaf in second.values())


def test_recomputation_inside_backward_is_refused() -> None:
    layer = FwPKMLayer(6, CONFIG)
    hidden = torch.randn(2, 9, 6, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=False)
    table = layer.fast_state.table_ND.clone()
    with pytest.raises(RuntimeError, match="would write twice"):
        out.sum().backward()
    assert torch.equal(table, layer.fast_state.table_ND)


def test_second_backward_is_refused_as_torch_does() -> None:
    state = FastState(CONFIG, seed=1, dtype=torch.float64)
    read = remember(make_inputs(CONFIG, 2, 12, 0).leaves(), None, state, CONFIG)
    read.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        read.sum().backward()


def test_without_gradients_the_state_is_written_all_the_same() -> None:
    state = FastState(CONFIG, seed=1, dtype=torch.float64)
    other = clone_state(state)
    inputs = make_inputs(CONFIG, 2, 12, 0)
    with torch.no_grad():
        fast_memory(*inputs.tensors(), state, CONFIG)
    remember(inputs.leaves(), None, other, CONFIG)
    assert torch.equal(state.values_ND(), other.values_ND())
