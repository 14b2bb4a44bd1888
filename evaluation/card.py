"""
Scores in the card of a folder, and for the leaderboards of the Hub: written there from predictions, which are copied
beside them, and checked by them.
"""

import json
import shutil
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

from evaluation.leaderboard import BENCHMARK
from evaluation.scoring import ALL, AS_GIVEN, read_folder, score, score_arms, table
from publishing.card import ENTRIES, EVALUATION, replace_section, save_card
from publishing.check import check_sizes
from publishing.paths import weights_of


METRICS = {  # task and name that the Hub shows
    "wer": ("automatic-speech-recognition", "WER"),
    "cer": ("automatic-speech-recognition", "CER"),
    "exact_match": ("any-to-any", "Exact match"),
}


def list_results(scores: dict, manifest: dict) -> list[EvalResult]:
    """
    The Hub's evaluation metadata, in percent: the exact answers where they are classes or JSON, else word and character
    error rates. Figures of a user's function are not there, because `check` cannot compute them again.
    """
    sources = ", ".join(source["name"] for source in manifest["data"])
    results = []
    for group, figures in scores["arms"][AS_GIVEN].items():
        for metric in ("wer", "cer") if figures["kind"] == "text" else ("exact_match",):
            rate = figures["exact" if metric == "exact_match" else metric]["value"]
            if rate is not None:
                task, title = METRICS[metric]
                config = None if group == ALL else group  # tells the groups of a set apart
                dataset = {"dataset_type": sources, "dataset_name": sources, "dataset_config": config}
                shown = {"metric_type": metric, "metric_name": title, "metric_value": round(100 * rate, 2)}
                results.append(EvalResult(task_type=task, **dataset, **shown))
    return results


def list_entries(rows: list[dict], manifest: dict) -> list[EvalResultEntry]:
    """
    The WER of each whole set of the Open ASR Leaderboard that was asked for, in percent, and their mean if all were. A
    set with a failed row, a part of one (`--limit`) and local files of that name do not count.
    """
    entries, common = [], {"dataset_id": BENCHMARK["id"], "date": manifest["date"][:10]}
    is_whole = manifest.get("limit", 0) is None  # manifests of earlier releases do not tell
    for source in manifest["data"] if is_whole else ():
        identifier, _, name = source["name"].partition(":")
        if identifier != BENCHMARK["id"] or name not in BENCHMARK["tasks"] or "revision" not in source:
            continue
        scores = score([row for row in rows if row["place"].rpartition(":")[0] == source["name"]])
        if scores["wer"]["value"] is not None and not scores["failed"]:
            common["dataset_revision"] = source["revision"]
            percent = round(100 * scores["wer"]["value"], 2)
            entries.append(EvalResultEntry(task_id=BENCHMARK["tasks"][name], value=percent, **common))
    if {entry.task_id for entry in entries} == set(BENCHMARK["tasks"].values()):
        mean = round(sum(entry.value for entry in entries) / len(entries), 2)
        entries.insert(0, EvalResultEntry(task_id=BENCHMARK["mean"], value=mean, **common))
    return entries


def write_section(scores: dict, manifest: dict) -> str:
    """The scores as a section of the card."""
    origin = f"{', '.join(source['name'] for source in manifest['data'])}, {manifest['date'][:10]}"
    rule = f"{scores['rule']['normalizer']}, {scores['rule']['alignment']}"
    details = f"On {origin}. Rule: {rule}; intervals are of 95%. The answers are in `{EVALUATION}/`."
    return f"## Scores\n\n{table(scores)}\n{details}\n"


def read_results(folder: Path, results: Path) -> tuple[dict, dict, str]:
    """
    Reads predictions of the model in a folder, and scores them again. Returns their manifest, their scores, and what
    [`list_entries`] gives as YAML. Raises a ValueError if they are not all there or too large, are of other weights
    than those of the folder, or give other scores than those beside them.
    """
    if missing := [name for name in ("manifest.json", "scores.json") if not (results / name).is_file()]:
        raise ValueError(f"{results} has no {' and no '.join(missing)}; `python -m evaluation` writes them")
    check_sizes(results)
    manifest, stored = (json.loads((results / name).read_text()) for name in ("manifest.json", "scores.json"))
    predicted, weights = manifest["model"]["weights"], weights_of(folder)
    if predicted != weights:
        raise ValueError(f"the predictions in {results} are of other weights: {predicted}, but {folder} has {weights}")
    predictions = read_folder(results)
    rows = len(predictions[AS_GIVEN])
    if manifest["rows"] != rows:
        run = f"{manifest['rows']} rows" if manifest["rows"] else "an unfinished run"
        raise ValueError(f"{results} has {rows} predictions of {run}; `python -m evaluation predict` goes on with it")
    scores = json.loads(json.dumps(score_arms(predictions)))
    if difference := first_difference(stored.get("arms"), scores["arms"]):
        place, says, gives = difference
        raise ValueError(f"{results / 'scores.json'} says {place} = {says}, but its predictions give {gives}")
    entries = eval_result_entries_to_yaml(list_entries(predictions[AS_GIVEN], manifest))
    return manifest, {**scores, "rule": stored["rule"]}, yaml.safe_dump(entries, sort_keys=False) if entries else ""


def first_difference(one, other, place: str = "") -> tuple | None:
    """
    The first place in which two trees of dicts differ, with both values; None if they are equal. The figures of a
    user's function do not count, because only its owner can compute them again.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        names = [name for name in dict.fromkeys([*one, *other]) if name != "metrics"]
        differences = (first_difference(one.get(name), other.get(name), f"{place}/{name}") for name in names)
        return next(filter(None, differences), None)
    return None if one == other else (place.strip("/"), one, other)


def add_results(folder: Path, results: Path):
    """
    Copies predictions into a folder, and writes their scores into its card and for the leaderboard, unless
    [`read_results`] raises an error.
    """
    manifest, scores, entries = read_results(folder, results)
    shutil.rmtree(folder / EVALUATION, ignore_errors=True)
    (folder / EVALUATION).mkdir()
    for path in (*results.glob("predictions*.jsonl"), results / "manifest.json", results / "scores.json"):
        shutil.copyfile(path, folder / EVALUATION / path.name)
    (folder / ENTRIES).unlink(missing_ok=True)
    if entries:
        (folder / ENTRIES).parent.mkdir(exist_ok=True)
        (folder / ENTRIES).write_text(entries, encoding="utf-8")
    card = ModelCard.load(folder / "README.md")
    card.data.model_name = manifest["model"]["name"]
    card.data.eval_results = list_results(scores, manifest)
    card.text = replace_section(card.text, "results", write_section(scores, manifest))
    save_card(folder, card)


def check_results(folder: Path) -> str:
    """
    Scores the predictions of a folder again, and returns what was compared. Raises a ValueError if the figures of the
    card or for the leaderboard are not those that the predictions give, or as [`read_results`].
    """
    card = ModelCard.load(folder / "README.md")
    manifest, scores, entries = read_results(folder, folder / EVALUATION)
    expected = list_results(scores, manifest)
    in_card, right = (
        {(result.dataset_config or "all rows", result.metric_type, result.metric_value) for result in results}
        for results in (card.data.eval_results or [], expected)
    )
    if wrong := in_card ^ right:
        figures = "; ".join(f"{metric} of {group}: {value}" for group, metric, value in sorted(wrong))
        raise ValueError(f"the metadata of README.md and the predictions in {EVALUATION}/ differ: {figures}")
    if replace_section(card.text, "results", write_section(scores, manifest)) != card.text:
        raise ValueError(f"the table of scores in README.md is not what the predictions in {EVALUATION}/ give")
    if entries != ((folder / ENTRIES).read_text(encoding="utf-8") if (folder / ENTRIES).is_file() else ""):
        raise ValueError(
            f"{ENTRIES} is not what the predictions in {EVALUATION}/ give, which is {entries or 'no file'}"
        )
    return f"{manifest['rows']} predictions of these weights give the {len(expected)} figures of the card"
