"""The owner of the trained tables in one process: gradients, clipping, cost, files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megatron_fwpkm.checkpoint.parts import TableValues
from megatron_fwpkm.checkpoint.pieces import Staging
from megatron_fwpkm.checkpoint.tensors import SavedTensors, save_tensors
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.memory import MemoryConfig
from megatron_fwpkm.memory.pkm_layer import PKMConfig, PKMLayer, named_slow_weights, slow_tables
from megatron_fwpkm.memory.slow_table import SlowTable
from megatron_fwpkm.profiling.traffic import RowTraffic
from megatron_fwpkm.train.optimizer import build_optimizer, is_decayed, parameter_groups
from megatron_fwpkm.train.tables import TrainedTables
from megatron_fwpkm.train.touched_rows import RowSettings
from megatron_fwpkm.train.touched_rows_reference import DenseReference
from tests.memory_tables import whole_table

SETTINGS = RowSettings(betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1)
NAMES = ["layers.0.values", "layers.2.values"]


class TwoMemories(nn.Module):
    """Two PKM layers with a linear one between."""

    def __init__(self, dtype: torch.dtype = torch.float64, n_subkeys: int = 6) -> None:
        super().__init__()
        torch.manual_seed(3)
        wide, narrow = (PKMConfig(heads=2, topk=3, n_subkeys=n_subkeys, k_dim=8, v_dim=v_dim) for v_dim in (10, 4))
        self.layers = nn.Sequential(PKMLayer(12, wide), nn.Linear(12, 12), PKMLayer(12, narrow))
        self.to(dtype)

    def loss(self, x_BTE: Tensor) -> Tensor:
        return (x_BTE + self.layers(x_BTE)).square().mean()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: table.values_ND for name, table in slow_tables(model).items()}


def first_values(model: TwoMemories) -> Tensor:
    return values_of(model)[NAMES[0]]


def make_tables(model: nn.Module, **options: float) -> TrainedTables:
    return TrainedTables(model, SETTINGS, is_decayed=is_decayed, **options)  # type: ignore[arg-type]


def train_step(model: TwoMemories, tables: TrainedTables, batches: list[Tensor], rate: float = 1e-2) -> None:
    tables.begin_step()
    for batch in batches:
        model.loss(batch).backward()
    tables.apply(rate, tables.join_norm(torch.zeros((), dtype=torch.float64)))


def snapshot(tables: TrainedTables) -> list[Tensor | float]:
    state = [table[name] for table in tables.state_dict().values() for name in sorted(table)]
    return [value.clone() if isinstance(value, Tensor) else value for value in state]


def equal(one: list[Tensor | float], other: list[Tensor | float]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)


def test_tables_are_found_and_kept_out_of_the_optimizer() -> None:
    model = TwoMemories()
    assert list(slow_tables(model)) == NAMES
    assert list(slow_tables(model.layers[0])) == ["values"]
    grouped = {id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]}
    named = dict(named_slow_weights(model))
    assert grouped == {id(weight) for name, weight in named.items() if name not in NAMES}
    assert not any(name.endswith("values") for name in model.state_dict())


@pytest.mark.parametrize("clipping", [0.0, 0.02])
def test_a_step_equals_dense_adamw_with_clipping_over_everything(clipping: float) -> None:
    """Model and tables against torch: clip_grad_norm_ over all gradients, AdamW, and the dense reference."""
    model, twin = TwoMemories(), TwoMemories()
    tables = make_tables(model, clipping=clipping)
    arguments = (1e-2, (0.9, 0.95), 1e-8, 0.1)
    optimizer, reference_optimizer = build_optimizer(model, *arguments), build_optimizer(twin, *arguments)
    values = values_of(twin)
    references = {name: DenseReference(parameter.detach(), SETTINGS) for name, parameter in values.items()}
    for _ in range(4):
        batches = [torch.randn(2, 3, 12, dtype=torch.float64) for _ in range(2)]
        tables.begin_step()
        for batch in batches:
            model.loss(batch).backward()
            twin.loss(batch).backward()
        others = [parameter.grad for parameter in model.parameters()]
        norm = tables.join_norm(torch.stack([grad.norm() for grad in others if grad is not None]).norm())
        touched = {}
        for name, parameter in values.items():
            assert parameter.grad is not None
            rows = parameter.grad.coalesce().indices()[0]
            touched[name] = torch.zeros(len(parameter), dtype=torch.bool).index_fill_(0, rows, True)
            parameter.grad = parameter.grad.to_dense()
        expected = nn.utils.clip_grad_norm_([weight for _, weight in named_slow_weights(twin)], clipping or math.inf)
        torch.testing.assert_close(norm, expected, rtol=1e-13, atol=0)
        if clipping:
            assert norm > 2 * clipping
            for grad in others:
                assert grad is not None
                grad.mul_(clipping / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        tables.apply(1e-2, norm)
        reference_optimizer.step()
        with torch.no_grad():
            for name, parameter in values.items():
                assert parameter.grad is not None
                references[name].update(parameter.grad, touched[name], 1e-2)
                parameter.copy_(references[name].table_ND)
        twin.zero_grad()
        for parameter in values.values():
            parameter.grad = None
    assert len(set(tables[NAMES[0]].updates_N.tolist())) > 1  # some rows missed steps
    for (_, own), (_, other) in zip(named_slow_weights(model), named_slow_weights(twin), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_own_learning_rate_is_a_share_of_the_schedule() -> None:
    """A first step of AdamW without decay moves every touched entry by the learning rate."""
    model = TwoMemories()
    tables = TrainedTables(model, RowSettings((0.9, 0.95), 1e-12, 0.0), rate_share=0.25)
    before = first_values(model).detach().clone()
    train_step(model, tables, [torch.randn(2, 3, 12, dtype=torch.float64)], rate=8e-3)
    moved = (first_values(model).detach() - before).abs()
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 2e-3), rtol=1e-4, atol=0)


def test_dropped_steps_change_nothing_and_gradients_outside_steps_stay() -> None:
    model = TwoMemories()
    tables = make_tables(model)
    batch = torch.randn(2, 3, 12, dtype=torch.float64)
    train_step(model, tables, [batch])
    before = snapshot(tables)
    tables.begin_step()
    model.loss(batch).backward()
    assert first_values(model).grad is None
    tables.join_norm(torch.zeros(()))
    tables.discard()
    assert equal(before, snapshot(tables))
    with pytest.raises(RuntimeError, match="join_norm"):
        tables.apply(1e-2, 1.0)
    model.loss(batch).backward()  # outside a step a gradient is the caller's
    assert first_values(model).grad is not None
    tables.begin_step()
    model.loss(batch * math.nan).backward()
    tables.begin_step()  # the step before was aborted
    assert tables.join_norm(torch.zeros(())) == 0
    tables.apply(1e-2, 0.0)
    # A step in which no row was read: the clocks alone moved.
    assert [a == b for a, b in zip(before, snapshot(tables), strict=True) if isinstance(a, float)] == [False, False]


def test_a_step_costs_touched_rows_only() -> None:
    sizes = {}
    for n_subkeys in (16, 64):
        model = TwoMemories(torch.float32, n_subkeys)
        tables = make_tables(model, clipping=1.0)
        batch = torch.randn(1, 4, 12)
        train_step(model, tables, [batch])
        with RowTraffic(width=10) as traffic:
            train_step(model, tables, [batch, batch])
        sizes[n_subkeys] = (traffic.largest_result, traffic.bytes_moved)
    assert sizes[64][0] < 64 * 64  # less than one number a row
    assert sizes[64][1] < 1.5 * sizes[16][1]
    with RowTraffic(width=10) as traffic:
        tables.settle()
    assert traffic.largest_result >= 64 * 64 and tables[NAMES[0]].settles == 1


def test_dense_gradients_are_refused() -> None:
    layer = PKMLayer(12, PKMConfig(heads=1, topk=2, n_subkeys=4, k_dim=8, v_dim=4, sparse_gradients=False))
    with pytest.raises(UserError, match="sparse_gradients"):
        make_tables(nn.Sequential(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_resume_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    model = TwoMemories(dtype, n_subkeys=16)
    tables = make_tables(model)
    batches = [torch.randn(2, 3, 12).to(dtype) for _ in range(4)]
    train_step(model, tables, batches[:1])
    train_step(model, tables, batches[1:2])
    save_tensors(tmp_path / "tables", TableValues(tables).pieces(Staging()))
    weights = {name: tensor.detach().clone() for name, tensor in named_slow_weights(model)}
    train_step(model, tables, batches[2:3])
    train_step(model, tables, batches[3:])

    again = TwoMemories(dtype, n_subkeys=16)
    resumed = make_tables(again)
    assert TableValues(resumed).load(SavedTensors(tmp_path / "tables")) == []
    for name in NAMES:
        assert torch.equal(values_of(again)[name], weights[name])
        untouched = resumed[name].updates_N == 0
        assert 0 < int(untouched.sum()) < 256
    again.load_state_dict(weights)
    train_step(again, resumed, batches[2:3])
    train_step(again, resumed, batches[3:])
    assert equal(snapshot(tables), snapshot(resumed))

    third = make_tables(TwoMemories(dtype, n_subkeys=16))
    third.load_state_dict(tables.state_dict())
    assert equal(snapshot(tables), snapshot(third))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tables = make_tables(TwoMemories(n_subkeys=4))
    save_tensors(tmp_path / "t", TableValues(make_tables(TwoMemories(n_subkeys=6))).pieces(Staging()))
    before = snapshot(tables)
    with pytest.raises(ValueError, match=r"values\.by_slot has shape \(36, 10\).*this job's has \(16, 10\)"):
        TableValues(tables).load(SavedTensors(tmp_path / "t"))
    with pytest.raises(ValueError, match="tables"):
        tables.load_state_dict({})
    assert equal(before, snapshot(tables))


@pytest.mark.parametrize(("n_subkeys", "ranks"), [(6, 1), (6, 2), (7, 3), (8, 4)])
def test_shards_are_parts_of_the_whole_of_the_same_seed(n_subkeys: int, ranks: int) -> None:
    config = MemoryConfig(heads=2, topk=3, n_subkeys=n_subkeys, k_dim=8, v_dim=4, score_type="dot_product")

    def draw(rank: int, of: int) -> tuple[SlowTable, float]:
        torch.manual_seed(3)
        table = SlowTable(config, rank, of)
        table.draw()
        return table, float(torch.rand(()))  # the generator stands where it stands for the whole

    whole, after = draw(0, 1)
    shards = [draw(rank, ranks) for rank in range(ranks)]
    assert {number for _, number in shards} == {after}
    tables = [table for table, _ in shards]
    assert sum(table.num_slots for table in tables) == n_subkeys**2 == whole.num_slots
    assert torch.equal(whole_table([table.values_ND.detach() for table in tables], n_subkeys), whole.values_ND)
    for table in tables:
        drawn = table.values_ND.detach().clone()
        with torch.no_grad():
            table.values_ND.fill_(9.0)
        table.place(whole.values_ND.detach())
        assert torch.equal(table.values_ND, drawn)
