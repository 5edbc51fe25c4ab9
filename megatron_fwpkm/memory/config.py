"""Settings of the memory layers, and the checks on them.

A frozen standard-library dataclass, so that the memory works with torch alone; the YAML configuration validates it as
it stands (pydantic understands dataclasses), so every field is declared here and nowhere else.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin


class MemoryConfigError(ValueError):
    """A memory setting is out of range; the message names the field, its value and what is allowed."""


Reset = Literal["carry", "per_step", "per_sequence", "per_document"]
"""The values of `MemoryConfig.reset`, for those that set another policy for a while."""


def _option(default: Any, doc: str, *, minimum: float | None = None, maximum: float = 2**31 - 1) -> Any:
    return field(default=default, metadata={"doc": doc, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of one fast-weight product-key memory. `MemoryConfig.describe()` prints them with units and sources.

    Raises:
        MemoryConfigError: a value is out of range or values contradict each other.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, absent from the fields

    # Behind each field: what it is [unit; where docs/semantics.md defines it].
    heads: int = _option(1, "addressing heads H; their reads add up [heads; A.2]", minimum=1)
    topk: int = _option(8, "slots K that a token reads per head [slots; A.2]", minimum=1)
    n_subkeys: int = _option(512, "sub-keys n per half; N = n * n slots [sub-keys; A.2]", minimum=1, maximum=2**20)
    k_dim: int = _option(512, "query width per head, k; each half has k / 2 [columns; A.1]", minimum=2)
    v_dim: int = _option(512, "width D of a slot's value [columns; A.4]", minimum=1)
    chunk_size: int | Literal["sequence"] = _option(
        512, "tokens C between writes, or the whole input [tokens; A, C]", minimum=1
    )
    lookahead: int = _option(1, "L: the value written for token t is that of token t + L [tokens; A.5]", minimum=0)
    score_type: Literal["idw", "dot_product"] = _option("idw", "sub-key score: inverse distance or product [name; A.1]")
    score_nonlinearity: Literal["softmax", "silu", "relu"] = _option("softmax", "scores to slot weights [name; A.3]")
    temperature: float = _option(1.0, "scores are divided by it before the nonlinearity [1; A.3]", minimum=1e-6)
    learning_rate: float = _option(1.0, "step size of a write [1; A.7]", minimum=0)
    weight_decay: float = _option(0.0, "decay of all slots and sub-keys, times step size [1 per write; A.7]", minimum=0)
    gradient_clip: bool = _option(False, "clamp every element of a write's gradient to [-1, 1] [flag; A.7]")
    addressing_loss: Literal["marginal_entropy", "none"] = _option(
        "marginal_entropy", "what moves the sub-keys [name; A.8]"
    )
    addressing_loss_weight: float = _option(1.0, "weight of the addressing loss [1; A.8]", minimum=0)
    values_only: bool = _option(True, "the memory loss moves values only, not sub-keys too [flag; A.9]")
    key_gradient: Literal["exact", "official"] = _option("exact", "outer gradient if not values_only [name; G.2]")
    weigh_write_by_gate: bool = _option(True, "the gate weighs the write [flag; A.5]")
    fuse_output_by_gate: bool = _option(True, "output g * read + (1 - g) * value, not the read alone [flag; D]")
    normalize_value: bool = _option(True, "z-score the value over its columns [flag; D]")
    gate_outputs: int = _option(8, "gate projection outputs, averaged before the sigmoid [outputs; D]", minimum=1)
    reset: Literal["carry", "per_step", "per_sequence", "per_document"] = _option(
        "carry", "when training forgets [name; A]"
    )
    cache_mode: Literal["aligned", "official"] = _option("aligned", "where inference writes [name; C]")
    cache_memory: Literal["per_sequence", "shared"] = _option("per_sequence", "memories at inference [name; C]")
    check_finite: bool = _option(False, "refuse NaN and infinity in inputs, at the cost of a host sync [flag; ours]")

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_field(option.name, getattr(self, option.name), option.type, option.metadata)
        if self.k_dim % 2:
            raise MemoryConfigError(f"k_dim is {self.k_dim}; it must be even, since each half of a query has k_dim / 2")
        if self.normalize_value and self.v_dim < 2:
            raise MemoryConfigError("v_dim is 1; a z-score needs 2 columns or more (or normalize_value = False)")
        if self.topk > self.n_subkeys:
            raise MemoryConfigError(
                f"topk is {self.topk} but n_subkeys is {self.n_subkeys}; allowed are topk from 1 to n_subkeys"
            )
        if isinstance(self.chunk_size, int) and self.chunk_size <= self.lookahead:
            raise MemoryConfigError(
                f"chunk_size is {self.chunk_size} and lookahead {self.lookahead}; chunk_size must be larger than "
                "lookahead, or no token of a chunk has a target to write"
            )
        if self.learning_rate * self.weight_decay >= 1:
            raise MemoryConfigError(
                f"learning_rate * weight_decay is {self.learning_rate * self.weight_decay:g}; it must be below 1, "
                "or every write erases the whole memory"
            )

    @property
    def num_slots(self) -> int:
        """N = n_subkeys squared."""
        return self.n_subkeys**2

    @property
    def reads_per_token(self) -> int:
        """Slots that a token reads: heads * topk."""
        return self.heads * self.topk

    @property
    def moves_keys(self) -> bool:
        """Whether a write has a gradient for the sub-keys."""
        return self.has_addressing_loss or not self.values_only

    @property
    def has_addressing_loss(self) -> bool:
        """Whether the addressing loss contributes."""
        return self.addressing_loss != "none" and self.addressing_loss_weight != 0

    @classmethod
    def describe(cls) -> str:
        """One line for each field: name, default, what it is [unit; section of docs/semantics.md]."""
        lines = []
        for option in fields(cls):
            lines.append(f"{option.name} = {option.default!r}: {option.metadata['doc']}")
        return "\n".join(lines)


def _check_field(name: str, value: Any, declared: Any, limits: Any) -> None:
    """Raise MemoryConfigError unless the value has the declared type and lies within the limits."""
    choices = get_args(declared) if get_origin(declared) is Literal else ()
    if name == "chunk_size":
        choices = ("sequence",) if isinstance(value, str) else ()
        declared = int
    if choices:
        if value not in choices:
            allowed = ", ".join(repr(choice) for choice in choices)
            raise MemoryConfigError(f"{name} is {value!r}; allowed: {allowed}")
        return
    fits = isinstance(value, declared) or (declared is float and isinstance(value, int))
    if not fits or (declared is not bool and isinstance(value, bool)):
        raise MemoryConfigError(f"{name} is {value!r}; it must be of type {declared.__name__}")
    if declared is bool:
        return
    if not -1e300 < value < 1e300:
        raise MemoryConfigError(f"{name} is {value!r}; it must be finite")
    if limits["minimum"] is not None and value < limits["minimum"]:
        raise MemoryConfigError(f"{name} is {value!r}; it must be at least {limits['minimum']}")
    if value > limits["maximum"]:
        raise MemoryConfigError(f"{name} is {value!r}; it must be at most {limits['maximum']}")
