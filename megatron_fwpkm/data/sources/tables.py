"""Documents in columns: parquet files and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_fwpkm.data.sources.base import Document, FieldFiles, Part, Piece, divide, group_pieces
from megatron_fwpkm.errors import UserError

_ROWS_AT_A_TIME = 256


class ParquetSource(FieldFiles):
    """Parquet files, divided at their row groups."""

    def __init__(self, path: str, pattern: str | None, text_field: str) -> None:
        super().__init__(path, pattern or "**/*.parquet", text_field)

    def parts(self, size: int) -> list[Part]:
        """Ranges of row groups; small files together."""
        pieces: list[tuple[Piece, int]] = []
        for file in self._files:
            with _open_parquet(Path(file.path)) as table:
                metadata = table.metadata
                column = self._column(metadata, file.path)
                for group in range(metadata.num_row_groups):
                    uncompressed = metadata.row_group(group).column(column).total_uncompressed_size
                    pieces.append((Piece(file.name, group, group + 1), uncompressed))
        return [_join_neighbours(part) for part in group_pieces(pieces, size)]

    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of some row groups."""
        import pyarrow

        path = Path(self._root, piece.name)
        with _open_parquet(path) as table:
            groups = list(range(piece.begin, piece.end))
            row = sum(table.metadata.row_group(group).num_rows for group in range(piece.begin))
            try:
                for batch in table.iter_batches(_ROWS_AT_A_TIME, row_groups=groups, columns=[self._text_field]):
                    texts = batch.column(0).to_pylist()
                    yield from _documents(texts, piece.name, row, self._text_field)
                    row += len(texts)
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{path} is damaged: {error}; replace it or leave it out by data.files") from error

    def _column(self, metadata: Any, path: str) -> int:
        names = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
        if self._text_field not in names:
            raise UserError(f"{path} has no column {self._text_field!r}; set data.text_field ({', '.join(names)})")
        return names.index(self._text_field)


class HuggingFaceSource:
    """A dataset of the `datasets` library, by name, or by a folder that it can load or that it has saved."""

    def __init__(self, path: str, subset: str | None, split: str, text_field: str) -> None:
        self._dataset = _load_dataset(path, subset, split)
        self._text_field = text_field
        names = self._dataset.column_names
        if text_field not in names:
            raise UserError(f"dataset {path} has no column {text_field!r}; set data.text_field ({', '.join(names)})")
        if not len(self._dataset):
            raise UserError(f"split {split!r} of dataset {path} has no rows; give another data.source_split")
        self._name = f"{path}:{split}"

    def version(self) -> str:
        """The dataset's own fingerprint, and the column."""
        return f"{self._dataset._fingerprint}, {len(self._dataset)} rows, {self._text_field}"

    def parts(self, size: int) -> list[Part]:
        """Ranges of rows, by the mean size of a row."""
        rows = len(self._dataset)
        row_size = max(1, self._dataset.select_columns([self._text_field]).data.nbytes // rows)
        return [(Piece(self._name, *bounds),) for bounds in divide(rows, size // row_size)]

    def read(self, piece: Piece) -> Iterator[Document]:
        """The documents of some rows."""
        column = self._dataset.select_columns([self._text_field]).with_format(None)
        for begin in range(piece.begin, piece.end, _ROWS_AT_A_TIME):
            texts = column[begin : min(begin + _ROWS_AT_A_TIME, piece.end)][self._text_field]
            yield from _documents(texts, piece.name, begin, self._text_field)


def _documents(texts: Sequence[Any], name: str, first_row: int, field: str) -> Iterator[Document]:
    for row, text in enumerate(texts, first_row):
        if text is not None and not isinstance(text, str):
            raise UserError(f"{name}, row {row}: column {field!r} holds {type(text).__name__}, not text")
        if text:
            yield Document.of(f"{name}:{row}", text)


def _join_neighbours(part: Part) -> Part:
    joined: list[Piece] = []
    for piece in part:
        if joined and joined[-1].name == piece.name and joined[-1].end == piece.begin:
            joined[-1] = joined[-1]._replace(end=piece.end)
        else:
            joined.append(piece)
    return tuple(joined)


def _open_parquet(path: Path) -> Any:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path} as parquet: {error}; leave it out by data.files") from error


def _load_dataset(path: str, subset: str | None, split: str) -> Any:
    import datasets

    try:
        if (Path(path) / "dataset_dict.json").is_file() or (Path(path) / "state.json").is_file():
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # the library raises many types: network, builders, files
        raise UserError(
            f"cannot load dataset {path!r}, data.subset {subset!r}, data.source_split {split!r}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
