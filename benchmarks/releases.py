"""
Whether every release computes the same: `nox` records the logits and greedy tokens of the demo checkpoint on each.

    python -m benchmarks.releases --record       of the transformers and torch that this Python finds
    python -m benchmarks.releases [--readme]     compares all that was recorded with the first
"""

import tempfile
from datetime import date
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

import upload
from benchmarks.report import report
from demo.ask import DEMO, content_of, load, read_examples
from publishing import paths


RECORDS = paths.ROOT / "build" / "releases"


def record() -> str:
    with tempfile.TemporaryDirectory() as folder:
        processor, model = load(upload.build(checkpoint=DEMO, output=Path(folder) / "demo"))
        model, found = model.float(), {}
        for number, example in enumerate(read_examples()):
            inputs = processor.make_inputs([{"role": "user", "content": content_of(example)}])
            with torch.no_grad():
                found[f"{number:02}.logits"] = model(**inputs).logits[0].contiguous()
            found[f"{number:02}.tokens"] = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    RECORDS.mkdir(parents=True, exist_ok=True)
    name = f"transformers {transformers.__version__}, torch {torch.__version__}"
    save_file(found, RECORDS / f"{name}.safetensors")
    return f"recorded {name}"


def table() -> str:
    paths = sorted(RECORDS.glob("*.safetensors"))
    first = load_file(paths[0])
    rows = ["| release | largest difference of a logit | greedy tokens |", "|---|---|---|"]
    for path in paths:
        found = load_file(path)
        logits = max((found[name] - first[name]).abs().max().item() for name in first if name.endswith("logits"))
        equal = all(torch.equal(found[name], first[name]) for name in first if name.endswith("tokens"))
        rows.append(f"| {path.stem} | {logits:.0e} | {'equal' if equal else 'different'} |")
    largest = max(tensor.abs().max().item() for name, tensor in first.items() if name.endswith("logits"))
    note = f"{date.today()}; beside {paths[0].stem}, whose logits reach {largest:.0f}, float32 on the CPU."
    return "\n".join([*rows, "", note])


if __name__ == "__main__":
    options = {"--record": {"action": "store_true", "help": "compute and keep, instead of comparing"}}
    report(__file__, __doc__, lambda given: record() if given.record else table(), options)
