"""
Measures the speech model on what training never said, and Whisper beside it on the same clips:

    python -m speech.figures [REPO] --output DIR [--train FILE ...] [--limit N] [--readme]

REPO is what `make speech` built. Needs the clips of speech.recordings, with and without --silences, and those that
speech.clips holds out. Started again, it goes on. DIR/figures.json has all figures, DIR/*/report.html every answer.
"""

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.utils import logging

from audio_utils import fetch_audio
from benchmarks.report import fill
from evaluation.predict import merge, predict
from evaluation.report import score_folder
from evaluation.scoring import AS_GIVEN, align, normalize, percent, read_folder, score, score_arms
from publishing.paths import ROOT, write_json
from speech.recordings import BUILD, read_rows
from speech.run import DTYPE, INSTRUCTION, MAX_NEW_TOKENS, REPO


SETS = {  # folder in build/speech -> what its clips are, and their column of groups
    "recordings": ("a person", "group"),
    "held-out": ("synthetic voices, held out", "source"),
    "silences": ("nothing said", "group"),
}
SPOKEN = ("recordings", "held-out")
BASE = BUILD / "smollm2"
NUM_AGAIN = 24  # rows that are asked again: silenced, with another clip, with 1,500 tokens where the clip has fewer
BATCH = 8
OFTEN = {"100 times or more": 100, "10 to 99 times": 10, "1 to 9 times": 1, "never": 0}  # the least of each


def ask_model(
    options, folder: str, limit: int | None, audio_tokens: str = "trimmed", arms: tuple[str, ...] = ()
) -> dict[str, list[dict]]:
    """Predictions of each arm, by eval.py; it keeps them in a folder of the output."""
    output = options.output / "-".join([folder, audio_tokens, *arms])
    predict(
        options.repo,
        [BUILD / folder / "rows.jsonl"],
        output,
        audio_column="audio",
        text_column="text",
        group_column=SETS[folder][1],
        instruction=INSTRUCTION,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=BATCH,
        audio_tokens=audio_tokens,
        dtype=str(DTYPE).removeprefix("torch."),
        arms=arms,
        limit=limit,
    )
    score_folder(output)
    return {arm: rows[:limit] for arm, rows in read_folder(output).items()}


def ask_whisper(options, folder: str, limit: int | None) -> list[dict]:
    """Predictions of Whisper as a whole, in windows of 30 s, in a file as eval.py writes it."""
    rows, output = read_rows(BUILD / folder)[:limit], options.output / f"{folder}-whisper"
    path = output / "predictions.jsonl"
    if path.is_file():
        merge(output, AS_GIVEN)  # without a line that a kill has left unfinished
    done = len(read_folder(output)[AS_GIVEN]) if path.is_file() else 0
    if done < len(rows):
        output.mkdir(parents=True, exist_ok=True)
        processor = WhisperProcessor.from_pretrained(BUILD / "whisper")
        model = WhisperForConditionalGeneration.from_pretrained(BUILD / "whisper", dtype=torch.float32).eval()
        for start in range(done, len(rows), BATCH):
            lines = []
            clips = [fetch_audio(BUILD / folder / row["audio"]).numpy() for row in rows[start : start + BATCH]]
            before = time.perf_counter()
            features = processor(clips, sampling_rate=16_000, return_tensors="pt").input_features
            with torch.no_grad():
                ids = model.generate(features, language="en", task="transcribe", max_new_tokens=MAX_NEW_TOKENS)
            seconds = (time.perf_counter() - before) / len(clips)
            for number, text in enumerate(processor.batch_decode(ids, skip_special_tokens=True), start):
                row = rows[number]
                line = {"row": number, "place": f"rows.jsonl:{number + 1}", "group": row.get(SETS[folder][1])}
                line |= {"audio_filepath": None, "duration": row["seconds"], "time": round(seconds, 4)}
                lines.append({**line, "text": row["text"], "pred_text": text.strip()})
            with path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
    return read_folder(output)[AS_GIVEN][:limit]


def count_words(paths: list[Path]) -> Counter:
    """How often each normalized word is in the `text` of rows of JSON lines."""
    texts = (json.loads(line)["text"] for path in paths for line in path.read_text().splitlines())
    return Counter(word for text in texts for word in normalize(text).split())


def recall(rows: list[dict], training: Counter) -> dict[str, dict[str, int]]:
    """
    For words of the references by how often training said them: their number, and how many of them were recalled.

    Args:
        rows: Predictions; those that failed are left out.
        training: How often each normalized word was said.
    """
    found = {name: {"words": 0, "recalled": 0} for name in OFTEN}
    for row in rows:
        if "error" in row:
            continue
        for said, given in align(normalize(row["text"]), normalize(row["pred_text"])):
            is_right = said.replace(" ", "") == given.replace(" ", "")  # a compound may be joined
            for word in said.split():
                name = next(name for name, least in OFTEN.items() if training[word] >= least)
                found[name]["words"] += 1
                found[name]["recalled"] += is_right
    return found


@torch.no_grad()
def perplexity(folder: Path, texts: list[str]) -> float:
    """Of texts by themselves, for the language model of a folder, per token; the first of each is given."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    loader = AutoModelForImageTextToText if config.model_type == "qwen2_vl" else AutoModel
    model = loader.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    total = count = 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        if ids.shape[1] > 1:
            total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return math.exp(total / count)


def markdown(head: tuple, *rows: tuple) -> str:
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (head, ("---",) * len(head), *rows))


def rates_table(scores: dict) -> str:
    """Word error rates of each set and group, and of Whisper."""
    rows = []
    for folder in SPOKEN:
        whisper = scores[f"{folder}-whisper"]["arms"][AS_GIVEN]
        for group, found in scores[folder]["arms"][AS_GIVEN].items():
            errors = "/".join(str(found[name]) for name in ("insertions", "deletions", "substitutions"))
            rates = (percent(found["wer"]), errors, percent(whisper[group]["wer"]))
            rows.append((f"{SETS[folder][0]}, {group}", found["rows"], *rates))
    return markdown(("clips", "rows", "WER %", "ins/del/sub", "Whisper base, WER %"), *rows)


def again_table(again: dict[str, dict[str, dict]]) -> str:
    """Word error rates of the first rows of each set, by what was asked."""
    arms = list(again[SPOKEN[0]])
    rows = [
        (f"the first {found[arms[0]]['rows']} of {SETS[folder][0]}", *(percent(found[arm]["wer"]) for arm in arms))
        for folder, found in again.items()
    ]
    return markdown(("WER %", *arms), *rows)


def silences_table(scores: dict) -> str:
    """How many clips without speech were answered with words, by the model and by Whisper."""
    rows = []
    for group, found in scores["silences"]["arms"][AS_GIVEN].items():
        both = [one["nothing_said"] for one in (found, scores["silences-whisper"]["arms"][AS_GIVEN][group])]
        rows.append((group, both[0]["rows"], *(counts["answered"] for counts in both)))
    return markdown(("nothing said", "clips", "answered with words", "by Whisper base"), *rows)


def measure(options) -> str:
    """Asks for all predictions, writes `figures.json`, and returns the tables as Markdown."""
    scores, given, again = {}, {}, {}
    for folder in SETS:
        given[folder] = ask_model(options, folder, options.limit)
        scores[folder] = score_arms(given[folder])
        scores[f"{folder}-whisper"] = score_arms({AS_GIVEN: ask_whisper(options, folder, options.limit)})
    few = min(options.limit or NUM_AGAIN, NUM_AGAIN)
    for folder in SPOKEN:
        asked = ask_model(options, folder, few, arms=("silence", "swapped"))
        asked["fixed tokens"] = ask_model(options, folder, few, "fixed")[AS_GIVEN]
        again[folder] = {arm: score(rows) for arm, rows in asked.items()}
    tables = [rates_table(scores), again_table(again), silences_table(scores)]
    figures = {"limit": options.limit, "scores": scores, "again": again}
    if options.train:
        figures["recall"] = recall(given["recordings"][AS_GIVEN], count_words(options.train))
        counts = [(name, *found.values()) for name, found in figures["recall"].items()]
        rows = [(name, words, percent(recalled / max(1, words))) for name, words, recalled in counts]
        tables.append(markdown(("said in training", "words of a person", "recalled %"), *rows))
    texts = [row["text"] for row in read_rows(BUILD / "held-out")[: options.limit]]
    figures["perplexity"] = {
        name: perplexity(path, texts) for name, path in (("SmolLM2", BASE), ("with LoRA", options.repo))
    }
    rows = [(name, f"{value:.1f}") for name, value in figures["perplexity"].items()]
    tables.append(markdown(("language model", f"perplexity of {len(texts)} sentences of WordNet and fortunes"), *rows))
    if options.limit:
        tables.append(f"The first {options.limit} clips of each set (`--limit {options.limit}`).\n")
    write_json(options.output / "figures.json", figures)
    return "\n".join(tables)


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", nargs="?", type=Path, default=REPO, metavar="REPO", help="(default: %(default)s)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR")
    parser.add_argument("--train", nargs="+", type=Path, metavar="FILE", help="rows that were trained on, for recall")
    parser.add_argument("--limit", type=int, metavar="N", help="the first rows of each set")
    parser.add_argument("--readme", action="store_true", help="put the tables into speech/README.md")
    options = parser.parse_args(arguments)
    if missing := [str(BUILD / folder) for folder in SETS if not (BUILD / folder / "rows.jsonl").is_file()]:
        parser.exit(1, f"speech.figures: no rows.jsonl in {', '.join(missing)}; --help says what makes it.\n")
    logging.set_verbosity_error()
    text = measure(options)
    print(text)
    if options.readme:
        fill("figures", text, ROOT / "speech" / "README.md")


if __name__ == "__main__":
    main()
