import errno
import time
from pathlib import Path

import pytest
import torch

from litgpt.data import TextFiles, text_files
from litgpt.data.text_files import cut_up, encode_piece
from litgpt.errors import MissingFile, UserError


def module(folder, tokenizer, length=8, **options):
    data = TextFiles(folder, num_workers=0, **options)
    data.connect(tokenizer, batch_size=2, max_seq_length=length)
    data.prepare_data()
    data.setup()
    return data


def all_tokens(dataset):
    return dataset.store.read(dataset.start, dataset.end).tolist()


def test_files_are_documents_in_the_order_of_their_names(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_text("second one\n")
    (tmp_path / "a.txt").write_text("  first one")
    (tmp_path / "c.md").write_text("not read")
    (tmp_path / "d.txt").write_text("\n \n")
    data = module(tmp_path, tokenizer)
    expected = [*tokenizer.ids("first one"), tokenizer.eos_id, *tokenizer.ids("second one"), tokenizer.eos_id]
    assert all_tokens(data.train_dataset) + all_tokens(data.val_dataset) == expected
    assert data.train_dataset.store.documents.tolist() == [0, 10]


def test_documents_begin_with_one_bos_where_the_tokenizer_wants_it(tmp_path, with_bos):
    (tmp_path / "a.txt").write_text("plain text")
    (tmp_path / "b.txt").write_text("<s>with both</s>")
    store = module(tmp_path, with_bos).train_dataset.store
    bos, eos = with_bos.bos_id, with_bos.eos_id
    assert store.read(0, len(store)).tolist() == [bos, *with_bos.ids("plain text"), eos, bos, *with_bos.ids("with both"), eos]


def test_one_small_file_gives_training_and_validation_without_overlap(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    data = module(tmp_path, tokenizer, length=16)
    assert data.train_dataset.end == data.val_dataset.start
    assert len(data.train_dataset) > 10 * len(data.val_dataset) > 0
    seen = max(data.train_dataset._span(len(data.train_dataset) - 1))
    assert seen <= data.val_dataset.start


@pytest.mark.parametrize("n_letters", [3, 5, 40, 300])
def test_texts_shorter_than_a_window_get_shorter_windows(tmp_path, tokenizer, n_letters):
    (tmp_path / "a.txt").write_text("x" * n_letters)
    data = module(tmp_path, tokenizer, length=1024)
    assert len(data.train_dataset) == len(data.val_dataset) == 1
    n_targets = data.train_dataset.length + data.val_dataset.length
    assert n_targets == n_letters + 1 - 2


def test_a_text_of_next_to_nothing_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="only 2 tokens"):
        module(tmp_path, tokenizer)


def test_validation_texts_of_next_to_nothing_are_named(tmp_path, tokenizer):
    (tmp_path / "t.txt").write_text("to train on")
    (tmp_path / "tiny.txt").write_text("x")
    with pytest.raises(UserError) as caught:
        module(tmp_path / "t.txt", tokenizer, val_data_path=tmp_path / "tiny.txt")
    assert str(caught.value) == f"The texts in {tmp_path / 'tiny.txt'} have only 2 tokens, but it takes at least 4. Add text."


def test_a_text_that_cannot_be_read_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    piece = cut_up(tmp_path / "a.txt")[0]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt cannot be read: No such file"):
        encode_piece(piece, tokenizer)


def test_what_may_not_be_read_is_one_sentence(tmp_path, tokenizer, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(UserError, match="its 300 characters are more than a name may have"):
        module(Path("a" * 300), tokenizer)
    (tmp_path / "a.txt").write_text("text")
    for name in ("open", "iterdir"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="may not be read by this user"):
            patch.setattr(Path, name, refused)
            module(tmp_path, tokenizer)


def test_validation_texts_are_read_from_their_own_folder(tmp_path, tokenizer):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "v.txt").write_text("to validate on")
    (tmp_path / "t.txt").write_text("to train on")
    data = module(tmp_path, tokenizer, val_data_path=tmp_path / "val")
    assert tokenizer.decode(all_tokens(data.train_dataset)) == "to train on"
    assert tokenizer.decode(all_tokens(data.val_dataset)) == "to validate on"


def test_a_file_cannot_be_trained_and_validated_on(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(UserError, match="among the training texts and the validation texts"):
        module(tmp_path, tokenizer, val_data_path=tmp_path / "a.txt")


def test_unchanged_texts_are_encoded_once_and_changed_ones_again(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text("some text")
    module(tmp_path, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "ids", None)
        module(tmp_path, tokenizer)
    time.sleep(0.01)
    (tmp_path / "a.txt").write_text("same size")
    data = module(tmp_path, tokenizer)
    assert tokenizer.decode(all_tokens(data.train_dataset) + all_tokens(data.val_dataset)) == "same size"
    assert len(list((tmp_path / ".tokens").iterdir())) == 2


@pytest.mark.parametrize(
    "text", ["line of text\n" * 20, "x" * 200, "größe €" * 30, "\n" * 9 + "é" * 90], ids=["lines", "one", "wide", "mixed"]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_long_files_are_encoded_in_pieces_that_make_up_the_whole(tmp_path, tokenizer, monkeypatch, text, num_workers):
    monkeypatch.setattr(text_files, "PIECE", 32)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    pieces = cut_up(path)
    assert len(pieces) > 1 and all(0 < piece.end - piece.start <= 32 for piece in pieces)
    assert b"".join(path.read_bytes()[piece.start : piece.end] for piece in pieces) == text.encode()
    data = TextFiles(path, num_workers=num_workers)
    data.connect(tokenizer, max_seq_length=8)
    data.setup()
    store = data.train_dataset.store
    assert store.read(0, len(store)).tolist() == [*tokenizer.ids(text.strip()), tokenizer.eos_id]
    assert store.documents.tolist() == [0]


def test_a_long_file_that_is_no_text_is_one_sentence(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(text_files, "PIECE", 32)
    (tmp_path / "a.txt").write_bytes(b"\x80" * 200)  # insides of characters, and never a place to cut
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text: byte 0"):
        module(tmp_path, tokenizer)


def test_line_ends_and_byte_order_marks_of_other_systems_are_not_trained_on(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    ids, starts = encode_piece(cut_up(tmp_path / "a.txt")[0], tokenizer)
    assert tokenizer.decode(ids) == "one\ntwo" and starts == [0]


def test_loaders_yield_windows_in_an_order_of_their_own(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(100)))
    data = module(tmp_path, tokenizer, length=16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(batches, data.train_dataloader(), strict=True))
    assert batches[0].shape == (2, 17)
    order = [row.tolist() for batch in batches for row in batch]
    assert order != sorted(order, key=lambda row: [data.train_dataset[i].tolist() for i in range(len(data.train_dataset))].index(row))
    assert [row.tolist() for batch in data.val_dataloader() for row in batch] == [window.tolist() for window in data.val_dataset]


def test_a_folder_without_texts_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match=r"no \.txt files"):
        module(tmp_path, tokenizer)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.txt").write_text("text")
    with pytest.raises(UserError, match="folders inside are not read"):
        module(tmp_path, tokenizer)
    with pytest.raises(MissingFile, match="no folder"):
        module(tmp_path / "nowhere", tokenizer)


def test_without_a_tokenizer_the_way_out_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="--tokenizer_dir"):
        module(tmp_path, None)


def test_a_length_is_needed(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="max_seq_length"):
        module(tmp_path, tokenizer, length=None)


def test_a_file_that_is_not_utf_8_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"fine so far \xff")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 text: byte 12"):
        module(tmp_path, tokenizer)
