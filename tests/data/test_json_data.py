import csv
import errno
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from jsonargparse import ArgumentParser, set_parsing_settings

from litgpt.data import JSON, Chat, DataModule
from litgpt.data.json_data import SUFFIXES, load_split
from litgpt.data.records import messages_of
from litgpt.errors import MissingFile, UserError

RECORDS = [{"instruction": f"Say {i}.", "input": "" if i % 2 else "loudly", "output": str(i)} for i in range(20)]


def write(path, records=RECORDS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


def compressed(path, suffix):
    content = path.read_bytes()
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path.unlink()
    (path := path.with_name(path.name + suffix)).write_bytes(packed)
    return path


def module(path, tokenizer, **options):
    data = JSON(path, prompt_style="alpaca", **options)
    data.connect(tokenizer, batch_size=2, max_seq_length=400)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_holds_records(tmp_path, suffix):
    assert load_split(write(tmp_path / f"data{suffix}")) == RECORDS


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_may_be_compressed(tmp_path, tokenizer, suffix, packing):
    path = compressed(write(tmp_path / f"train{suffix}"), packing)
    assert load_split(path) == RECORDS
    val = compressed(write(tmp_path / "val.jsonl", RECORDS[:3]), packing)
    data = module(tmp_path, tokenizer)
    assert (data.train_dataset.data, data.val_dataset.data) == (RECORDS, RECORDS[:3])
    assert data.val_dataset.place(1) == f"{val}, line 2"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet.zst"])
@pytest.mark.parametrize("how", ["cut", "other", "long"])
def test_a_compressed_file_that_is_damaged_is_one_sentence(tmp_path, name, how):
    path = tmp_path / name
    path = compressed(write(path.with_suffix("")), path.suffix)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-5], "other": b"plain text", "long": content + b"more"}[how])
    with pytest.raises(UserError, match=f"^{path} cannot be decompressed .*Compress or download it again"):
        load_split(path)


def test_all_frames_of_a_file_are_read(tmp_path):
    lines = [json.dumps(record).encode() + b"\n" for record in RECORDS]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"".join(lines[:9])) + zstandard.compress(b"".join(lines[9:])))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:9])) + gzip.compress(b"".join(lines[9:])))
    assert load_split(tmp_path / "a.jsonl.zst") == load_split(tmp_path / "a.jsonl.gz") == RECORDS


def test_a_table_holds_texts_as_they_are(tmp_path):
    records = [
        {"prompt": 'Say "one", two', "completion": " lines\r\nof text\n"},
        {"prompt": "", "completion": "é\u2028日本"},
        {"prompt": "x" * 200_000, "completion": "007"},
    ]
    limit = csv.field_size_limit()
    data = load_split(write(tmp_path / "a.csv", records))
    assert data == records and csv.field_size_limit() == limit
    assert [record.place for record in data] == [f"{tmp_path / 'a.csv'}, {place}" for place in ("line 2", "line 5", "line 6")]


def test_a_table_may_hold_conversations_as_json(tmp_path):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    [read] = load_split(write(tmp_path / "a.csv", [{"messages": json.dumps(record["messages"])}]))
    assert messages_of(read) == messages_of(record)


def test_keys_that_parquet_adds_are_left_out(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": None}}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call, other]}]
    [read] = load_split(write(tmp_path / "a.parquet", [{"messages": messages}]))
    assert [call["function"]["arguments"] for call in messages_of(read)[1]["tool_calls"]] == [{"x": 1}, {}]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("text", "message"), [("[" * 100_000, "nested too deep"), ("[" + "7" * 5000 + "]", "thousands of digits")])
def test_json_that_python_cannot_read_is_one_sentence(tmp_path, suffix, text, message):
    (path := tmp_path / f"data{suffix}").write_text(text)
    with pytest.raises(UserError, match=f"data{suffix} cannot be read.*{message}"):
        load_split(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_file_may_hold_messages(tmp_path, tokenizer, suffix):
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    data = module(write(tmp_path / f"data{suffix}", [record] * 4), tokenizer)
    assert data.train_dataset.example(0) == (record["messages"][:1], "b")


def test_a_single_file_is_split_by_its_seed(tmp_path, tokenizer):
    path = write(tmp_path / "data.json")
    data = module(path, tokenizer, val_split_fraction=0.25)
    train, val = data.train_dataset.data, data.val_dataset.data
    assert len(val) == 5 and sorted([*train, *val], key=str) == sorted(RECORDS, key=str)
    assert module(path, tokenizer, val_split_fraction=0.25).val_dataset.data == val
    assert module(path, tokenizer, val_split_fraction=0.25, seed=1).val_dataset.data != val


def test_without_a_fraction_a_twentieth_is_held_out_and_said(tmp_path, tokenizer, caplog):
    data = module(write(tmp_path / "data.json"), tokenizer)
    assert len(data.val_dataset) == 1
    assert "validating on 0.05" in caplog.text


def test_a_folder_has_its_own_validation_file(tmp_path, tokenizer):
    write(tmp_path / "train.json", RECORDS[:3])
    write(tmp_path / "val.jsonl", RECORDS[3:5])
    data = module(tmp_path, tokenizer)
    assert data.train_dataset.data == RECORDS[:3] and data.val_dataset.data == RECORDS[3:5]
    with pytest.raises(UserError, match="a folder with its own `val` file"):
        module(tmp_path, tokenizer, val_split_fraction=0.1)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(MissingFile, match=r"has no val\.json, val\.jsonl, val\.parquet or val\.csv"):
        module(tmp_path, tokenizer)


def test_a_folder_with_two_train_files_is_refused_for_one_would_be_left_out(tmp_path, tokenizer):
    for name in ("train.json", "train.jsonl.gz", "val.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=r"has train\.json and train\.jsonl\.gz, of which one would be left out"):
        module(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "name, message", [("nowhere.json", "no file or folder"), ("data.tsv", "ends in '.tsv'"), ("data.txt.gz", "'.gz', but.*compressed")]
)
def test_a_path_that_is_no_data_is_refused_before_anything_else(tmp_path, name, message):
    for known in ("data.tsv", "data.txt.gz"):
        (tmp_path / known).write_text("a,b")
    with pytest.raises(UserError, match=message):
        JSON(tmp_path / name).prepare_data()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "", "a.json is empty"),
        ("a.json", "[]", "a.json is empty"),
        ("a.jsonl", "\n \n", "a.jsonl is empty"),
        ("a.json", '[{"instruction": "x", "output": "y"},\n {"instruction" "x"}]', "line 2, column 17"),
        ("a.json", '{"instruction": "x", "output": "y"}', "must hold a list of records, but holds a dict"),
        ("a.json", '{"instruction": "x"}\n{"instruction": "y"}', "name it `.jsonl`"),
        ("a.json", '[{"instruction": "x", "output": "y"}, {"instruction": "x"}]', "a.json, record 2: The key `output` is missing"),
        ("a.jsonl", '\n{"instruction": "x", "output": "y"}\n\n{"output": "y"}\n', "a.jsonl, line 4: The key `instruction` is missing"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{oops}\n', "not valid JSON in line 2, column 2"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n[1]\n', "a.jsonl, line 2: A record must be a mapping"),
        ("a.parquet", "not parquet", "cannot be read as Parquet"),
        ("a.csv", "instruction,output\n", "a.csv is empty"),
        ("a.csv", "instruction,outputs\nx,y\n", "a.csv, line 2: The key `output` is missing"),
        ("a.csv", 'instruction,output\n"x\ny",z\nx,y,z\n', "a.csv, line 4: of its 2 columns it has 3. Put texts with"),
        ("b.csv", "instruction,output\nx\n", "b.csv, line 2: of its 2 columns it has 1. Add commas"),
        ("a.csv", 'instruction,output\nx,"y"z\n', "a.csv is not valid CSV in line 2"),
        ("a.csv", 'instruction,output\nx,"y\n', "a.csv is not valid CSV in line 2"),
        ("a.csv", "output,output\nx,y\n", "names a column twice"),
        ("a.csv", "instruction;output\nx;y\n", "a.csv has ';' between its columns"),
        ("a.csv", "instruction\toutput\nx\ty\n", r"a.csv has '\t' between its columns"),
    ],
)
def test_a_bad_file_is_one_sentence_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        load_split(tmp_path / name)
    assert message in str(caught.value)


@pytest.mark.parametrize("name, place", [("a.json", "record 2"), ("a.jsonl", "line 2"), ("a.parquet", "row 2")])
def test_turns_out_of_order_are_reported_with_their_place(tmp_path, tokenizer, name, place):
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    path = write(tmp_path / name, [{"messages": [question, answer]}, {"messages": [question, question, answer]}])
    with pytest.raises(UserError) as caught:
        module(path, tokenizer)
    assert str(caught.value).startswith(f"{path}, {place}: Message 1 is from 'user', but should be from 'assistant'")


def test_a_bad_record_names_its_file_once(tmp_path, tokenizer):
    path = write(tmp_path / "bad.json", [RECORDS[0], {"instruction": "x"}])
    with pytest.raises(UserError) as caught:
        module(path, tokenizer)
    assert str(caught.value).startswith(f"{path}, record 2: ") and str(caught.value).count("bad.json") == 1


def test_a_fraction_of_0_trains_on_all_and_validates_on_none(tmp_path, tokenizer):
    data = module(write(tmp_path / "data.json"), tokenizer, val_split_fraction=0)
    assert data.train_dataset.data == RECORDS and len(data.val_dataset) == 0
    assert list(data.val_dataloader()) == []
    assert len(module(write(tmp_path / "one.json", RECORDS[:1]), tokenizer, val_split_fraction=0.0).train_dataset) == 1


def test_bytes_that_are_not_utf_8_are_placed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(UserError, match="byte 17"):
        load_split(tmp_path / "a.jsonl")


def test_a_row_of_parquet_is_named(tmp_path):
    write(tmp_path / "a.parquet", [{"instruction": "x", "output": "y"}, {"instruction": "x", "output": None}])
    with pytest.raises(UserError, match="row 2: `output` must be text, but is None"):
        load_split(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [JSON, Chat])
def test_a_record_in_the_place_of_a_path_is_one_sentence(kind):
    with pytest.raises(UserError, match="cannot be read: its 320 characters are more than a name may have"):
        kind(Path(json.dumps(RECORDS[1])[:32] * 10)).prepare_data()


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match="a.jsonl may not be read by this user"):
        load_split(path)
    monkeypatch.setattr(Path, "is_dir", refused)
    with pytest.raises(UserError, match="a.jsonl may not be read by this user"):
        JSON(path).prepare_data()


def refused(path):
    raise PermissionError(errno.EACCES, "Permission denied")


def test_a_date_that_python_lacks_is_one_sentence(tmp_path):
    times = pyarrow.array([2**62], pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["x"], "output": ["y"], "at": times}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet cannot be read as Parquet: date value out of range"):
        load_split(tmp_path / "a.parquet")


def test_byte_order_marks_and_line_separators_inside_texts_are_read(tmp_path):
    record = {"instruction": "one\u2028two", "output": "é"}
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(record, ensure_ascii=False).encode() + b"\r\n")
    assert load_split(tmp_path / "a.jsonl") == [record]


def test_one_record_is_too_few_for_a_single_file(tmp_path, tokenizer):
    with pytest.raises(UserError, match="data.json: There is only 1 sample"):
        module(write(tmp_path / "data.json", RECORDS[:1]), tokenizer)


def test_it_is_made_from_flags(tmp_path):
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataModule | None)
    arguments = ["--data=JSON", f"--data.json_path={tmp_path}", "--data.val_split_fraction=0.1", "--data.prompt_style=alpaca"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert isinstance(data, JSON) and (data.json_path, data.val_split_fraction, data.prompt_style) == (tmp_path, 0.1, "alpaca")
    assert data.mask_prompt is None
