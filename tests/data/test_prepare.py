"""Preparation of a corpus: splits, duplicates, reuse, and what it says when it can't."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_fwpkm.data import parts, prepare
from megatron_fwpkm.data.corpus import corpus_tokenizer, find_corpus, prepare_corpus
from megatron_fwpkm.data.manifest import Manifest, check_shards, read_manifest
from megatron_fwpkm.data.parts import SplitRule
from megatron_fwpkm.data.settings import DataConfig
from megatron_fwpkm.data.sources import Document
from megatron_fwpkm.data.token_stream import read_stream, stream_tokens
from megatron_fwpkm.data.tokenizer import END_OF_DOCUMENT, CorpusTokenizer, train_tokenizer
from megatron_fwpkm.errors import UserError
from megatron_fwpkm.train import job_data

Corpus = tuple[Path, Manifest]
Make = Callable[..., DataConfig]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_manifest_describes_the_corpus(corpus: Corpus, texts: list[str]) -> None:
    folder, manifest = corpus
    assert manifest == read_manifest(folder)
    assert manifest.fingerprint == folder.name
    assert (manifest.vocab_size, manifest.token_dtype, manifest.block_tokens) == (300, "uint16", 100)
    assert manifest.seed == 3 and manifest.duplicates == 0
    assert manifest.characters == sum(map(len, texts))
    assert sum(counts.documents for counts in manifest.splits.values()) == len(texts)
    assert len(manifest.splits["train"].part_tokens) > 3
    assert all(sum(counts.part_tokens) == counts.tokens for counts in manifest.splits.values())
    assert manifest.tokenizer_sha256 == corpus_tokenizer(folder).sha256()
    assert set(manifest.files) | {"manifest.json"} == set(hashes(folder))


def test_what_is_there_is_reused(corpus: Corpus, settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "_prepare", lambda *_: pytest.fail("prepared again"))
    folder, manifest = corpus
    for changes in ({}, {"sequence_length": 1 << 17, "documents": "separate", "workers": 3, "processes": 2}):
        lines: list[str] = []
        assert prepare_corpus(settings(folder.parent, **changes), 3, lines.append) == (folder, manifest)
        assert len(lines) == 1 and "reading" in lines[0]


def test_another_request_has_another_folder(settings: Make, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"vocab_size": 301},
        {"validation_fraction": 0.3},
        {"test_fraction": 0.0},
        {"max_documents": 5},
        {"part_megabytes": 1},
        {"block_tokens": 99},
        {"shard_megabytes": 1},
        {"tokenizer_megabytes": 1},
    ]
    requests = [prepare.plan_preparation(settings(tmp_path, **change), 3).request() for change in changes]
    requests.append(prepare.plan_preparation(settings(tmp_path), 4).request())
    assert len({prepare.fingerprint(request) for request in requests}) == len(changes) + 1


def test_duplicates_inside_a_part_are_dropped(settings: Make, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:60], *texts[:60]]))
    once = tmp_path / "once.jsonl"
    once.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:60]))
    whole = {"part_megabytes": 100}
    _, doubled = prepare_corpus(settings(tmp_path, path=str(path), **whole), seed=3)
    _, single = prepare_corpus(settings(tmp_path, path=str(once), **whole), seed=3)
    assert doubled.duplicates == 60 and single.duplicates == 0
    assert doubled.corpus_sha256 == single.corpus_sha256 and doubled.splits == single.splits


def test_windows_bound_what_is_held(settings: Make, texts: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    """A compressed file is one part however large; it is ordered in windows."""
    import zstandard

    path = tmp_path / "texts.jsonl.zst"
    path.write_bytes(zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    held = []
    whole = parts._windows

    def watched(documents: Any, size: int) -> Any:
        for window in whole(documents, size):
            held.append(sum(len(document.text) for document in window))
            yield window

    monkeypatch.setattr(parts, "_windows", watched)
    _, manifest = prepare_corpus(settings(tmp_path, path=str(path), part_megabytes=0.02), seed=3)
    assert len(manifest.splits["train"].part_tokens) == 1
    assert sum(counts.documents for counts in manifest.splits.values()) == len(texts)
    assert max(held) < 0.02 * (1 << 20) + 5000


def test_split_depends_on_each_document_alone() -> None:
    rule, other = SplitRule(5, 0.1, 0.05), SplitRule(6, 0.1, 0.05)
    documents = [Document.of(str(index), str(index)) for index in range(2000)]
    found = [rule.split(document) for document in documents]
    assert 140 < found.count("validation") < 260 and 60 < found.count("test") < 140
    assert [rule.split(Document.of("another name", document.text)) for document in documents] == found
    assert [other.split(document) for document in documents] != found
    more = SplitRule(5, 0.2, 0.05)  # a larger share keeps those that were held out
    assert all(more.split(document) == "validation" for document in documents if rule.split(document) == "validation")


def test_given_tokenizer_is_used_and_kept(corpus: Corpus, settings: Make, tmp_path: Path) -> None:
    trained = corpus_tokenizer(corpus[0])
    PreTrainedTokenizerFast(tokenizer_object=trained.tokenizer, eos_token="<|end|>").save_pretrained(tmp_path / "hf")
    given = settings(tmp_path, tokenizer=str(tmp_path / "hf"), vocab_size=None)
    folder, manifest = prepare_corpus(given, seed=3)
    assert manifest.tokenizer_sha256 == trained.sha256() and manifest.vocab_size == 300
    count = stream_tokens(folder, "train")
    assert (read_stream(folder, "train", 0, count).tokens == read_stream(corpus[0], "train", 0, count).tokens).all()
    with pytest.raises(UserError, match=r"data.vocab_size is 301 but tokenizer .* has 300 tokens"):
        prepare_corpus(settings(tmp_path, tokenizer=str(tmp_path / "hf"), vocab_size=301), seed=3)
    with pytest.raises(UserError, match=r"data.end_of_document is for a given data.tokenizer"):
        prepare_corpus(settings(tmp_path, end_of_document="<|end|>"), seed=3)


def test_corpus_given_by_its_folder(corpus: Corpus, settings: Make, tmp_path: Path) -> None:
    folder, manifest = corpus
    given = {"corpus": str(folder), "path": None, "vocab_size": None}
    assert prepare_corpus(settings(tmp_path / "unused", **given), seed=99) == corpus
    assert not (tmp_path / "unused").exists()
    own = settings(tmp_path, **given | {"tokenizer": str(folder / "tokenizer.json"), "end_of_document": "<|end|>"})
    assert prepare_corpus(own, seed=3) == corpus
    with pytest.raises(UserError, match=r"data.vocab_size is 4096 but corpus .* has a vocabulary of 300"):
        prepare_corpus(settings(tmp_path, **given | {"vocab_size": 4096}), seed=3)
    other, _ = prepare_corpus(settings(tmp_path / "other", vocab_size=301), seed=3)
    wrong = given | {"tokenizer": str(other / "tokenizer.json"), "end_of_document": "<|end|>"}
    with pytest.raises(UserError, match=rf"301 tokens.* is not the one of .*{manifest.tokenizer_sha256[:12]}, 300"):
        prepare_corpus(settings(tmp_path, **wrong), seed=3)
    with pytest.raises(UserError, match=r"data.corpus: .*nowhere is not there"):
        prepare_corpus(settings(tmp_path, **given | {"corpus": str(tmp_path / "nowhere")}), seed=3)
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        prepare_corpus(settings(tmp_path, **given | {"corpus": str(tmp_path)}), seed=3)


def test_another_tokenizer_under_the_same_name_is_loaded(corpus: Corpus, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for size in (300, 290):
        path.write_text(train_tokenizer(texts, size).tokenizer.to_str())
        assert parts._tokenizer(path, END_OF_DOCUMENT).vocab_size == size


def test_swapped_tokenizer_is_refused(settings: Make, tmp_path: Path) -> None:
    folder, _ = prepare_corpus(settings(tmp_path, max_documents=30), seed=3)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġ"', '"ġ"', 1))
    with pytest.raises(UserError, match=r"is not the tokenizer|cannot read tokenizer"):
        corpus_tokenizer(folder)


@pytest.mark.parametrize("damage", ["shorten", "remove", "manifest", "version", "index"])
def test_damaged_corpus_is_refused(settings: Make, tmp_path: Path, damage: str) -> None:
    small = settings(tmp_path, max_documents=30)
    folder, _ = prepare_corpus(small, seed=3)
    manifest = folder / "manifest.json"
    shard = next((folder / "train").glob("*/*.zstd"))
    if damage == "shorten":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "remove":
        shard.unlink()
    elif damage == "index":  # of the same size
        index = folder / "train" / "index.json"
        index.write_text(index.read_text().replace("basename", "basenane"))
        with pytest.raises(UserError, match=rf"{index} is damaged; delete {folder}"):
            check_shards(folder)
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format_version": 99}))
    with pytest.raises(UserError, match="prepare the corpus again"):
        prepare_corpus(small, seed=3)


def test_empty_splits_are_errors_that_say_what_to_raise(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"the (validation|test) split is empty: .* 2 documents; raise data.\1_fraction"
    ):
        prepare_corpus(settings(tmp_path, vocab_size=257, max_documents=2, test_fraction=1e-6), seed=1)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_special_token_in_a_text_is_text(settings: Make, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    documents = [f"{text}<|end|>and on{number}" for number, text in enumerate(texts[:30])]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    folder, manifest = prepare_corpus(settings(tmp_path, path=str(path)), seed=3)
    stream = read_stream(folder, "train", 0, stream_tokens(folder, "train"))
    assert (stream.tokens == 0).sum() == manifest.splits["train"].documents
    first = stream.tokens[stream.documents == 0][:-1].tolist()
    assert corpus_tokenizer(folder).tokenizer.decode(first) in documents


def test_no_text_is_an_error_that_says_so(settings: Make, corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("")
    given = {"tokenizer": str(corpus[0] / "tokenizer.json"), "end_of_document": "<|end|>", "vocab_size": None}
    for changes in ({}, {"max_documents": 5}, given):
        with pytest.raises(UserError, match=r"the source has no text: everything in .*texts\.jsonl"):
            prepare_corpus(settings(tmp_path, path=str(path), **changes), seed=3)
    path.write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="the source has no text to train a tokenizer on"):
        prepare_corpus(settings(tmp_path, path=str(path)), seed=3)


def test_an_unreadable_source_is_named(settings: Make, jsonl: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(jsonl.read_bytes())
    preparation = prepare.plan_preparation(settings(tmp_path, path=str(path)), 3)
    path.unlink()
    with pytest.raises(UserError, match=rf"cannot read {path} of the source: No such file"):
        prepare.prepare_missing(preparation, 1, lambda line: None)


def test_a_job_compares_the_tokenizer(settings: Make, tmp_path: Path) -> None:
    small = settings(tmp_path, max_documents=30)
    folder, _ = prepare_corpus(small, seed=3)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"Ġ"', '"ġ"', 1))  # of the same size
    with pytest.raises(UserError, match=r"is not the tokenizer|cannot read tokenizer"):
        job_data._prepare_and_verify(SimpleNamespace(data=small, seed=3), lambda line: None)  # type: ignore[arg-type]


def test_unusable_folder_is_an_error(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot prepare data in .*data\.directory"):
        prepare_corpus(settings(tmp_path / "file" / "data"), seed=3)


def test_a_bad_line_keeps_finished_parts(corpus: Corpus, settings: Make, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join([*lines, "{bad"]))
    given = {"tokenizer": str(corpus[0] / "tokenizer.json"), "end_of_document": "<|end|>"}
    with pytest.raises(UserError, match=r"texts.jsonl, line at byte \d+: not JSON"):
        prepare_corpus(settings(tmp_path / "data", path=str(path), **given), seed=3)
    finished = list((tmp_path / "data").glob(".*.partial/.progress/00*.json"))
    assert len(finished) == len(corpus[1].splits["train"].part_tokens) - 1


def test_no_space_left_is_one_message_and_costs_no_finished_part(
    corpus: Corpus, settings: Make, small_disk: Path
) -> None:
    with pytest.raises(UserError, match=rf"no space left on the device of {small_disk}.* finished parts are kept"):
        prepare_corpus(settings(small_disk), seed=3)
    finished = {path: path.stat().st_mtime_ns for path in small_disk.glob(".*.partial/.progress/00*.json")}
    assert finished
    shards = {path: path.stat().st_ino for path in small_disk.glob(".*.partial/train/000000/*")}
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    lines: list[str] = []
    folder, _ = prepare_corpus(settings(small_disk), 3, lines.append)
    assert any(f"{len(finished)} of " in line and "finished before" in line for line in lines)
    assert shards and all((folder / "train/000000" / path.name).stat().st_ino == node for path, node in shards.items())
    assert hashes(folder) == hashes(corpus[0])


@pytest.mark.parametrize("kind", ["unigram", "words", "plain added token"])
def test_end_token_is_at_ends_alone_whatever_the_tokenizer(kind: str) -> None:
    """Tokenizers that have the end token among their ordinary tokens find it in a text that has its name."""
    if kind == "unigram":
        pieces = [("<unk>", -9.0), ("</s>", 0.0), *((letter, -2.0) for letter in "abcdes<>/▁")]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    elif kind == "words":
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "see": 2, "bad": 3}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = train_tokenizer(["some text to see"], 257).tokenizer
        tokenizer.add_tokens([AddedToken("</s>", special=False)])
    given = CorpusTokenizer(tokenizer, "</s>")
    documents = [Document.of("a", "see </s> bad </s>"), Document.of("b", "see bad")]
    (_, first), (_, second) = parts._tokenize(documents, given, "uint16")
    for tokens in (first, second):
        assert (tokens == given.end_id).sum() == 1 and tokens[-1] == given.end_id
    assert len(first) > len(second)
    unknown = CorpusTokenizer(tokenizer, "<unk>")
    if kind == "words":
        with pytest.raises(UserError, match="b: the tokenizer makes its end token '<unk>' out of ordinary text"):
            list(parts._tokenize([Document.of("b", "never seen")], unknown, "uint16"))


def test_tokenizers_are_trained_on_training_texts_alone(settings: Make, texts: list[str], tmp_path: Path) -> None:
    preparation = prepare.plan_preparation(settings(tmp_path), seed=3)
    rule = SplitRule(3, 0.2, 0.1)
    wanted = [text for text in texts if rule.split(Document.of("", text)) == "train"]
    found = list(preparation.worker(tmp_path).training_texts(preparation.parts(), 1 << 30))
    assert 50 < len(wanted) < len(texts) and sorted(found) == sorted(wanted)


def test_a_prepared_corpus_is_found_without_its_source(settings: Make, texts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = settings(tmp_path / "made", path=str(path))
    folder, manifest = prepare_corpus(made, seed=3)
    hashes_of_it = {"corpus": manifest.corpus_sha256, "tokenizer": manifest.tokenizer_sha256}
    prepare_corpus(made, seed=4)
    path.unlink()
    assert find_corpus(made, hashes_of_it) == (folder, manifest)
    moved = folder.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"is not in .*made: give its folder as data\.corpus"):
        find_corpus(made, hashes_of_it)
    assert find_corpus(made.model_copy(update={"corpus": str(moved)}), hashes_of_it) == (moved, manifest)


def test_counts_that_do_not_add_up_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    content = json.loads((corpus[0] / "manifest.json").read_text())
    content["splits"]["train"]["tokens"] += 1000
    for damaged in (content, {**content, "files": []}, {**content, "index_sha256": None}):
        (tmp_path / "manifest.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="cannot read"):
            read_manifest(tmp_path)
