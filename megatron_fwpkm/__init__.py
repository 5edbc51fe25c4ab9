"""Distributed pretraining of language models with fast-weight product-key memory (FwPKM, arXiv:2601.00671).

Importing this package is cheap and has no side effects: nothing heavy (DeepSpeed, Megatron-Core, streaming,
Transformers, Transformer Engine) is imported here, so that `--help` answers at once and `doctor` can run on a machine
where one of them is broken. Import the parts that you need: `megatron_fwpkm.memory`, `megatron_fwpkm.train`, ...
"""

# The one place of the version: the build reads this line without importing the package.
__version__ = "0.1.0"

__all__ = ["__version__"]
