import errno
import json
import os
import pickle

import pytest
import torch

from litgpt.data import tokens
from litgpt.data.tokens import TokenDataset, TokenStore, fitting_length, held_out_from, open_store, store_key
from litgpt.errors import UserError, disk_error

DOCUMENTS = [[1, 2, 3], [4, 5], [], [6, 7, 8, 9], [10]]
FLAT = [i for document in DOCUMENTS for i in document]


def encode(document):
    return document, [0] if document else []


def build(folder, documents=DOCUMENTS, key="key", vocab_size=100, **options):
    return open_store(folder, key, documents, encode, vocab_size=vocab_size, **options)


def test_a_store_holds_the_tokens_of_all_documents_in_order(tmp_path):
    store = build(tmp_path)
    assert len(store) == len(FLAT)
    assert store.read(0, len(store)).tolist() == FLAT
    assert store.read(2, 6).tolist() == FLAT[2:6] and store.read(2, 6).dtype == torch.int64
    assert store.documents.tolist() == [0, 3, 5, 9]


@pytest.mark.parametrize("vocab_size, dtype, n_bytes", [(2**16, "uint16", 2), (2**16 + 1, "uint32", 4)])
def test_a_token_takes_two_bytes_where_the_vocabulary_allows_it(tmp_path, vocab_size, dtype, n_bytes):
    largest = vocab_size - 1
    store = build(tmp_path, [[0, largest]], vocab_size=vocab_size)
    assert store.read(0, 2).tolist() == [0, largest]
    assert (store.folder / tokens.TOKENS).stat().st_size == 2 * n_bytes
    assert json.loads((store.folder / tokens.INDEX).read_text())["dtype"] == dtype


def test_tokens_beyond_the_vocabulary_widen_the_store(tmp_path):
    store = build(tmp_path, [[1], [70_000]], vocab_size=2**16)
    assert store.read(0, 2).tolist() == [1, 70_000]


def test_several_processes_build_the_same_store(tmp_path):
    store = build(tmp_path, num_workers=2)
    assert store.read(0, len(store)).tolist() == FLAT
    assert store.documents.tolist() == [0, 3, 5, 9]


def test_a_store_is_built_once_for_a_key(tmp_path):
    build(tmp_path)
    assert len(build(tmp_path, [[1]])) == len(FLAT)
    assert len(build(tmp_path, [[1]], key="other")) == 1


def test_nothing_is_left_of_a_store_that_could_not_be_finished(tmp_path):
    def fail(document):
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        open_store(tmp_path, "key", DOCUMENTS, fail, vocab_size=100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES])
def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as caught:
        build(tmp_path)
    assert str(caught.value) == f"Tokens cannot be written to {tmp_path}: {disk_error(OSError(number, ''))}"
    assert list(tmp_path.iterdir()) == []


def test_another_error_of_the_system_stays_what_it_is(tmp_path, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        build(tmp_path)
    assert not isinstance(caught.value, UserError)


def test_the_faster_of_two_builders_wins_and_both_read_its_store(tmp_path):
    def meanwhile(document):
        build(tmp_path)
        return encode(document)

    store = open_store(tmp_path, "key", [[1]], meanwhile, vocab_size=100)
    assert len(store) == len(FLAT)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_place_that_cannot_be_written_is_replaced_by_a_temporary_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tokens.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("not a folder")
    store = build(tmp_path / "file" / "stores")
    assert store.folder.is_relative_to(tmp_path / "temporary")
    assert "cannot be written" in caplog.text
    assert build(tmp_path / "file" / "stores", [[1]]).folder == store.folder


def test_texts_of_two_places_that_cannot_be_written_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "file").write_text("not a folder")
    first, second = (build(tmp_path / "file" / name, documents) for name, documents in (("one", DOCUMENTS), ("two", [[1]])))
    assert (len(first), len(second)) == (len(FLAT), 1)


def test_empty_texts_are_refused(tmp_path):
    with pytest.raises(UserError, match="no text"):
        build(tmp_path, [[], []])


def test_a_cut_store_is_refused(tmp_path):
    store = build(tmp_path)
    os.truncate(store.folder / tokens.TOKENS, 6)
    with pytest.raises(UserError, match="damaged"):
        build(tmp_path)


def test_a_store_is_sent_to_other_processes_by_its_name(tmp_path):
    store = build(tmp_path, [list(range(1000))] * 50, vocab_size=1000)
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).read(0, len(store)), store.read(0, len(store)))


def test_the_key_follows_files_tokenizer_and_settings(tmp_path, tokenizer, tokenizer_dir):
    file = tmp_path / "a.txt"
    file.write_text("one")
    key = store_key([file], tokenizer, {"x": 1})
    assert store_key([file], tokenizer, {"x": 1}) == key
    keys = [key, store_key([file], tokenizer, {"x": 2})]

    os.utime(file, ns=(0, 0))
    keys.append(store_key([file], tokenizer, {"x": 1}))
    file.write_text("three")
    os.utime(file, ns=(0, 0))
    keys.append(store_key([file], tokenizer, {"x": 1}))
    tokenizer.checkpoint_dir = tmp_path  # without the tokenizer's files
    keys.append(store_key([file], tokenizer, {"x": 1}))
    tokenizer.eos_id = None
    keys.append(store_key([file], tokenizer, {"x": 1}))
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("start, end", [(0, None), (2, 8)])
def test_each_token_is_a_target_once_until_the_last_piece(tmp_path, length, start, end):
    dataset = TokenDataset(build(tmp_path), length, start, end)
    tokens_in = FLAT[start:end]
    assert len(dataset) == (len(tokens_in) - 1) // length
    windows = [dataset[i] for i in range(len(dataset))]
    assert all(window.shape == (length + 1,) and window.dtype == torch.int64 for window in windows)
    assert [i for window in windows for i in window[:-1].tolist()] == tokens_in[: len(windows) * length]
    assert [i for window in windows for i in window[1:].tolist()] == tokens_in[1 : 1 + len(windows) * length]


def test_windows_are_read_in_any_order(tmp_path):
    dataset = TokenDataset(build(tmp_path), 3)
    assert dataset[2].tolist() == FLAT[6:10] and dataset[0].tolist() == FLAT[:4] and dataset[-1].tolist() == dataset[2].tolist()
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_documents_of_a_window_are_known(tmp_path):
    dataset = TokenDataset(build(tmp_path), 3)
    assert [dataset.document_lengths(i) for i in range(3)] == [[3, 1], [2, 2], [3, 1]]
    assert dataset.store.document_lengths(3, 5) == [2]
    assert dataset.store.document_lengths(0, 10) == [3, 2, 4, 1]


@pytest.mark.parametrize("n_tokens", [4, 5, 10, 99, 1000, 10_000, 10**9])
@pytest.mark.parametrize("length", [1, 16, 2048])
def test_training_and_validation_both_get_windows_whatever_the_size(n_tokens, length):
    cut = held_out_from(n_tokens, length)
    for n in (cut, n_tokens - cut):
        assert n >= 2
        window = fitting_length(n, length)
        assert 1 <= window <= length
        assert n - 1 - (n - 1) // window * window <= n // 8  # what is left out
    assert n_tokens - cut <= max(2, n_tokens // 10, 2048)


def test_the_tail_is_five_percent_of_a_long_text_and_one_window_of_a_shorter_one():
    assert held_out_from(100_000, 100) == 95_000
    assert held_out_from(1_200, 100) == 1_200 - 101
    assert held_out_from(10**9, 100) == 10**9 - tokens.MAX_HELD_OUT


def test_a_missing_index_means_there_is_no_store(tmp_path):
    with pytest.raises(UserError, match="damaged"):
        TokenStore(tmp_path)
