"""
What the audio path costs beside the sum of its parts (stock Qwen2-VL on as many tokens, stock Whisper encoder, a matrix
product), on the same random weights and in turns in one run; and how time and memory grow. Prints a table and draws
`benchmarks/model.png`; with `--readme` the table goes into the README.

    python -m benchmarks.model
"""

import argparse
import statistics
from collections.abc import Callable

import matplotlib
import torch
from transformers.utils import logging

from benchmarks import readme
from benchmarks.measure import Clock, in_turns, peak_memory, where
from benchmarks.parts import ROOT, Parts, make_model, make_prompt, small_config


matplotlib.use("Agg")
from matplotlib import pyplot


PLOT = ROOT / "benchmarks" / "model.png"
STEPS = 32  # tokens of an answer
GROWTH_WINDOW = 250  # audio tokens, a window of 5 s
COUNTS = (1, 2, 4, 8, 16)


def step_times(model, inputs: dict) -> list[float]:
    """Seconds of every decode step of a greedy answer."""
    clock = Clock()
    model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, stopping_criteria=[clock])
    return clock.steps


def memories(*functions: Callable) -> list[int]:
    """The peak memory of each in bytes, above what is held anyway."""
    held = peak_memory(lambda: None)
    return [peak_memory(function) - held for function in functions]


def bench_inference(model, parts: Parts, seconds: float) -> list[tuple]:
    inputs, words = make_prompt(model)
    prompt = {"input_ids": words, "attention_mask": inputs["attention_mask"]}

    @torch.no_grad()
    def ours():
        return model(**inputs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def theirs():
        heard = parts.hear(inputs["input_features"])
        return heard, parts.qwen(**prompt, use_cache=True, logits_to_keep=1)

    rows = [("prefill", "ms", *in_turns(ours, theirs, seconds=seconds))]
    steps = [[], []]
    for _ in range(6):
        for each, given, own in ((model, inputs, steps[0]), (parts.qwen, prompt, steps[1])):
            own += step_times(each, given)
    rows.append(("decode, a token", "ms", *map(statistics.median, steps)))
    rows.append(("memory of a prefill above the weights", "MB", *memories(ours, theirs)))
    return rows


def bench_training(model, parts: Parts, seconds: float) -> list[tuple]:
    inputs, words = make_prompt(model)
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    embeds = parts.qwen.get_input_embeddings()(words).requires_grad_()

    def ours():
        model(**inputs, labels=words, use_cache=False).loss.backward()

    def language_model():
        parts.qwen(inputs_embeds=embeds, labels=words, use_cache=False).loss.backward()

    def theirs():
        with torch.no_grad():
            hidden = parts.encoder(inputs["input_features"]).last_hidden_state
        heard = hidden @ parts.projector.weight.T
        language_model()
        heard.backward(torch.ones_like(heard))

    step, alone, total = in_turns(ours, language_model, theirs, seconds=seconds)
    memory = memories(ours, theirs)
    model.zero_grad()
    return [
        ("training step of the projector", "ms", step, total),
        ("the same beside the language model alone", "ms", step, alone),
        ("memory of a training step above the weights", "MB", *memory),
    ]


def count_encoder_calls(model) -> int:
    inputs, _ = make_prompt(model)
    calls = []
    hook = model.model.audio_encoder.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    hook.remove()
    return len(calls)


def grow(model, parts: Parts) -> dict[str, list[tuple]]:
    """By what grows: how many, seconds and bytes here, and seconds of the parts' sum and of the encoder."""
    curves = {}
    for name in ("clips", "windows", "batch"):
        curves[name] = []
        for count in COUNTS:
            inputs, words = make_prompt(model, **{name: count})

            @torch.no_grad()
            def ours(inputs=inputs):
                model(**inputs, use_cache=True, logits_to_keep=1)

            @torch.no_grad()
            def encoder(inputs=inputs):
                parts.hear(inputs["input_features"])

            @torch.no_grad()
            def theirs(inputs=inputs, words=words):
                parts.hear(inputs["input_features"])
                parts.qwen(input_ids=words, use_cache=True, logits_to_keep=1)

            times = in_turns(ours, theirs, encoder, seconds=2)
            curves[name].append((count, *times, *memories(ours)))
    return curves


def draw(curves: dict[str, list[tuple]]):
    figure, axes = pyplot.subplots(2, 3, figsize=(9.6, 5.4), layout="constrained", sharey="row", sharex=True)
    for (name, points), (above, below) in zip(curves.items(), axes.T, strict=True):
        counts, ours, theirs, encoder, memory = zip(*points, strict=True)
        above.plot(counts, theirs, "o--", color="0.5", label="sum of the parts")
        above.plot(counts, ours, "o-", color="tab:blue", label="this model")
        above.plot(counts, encoder, "o-", color="tab:orange", label="encoder and projector")
        below.plot(counts, [bytes / 1e6 for bytes in memory], "o-", color="tab:blue")
        above.set(title=f"{name} of 5 s", ylim=(0, None))
        below.set(xlabel=name, ylim=(0, None), xticks=COUNTS)
        for each in (above, below):
            each.grid(alpha=0.3)
    axes[0, 0].set(ylabel="seconds of a prefill")
    axes[1, 0].set(ylabel="MB above the weights")
    axes[0, 0].legend()
    figure.savefig(PLOT, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="put the table into the README")
    parser.add_argument("--seconds", type=float, default=60, help="of each comparison (default: 60)")
    options = parser.parse_args()
    logging.set_verbosity_error()

    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = make_model(small_config(), torch.float32, device)
    parts = Parts(model)
    rows = bench_inference(model, parts, options.seconds)
    calls = count_encoder_calls(model)
    rows += bench_training(model, parts, options.seconds)
    lines = ["| what | here | sum of the parts | ratio |", "|---|---|---|---|"]
    for what, unit, ours, theirs in rows:
        factor = {"ms": 1e3, "MB": 1e-6}[unit]
        lines.append(f"| {what} | {ours * factor:.1f} {unit} | {theirs * factor:.1f} {unit} | {ours / theirs:.3f} |")
    lines.append(f"| calls of the encoder in an answer of {STEPS} tokens | {calls} | 1 | |")
    lines += ["", f"| time of {COUNTS[-1]}, over {COUNTS[-1]} times that of one | here | sum of the parts | encoder |"]
    lines.append("|---|---|---|---|")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    del model, parts

    model = make_model(small_config(GROWTH_WINDOW), torch.float32, device)
    curves = grow(model, Parts(model))
    draw(curves)
    for name, points in curves.items():
        growth = [last / first / COUNTS[-1] for first, last in zip(points[0][1:4], points[-1][1:4], strict=True)]
        lines.append(f"| {name} of 5 s | " + " | ".join(f"{each:.2f}" for each in growth) + " |")
    note = f"{where()}; {size:.0f} million parameters in float32; above, a clip of 30 s and 64 tokens of text."
    text = "\n".join([*lines, "", note]) + "\n"
    print(text)
    if options.readme:
        readme.fill("benchmarks/model.py", text)


if __name__ == "__main__":
    main()
