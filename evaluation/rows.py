"""JSON lines, or datasets of the Hub or of a folder -> rows that `ChatCollator` takes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import datasets

from collator import RECORDING, items_of, names_file, names_lines
from content_items import normalize_conversations
from publishing.paths import resolve, sha256


def load_rows(
    sources: list[str],
    streaming: bool = False,
    columns: tuple[str, str] | None = None,
    keep: tuple[str, ...] = (),
    weights: list[float] | None = None,
    seed: int = 0,
):
    """
    Loads JSON lines files, folders that `datasets` saved, and datasets by their Hub id or folder, written `NAME`,
    `NAME:SPLIT` or `NAME:CONFIGURATION:SPLIT`.

    `columns` are a column of recordings (files as bytes or paths) and one of their transcripts, where there are no
    `messages`. `keep` are further columns to keep; rows of JSON lines keep all that they have. With `weights`, one for
    each source, rows are drawn from the sources at random in these proportions, until each row was drawn at least once;
    the same seed draws the same. Without them the sources follow each other.

    Returns a dataset of `datasets` with columns `line` (JSON text), `messages`, or `audio` and `text`, those to keep,
    and `place`, which names the row in messages. Raises a ValueError if a source is not there, or has no such columns.
    """
    if "place" in keep:
        raise ValueError("The column place is where rows are told apart in messages; rename that of the data.")
    parts = []
    for source in sources:
        is_lines = names_lines(source)
        load = load_lines if is_lines else load_dataset
        rows = load(source, streaming, columns, keep)
        if streaming:
            rows = rows.map(lambda _, index, source=source: {"place": f"{source}:{index + 1}"}, with_indices=True)
        else:
            rows = rows.add_column("place", [f"{source}:{index + 1}" for index in range(len(rows))])
        if is_lines:  # blank lines are left out once each row has the number of its line
            rows = rows.filter(lambda row: row["line"].strip("\ufeff \t"))
        parts.append(rows)
    if weights is None:
        return datasets.concatenate_datasets(parts)
    shares = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="all_exhausted")


def load_lines(source: str, streaming: bool, columns: tuple[str, str] | None, keep: tuple[str, ...]):
    # As text: Arrow would give every content item the keys of all others, filled with None.
    if "://" in source:
        rows = datasets.load_dataset("text", data_files=source, split="train", streaming=streaming)
        rows = rows.rename_column("text", "line")
    else:
        # `datasets` would tell files by name, which it reads as a pattern, and time of change.
        content = {"path": source, "checksum": check_lines(source, keep)}
        dataset = datasets.IterableDataset if streaming else datasets.Dataset
        rows = dataset.from_generator(
            read_lines, datasets.Features({"line": datasets.Value("string")}), gen_kwargs=content
        )
    if columns and columns != RECORDING:
        rows = rows.map(partial(rename_keys, columns=columns), input_columns="line")
    return rows


def read_lines(path: str, checksum: str) -> Iterator[dict[str, str]]:
    """Yields the lines of a file. `datasets` takes the checksum into the name of what it caches."""
    with open(path, encoding="utf-8", newline="\n") as file:
        yield from ({"line": line.rstrip("\r\n")} for line in file)


def check_lines(source: str, keep: tuple[str, ...]) -> str:
    """
    Returns the checksum of a local file of JSON lines. Raises a ValueError if it is not there, empty or not UTF-8, or
    if none of its lines has a column to keep.
    """
    if not Path(source).is_file():
        raise ValueError(f"There is no file {source}.")
    digest, is_empty, missing = hashlib.sha256(), True, {*keep}
    with open(source, "rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            is_empty = is_empty and not line.strip()
            if number == 1 and line.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
                raise ValueError(f"{source} is a JSON array; expected an object on each line, as `jq -c '.[]'` writes.")
            if b"\0" in line:
                raise ValueError(f"{source} must be JSON lines in UTF-8; it holds zero bytes, as UTF-16 does.")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{source} must be JSON lines in UTF-8; line {number} is not: {error}.") from error
            missing = {name for name in missing if json.dumps(name) not in text and f'"{name}"' not in text}
    if is_empty:
        raise ValueError(f"{source} is empty; expected a JSON object with `messages` on each line.")
    if missing:
        raise ValueError(f"No line of {source} has the column {', '.join(sorted(missing))}.")
    return digest.hexdigest()


def rename_keys(line: str, columns: tuple[str, str]) -> dict[str, str]:
    """Puts the recording and the transcript of a line, but of no others, under the usual names."""
    try:
        row = json.loads(line.lstrip("\ufeff"))
        named = {usual: row[name] for usual, name in zip(RECORDING, columns, strict=True) if name in row}
        others = {name: value for name, value in row.items() if name not in RECORDING}
        return {"line": json.dumps(others | named)}
    except (ValueError, TypeError, AttributeError, RecursionError):  # no object, which is reported when it is read
        return {"line": line}


def load_dataset(source: str, streaming: bool, columns: tuple[str, str] | None, keep: tuple[str, ...]):
    if (Path(source) / "state.json").is_file():
        rows = datasets.load_from_disk(source)
        rows = rows.to_iterable_dataset() if streaming else rows
    else:
        name, *configuration, split = split_source(source)
        rows = datasets.load_dataset(name, *configuration, split=split or "train", streaming=streaming)
    features, needed = rows.features or {}, columns or ("messages",)
    if missing := [f"`{name}`" for name in (*needed, *keep) if name not in features]:
        advice = "" if columns else " --audio-column and --text-column name recordings and transcripts."
        raise ValueError(f"{source} has columns {', '.join(features)}; expected {' and '.join(missing)}.{advice}")
    rows = rows.select_columns(list(dict.fromkeys([*needed, *keep])))
    for name, feature in rows.features.items():
        if (stored := without_decoding(feature)) != feature:
            rows = rows.cast_column(name, stored)
    if columns and columns != RECORDING:
        rows = rows.rename_columns(dict(zip(columns, RECORDING, strict=True)))
    return rows


def split_source(source: str) -> list[str]:
    """The name, the configuration if any, and the split. Raises a ValueError if the name is a path to nothing."""
    parts = source.split(":") if ":" in source else [source, "train"]
    if parts[0].startswith((".", "/", "~")) and not Path(parts[0]).exists():
        raise ValueError(f"There is no file or folder {parts[0]}.")
    if Path(parts[0]).is_file():
        advice = "put a file of another kind into a folder of its own, and give the folder."
        raise ValueError(f"{parts[0]} is not named .jsonl or .json, as files of JSON lines are; {advice}")
    return parts


def without_decoding(feature):
    """The same feature with audio and pictures left as the bytes of their files, which the processor decodes."""
    if isinstance(feature, (datasets.Audio, datasets.Image)):
        return type(feature)(decode=False)
    if isinstance(feature, dict):
        return {name: without_decoding(part) for name, part in feature.items()}
    if isinstance(feature, datasets.List):
        return datasets.List(without_decoding(feature.feature))
    return feature


def describe_data(sources: list[str], columns: tuple[str, str] | None = None) -> list[dict[str, str]]:
    """
    Describes sources so that other content under the same names differs. Files that rows name are not opened.

    Returns for each source its `name` without the folders above it, and what is known of it: `sha256` of a local file
    of JSON lines; `fingerprint`, by `datasets`, of a folder that it saved; `revision` of a dataset of the Hub; `files`,
    a checksum over names, sizes in bytes and times of change in seconds: of the files that the rows of JSON lines name,
    or that a local dataset consists of.
    """
    names = (Path(source).name if Path(source).exists() else source for source in sources)
    return [{"name": name, **identify(source, columns)} for name, source in zip(names, sources, strict=True)]


def identify(source: str, columns: tuple[str, str] | None) -> dict[str, str]:
    path = Path(source)
    if names_lines(source):
        if not path.is_file():
            return {}
        digest, names = hashlib.sha256(), set()
        with path.open("rb") as lines:
            for line in lines:
                digest.update(line)
                names.update(named_files(line, columns or RECORDING))
        return {"sha256": digest.hexdigest(), "files": checksum_of_files(path.parent, names)}
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
        return {"fingerprint": state["_fingerprint"], "files": checksum_of_files(path, names)}
    name, *configuration, _ = split_source(source)
    builder = datasets.load_dataset_builder(name, *configuration)
    if not Path(name).exists():
        return {"revision": builder.hash}
    paths = (file for files in builder.config.data_files.values() for file in files)
    return {"files": checksum_of_files(Path(name), (os.path.relpath(file, name) for file in paths))}


def named_files(line: bytes, columns: tuple[str, str]) -> Iterator[str]:
    """The local files that a line of JSON names: what `ChatCollator` looks for beside the source."""
    try:
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
        recording = {"role": "user", "content": [{"type": "audio", "audio": row.get(columns[0])}]}
        (messages,), _ = normalize_conversations([recording, *(row.get("messages") or [])])
        yield from (item[item["type"]] for message in messages for item in items_of(message) if names_file(item))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # a bad row, which is refused where it is read


def checksum_of_files(folder: Path, names: Iterable[str]) -> str:
    """Takes the names, sizes and times of change of files; whole seconds, as archives keep no more."""
    digest = hashlib.sha256()
    for name in sorted(names):
        try:
            stat = os.stat(os.path.join(folder, name))
            facts = [name, stat.st_size, int(stat.st_mtime)]
        except (OSError, ValueError):
            facts = [name]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def describe_model(source: str) -> dict:
    """
    Describes a model or adapter by its folder or Hub id: its name, its commit, and the checksums of its weights, code
    and settings by file name.
    """
    origin = resolve(source)
    patterns = {"weights": ["*.safetensors"], "code": ["*.py"], "settings": ["*.json", "*.jinja"]}
    content = {
        what: {file.name: sha256(file) for each in endings for file in sorted(origin.folder.glob(each))}
        for what, endings in patterns.items()
    }
    return {"name": origin.name, "revision": origin.commit, **content}


def describe_changes(name: str, then, now) -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*then, *now])
        return [text for key in keys for text in describe_changes(f"{key} of {name}", then.get(key), now.get(key))]
    return [f"{name} was {then!r}, is {now!r}"] if then != now else []


def list_changes(then: dict, now: dict, names: tuple[str, ...], data: str) -> list[str]:
    """
    Compares what two runs wrote down: the values under some names, and the descriptions of their data by
    [`describe_data`]. What only one of the descriptions knows does not count. Returns the differences in words.
    """
    then, now = (json.loads(json.dumps(each)) for each in (then, now))  # JSON has no tuples
    # A run of an earlier release did not write all down.
    changes = [text for name in names if name in then for text in describe_changes(name, then[name], now[name])]
    before, after = ([source["name"] for source in each[data]] for each in (then, now))
    if before != after:
        return [*changes, f"data was {', '.join(before)}, is {', '.join(after)}"]
    for old, new in zip(then[data], now[data], strict=True):
        differing = [key for key in new if key in old and old[key] != new[key]]
        changes += [f"{key} of {old['name']} was {old[key]}, is {new[key]}" for key in differing]
    return changes
