"""
Measures the speech model on clips that training never had, and Whisper beside it on the same clips:

    python -m speech.figures [--repo REPO] [--output DIR] [--limit N] [--readme]

REPO is what `make speech` built. It needs the clips of speech.recordings, with and without --silences, and those that
speech.recipe holds out; the recall of words needs the clips of all its rounds as well. `--limit` takes the first clips
of each set. Started again, it goes on. DIR, build/speech/figures, gets figures.json and every answer in */report.html.
"""

import math
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import Qwen2VLForConditionalGeneration, WhisperForConditionalGeneration, WhisperProcessor

from audio_utils import SAMPLING_RATE, fetch_audio
from benchmarks.report import report, table
from demo.ask import read_rows, write_rows
from evaluation.generate import load
from evaluation.predict import predict
from evaluation.report import score_folder
from evaluation.scoring import AS_GIVEN, align, edit_of, file_of, normalize, percent, read_folder, score, score_arms
from publishing.paths import ROOT, write_json
from speech.recipe import ROUNDS
from speech.recordings import BUILD, rows_of
from speech.run import DTYPE, MAX_NEW_TOKENS, REPO


SETS = {  # folder in build/speech: what its clips are, and the column of their groups
    "recordings": ("a person", "group"),
    "held-out": ("synthetic voices, held out", "source"),
    "silences": ("nothing said", "group"),
}
# A set -> how many rows are asked again: with silence, with another clip, with 1,500 tokens for each clip.
SPOKEN = {"recordings": 120, "held-out": 24}
BATCH = 8
COUNTS = {"100 times or more": 100, "10 to 99 times": 10, "1 to 9 times": 1, "never": 0}  # the least of each


def ask_model(
    repo: Path, output: Path, folder: str, limit: int, audio_tokens: str = "trimmed", arms: tuple[str, ...] = ()
) -> dict[str, list[dict]]:
    """Returns the predictions of each arm, which stay in a folder of the output with their report."""
    results = predict(
        str(repo),
        [str(rows_of(folder))],
        output / "-".join([folder, audio_tokens, *arms]),
        audio_column="audio",
        text_column="text",
        group_column=SETS[folder][1],
        limit=limit,
        arms=arms,
        batch_size=BATCH,
        max_new_tokens=MAX_NEW_TOKENS,
        audio_tokens=audio_tokens,
        dtype=DTYPE,
    )
    score_folder(results)
    return {arm: rows[:limit] for arm, rows in read_folder(results).items()}


@torch.no_grad()
def ask_whisper(output: Path, folder: str, limit: int) -> list[dict]:
    """Returns the predictions of the whole Whisper in windows of 30 s, which stay in a folder of the output."""
    path, rows = output / f"{folder}-whisper" / file_of(AS_GIVEN), read_rows(rows_of(folder))[:limit]
    if path.is_file() and len(lines := read_rows(path)) >= len(rows):
        return lines[:limit]
    processor = WhisperProcessor.from_pretrained(BUILD / "whisper")
    model = WhisperForConditionalGeneration.from_pretrained(BUILD / "whisper", dtype=torch.float32).eval()
    lines = []
    for batch in (rows[start : start + BATCH] for start in range(0, len(rows), BATCH)):
        clips = [fetch_audio(BUILD / folder / row["audio"]).numpy() for row in batch]
        before = time.perf_counter()
        features = processor(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt").input_features
        ids = model.generate(features, language="en", task="transcribe", max_new_tokens=MAX_NEW_TOKENS)
        seconds = round((time.perf_counter() - before) / len(clips), 4)
        for row, text in zip(batch, processor.batch_decode(ids, skip_special_tokens=True), strict=True):
            line = {"row": len(lines), "place": f"rows.jsonl:{len(lines) + 1}", "group": row.get(SETS[folder][1])}
            line |= {"audio_filepath": None, "duration": row["seconds"], "time": seconds}
            lines.append({**line, "text": row["text"], "pred_text": text.strip()})
    return write_rows(path, lines)


def count_words(paths: list[Path]) -> Counter:
    """Counts each normalized word in the `text` of rows of JSON lines."""
    return Counter(word for path in paths for row in read_rows(path) for word in normalize(row["text"]).split())


def recall(rows: list[dict], training: Counter) -> dict[str, dict[str, int]]:
    """
    Counts the words of the references, and those that were recalled, by how often training said them: `training` has
    that for each normalized word. Predictions that failed are left out.
    """
    counts = {name: {"words": 0, "recalled": 0} for name in COUNTS}
    for row in rows:
        if "error" in row:
            continue
        for expected, answer in align(normalize(row["text"]), normalize(row["pred_text"])):
            is_right = edit_of(expected, answer) == "equal"
            for word in expected.split():
                name = next(name for name, least in COUNTS.items() if training[word] >= least)
                counts[name]["words"] += 1
                counts[name]["recalled"] += is_right
    return counts


@torch.no_grad()
def perplexity(tokenizer, model, texts: list[str]) -> float:
    """Returns the perplexity per token of a language model on texts; the first tokens are not predicted."""
    total = count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] > 1:
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(total / count)


def rates_table(scores: dict) -> str:
    """Lists the word error rates of the model and of Whisper for each set and group."""
    rows = []
    for folder in SPOKEN:
        whisper = scores[f"{folder}-whisper"]["arms"][AS_GIVEN]
        for group, own in scores[folder]["arms"][AS_GIVEN].items():
            errors = "/".join(str(own[name]) for name in ("insertions", "deletions", "substitutions"))
            rates = (percent(own["wer"]), errors, percent(whisper[group]["wer"]))
            rows.append((f"{SETS[folder][0]}, {group}", own["rows"], *rates))
    return table(("clips", "rows", "WER %", "ins/del/sub", "Whisper base, WER %"), rows)


def again_table(again: dict[str, dict[str, dict]]) -> str:
    """Lists the word error rates of the first rows of each set for each arm."""
    arms = list(again["recordings"])
    rows = [
        (f"the first {scores[arms[0]]['rows']} of {SETS[folder][0]}", *(percent(scores[arm]["wer"]) for arm in arms))
        for folder, scores in again.items()
    ]
    return table(("WER %", *arms), rows)


def silences_table(scores: dict) -> str:
    """Counts the clips without speech that the model and Whisper answered with words."""
    own, whisper = (scores[name]["arms"][AS_GIVEN] for name in ("silences", "silences-whisper"))
    counts = {group: [arm[group]["nothing_said"] for arm in (own, whisper)] for group in own}
    rows = [(group, both[0]["rows"], *(each["answered"] for each in both)) for group, both in counts.items()]
    return table(("nothing said", "clips", "answered with words", "by Whisper base"), rows)


def recall_table(counts: dict[str, dict[str, int]]) -> str:
    rows = [
        (name, count["words"], percent(count["recalled"] / max(1, count["words"]))) for name, count in counts.items()
    ]
    return table(("said in training", "words of a person", "recalled %"), rows)


def main(repo: Path = REPO, output: Path = BUILD / "figures", limit: int = sys.maxsize) -> list[str]:
    """Makes all predictions, writes `figures.json`, and returns the tables."""
    if missing := [str(BUILD / folder) for folder in SETS if not rows_of(folder).is_file()]:
        raise SystemExit(f"speech.figures: no rows.jsonl in {', '.join(missing)}; --help says what makes it.")
    scores, answers, again = {}, {}, {}
    for folder in SETS:
        answers[folder] = ask_model(repo, output, folder, limit)
        scores[folder] = score_arms(answers[folder])
        scores[f"{folder}-whisper"] = score_arms({AS_GIVEN: ask_whisper(output, folder, limit)})
    for folder, count in SPOKEN.items():
        few = min(limit, count)
        arms = ask_model(repo, output, folder, few, arms=("silence", "swapped"))
        arms["fixed tokens"] = ask_model(repo, output, folder, few, "fixed")[AS_GIVEN]
        again[folder] = {arm: score(rows) for arm, rows in arms.items()}
    tables = [rates_table(scores), again_table(again), silences_table(scores)]
    figures = {"limit": limit, "scores": scores, "again": again}
    trained = [rows_of(name) for name in dict.fromkeys(name for round_ in ROUNDS for name in round_.data)]
    if all(path.is_file() for path in trained):
        figures["recall"] = recall(answers["recordings"][AS_GIVEN], count_words(trained))
        tables.append(recall_table(figures["recall"]))
    texts = [row["text"] for row in read_rows(rows_of("held-out"))[:limit]]
    smollm2 = Qwen2VLForConditionalGeneration.from_pretrained(BUILD / "smollm2", dtype=torch.float32).eval()
    processor, model = load(repo, "float32")  # its tokenizer is that of SmolLM2 and three tokens more
    models = {"SmolLM2": smollm2, "with LoRA": model}
    figures["perplexity"] = {name: perplexity(processor.tokenizer, each, texts) for name, each in models.items()}
    rows = [(name, f"{value:.1f}") for name, value in figures["perplexity"].items()]
    tables.append(table(("language model", f"perplexity of {len(texts)} sentences of WordNet and fortunes"), rows))
    write_json(output / "figures.json", figures)
    return tables


if __name__ == "__main__":
    report(__file__, __doc__, main, ROOT / "speech" / "README.md")
