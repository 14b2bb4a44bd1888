"""make test ONLY=tests/test_rows.py: which tokens are learned, from which data, and which rows are refused."""

import json
import os
import shutil
import time
from pathlib import Path

import datasets
import pytest
import torch
from data_rows import chat, damage_png, write_lines
from helpers import audio, image, text, video
from PIL import Image

from collator import BadRow
from evaluation.rows import describe_data, load_rows
from training.arguments import Arguments
from training.selection import select_rows


pytest_plugins = "runs"  # fixtures


def test_labels_are_the_answers_and_the_ends_of_their_turns(collator, photo, sound):
    short = chat(text("Why?"), answer="Because.")
    long = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [audio(sound(1)), image(str(photo)), text("assistant\nWhat?")]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "And then?"},
            {"role": "assistant", "content": [text("It "), text("slept.")]},
        ]
    }
    batch = collator([{**short, "place": "a:1"}, {**long, "place": "a:2"}])
    tokenizer = collator.processor.tokenizer
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert len(batch["input_features"]) == 1 and len(batch["image_grid_thw"]) == 1
    learned = [labels[labels != -100] for labels in batch["labels"]]
    assert [tokenizer.decode(ids) for ids in learned] == ["Because.<|im_end|>", "A cat.<|im_end|>It slept.<|im_end|>"]
    # Every label is the token of its own place, and what stands before each answer is the prompt for it.
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != -100], labels[labels != -100])
        starts = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
        assert all(tokenizer.decode(ids[:i]).endswith("<|im_start|>assistant\n") for i in starts)
    assert (batch["labels"][0][batch["attention_mask"][0] == 0] == -100).all()
    assert (batch["attention_mask"][0] == 0).sum() > 100  # the short row is padded


def test_audio_and_pictures_in_an_answer_are_not_learned(collator, photo, sound):
    """The words of such an answer are, and its pads and markers are not, with fixed and with trimmed tokens."""
    clip, picture, film = audio(sound(1)), image(str(photo)), video([Image.open(photo)] * 2)
    row = chat(text("Which tone?"), answer=[text("This: "), clip, text("and "), picture, film, text("low")])
    row["messages"] += [{"role": "user", "content": [clip]}, {"role": "assistant", "content": "high"}]
    tokenizer = collator.processor.tokenizer
    for audio_tokens in ("fixed", "trimmed"):
        inputs = collator.inputs(row, audio_tokens)
        ids, labels = inputs["input_ids"][0], inputs["labels"][0]
        assert (ids == collator.processor.audio_token_id).sum() == 2 * {"fixed": 150, "trimmed": 50}[audio_tokens]
        assert {"image_grid_thw", "video_grid_thw"} <= inputs.keys()
        learned = labels != -100
        assert torch.equal(ids[learned], labels[learned])
        assert tokenizer.decode(labels[learned]) == "This: and low<|im_end|>high<|im_end|>"


BAD = [
    ("not json", "Expecting value"),
    ('"a text"', "no list of `messages`"),
    ({"messages": []}, "no list of `messages`"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "the last message is from 'user'"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "role 'robot'"),
    (chat(text("hi"), answer=" "), "answer of the assistant is empty"),
    (chat({"type": "smell", "smell": "rose"}), "Content of type 'smell'"),
    (chat("a bare string"), "Content of Python type str"),
    (chat(audio("nowhere.wav")), "there is no file"),
    (chat({"type": "audio", "audoi": "one.wav"}), "an item of type audio has no source"),
    (chat(text("hi<|im_end|>\n<|im_start|>assistant\nyes")), "a text contains <|im_start|>"),
    (chat(text("hi"), answer="<|audio_pad|>"), "a text contains <|audio_pad|>"),
    (chat(text("hi"), answer=[text("<|audio_"), text(""), text("bos|>")]), "a text contains <|audio_bos|>"),
    ({"audio": "bad.jsonl", "text": "yes<|audio_eos|>"}, "a text contains <|audio_eos|>"),
    ({"audio": "bad.jsonl", "text": None}, 'must be a string, got None; write "" where nothing is said'),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "no message of the user before the answer"),
    *((chat(text(f"a {token}")), f"a text contains {token}") for token in ("<|image_pad|>", "<|video_pad|>")),
    (chat(text("<|vision_start|>")), "a text contains <|vision_start|>"),
    ({"messages": [{"role": "system", "content": "<|vision_end|>"}, *chat()["messages"]]}, "contains <|vision_end|>"),
]


def test_bad_rows_are_counted_and_named_before_training(run, tones, tmp_path):
    good = chat(audio("train-0.wav"), text("Which tone?"))
    data = write_lines(tmp_path / "bad.jsonl", [*(row for row, _ in BAD), good])
    shutil.copyfile(tones / "train-0.wav", tmp_path / "train-0.wav")
    with pytest.raises(ValueError) as error:
        run(tmp_path / "out", data=[data], stage="lora")
    lines = str(error.value).splitlines()
    assert lines[0] == f"{len(BAD)} of {len(BAD) + 1} rows cannot be used:"
    for number, (line, (_, message)) in enumerate(zip(lines[1:], BAD, strict=True), start=1):
        assert line.startswith(f"{data}:{number}: ") and message in line
    # Rows that are drawn several times are counted and named once.
    with pytest.raises(ValueError) as again:
        run(tmp_path / "out", data=[data, tones / "train.jsonl"], weights=[0.9, 0.1], stage="lora")
    first, *rest = str(again.value).splitlines()
    assert first == f"{len(BAD)} of {len(BAD) + 17} rows cannot be used:" and sorted(rest) == sorted(lines[1:])
    with pytest.raises(ValueError, match="jsonl:1: there is no audio, so the projector learns nothing"):
        run(tmp_path / "out", data=[write_lines(tmp_path / "text.jsonl", [chat(text("hi"))])])


def test_paths_start_from_the_folder_of_a_dataset(collator, speech, tmp_path):
    (tmp_path / "set" / "clips").mkdir(parents=True)
    shutil.copyfile(speech, tmp_path / "set" / "clips" / "a.wav")
    (tmp_path / "set" / "train.csv").write_text("wav,said\nclips/a.wav,hi\n")
    for source in (tmp_path / "set", f"{tmp_path / 'set'}:train"):
        (row,) = load_rows([str(source)], columns=("wav", "said"))
        assert collator.messages(row)[0]["content"][0]["audio"] == str(tmp_path / "set" / "clips" / "a.wav")


def test_a_class_number_and_a_missing_question_are_no_text(collator):
    with pytest.raises(BadRow, match="must be a string, got 3; .* in the place of the numbers of classes"):
        collator.messages({"audio": "a.wav", "text": 3})
    with pytest.raises(BadRow, match="role 'user' has no content"):
        collator.messages({"messages": [{"role": "user", "content": None}, *chat()["messages"][1:]]})


def read(path: Path, *arguments, **settings) -> list[dict]:
    return [json.loads(row["line"]) for row in load_rows([str(path)], *arguments, **settings)]


@pytest.mark.parametrize("streaming", [False, True])
def test_lines_are_those_of_the_file(tmp_path, streaming):
    """Whatever its name looks like as a pattern, and if its time of change is that of another content."""
    (tmp_path / "a[1].jsonl").write_text('{"n": 1}\r\n\n{"n": "\u2028"}\n')
    (tmp_path / "a1.jsonl").write_text('{"n": 2}')
    os.utime(tmp_path / "a[1].jsonl", (1, 1))
    assert read(tmp_path / "a[1].jsonl", streaming) == [{"n": 1}, {"n": "\u2028"}]
    (tmp_path / "a[1].jsonl").write_text('{"n": 3}')
    os.utime(tmp_path / "a[1].jsonl", (1, 1))
    assert read(tmp_path / "a[1].jsonl", streaming) == [{"n": 3}]


def test_columns_of_lines_are_those_that_are_named(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"audio": "a.wav", "text": "wrong", "said": "b"}, {"text": "c", "n": 1}])
    rows = read(path, False, ("audio", "said"))
    assert rows == [{"audio": "a.wav", "text": "b"} | {"said": "b"}, {"n": 1}]
    with pytest.raises(ValueError, match=r"No line of .*a\.jsonl has the column acent"):
        read(path, keep=("n", "acent"))
    path.write_bytes(b'{"n": 1}\n{"n": "\xe9"}')
    with pytest.raises(ValueError, match="must be JSON lines in UTF-8; line 2 is not"):
        read(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_undecodable_audio_is_an_error_or_left_out_by_name(run, tones, tmp_path, streaming):
    shutil.copytree(tones, tmp_path, dirs_exist_ok=True)
    (tmp_path / "train-2.wav").write_bytes(b"this is no sound")
    more = {"data": [tmp_path / "train.jsonl"], "streaming": streaming, "max_steps": 4}
    with pytest.raises(ValueError, match=r"train\.jsonl:3: .*train-2\.wav"):
        run(tmp_path / "out", **more)
    summary = run(tmp_path / "left-out", **more, skip_bad_rows=True)
    assert (summary["rows"], summary["steps"]) == (None if streaming else 15, 4)


def save_chats(rows: list[dict], folder: Path):
    """Saves rows of `messages` by `datasets`, which keeps audio and pictures as the bytes of their files."""
    item = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    item |= {"audio": datasets.Audio(), "image": datasets.Image()}
    message = {"role": datasets.Value("string"), "content": datasets.List(item)}
    features = datasets.Features({"id": datasets.Value("int64"), "messages": datasets.List(message)})
    datasets.Dataset.from_list([{"id": 1, **row} for row in rows], features=features).save_to_disk(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_that_no_decoder_reads_are_left_out_by_name(run, tones, photo, tmp_path, streaming):
    clip = (tones / "train-0.wav").read_bytes()
    pictures = [image({"bytes": picture}) for picture in (photo.read_bytes(), damage_png(photo.read_bytes()))]
    chats = [chat(audio({"bytes": clip}), picture, answer=[text("low")]) for picture in pictures]
    save_chats(chats, tmp_path / "saved")
    more = {"data": [tmp_path / "saved"], "streaming": streaming, "max_steps": 2, "per_device_train_batch_size": 1}
    with pytest.raises(ValueError, match="saved:2: SyntaxError: broken PNG file"):
        run(tmp_path / "out", **more)
    assert run(tmp_path / "left-out", **more, skip_bad_rows=True)["rows"] == (None if streaming else 1)


def test_files_of_other_editors(collator, tmp_path, speech):
    """A mark of UTF-8, blank lines and Windows' ends of lines are read; what is no UTF-8 or empty is said."""
    line = json.dumps(chat(audio(str(speech)), text("Tone?")))
    for number, content in enumerate((f"\ufeff{line}\n", f"\n{line}\r\n\r\n", f"{line}\n \n\n")):
        path = write_lines(tmp_path / f"{number}.jsonl", [content.encode()])
        for streaming in (False, True):
            (row,) = load_rows([str(path)], streaming)
            assert collator.messages(row)[-1]["content"] == "low"
            assert row["place"] == f"{path}:{2 if number == 1 else 1}"
    utf_16, array = line.encode("utf-16"), f"[\n{line}\n]\n".encode()
    for content, message in (
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (utf_16, "must be JSON lines in UTF-8"),
        (array, "is a JSON array; expected an object on each line"),
    ):
        with pytest.raises(ValueError, match=message):
            load_rows([str(write_lines(tmp_path / "bad.jsonl", [content]))])
    deep = write_lines(tmp_path / "deep.jsonl", ['{"messages": ' + "[" * 10**5 + "]" * 10**5 + "}"])
    (row,) = load_rows([str(deep)])
    with pytest.raises(BadRow, match="deep.jsonl:1: maximum recursion depth"):
        collator.messages(row)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_datasets(run, collator, tones, photo, tmp_path, streaming):
    """Arrow fills missing keys with None; sound and pictures come as the bytes of their files."""
    content = [audio(str(tones / "train-1.wav")), image(str(photo)), text("Which tone?")]
    row = chat(*content, answer=[text("middle")])
    save_chats([row] * 4, tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    datasets.load_from_disk(tmp_path / "saved").to_parquet(tmp_path / "parquet" / "train.parquet")

    expected = collator.inputs({**row, "place": "here:1"})
    for source in (tmp_path / "saved", tmp_path / "parquet"):
        loaded = load_rows([str(source)], streaming)
        assert isinstance(loaded, datasets.IterableDataset) == streaming
        first = next(iter(loaded))
        assert first["place"] == f"{source}:1"
        inputs = collator.inputs(first)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert run(tmp_path / "out", data=[tmp_path / "parquet"], streaming=streaming, max_steps=2)["steps"] == 2
    for name in ("train.parquet", "train.jsonl.gz"):
        (tmp_path / name).write_bytes((tmp_path / "parquet" / "train.parquet").read_bytes())
        with pytest.raises(ValueError, match=f"{name} is not named .jsonl or .json.* into a folder of its own"):
            load_rows([str(tmp_path / name)], streaming)
    with pytest.raises(ValueError, match="The column place is where rows are told apart"):
        load_rows([str(tmp_path / "saved")], streaming, keep=("place",))
    with pytest.raises(ValueError, match="has columns id; expected `messages`"):
        datasets.Dataset.from_list([{"id": 1}]).save_to_disk(tmp_path / "other")
        load_rows([str(tmp_path / "other")])


def test_rows_are_grouped_by_their_length(run, settings, collator, tmp_path):
    args = Arguments(**settings(tmp_path, train_sampling_strategy="group_by_length"))
    dataset = select_rows(load_rows(args.data), collator, args)
    assert dataset["length"] == [collator.inputs(row)["input_ids"].shape[1] for row in dataset]
    assert len(set(dataset["length"])) > 3
    assert run(tmp_path, train_sampling_strategy="group_by_length", max_steps=2)["steps"] == 2


def test_rows_have_their_length(run, settings, collator, tones, tmp_path, monkeypatch):
    grouped = {"train_sampling_strategy": "group_by_length", "length_column_name": "seconds"}
    lines = [json.loads(line) for line in (tones / "train.jsonl").read_text().splitlines()]
    for line, seconds in zip(lines, range(len(lines), 0, -1), strict=True):
        line["seconds"] = seconds / 2
    timed = write_lines(tones / "timed.jsonl", lines)  # beside the clips
    args = Arguments(**settings(tmp_path, **grouped, data=[timed]))
    with monkeypatch.context() as patched:
        patched.setattr(collator, "inputs", None)  # no file is opened
        dataset = select_rows(load_rows(args.data), collator, args)
    assert dataset["seconds"] == [line["seconds"] for line in lines]
    assert run(tmp_path / "out", **grouped, data=[timed], max_steps=2)["steps"] == 2
    recordings = {"audio": [str(tones / f"train-{number}.wav") for number in range(16)], "text": ["a tone"] * 16}
    recordings["seconds"] = [line["seconds"] for line in lines]
    datasets.Dataset.from_dict(recordings).save_to_disk(tmp_path / "recordings")
    columns = load_rows([str(tmp_path / "recordings")], columns=("audio", "text"), keep=("seconds",))
    assert select_rows(columns, collator, args)["seconds"] == dataset["seconds"]
    both = datasets.concatenate_datasets([load_rows(args.data), columns])
    assert select_rows(both, collator, args)["seconds"] == [*dataset["seconds"]] * 2
    for wrong in (None, True, -1, "long", float("nan")):
        write_lines(timed, [lines[0], {**lines[1], "seconds": wrong}])
        with pytest.raises(ValueError, match=r"1 of 2 rows.*\n.*timed.jsonl:2: the length `seconds` is"):
            select_rows(load_rows(args.data), collator, args)


def test_the_revision_of_a_set_of_the_hub_is_known(tmp_path, monkeypatch):
    """Without a network `datasets` takes the revision that it downloaded last."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.Dataset.from_list([{"text": "one"}]).to_parquet(tmp_path / "data" / "train.parquet")
    built = datasets.load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "built"))
    for number, revision in enumerate(("0" * 40, "1" * 40)):
        folder = tmp_path / "cache" / "someone___a-set" / "default" / "0.0.0" / revision
        shutil.copytree(Path(built.cache_files[0]["filename"]).parent, folder)
        os.utime(folder, (number, number))
        assert describe_data(["someone/a-set"]) == [{"name": "someone/a-set", "revision": revision}]


def test_many_rows_are_described_in_seconds(tmp_path):
    rows = (chat(audio(f"clips/{number}.wav"), text("Which tone?")) for number in range(20_000))
    odd = ["{", "[" * 9_999, "7", {"messages": 7}, {"messages": [7]}]
    data = write_lines(tmp_path / "data.jsonl", [*rows, *odd])
    start = time.perf_counter()
    (described,) = describe_data([str(data)])
    assert time.perf_counter() - start < 5
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "19999.wav").touch()
    (again,) = describe_data([str(data)])
    assert described["sha256"] == again["sha256"] and described["files"] != again["files"]
