"""What a rank of a job really holds, category by category: live tensors of a step through the real build.

accounting_checks.py <configuration, unused> <case>...; prints the bytes of every rank, case by case, on rank 0.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fwpkm_kernels import ProductKeyTopk, product_key_topk
from megatron_fwpkm.checkpoint.pieces import Staging
from megatron_fwpkm.config import TrainConfig
from megatron_fwpkm.data.batch import TokenBatch
from megatron_fwpkm.memory import addressing, fwpkm_layer, pkm_layer
from megatron_fwpkm.memory.pkm_layer import slow_tables
from megatron_fwpkm.model.decoder import BlockStack
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.train import job
from megatron_fwpkm.train.dry_run import padded_vocabulary
from megatron_fwpkm.train.engine import EngineBundle, build_training
from megatron_fwpkm.train.step import Stepper

VOCABULARY = 2048
SETTLING_SECONDS = 10.0
DRAW = torch.Generator()
GRADIENTS = ("fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
"""What DeepSpeed's optimizers keep gradients in from step to step."""
BASE: dict[str, Any] = {
    "model": {
        "hidden_size": 64,
        "layers": 4,
        "mixers": ["full_attention", "gated_delta_net", "sliding_attention", "gated_delta_net"],
        "attention_heads": 8,
        "key_value_heads": 4,
        "head_dim": 16,
        "mlp_size": 192,
        "window": 64,
        "delta_net": {"key_heads": 2, "value_heads": 4, "key_head_dim": 16, "value_head_dim": 16},
        "memory_layers": [0, 3],
        "memory": {"heads": 2, "topk": 4, "n_subkeys": 128, "k_dim": 16, "v_dim": 64, "chunk_size": 64},
    },
    "data": {"vocab_size": VOCABULARY, "sequence_length": 256},
    "training": {"micro_batch_size": 2, "gradient_accumulation": 2, "zero_stage": 0},
    "parallel": {"timeout_seconds": 60},
}


def _case(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return sections


CASES: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    1: {
        "one rank": _case(),
        "one rank, untied, reset": _case(model={"tied_embeddings": False, "memory": {"reset": "per_step"}}),
        "one rank, recomputed": _case(training={"activation_checkpointing": "sublayers"}),
        "one rank, bf16": _case(training={"precision": "bf16", "zero_stage": 1}),
        "one rank, PKM": _case(
            model={"pkm_layers": [1], "pkm": {"heads": 2, "topk": 4, "n_subkeys": 128, "k_dim": 16, "v_dim": 64}}
        ),
    },
    2: {
        "TP2": _case(parallel={"tensor": 2}),
        "TP2, sequence": _case(parallel={"tensor": 2, "sequence_parallel": True}),
        "TP2, sequence, recomputed": _case(
            parallel={"tensor": 2, "sequence_parallel": True}, training={"activation_checkpointing": "sublayers"}
        ),
        "TP2, static": _case(parallel={"tensor": 2, "memory": {"routing": "static"}}),
        "TP2, columns": _case(parallel={"tensor": 2, "memory": {"sharding": "columns"}}),
        "TP2, sequence, columns": _case(
            parallel={"tensor": 2, "sequence_parallel": True, "memory": {"sharding": "columns"}}
        ),
        "TP2, PKM": _case(
            parallel={"tensor": 2},
            model={"pkm_layers": [1], "pkm": {"heads": 2, "topk": 4, "n_subkeys": 128, "k_dim": 16, "v_dim": 64}},
        ),
        "PP2": _case(parallel={"pipeline": 2}, training={"gradient_accumulation": 4}),
        "PP2, ZeRO-1 bf16": _case(
            parallel={"pipeline": 2}, training={"gradient_accumulation": 4, "zero_stage": 1, "precision": "bf16"}
        ),
        **{f"DP2, ZeRO-{stage}": _case(training={"zero_stage": stage}) for stage in range(4)},
        **{
            f"DP2, ZeRO-{stage} bf16": _case(training={"zero_stage": stage, "precision": "bf16"}) for stage in (1, 2, 3)
        },
        "DP2, one memory": _case(parallel={"memory": {"replicas": "synced"}}, training={"zero_stage": 1}),
    },
    4: {
        "TP4, sequence": _case(
            parallel={"tensor": 4, "sequence_parallel": True},
            model={"delta_net": {"key_heads": 4, "value_heads": 4, "key_head_dim": 16, "value_head_dim": 16}},
        ),
        "TP2, sequence, PP2": _case(
            parallel={"tensor": 2, "sequence_parallel": True, "pipeline": 2}, training={"gradient_accumulation": 4}
        ),
        "TP2, DP2, ZeRO-2": _case(parallel={"tensor": 2}, training={"zero_stage": 2}),
        "PP2, DP2, ZeRO-1": _case(parallel={"pipeline": 2}, training={"gradient_accumulation": 4, "zero_stage": 1}),
    },
}


def configuration(processes: int, name: str) -> TrainConfig:
    """Of a case."""

    def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        merged = dict(base)
        for key, value in changes.items():
            merged[key] = merge(base.get(key, {}), value) if isinstance(value, dict) else value
        return merged

    changes = merge(CASES[processes][name], {"parallel": {"processes": processes}})
    return TrainConfig.model_validate(merge(BASE, changes))


# -- storages ---------------------------------------------------------------------------------------------------------


class Storages:
    """Distinct storages of tensors, kept alive so that no address is used twice."""

    def __init__(self, *, without: Storages | None = None) -> None:
        self._found: dict[int, torch.UntypedStorage] = {}
        self._without = set() if without is None else set(without._found)

    def add(self, value: Any) -> None:
        """Every tensor in a tensor, list, dictionary or dataclass."""
        if isinstance(value, Tensor):
            if value.is_sparse:
                self.add([value._indices(), value._values()])
                return
            storage = value.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self._without:
                self._found[storage.data_ptr()] = storage
        elif isinstance(value, dict):
            self.add(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for part in value:
                self.add(part)
        elif dataclasses.is_dataclass(value):
            self.add([getattr(value, field.name) for field in dataclasses.fields(value)])

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._found

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._found.values())

    def largest(self, count: int = 6) -> list[int]:
        """Bytes of so many, the largest first."""
        return sorted((storage.nbytes() for storage in self._found.values()), reverse=True)[:count]

    def join(self, other: Storages) -> Storages:
        self._found |= other._found
        return self


def storages(*values: Any, without: Storages | None = None) -> Storages:
    found = Storages(without=without)
    for value in values:
        found.add(value)
    return found


def live_tensors(model: nn.Module) -> list[Tensor]:
    """Whatever Python knows of; gradients may have no Python object of their own yet."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and type(thing).__name__ != "FakeTensor"]
    return [*found, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def settled(model: nn.Module, known: Storages, patience: float) -> Storages:
    """Whatever else lives once gloo's threads have let go of what they sent, which they do shortly after it is sent."""
    deadline = time.monotonic() + patience
    while True:
        others = storages(live_tensors(model), without=known)
        if others.bytes < 0.01 * known.bytes or time.monotonic() > deadline:
            return others
        del others
        time.sleep(0.01)


# -- one case ---------------------------------------------------------------------------------------------------------


class Kept:
    """Tensors that the forward pass of one microbatch keeps for its backward pass."""

    def __init__(self, model: BlockStack) -> None:
        self._model, self._inside = model, 0
        self._weights: Storages | None = None
        self.rows, self.others = Storages(), Storages()
        self.touched: list[int] = []

    def _own(self) -> Storages:
        """The weights; ZeRO-3 gathers them anew for every use."""
        weights = [parameter.data for parameter in self._model.parameters()]
        if self._weights is None or any(hasattr(parameter, "ds_id") for parameter in self._model.parameters()):
            tables = [table.values_ND.detach() for table in slow_tables(self._model).values()]
            self._weights = storages(weights, tables)
        return self._weights

    def hooks(self) -> AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        own = self._own()
        if tensor not in own and tensor not in self.rows and tensor not in self.others:
            (self.rows if self._inside else self.others).add(tensor)
        return tensor

    def within_memory(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self._inside += 1
            try:
                return call(*arguments, **options)
            finally:
                self._inside -= 1

        return run

    def watch_pkm(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(ctx: Any, *arguments: Any) -> Any:
            result = call(ctx, *arguments)
            route = ctx.route
            self.rows.add([ctx.top, route.plan, route.weight, *route.saved()])
            self.touched.append(route.plan.slots_U.numel())
            return result

        return run

    def watch_chunk(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            result = call(*arguments)
            self.touched.append(result[0].plan.slots_U.numel())
            return result

        return run

    def watched(self) -> ExitStack:
        stack = ExitStack()
        from megatron_fwpkm.memory import functional

        values = pkm_layer._ProductKeyValues
        for owner, name, changed in (
            (fwpkm_layer, "fast_memory", self.within_memory(fwpkm_layer.fast_memory)),
            (functional, "_forward_chunk", self.watch_chunk(functional._forward_chunk)),
            (values, "forward", staticmethod(self.watch_pkm(values.forward))),
        ):
            stack.enter_context(mock.patch.object(owner, name, changed))
        return stack


def anywhere(query_GXd: Tensor, keys_Gnd: Tensor, topk: int, score_type: str) -> ProductKeyTopk:
    """A top-k whose slots are drawn: all are used alike, as the plan assumes. Scores stay those of the best."""
    top, n = product_key_topk(query_GXd, keys_Gnd, topk, score_type), keys_Gnd.shape[1]
    sub_index = torch.rand(*query_GXd.shape[:2], n, generator=DRAW).topk(topk).indices
    first, second = sub_index.unflatten(0, (-1, 2)).unbind(1)
    slot = first.gather(-1, top.rank[0]) * n + second.gather(-1, top.rank[1])
    return dataclasses.replace(top, sub_index=sub_index, slot=slot)


def batches(config: TrainConfig, replica: int) -> Iterator[TokenBatch]:
    generator = torch.Generator().manual_seed(replica)
    while True:
        shape = (config.training.micro_batch_size, config.data.sequence_length)
        tokens = torch.randint(VOCABULARY, shape, generator=generator)
        yield TokenBatch(tokens, tokens.roll(-1, 1))


def own_storages(model: BlockStack, bundle: EngineBundle) -> dict[str, Storages]:
    """What lives from step to step."""
    parameters = storages([parameter.data for parameter in model.parameters()])
    parameters.add([getattr(parameter, "ds_tensor", None) for parameter in model.parameters()])
    tables = bundle.tables
    values = [table.values_ND.detach() for table in slow_tables(model).values()]
    of_tables = storages(values, [state for state in tables.state_dict().values()])
    base = getattr(bundle.engine.optimizer, "optimizer", bundle.engine.optimizer)
    optimizer = storages(
        [dict(state) for state in base.state.values()],
        [group["params"] for group in base.param_groups] if bundle.engine.zero_optimization_stage() else [],
        getattr(bundle.engine.optimizer, "fp32_partitioned_groups_flat", None),
        without=parameters,
    )
    gradients = storages([getattr(bundle.engine.optimizer, name, None) for name in GRADIENTS])
    fast = storages([[state.keys_H2nd, state.table_ND] for _, state in model.fast_states()])
    return {
        "parameters": parameters,
        "optimizer": optimizer,
        "slow tables": of_tables,
        "fast state": fast,
        "gradients": gradients,
    }


def measure(config: TrainConfig) -> dict[str, Any]:
    """Bytes of this rank by category."""
    ranks = topology.build_groups(config.parallel)
    torch.manual_seed(1)
    model = job.build_model(
        config, ranks, padded_vocabulary(config.data.vocab_size or VOCABULARY, config.parallel.tensor)
    )
    model.recompute_sublayers(config.training.activation_checkpointing == "sublayers")
    bundle = build_training(model, config.optimizer, config.training)
    engine = bundle.engine
    ways = job._ways_of_a_pipeline(ranks, engine)
    make: Any = ways.get("stepper", Stepper)
    stepper = make(bundle, model, batches(config, ranks.replica), training=config.training, seed=1, topology=ranks)
    kept = Kept(model)
    found: dict[str, Any] = {"buffers": 0}
    stepper.run(1, 1e-4, lambda: False)

    before: list[Storages] = []

    def own_gradients() -> Storages:
        optimizer = engine.optimizer
        parts = [getattr(optimizer, name, None) for name in (*GRADIENTS, "averaged_gradients", "all_grad_tensors")]
        of_tables = bundle.tables._gradients or {}
        buckets = bucket_storages(optimizer)
        found["buffers"] = max(found["buffers"], buckets.bytes)
        return storages(
            parts,
            [[parameter.grad, getattr(parameter, "grad_accum", None)] for parameter in model.parameters()],
            of_tables,
            without=buckets,
        )

    def look_at_gradients() -> None:
        found["gradients"] = max(found["gradients"], own_gradients().bytes)

    def at_boundary() -> None:
        look_at_gradients()
        known = own_gradients()
        for part in before:
            known.join(part)
        known.join(kept.rows).join(kept.others)
        undo = storages(
            [[o._rows, o._slots, o._position] for _, s in model.fast_states() if (o := s._step_overlay) is not None],
            [
                [s._log.keys, *(e.rows_UD for e in s._log.entries), *(e.slots_U for e in s._log.entries)]
                for _, s in model.fast_states()
                if s._log is not None
            ],
            without=known,
        )
        known.join(undo)
        found["written rows"] = undo.bytes
        # Stages of a pipeline have much else: their messages.
        others = settled(model, known, SETTLING_SECONDS if config.parallel.pipeline == 1 else 0.0)
        found["others"], found["largest"] = others.bytes, others.largest()

    def after_step() -> None:
        own = own_storages(model, bundle)
        found.update({name: part.bytes for name, part in own.items()})
        before.extend(own.values())
        rest = storages(
            live_tensors(model),
            without=Storages()
            .join(own["parameters"])
            .join(own["optimizer"])
            .join(own["slow tables"])
            .join(own["fast state"])
            .join(own["gradients"]),
        )
        before.append(rest)

    after_step()
    with ExitStack() as stack:
        watch_step(stack, engine, kept, config.training.gradient_accumulation, look_at_gradients, at_boundary)
        stepper.run(2, 1e-4, lambda: False)
    found["memory rows"], found["activations"], found["touched"] = kept.rows.bytes, kept.others.bytes, kept.touched
    found["saving copy"] = sum(
        pieces.num_bytes
        for part in job.checkpoint_parts(bundle, model, ranks).values()
        for pieces in part.pieces(Staging()).values()
    )
    engine.destroy()
    return found


def bucket_storages(optimizer: Any) -> Storages:
    """Buffers in which gradients are gathered before they are reduced."""
    found = Storages()
    for bucket in getattr(optimizer, "ipg_buckets", {}).values():
        found.add(bucket.buffer)
    return found


def watch_step(
    stack: ExitStack,
    engine: Any,
    kept: Kept,
    microbatches: int,
    after_backward: Callable[[], None],
    at_boundary: Callable[[], None],
) -> None:
    """In the next step: hooks around the last microbatch's forward pass, and looks before reduction and update."""
    import deepspeed
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    calls = 0

    def last(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < microbatches:
                return forward(*arguments, **options)
            kept.touched.clear()
            with kept.watched(), kept.hooks():
                return forward(*arguments, **options)

        return run

    def before(action: Callable[..., Any], look: Callable[[], None]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            look()
            return action(*arguments, **options)

        return run

    if isinstance(engine.module, deepspeed.PipelineModule):
        actions = PipelineEngine._INSTRUCTION_MAP
        changed = {
            schedule.ForwardPass: last(actions[schedule.ForwardPass]),
            schedule.ReduceGrads: before(actions[schedule.ReduceGrads], after_backward),
            schedule.OptimizerStep: before(actions[schedule.OptimizerStep], at_boundary),
        }
        stack.enter_context(mock.patch.dict(actions, changed))
        return
    engine.forward = last(engine.forward)
    engine.allreduce_gradients = before(engine.allreduce_gradients, after_backward)
    plain_step = engine.step

    def step() -> None:
        if engine.is_gradient_accumulation_boundary():
            at_boundary()
        plain_step()

    engine.step = step


def main() -> None:
    topology.initialize(configuration(dist_size(), sys.argv[2]).parallel)
    every: dict[str, list[Any]] = {}
    DRAW.manual_seed(dist.get_rank())  # ranks have different tokens
    gc.freeze()  # what the libraries have is looked at no more
    with mock.patch.object(addressing, "product_key_topk", anywhere):
        with mock.patch.object(pkm_layer, "product_key_topk", anywhere):
            _measure_all(every)
    rank = dist.get_rank()
    topology.shut_down()
    if rank == 0:
        print(json.dumps(every), flush=True)


def _measure_all(every: dict[str, list[Any]]) -> None:
    for name in sys.argv[2:]:
        found = measure(configuration(dist_size(), name))
        topology.end_groups()
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, found)
        every[name] = parts


def dist_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main()
