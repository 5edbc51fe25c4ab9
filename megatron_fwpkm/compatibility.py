"""Ways around what libraries do on machines without a GPU, each in one place."""

from __future__ import annotations

import functools
from typing import Any

import torch

_operator_library: list[Any] = []
"""Keeps operator definitions alive; torch drops them with the object."""


@functools.cache
def mend_torchvision() -> None:
    """Make `import transformers` (and streaming, which imports it) work where torchvision's operators can't load.

    torchvision registers fake versions of two operators at import. With a CPU build of torch beside another build of
    torchvision these operators don't exist and the import fails; defining their schemas is enough, because nothing
    here calls them.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # not installed: transformers then does without
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _operator_library.append(library)
