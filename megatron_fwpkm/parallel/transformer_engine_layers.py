"""Transformer Engine's linear layers and norms behind the Backend interface, through Megatron-Core's wrappers.

For GPUs: importing this module without Transformer Engine raises ImportError.
"""

from __future__ import annotations

from megatron.core.extensions import transformer_engine as wrappers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_fwpkm.memory.placement import ALONE, Placement
from megatron_fwpkm.parallel.megatron_layers import BatchFirst, MegatronBackend

if not wrappers.HAVE_TE:
    raise ImportError("Transformer Engine is not installed; install the gpu extra or use MegatronBackend")


class _ColumnLinear(BatchFirst, wrappers.TEColumnParallelLinear):
    pass


class _RowLinear(BatchFirst, wrappers.TERowParallelLinear):
    pass


class TransformerEngineBackend(MegatronBackend):
    """As MegatronBackend, with Transformer Engine's column- and row-parallel layers and RMSNorm.

    Embedding, head, layers for divided tokens and cross entropy stay Megatron's and ours: Transformer Engine
    has no equal of them.
    """

    _column_class = _ColumnLinear
    _row_class = _RowLinear

    def __init__(self, initial_std: float, norm_epsilon: float, placement: Placement = ALONE) -> None:
        super().__init__(initial_std, norm_epsilon, placement)
        # The wrappers read dtypes, initialization and the kind of norm from it; the sizes are required but not used.
        self._layer_config = TransformerConfig(
            num_layers=1,
            hidden_size=1,
            num_attention_heads=1,
            normalization="RMSNorm",
            layernorm_zero_centered_gamma=True,
            layernorm_epsilon=norm_epsilon,
            **self._config_values(),
        )

    def norm(self, size: int) -> nn.Module:
        """Transformer Engine's RMSNorm with a zero-centred weight; with sequence parallelism ours, see share_norm."""
        if self.placement.sequence_parallel:  # Transformer Engine would leave the sum over ranks to the trainer
            return super().norm(size)
        return wrappers.TENorm(self._layer_config, size, eps=self._norm_epsilon)
