"""The model card of a folder: the facts of its build, and the scores of predictions that lie beside it."""

import json
import re
import shutil
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from configuration_qwen2_audio_vl import tokens_per_window
from publishing.paths import CHECKSUMS, ROOT, read_checksums, write_checksums


EVALUATION = "evaluation"  # the folder of the predictions that the card's scores come from
# Bytes of the files that `check` reads whole, of strangers as well; all files that fit a name count together.
LARGEST = {
    **{"README.md": 2**18, "config.json": 2**20, CHECKSUMS: 2**20},
    **{"manifest.json": 2**20, "scores.json": 2**24, "predictions*.jsonl": 2**28},
}
METRICS = {  # task and name that the Hub shows
    "wer": ("automatic-speech-recognition", "WER"),
    "cer": ("automatic-speech-recognition", "CER"),
    "accuracy": ("any-to-any", "Accuracy"),
}
FACTS = r"<!-- facts of the build -->\n(?:.+\n)+"
RESULTS = r"<!-- results -->\n(?:.*\n)*?<!-- end of results -->\n"


def make_card(origins: dict, is_trained: bool, tensors, config, feature_extractor) -> ModelCard:
    """The project's README, with the facts of a build in the place of the paragraph about its source."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    untrained = "**The projector is untrained: answers about audio mean nothing until it is trained.**"
    facts = ["The projector is trained." if is_trained else untrained, ""]
    for role, (_, name, commit) in origins.items():
        facts.append(f"- {role}: {name}" + (f" at commit `{commit}`" if commit else " (a directory)"))
    parameters, size = sum(tensor.numel() for tensor in tensors.values()), sum(t.nbytes for t in tensors.values())
    facts.append(f"- {parameters:,} parameters in {str(config.dtype).removeprefix('torch.')}, {size / 1e9:.2f} GB")
    window = f"{feature_extractor.chunk_length} s, {config.text_config.max_position_embeddings:,} positions"
    facts.append(f"- {tokens_per_window(feature_extractor):,} audio tokens for each window of {window}")
    card = ModelCard(re.sub(FACTS, lambda _: "\n".join(facts) + "\n", text))
    card.data.base_model = [origin.name for origin in origins.values() if origin.commit] or None
    card.data.base_model_relation = card.data.base_model_relation if card.data.base_model else None
    return card


def list_results(scores: dict, manifest: dict) -> list[EvalResult]:
    """The Hub's evaluation metadata, in percent: the accuracy of closed answers, or word and character error rates."""
    from evaluation.scoring import AS_GIVEN

    sources = ", ".join(source["name"] for source in manifest["data"])
    results = []
    for group, found in scores["arms"][AS_GIVEN].items():
        for metric in ("accuracy",) if "accuracy" in found else ("wer", "cer"):
            task, title = METRICS[metric]
            if found[metric]["value"] is not None:
                results.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=sources,
                        dataset_name=sources,
                        dataset_config=None if group == "all" else group,  # tells the groups of a set apart
                        metric_type=metric,
                        metric_name=title,
                        metric_value=round(100 * found[metric]["value"], 2),
                    )
                )
    return results


def write_section(scores: dict, manifest: dict) -> str:
    """The scores as a section of the card, between two marks."""
    from evaluation.scoring import table

    origin = f"{', '.join(source['name'] for source in manifest['data'])}, {manifest['date'][:10]}"
    rule = f"{scores['rule']['normalizer']}, {scores['rule']['alignment']}"
    lines = ["<!-- results -->", "## Scores", "", table(scores)]
    lines.append(f"On {origin}. Rule: {rule}; intervals are of 95%. The answers are in `{EVALUATION}/`.")
    return "\n".join([*lines, "<!-- end of results -->"]) + "\n"


def weights_of(folder: Path) -> dict[str, str]:
    return {name: sum for name, sum in read_checksums(folder).items() if name.endswith(".safetensors")}


def check_sizes(folder: Path):
    """
    Raises:
        ValueError: naming a file of a folder that is too large to be read whole, its size and the limit.
    """
    for pattern, limit in LARGEST.items():
        paths = sorted(folder.glob(pattern))
        size = sum(path.stat().st_size for path in paths)
        if size > limit:
            names = ", ".join(map(str, paths))
            raise ValueError(f"{names}: {size:,} bytes are past the limit of {limit:,} for {pattern}; make it smaller")


def read_results(folder: Path, results: Path) -> tuple[dict, dict]:
    """
    The manifest of predictions and the scores that they give.

    Raises:
        ValueError: if they are not all there or are too large, are of other weights than those of the folder, or give
            other scores than those beside them.
    """
    from evaluation.scoring import AS_GIVEN, read_folder, score_arms

    if missing := [name for name in ("manifest.json", "scores.json") if not (results / name).is_file()]:
        raise ValueError(
            f"{results} has no {' and no '.join(missing)}; `python -m evaluation predict` and `score` write them"
        )
    check_sizes(results)
    manifest, stored = (json.loads((results / name).read_text()) for name in ("manifest.json", "scores.json"))
    made, weights = manifest["model"]["weights"], weights_of(folder)
    if made != weights:
        raise ValueError(f"the predictions in {results} are of other weights: {made}, but {folder} has {weights}")
    predictions = read_folder(results)
    rows = len(predictions[AS_GIVEN])
    if manifest["rows"] != rows:
        whole = f"{manifest['rows']} rows" if manifest["rows"] else "an unfinished run"
        raise ValueError(
            f"{results} has {rows} predictions of {whole}; run `python -m evaluation predict` again, which goes on"
        )
    scores = json.loads(json.dumps(score_arms(predictions)))
    for place, (found, given) in differences(stored.get("arms"), scores["arms"]).items():
        raise ValueError(f"{results / 'scores.json'} says {place} = {found}, but its predictions give {given}")
    return manifest, {**scores, "rule": stored["rule"]}


def differences(one, other, place: str = "") -> dict[str, tuple]:
    """The places in which two trees of dicts differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = dict.fromkeys([*one, *other])
        return {
            p: d for name in names for p, d in differences(one.get(name), other.get(name), f"{place}/{name}").items()
        }
    return {} if one == other else {place.strip("/"): (one, other)}


def add_results(folder: Path, results: Path):
    """
    Puts predictions into a folder, and their scores into its card.

    Raises:
        ValueError: as [`read_results`], before anything is written.
    """
    manifest, scores = read_results(folder, results)
    shutil.rmtree(folder / EVALUATION, ignore_errors=True)
    (folder / EVALUATION).mkdir()
    for path in (*results.glob("predictions*.jsonl"), results / "manifest.json", results / "scores.json"):
        shutil.copyfile(path, folder / EVALUATION / path.name)
    card = ModelCard.load(folder / "README.md")
    card.data.model_name = manifest["model"]["name"]
    card.data.eval_results = list_results(scores, manifest)
    section = write_section(scores, manifest)
    text = re.sub(RESULTS, "", card.text)
    card.text = text.replace("## Limits\n", f"{section}\n## Limits\n", 1) if "## Limits\n" in text else text + section
    card.save(folder / "README.md")
    known = {name: sum for name, sum in read_checksums(folder).items() if name != "README.md"}
    write_checksums(folder, {name: sum for name, sum in known.items() if not name.startswith(f"{EVALUATION}/")})


def check_results(folder: Path) -> str | None:
    """
    Scores the predictions of a folder again.

    Returns:
        What was found, None if the folder has neither predictions nor scores.

    Raises:
        ValueError: if the card's figures are not those that the predictions give, or as [`read_results`].
    """
    card = ModelCard.load(folder / "README.md")
    shown, section = card.data.eval_results or [], re.search(RESULTS, card.text)
    if not (folder / EVALUATION).exists():
        if shown or section:
            raise ValueError(
                f"README.md shows scores, but there is no {EVALUATION}/ with the predictions they come from"
            )
        return None
    manifest, scores = read_results(folder, folder / EVALUATION)
    expected = list_results(scores, manifest)
    in_card, right = (
        {(result.dataset_config or "all rows", result.metric_type, result.metric_value) for result in each}
        for each in (shown, expected)
    )
    if wrong := in_card ^ right:
        figures = "; ".join(f"{metric} of {group}: {value}" for group, metric, value in sorted(wrong))
        raise ValueError(f"the metadata of README.md and the predictions in {EVALUATION}/ differ: {figures}")
    if section is None or section[0] != write_section(scores, manifest):
        raise ValueError(f"the table of scores in README.md is not what the predictions in {EVALUATION}/ give")
    return f"{manifest['rows']} predictions of these weights give the {len(expected)} figures of the card"
