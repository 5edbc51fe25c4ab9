"""Sources: what they read, how they are divided, and what they say about input they can't use."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
import zstandard
from pyarrow import parquet
from pydantic import ValidationError

from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.sources import Document, Source, open_source
from megatron_fwpkm.data.sources.base import read_documents
from megatron_fwpkm.errors import UserError

LINES = ["one", "zwei", "ü" * 40, "", "three\nlines\nof text", "\N{SNOWMAN} and 漢字", "six " * 30, "end"]
WANTED = [line for line in LINES if line]


def _read(source: Source, size: int) -> list[Document]:
    return list(itertools.chain.from_iterable(read_documents(source, part) for part in source.parts(size)))


def _texts(source: Source, size: int = 1 << 20) -> list[str]:
    return [document.text for document in _read(source, size)]


def _jsonl(path: Path, lines: list[str] = LINES, ending: str = "\n") -> Path:
    content = "\n".join(json.dumps({"body": line}, ensure_ascii=False) for line in lines) + ending
    path.write_bytes(content.encode())
    return path


def _open(source: str, path: Path | str, **settings: object) -> Source:
    return open_source(DataConfig.model_validate({"source": source, "path": str(path), **settings}))


@pytest.mark.parametrize("ending", ["\n", ""])
def test_every_line_is_read_once_however_a_file_is_divided(tmp_path: Path, ending: str) -> None:
    path = _jsonl(tmp_path / "a.jsonl", ending=ending)
    source = _open("jsonl", path, text_field="body")
    whole = _read(source, 1 << 20)
    assert [document.text for document in whole] == WANTED
    for size in range(1, path.stat().st_size + 2):
        parts = source.parts(size)
        assert list(itertools.chain.from_iterable(read_documents(source, part) for part in parts)) == whole, size
    assert len(source.parts(50)) > 5


def test_jsonl_plain_and_compressed_in_a_folder(tmp_path: Path) -> None:
    plain = _jsonl(tmp_path / "a.jsonl", WANTED[:3])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(_jsonl(tmp_path / "x", WANTED[3:5]).read_bytes()))
    frames = [zstandard.compress(_jsonl(tmp_path / "x", [line]).read_bytes()) for line in WANTED[5:]]
    (tmp_path / "c.jsonl.zst").write_bytes(b"".join(frames))  # as parallel compressors write
    for path in (tmp_path, tmp_path / "*.jsonl*"):
        source = _open("jsonl", path, text_field="body")
        assert _texts(source) == WANTED
        assert len(source.parts(1 << 20)) == 1
        assert len(source.parts(1)) == plain.stat().st_size + 2  # compressed files are never divided


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"', "not JSON"),
        ('{"text": "x"}', r"no field 'body'; set data.text_field \(fields here: text\)"),
        ('["x"]', "no field"),
        ('{"body": 3}', "holds int, not text"),
        ("\udcff", "not JSON"),
        ('{"body": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "good"}\n' + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=f"line at byte 17: .*{message}"):
        _texts(_open("jsonl", path, text_field="body"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damaged_compressed_files_are_named(tmp_path: Path, name: str) -> None:
    content = _jsonl(tmp_path / "x", [str(number) * 50 for number in range(5000)]).read_bytes()
    packed = bytearray(gzip.compress(content) if name.endswith("gz") else zstandard.compress(content))
    packed[len(packed) // 2 :] = b"\x55" * (len(packed) // 2)
    (tmp_path / name).write_bytes(packed)
    with pytest.raises(UserError, match=f"{name}"):
        _texts(_open("jsonl", tmp_path / name, text_field="body"))


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_cut_compressed_files_are_refused(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    content = _jsonl(tmp_path / "x", [f"{number * 7919 % 5003}" * 50 for number in range(5000)]).read_bytes()
    frames = compress(content), compress(content)
    path = tmp_path / f"a.jsonl.{'gz' if compress is gzip.compress else 'zst'}"
    path.write_bytes(b"".join(frames))
    source = _open("jsonl", path, text_field="body")
    assert len(_texts(source)) == 10000
    whole = path.read_bytes()
    cuts = [*range(1, 20), *range(20, len(whole), len(whole) // 20), len(whole) - 5, len(whole) - 1]
    for cut in cuts:
        if cut != len(frames[0]):
            path.write_bytes(whole[:cut])
            with pytest.raises(UserError, match=f"{path.name} is damaged"):
                _texts(source)


def test_unpaired_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n')
    assert _texts(_open("jsonl", tmp_path / "a.jsonl")) == ["a?b"]


def test_folder_of_texts(tmp_path: Path) -> None:
    for index, text in enumerate(WANTED):
        (tmp_path / f"{index % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{index % 2}" / f"{index}.txt").write_text(text)
    (tmp_path / "0" / "other.md").write_text("left out")
    source = _open("folder", tmp_path)
    assert sorted(_texts(source)) == sorted(WANTED)
    assert _read(source, 1) == _read(source, 1 << 20)
    assert len(source.parts(1)) == len(WANTED)
    assert _texts(_open("folder", tmp_path, files="**/*.md")) == ["left out"]
    assert _texts(_open("folder", tmp_path / "0" / "0.txt")) == ["one"]
    (tmp_path / "0" / "0.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n")  # a mark of its encoding is no text
    assert _texts(_open("folder", tmp_path / "0" / "0.txt")) == ["a\r\nb\rc\n"]
    (tmp_path / "0" / "0.txt").write_bytes(b"latin \xe9")
    with pytest.raises(UserError, match=r"0/0.txt is not UTF-8 text .* at byte 6"):
        _texts(source)


def test_linked_folders_are_read_once_and_names_with_brackets_are_names(tmp_path: Path) -> None:
    for name in ("data/a", "data/z", "elsewhere/deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / f"{name[-1]}.txt").write_text(f"text in {name}")
    (tmp_path / "data" / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "z")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    wanted = ["text in data/a", "text in data/z", "text in elsewhere/deep"]
    assert sorted(_texts(_open("folder", tmp_path / "data"))) == wanted
    (tmp_path / "data" / "[1].txt").write_text("brackets")
    assert _texts(_open("folder", tmp_path / "data" / "[1].txt")) == ["brackets"]
    assert _texts(_open("folder", tmp_path / "data", files="a/*.txt")) == ["text in data/a"]


def test_zstandard_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = _jsonl(tmp_path / "x").read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(content) + packer.flush())  # without the content's size
    assert _texts(_open("jsonl", tmp_path / "a.jsonl.zst", text_field="body")) == WANTED


def test_parquet_is_divided_at_row_groups(tmp_path: Path) -> None:
    table = pyarrow.table({"number": list(range(len(LINES))), "body": LINES})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    parquet.write_table(table.slice(0, 2), tmp_path / "b.parquet")
    source = _open("parquet", tmp_path, text_field="body")
    whole = _read(source, 1 << 20)
    assert [document.text for document in whole] == [*WANTED, *LINES[:2]]
    assert [document.name for document in whole[:4]] == [f"a.parquet:{row}" for row in (0, 1, 2, 4)]
    assert len(source.parts(1)) == 5 and len(source.parts(1 << 20)) == 1
    assert _read(source, 1) == whole
    with pytest.raises(UserError, match=r"no column 'text'; set data.text_field \(number, body\)"):
        _open("parquet", tmp_path).parts(1)
    with pytest.raises(UserError, match="holds int, not text"):
        _texts(_open("parquet", tmp_path, text_field="number"))
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"cannot read .*c.parquet as parquet"):
        _open("parquet", tmp_path, text_field="body").parts(1)


def test_hugging_face_datasets_saved_or_loadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = datasets.Dataset.from_dict({"body": [*LINES, None]})
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    dataset.to_parquet(str(tmp_path / "files" / "train.parquet"))
    for name in ("saved", "splits", "files"):
        source = _open("huggingface", tmp_path / name, text_field="body")
        assert _texts(source) == WANTED
        assert len(source.parts(1)) == len(LINES) + 1
        assert _read(source, 60) == _read(source, 1 << 20)
        assert _texts(pickle.loads(pickle.dumps(source))) == WANTED  # as sent to the processes of a preparation
    assert source.version() == _open("huggingface", tmp_path / "files", text_field="body").version()
    with pytest.raises(UserError, match=r"no column 'text'; set data.text_field \(body\)"):
        _open("huggingface", tmp_path / "saved")
    with pytest.raises(UserError, match=r"cannot load dataset .*data.source_split 'other'"):
        _open("huggingface", tmp_path / "splits", source_split="other")
    with pytest.raises(UserError, match="cannot load dataset"):
        _open("huggingface", tmp_path / "nowhere")


def test_standard_library_documents_are_files_with_text() -> None:
    source = open_source(DataConfig())
    parts = source.parts(1 << 20)
    assert len(parts) > 10
    documents = list(read_documents(source, parts[0]))
    assert documents == list(read_documents(open_source(DataConfig()), parts[0]))
    assert len(documents) > 5 and not any("site-packages" in document.name for document in documents)
    assert all(len(document.text) >= 64 for document in documents)


@pytest.mark.parametrize("source", ["folder", "jsonl", "parquet"])
def test_nothing_to_read_is_an_error(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"there is no .*nowhere; give"):
        _open(source, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no file in .* matches data.files"):
        _open(source, tmp_path)
    with pytest.raises(UserError, match=r"no file is .*\*"):
        _open(source, tmp_path / "*.none")


def test_version_follows_the_files(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl")
    before = _open("jsonl", tmp_path).version()
    assert _open("jsonl", tmp_path).version() == before
    assert _open("jsonl", tmp_path, text_field="body").version() != before
    _jsonl(path, [*LINES, "more"])
    assert _open("jsonl", tmp_path).version() != before


def test_settings_say_what_a_source_needs() -> None:
    with pytest.raises(ValidationError, match=r"data.source jsonl needs data.path: a folder, file or glob"):
        DataConfig(source="jsonl")
    with pytest.raises(ValidationError, match=r"needs data.path: a dataset's name or folder"):
        DataConfig(source="huggingface")
    with pytest.raises(ValidationError, match=r"data.source is stdlib"):
        DataConfig(path="/texts")
    assert DataConfig(source="jsonl", corpus="/prepared").path is None
