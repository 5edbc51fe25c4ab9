"""Training under ZeRO stages and tensor parallelism against one process in plain torch; prints relative errors.

In bf16 a weight in the other of two neighbouring roundings changes all that follows, so there the stages are held to
the first of them while no sum of theirs makes a difference: the global norm, which each adds up in its own order, takes
part in the last step only, the one that is clipped. Trained once more with every step clipped ("clipped"), they are
held to plain torch.

Arguments: a configuration (unused), then layouts as tensor-parallel ranks, "s" behind them for sequence parallelism,
"r" for computing sublayers again in the backward pass, "b" for buckets of gradients that most weights do not fit in.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_fwpkm.data.batch import IGNORED_LABEL, TokenBatch
from megatron_fwpkm.model.decoder import Decoder
from megatron_fwpkm.parallel import topology
from megatron_fwpkm.parallel.backend import TorchBackend, megatron_backend
from megatron_fwpkm.parallel.settings import ParallelConfig
from megatron_fwpkm.train import engine as engines
from megatron_fwpkm.train.engine import build_training
from megatron_fwpkm.train.optimizer import build_optimizer
from megatron_fwpkm.train.settings import OptimizerConfig, TrainingConfig
from megatron_fwpkm.train.step import Stepper
from tests.distributed.workers.tensor_parallel_checks import CONFIG, VOCABULARY, share

SEQUENCES, LENGTH, ACCUMULATION = 4, 16, 2
RATES = [4e-3, 6e-3, 2e-3]
# A large epsilon: AdamW divides tiny gradients by their own size, and would show the last bits of sums as whole steps.
OPTIMIZER = OptimizerConfig(learning_rate=3e-2, epsilon=1e-3, weight_decay=0.2, gradient_clipping=0.3, warmup_steps=0)
BF16_CLIPPING = 6.5  # between the norms of the second and of the third step
KINDS = [(0, "fp64"), *((stage, "fp32") for stage in range(4))]
KINDS += [(stage, precision) for precision in ("bf16", "clipped") for stage in (1, 2, 3)]
MODEL = replace(CONFIG, window=4)
SMALL_BUCKET = 300  # elements


def batches() -> Iterator[TokenBatch]:
    """Microbatches of all replicas together, with unevenly many labels."""
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.9, SEQUENCES)[:, None]] = -100
        yield TokenBatch(tokens[:, :-1], labels)


def own_share(ranks: topology.Topology) -> Iterator[TokenBatch]:
    size = SEQUENCES // ranks.replicas
    for batch in batches():
        rows = slice(ranks.replica * size, (ranks.replica + 1) * size)
        yield TokenBatch(batch.tokens_BT[rows], batch.labels_BT[rows])


def optimizer_settings(precision: str) -> OptimizerConfig:
    if precision != "bf16":
        return OPTIMIZER
    return OPTIMIZER.model_copy(update={"gradient_clipping": BF16_CLIPPING})


def reference(dtype: torch.dtype, clipping: float) -> dict[str, Any]:
    """Plain torch in one process with the whole batch."""
    model = Decoder(MODEL, VOCABULARY, TorchBackend(0.1), seed=3).to(dtype)
    optimizer = build_optimizer(model, 1.0, OPTIMIZER.betas, OPTIMIZER.epsilon, OPTIMIZER.weight_decay)
    found: dict[str, Any] = {"losses": [], "norms": []}
    source = batches()
    for rate in RATES:
        parts = [next(source) for _ in range(ACCUMULATION)]
        labels = sum(int((part.labels_BT != IGNORED_LABEL).sum()) for part in parts)
        losses = [model(part.tokens_BT, part.labels_BT).sum() / labels for part in parts]
        torch.stack(losses).sum().backward()
        if not found["losses"]:
            found["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found["losses"].append(sum(loss.item() for loss in losses))
        found["norms"].append(nn.utils.clip_grad_norm_(model.parameters(), clipping).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return found


def whole_gradients(engine: Any, model: Decoder) -> dict[str, Tensor]:
    """Of this tensor-parallel rank, over all replicas, before clipping; all ranks call this together."""
    from deepspeed.utils import safe_get_full_grad

    def gradient(parameter: nn.Parameter) -> Tensor:
        found = parameter.grad if engine.zero_optimization_stage() == 0 else safe_get_full_grad(parameter)
        assert found is not None
        return found.clone()

    return {name: gradient(parameter) for name, parameter in model.named_parameters()}


def float32_weights(model: Decoder) -> dict[str, Tensor]:
    """What the optimizer keeps of this tensor-parallel rank's weights; all ranks call this together."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(parameter).clone() for name, parameter in model.named_parameters()}


def train(ranks: topology.Topology, stage: int, precision: str, recompute: bool) -> dict[str, Any]:
    import deepspeed

    training = TrainingConfig.model_validate(
        {
            "micro_batch_size": SEQUENCES // ranks.replicas,
            "gradient_accumulation": ACCUMULATION,
            "zero_stage": stage,
            "precision": "bf16" if precision in ("bf16", "clipped") else "fp32",
        }
    )
    model = Decoder(MODEL, VOCABULARY, megatron_backend(0.1, 1e-5, ranks.placement), seed=3)
    model.recompute_sublayers(recompute)
    if precision == "fp64":
        model.double()
    bundle = build_training(model, optimizer_settings(precision), training)
    engine = bundle.engine
    stepper = Stepper(bundle, model, own_share(ranks), training=training, seed=3, topology=ranks)
    found: dict[str, Any] = {"losses": [], "norms": [], "applied": []}
    update = engine.step

    def step() -> None:
        if engine.is_gradient_accumulation_boundary() and not found["losses"]:
            found["gradients"] = whole_gradients(engine, model)
        update()

    engine.step = step
    for number, rate in enumerate(RATES, start=1):
        result = stepper.run(number, rate, lambda: False)
        found["losses"].append(result.loss)
        found["norms"].append(result.gradient_norm)
        found["applied"].append(result.applied)
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        found["weights"] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if precision == "bf16":
        found["masters"] = float32_weights(model)
    found["skipped"] = check_skip(ranks, stepper, model, stage, found["weights"])
    engine.destroy()
    return found


def check_skip(
    ranks: topology.Topology, stepper: Stepper, model: Decoder, stage: int, before: dict[str, Tensor]
) -> bool:
    """A gradient that is not finite on one rank: no rank applies the step or changes a weight."""
    import deepspeed

    handle = None
    if ranks.rank == ranks.world_size - 1:
        handle = model.get_submodule("blocks.0.mlp").register_forward_hook(
            lambda module, given, output: output * math.nan
        )
    result = stepper.run(len(RATES) + 1, 1e-2, lambda: False)
    if handle is not None:
        handle.remove()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        same = all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return same and not result.applied and stepper.run(len(RATES) + 2, 1e-2, lambda: False).applied


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor. `wanted` may be the whole ones, of which this rank has its share."""
    assert set(found) == set(wanted)
    return max(
        float((part.to(wanted[name].dtype) - share(wanted[name], part)).norm() / wanted[name].norm())
        for name, part in found.items()
    )


def compare(wanted: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    errors = {
        key: max(abs(a - b) / b for a, b in zip(found[key], wanted[key], strict=True)) for key in ("losses", "norms")
    }
    errors |= {key: difference(found[key], wanted[key]) for key in ("gradients", "weights")}
    errors["applied"] = 0.0 if all(found["applied"]) else 1.0
    errors["skipped"] = 0.0 if found.get("skipped", True) else 1.0
    return errors


def compare_stages(first: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Errors of a stage in bf16 against the first one; 0 where the weights are those of the optimizer, rounded, and
    where the last step, and only that, was clipped."""
    errors = {f"{key} of stages": difference(found[key], first[key]) for key in ("gradients", "masters")}
    errors["norms of stages"] = max(abs(a - b) / b for a, b in zip(found["norms"], first["norms"], strict=True))
    rounded = {name: master.bfloat16() for name, master in found["masters"].items()}
    errors["rounding"] = 0.0 if all(torch.equal(rounded[name], w) for name, w in found["weights"].items()) else 1.0
    *before, last = found["norms"]
    errors["clipping"] = 0.0 if max(before) < 0.95 * BF16_CLIPPING and last > 1.05 * BF16_CLIPPING else 1.0
    return errors


def main() -> None:
    topology.initialize(ParallelConfig(timeout_seconds=60))
    from deepspeed.accelerator import get_accelerator

    wanted = {
        precision: reference(dtype, optimizer_settings(precision).gradient_clipping)
        for precision, dtype in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32))
    }
    wanted["clipped"] = wanted["fp32"]
    accelerator = get_accelerator()
    accelerator.supported_dtypes = lambda: [torch.float32, torch.float64, torch.bfloat16]  # type: ignore[method-assign]
    found: dict[str, dict[str, float]] = {}
    for layout in sys.argv[2:]:
        settings = {"tensor": int(layout.rstrip("srb")), "sequence_parallel": "s" in layout}
        ranks = topology.build_groups(ParallelConfig.model_validate({**settings, "timeout_seconds": 60}))
        bucket = SMALL_BUCKET if "b" in layout else engines.LARGEST_BUCKET
        first: dict[str, Any] | None = None
        for stage, precision in KINDS:
            with mock.patch.object(engines, "LARGEST_BUCKET", bucket):
                trained = train(ranks, stage, precision, recompute="r" in layout)
            errors = compare(wanted[precision], trained)
            if precision == "bf16":
                first = first or trained
                errors |= compare_stages(first, trained)
            every: list[dict[str, float]] = [{}] * dist.get_world_size()
            dist.all_gather_object(every, errors)
            found[f"{layout} ZeRO-{stage} {precision}"] = {key: max(one[key] for one in every) for key in errors}
    rank = dist.get_rank()
    topology.shut_down()
    if rank == 0:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
