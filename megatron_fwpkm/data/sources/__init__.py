"""Where documents come from: the standard library, folders of text, JSONL, parquet and Hugging Face datasets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fwpkm.data.sources.base import Document, Part, Piece, Source
from megatron_fwpkm.data.sources.files import FolderSource, StandardLibrarySource
from megatron_fwpkm.data.sources.jsonl import JsonLinesSource
from megatron_fwpkm.data.sources.tables import HuggingFaceSource, ParquetSource

if TYPE_CHECKING:
    from megatron_fwpkm.data.settings import DataConfig

__all__ = ["Document", "Part", "Piece", "Source", "open_source"]


def open_source(settings: DataConfig) -> Source:
    """The source that a data section names, its files listed. Raises UserError if there is nothing to read."""
    path = settings.path or ""
    if settings.source == "stdlib":
        return StandardLibrarySource()
    if settings.source == "folder":
        return FolderSource(path, settings.files)
    if settings.source == "jsonl":
        return JsonLinesSource(path, settings.files, settings.text_field)
    if settings.source == "parquet":
        return ParquetSource(path, settings.files, settings.text_field)
    return HuggingFaceSource(path, settings.subset, settings.source_split, settings.text_field)
