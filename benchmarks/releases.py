"""
Compares what every release computes: `nox` records the logits and greedy tokens of the demo checkpoint on each.

    python -m benchmarks.releases --record       records those of the transformers and torch that this Python imports
    python -m benchmarks.releases [--readme]     compares all records with the first
"""

from datetime import date

import torch
import transformers
from safetensors.torch import load_file, save_file

from benchmarks.report import report, table
from demo.ask import content_of, load_demo, read_examples, user
from publishing.paths import ROOT


RECORDS = ROOT / "build" / "releases"


def write_record() -> str:
    processor, model = load_demo()
    model, tensors = model.float(), {}
    for number, example in enumerate(read_examples()):
        inputs = processor.make_inputs(user(content_of(example)))
        with torch.no_grad():
            tensors[f"{number:02}.logits"] = model(**inputs).logits[0].contiguous()
        tensors[f"{number:02}.tokens"] = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    RECORDS.mkdir(parents=True, exist_ok=True)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    save_file(tensors, RECORDS / f"{name}.safetensors")
    return f"{RECORDS} has the record of {name}."


def main(record: bool = False) -> list[str]:
    if record:
        return [write_record()]
    records = {path.stem: load_file(path) for path in sorted(RECORDS.glob("*.safetensors"))}
    if not records:
        raise SystemExit(f"{RECORDS} has no records; `make releases` writes them.")
    oldest, first = next(iter(records.items()))
    logits, tokens = ([name for name in first if name.endswith(ending)] for ending in ("logits", "tokens"))
    rows = []
    for release, tensors in records.items():
        difference = max((tensors[name] - first[name]).abs().max().item() for name in logits)
        is_equal = all(torch.equal(tensors[name], first[name]) for name in tokens)
        rows.append((release, f"{difference:.0e}", "equal" if is_equal else "different"))
    largest = max(first[name].abs().max().item() for name in logits)
    note = f"{date.today()}; beside {oldest}, whose logits reach {largest:.0f}, float32 on the CPU."
    return [table(("release", "largest difference of a logit", "greedy tokens"), rows), note]


if __name__ == "__main__":
    report(__file__, __doc__, main)
