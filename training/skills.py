"""What the rows teach: their instructions and kinds of answers; and how well old rows are answered before and after."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import datasets

from collator import ChatCollator, answer_text
from evaluation.rows import describe_data, load_rows
from evaluation.scoring import compare, headline, kind_of, score
from publishing.paths import write_json
from training.arguments import Arguments
from training.selection import select_rows


KEPT_FILE = "kept.json"  # in the output folder: the score of the old rows before training
SAMPLE = 1_000  # rows that are read to describe the tasks
LEAST_SHARE = 0.02  # an instruction of fewer rows is no task, but one question of many


def describe_tasks(dataset: datasets.Dataset, collator: ChatCollator) -> list[dict]:
    """
    Returns a dict for each instruction of at least 2% of the rows, the most frequent first: `instruction`, and
    `answers`, the kind of its answers as `evaluation.scoring.kind_of` names it.
    """
    answers = defaultdict(list)
    chosen = range(0, len(dataset), -(-len(dataset) // SAMPLE))
    for index in chosen:
        *asked, answer = collator.messages(dataset[index])
        content = asked[-1]["content"]
        texts = [content] if isinstance(content, str) else [item["text"] for item in content if item["type"] == "text"]
        answers[" ".join(texts)].append(compare({"text": answer_text(answer["content"]), "pred_text": ""}))
    counts = Counter({instruction: len(rows) for instruction, rows in answers.items()})
    frequent = [name for name, count in counts.most_common() if name and count >= LEAST_SHARE * len(chosen)]
    return [{"instruction": name, "answers": kind_of(answers[name])} for name in frequent]


class KeptSkill:
    """The rows of `--keep`, which are data as for `--eval`. Recordings with transcripts are asked to be transcribed."""

    def __init__(self, args: Arguments, processor):
        self.path, self.collator = Path(args.output_dir) / KEPT_FILE, ChatCollator(processor)
        self.rows = select_rows(load_rows(args.keep, columns=args.columns), self.collator, args)
        self.asked = {"data": describe_data(args.keep, args.columns), "max_new_tokens": args.max_new_tokens}

    def score(self, trainer) -> dict:
        """Asks all rows. Returns `metric`, the name of the figure that tells the most of them, and `value`."""
        name, rate = headline(score(trainer.answer(self.rows, self.collator)))
        return {"metric": name, "value": rate["value"]}

    def score_before(self, trainer, is_resumed: bool) -> dict:
        """Scores the untrained model, or reads what an interrupted run wrote then, if it asked the same rows."""
        if is_resumed and self.path.is_file():
            before = json.loads(self.path.read_text(encoding="utf-8"))
            if before.get("asked") == self.asked:
                return before
        before = {**self.score(trainer), "asked": self.asked}
        if trainer.args.should_save:
            write_json(self.path, before)
        return before

    def compare(self, trainer, before: dict) -> dict:
        """Returns `metric`, and its values `before` and `after` training."""
        return {"metric": before["metric"], "before": before["value"], "after": self.score(trainer)["value"]}

    def describe(self, scores: dict) -> list[dict]:
        """Returns the tasks of the rows as [`describe_tasks`] does, with the scores of all of them."""
        return [{**task, **scores} for task in describe_tasks(self.rows, self.collator)]


def join_tasks(*lists: list[dict] | None) -> list[dict]:
    """Joins lists of tasks; of two with the same instruction the later one counts, in the place of the first."""
    joined = {}
    for task in (task for tasks in lists for task in tasks or ()):
        joined[task["instruction"]] = task
    return list(joined.values())
