"""Shape of the decoder, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_fwpkm.memory import MemoryConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder and which layers have a memory. Raises ValueError on sizes that don't fit together."""

    hidden_size: int = 256
    """Width of the residual stream."""
    layers: int = 4
    """Number of blocks."""
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
    window: int | None = 64
    """Tokens that a query sees, itself included; null is full causal attention."""
    mlp_size: int = 640
    """Inner width of the SwiGLU MLP."""
    norm_epsilon: float = 1e-5
    """Term added to the mean square in RMSNorm."""
    initial_std: float = 0.02
    """Standard deviation of linear and embedding weights at the start."""
    memory_layers: tuple[int, ...] = ()
    """Indices of the blocks that have a memory before their attention, from 0."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """The fast-weight memory of those blocks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "memory_layers", tuple(self.memory_layers))
        for name in ("hidden_size", "layers", "attention_heads", "key_value_heads", "head_dim", "mlp_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rotary_base", "norm_epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, not {getattr(self, name)}")
        if not 0 <= self.initial_std < float("inf"):
            raise ValueError(f"initial_std must be at least 0 and finite, not {self.initial_std}")
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
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1 or null, not {self.window}")
        wrong = [index for index in self.memory_layers if not 0 <= index < self.layers]
        if wrong or len(set(self.memory_layers)) != len(self.memory_layers):
            raise ValueError(
                f"memory_layers must be distinct indices in 0..{self.layers - 1}, not {self.memory_layers}"
            )

    @property
    def rotary_dim(self) -> int:
        """Width of the rotated part of a head."""
        return int(self.head_dim * self.rotary_fraction)
