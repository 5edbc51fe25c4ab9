"""Shape of the decoder, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_fwpkm.memory import MemoryConfig, PKMConfig

Mixer = Literal["gated_delta_net", "sliding_attention", "full_attention"]
MIXERS: tuple[Mixer, ...] = ("gated_delta_net", "sliding_attention", "full_attention")


@dataclass(frozen=True)
class DeltaNetConfig:
    """Sizes of a gated delta net. Raises ValueError on sizes that don't fit together."""

    key_heads: int = 4
    """Heads of queries and keys; a multiple of the tensor-parallel size."""
    value_heads: int = 4
    """Heads of values and states; a multiple of key_heads."""
    key_head_dim: int = 64
    """Width of a query or key head."""
    value_head_dim: int = 64
    """Width of a value head."""
    conv_kernel: int = 4
    """Tokens that the causal convolution before the delta rule spans."""

    def __post_init__(self) -> None:
        _require_positive(self, "key_heads", "value_heads", "key_head_dim", "value_head_dim", "conv_kernel")
        if self.value_heads % self.key_heads:
            raise ValueError(
                f"delta_net.value_heads ({self.value_heads}) must be a multiple of key_heads ({self.key_heads})"
            )


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): RoPE stretched to contexts longer than those trained on. Raises ValueError."""

    factor: float
    """Longest context to be read, over original_length; at least 1."""
    original_length: int
    """Tokens of the contexts that the model was trained on."""
    beta_fast: float = 32.0
    """Pairs that turn more often than this over original_length keep their frequency."""
    beta_slow: float = 1.0
    """Pairs that turn less often than this are slowed down by the whole factor."""
    attention_factor: float | None = None
    """Factor of rotated queries and keys; null means 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        _require_finite_above_zero(self, "factor", "beta_fast", "beta_slow")
        _require_positive(self, "original_length")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor must be at least 1, not {self.factor}")
        if self.beta_slow >= self.beta_fast:
            raise ValueError(f"rope_scaling.beta_slow ({self.beta_slow}) must be below beta_fast ({self.beta_fast})")
        if self.attention_factor is not None:
            _require_finite_above_zero(self, "attention_factor")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder and what its layers are. Raises ValueError on sizes that don't fit together."""

    hidden_size: int = 256
    """Width of the residual stream."""
    layers: int = 4
    """Number of blocks."""
    mixers: tuple[Mixer, ...] = ("sliding_attention",)
    """What mixes tokens in the blocks, repeated in this order: gated_delta_net, sliding_attention, full_attention."""
    attention_heads: int = 4
    """Query heads."""
    key_value_heads: int = 2
    """Key and value heads; divides attention_heads."""
    head_dim: int = 64
    """Width of one attention head."""
    rotary_fraction: float = 0.25
    """Share of head_dim that is rotated by RoPE; the rotated width must be even."""
    rotary_base: float = 10000.0
    """Base of RoPE's frequencies."""
    rope_scaling: YarnConfig | None = None
    """RoPE for longer contexts than those trained on; null leaves it as trained."""
    window: int = 64
    """Tokens that a query of sliding_attention sees, itself included; of full_attention too while it is limited."""
    delta_net: DeltaNetConfig = field(default_factory=DeltaNetConfig)
    """The gated delta net of the blocks that have one."""
    mlp_size: int = 640
    """Inner width of the SwiGLU MLP."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square in RMSNorm."""
    initial_std: float = 0.02
    """Standard deviation of linear, convolution and embedding weights at the start."""
    tied_embeddings: bool = True
    """Whether the head's weight is the embedding's."""
    memory_layers: tuple[int, ...] = ()
    """Indices of the blocks that have a fast-weight memory before their mixer, from 0."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The fast-weight memory of those blocks."""
    pkm_layers: tuple[int, ...] = ()
    """Indices of the blocks that have a product-key memory with slow values in place of their MLP, from 0."""
    pkm: PKMConfig = field(default_factory=PKMConfig)
    """The product-key memory of those blocks."""

    def __post_init__(self) -> None:
        for name in ("mixers", "memory_layers", "pkm_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = ("hidden_size", "layers", "attention_heads", "key_value_heads", "head_dim", "mlp_size", "window")
        _require_positive(self, *sizes)
        _require_finite_above_zero(self, "rotary_base", "norm_epsilon")
        if not 0 <= self.initial_std < float("inf"):
            raise ValueError(f"initial_std must be at least 0 and finite, not {self.initial_std}")
        unknown = [mixer for mixer in self.mixers if mixer not in MIXERS]
        if unknown or not self.mixers:
            raise ValueError(f"mixers must name at least one of {', '.join(MIXERS)}, not {list(self.mixers)}")
        if self.attention_heads % self.key_value_heads:
            raise ValueError(
                f"attention_heads ({self.attention_heads}) must be a multiple of key_value_heads "
                f"({self.key_value_heads})"
            )
        if not 0.0 <= self.rotary_fraction <= 1.0 or self.rotary_dim % 2:
            raise ValueError(
                f"rotary_fraction x head_dim = {self.rotary_fraction} x {self.head_dim} must be an even width of at "
                f"most head_dim"
            )
        self._require_indices("memory_layers", self.memory_layers)
        self._require_indices("pkm_layers", self.pkm_layers)

    def _require_indices(self, name: str, indices: Sequence[int]) -> None:
        wrong = [index for index in indices if not 0 <= index < self.layers]
        if wrong or len(set(indices)) != len(indices):
            raise ValueError(f"{name} must be distinct indices in 0..{self.layers - 1}, not {tuple(indices)}")

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a head."""
        return int(self.head_dim * self.rotary_fraction)

    def mixer(self, index: int) -> Mixer:
        """What mixes tokens in one block."""
        return self.mixers[index % len(self.mixers)]


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")


def _require_finite_above_zero(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be above 0 and finite, not {getattr(config, name)}")
