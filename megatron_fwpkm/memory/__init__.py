"""The memory: addressing, fast state, read and write, inference caches, the FwPKM and PKM layers.

Needs torch alone (files of fast state need safetensors too).
"""

from megatron_fwpkm.memory.cache import CacheTrace, MemoryCache
from megatron_fwpkm.memory.config import MemoryConfig, MemoryConfigError
from megatron_fwpkm.memory.fast_state import FastState, Snapshot
from megatron_fwpkm.memory.functional import MemoryTrace, fast_memory
from megatron_fwpkm.memory.fwpkm_layer import FwPKMLayer
from megatron_fwpkm.memory.norms import RMSNorm
from megatron_fwpkm.memory.pkm_layer import PKMConfig, PKMLayer
from megatron_fwpkm.memory.state_file import StateFileError
from megatron_fwpkm.memory.statistics import MemoryStatistics

__all__ = [
    "CacheTrace",
    "FastState",
    "FwPKMLayer",
    "MemoryCache",
    "MemoryConfig",
    "MemoryConfigError",
    "MemoryStatistics",
    "MemoryTrace",
    "PKMConfig",
    "PKMLayer",
    "RMSNorm",
    "Snapshot",
    "StateFileError",
    "fast_memory",
]
