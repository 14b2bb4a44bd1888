"""
What the audio path costs beside the sum of its parts (stock Qwen2-VL on as many tokens, stock Whisper encoder, a matrix
product), on the same random weights and in turns in one run; and how time and memory grow. Prints the tables and draws
`benchmarks/model.png`.

    python -m benchmarks.model [--readme]
"""

import operator
import statistics
from collections.abc import Callable

import matplotlib
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import added_memory, decode_step, in_turns, where
from benchmarks.parts import Parts, full_config, make_model, make_prompt, small_config
from benchmarks.report import report
from publishing.paths import ROOT


matplotlib.use("Agg")
from matplotlib import pyplot


PLOT = ROOT / "benchmarks" / "model.png"
STEPS = 32  # tokens of an answer
WINDOW = 250  # audio tokens, a window of 5 s
ROUNDS = 20  # of answers
COUNTS = (1, 2, 4, 8, 16)


def make_prefills(model, parts: Parts, **prompt: int) -> tuple[Callable, ...]:
    """Three functions: a prefill of this model, one of its parts, and encoder and projector alone."""
    inputs, stock = make_prompt(model, **prompt)

    @torch.no_grad()
    def ours():
        return model(**inputs, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def encoder():
        return parts.embed_audio(inputs["input_features"])

    @torch.no_grad()
    def theirs():
        return encoder(), parts.qwen(**stock, use_cache=True, logits_to_keep=1)

    return ours, theirs, encoder


def make_steps(model, parts: Parts) -> tuple[Callable, ...]:
    """Three functions: a training step of this model, one of its parts, and one of the language model alone."""
    inputs, stock = make_prompt(model)
    words = stock["input_ids"]
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    embeds = parts.qwen.get_input_embeddings()(words).requires_grad_()

    def ours():
        model(**inputs, labels=words, use_cache=False).loss.backward()

    def alone():
        parts.qwen(inputs_embeds=embeds, labels=words, use_cache=False).loss.backward()

    def theirs():
        with torch.no_grad():
            hidden = parts.encoder(inputs["input_features"]).last_hidden_state
        audio_embeds = hidden @ parts.projector.weight.T
        alone()
        audio_embeds.backward(torch.ones_like(audio_embeds))

    return ours, theirs, alone


def count_operations(config) -> list[int]:
    """Of a training step: by the parts, and of the language model alone."""
    model = make_model(config, torch.bfloat16, "meta")
    counts = []
    for step in make_steps(model, Parts(model))[1:]:
        with FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    return counts


def decode_steps(model, parts: Parts) -> list[list[float]]:
    """The median seconds of a decode step in each answer, here and by stock Qwen2-VL, in turns."""
    inputs, stock = make_prompt(model)
    steps = [[], []]
    for _ in range(ROUNDS):
        for each, given, own in ((model, inputs, steps[0]), (parts.qwen, stock, steps[1])):
            own.append(decode_step(each.generate, given, STEPS))
    return steps


def count_encoder_calls(model) -> int:
    inputs, _ = make_prompt(model)
    calls = []
    hook = model.model.audio_encoder.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False)
    hook.remove()
    return len(calls)


def draw(times: dict[str, list], memories: dict[str, list]):
    figure, axes = pyplot.subplots(2, 3, figsize=(9.6, 5.4), layout="constrained", sharey="row", sharex=True)
    for name, (above, below) in zip(times, axes.T, strict=True):
        ours, theirs, encoder = zip(*times[name], strict=True)
        above.plot(COUNTS, theirs, "o--", color="0.5", label="sum of the parts")
        above.plot(COUNTS, ours, "o-", color="tab:blue", label="this model")
        above.plot(COUNTS, encoder, "o-", color="tab:orange", label="encoder and projector")
        below.plot(COUNTS, [size / 1e6 for size in memories[name]], "o-", color="tab:blue")
        above.set(title=f"{name} of 5 s", ylim=(0, None))
        below.set(xlabel=name, ylim=(0, None), xticks=COUNTS)
        for each in (above, below):
            each.grid(alpha=0.3)
    axes[0, 0].set(ylabel="seconds of a prefill")
    axes[1, 0].set(ylabel="MB above the weights")
    axes[0, 0].legend()
    figure.savefig(PLOT, dpi=110)


def table_of_costs(model, parts: Parts, seconds: float) -> tuple[list[str], str]:
    """The rows, and how many rounds they are the medians of."""
    prefills, steps = make_prefills(model, parts), make_steps(model, parts)
    prefill_memory, step_memory = ([[added_memory(each)] for each in group[:2]] for group in (prefills, steps))
    prefill = in_turns(*prefills[:2], seconds=seconds, take=list)
    step, total, alone = in_turns(*steps, seconds=seconds, take=list)
    rows = ["| what | here | sum of the parts | ratio |", "|---|---|---|---|"]
    for what, unit, factor, (ours, theirs) in (
        ("prefill", "ms", 1e3, prefill),
        ("decode, a token", "ms", 1e3, decode_steps(model, parts)),
        ("training step of the projector", "ms", 1e3, (step, total)),
        ("the same beside the language model alone", "ms", 1e3, (step, alone)),
        ("memory of a prefill above the weights", "MB", 1e-6, prefill_memory),
        ("memory of a training step above the weights", "MB", 1e-6, step_memory),
    ):
        # Ratios are taken within a round, because the speed of a shared machine changes between rounds.
        ratio = statistics.median(map(operator.truediv, ours, theirs))
        medians = (f"{statistics.median(each) * factor:.1f} {unit}" for each in (ours, theirs))
        rows.append(f"| {what} | {' | '.join(medians)} | {ratio:.3f} |")
    rows.append(f"| calls of the encoder in an answer of {STEPS} tokens | {count_encoder_calls(model)} | 1 | |")
    return rows, f"medians of {len(prefill[0])}, {ROUNDS} and {len(step)} rounds in turns"


def table_of_operations() -> list[str]:
    rows = ["| operations of a training step | sum of the parts | language model alone | ratio |", "|---|---|---|---|"]
    for what, config in (("at this size", small_config(WINDOW)), ("at full size", full_config())):
        total, alone = count_operations(config)
        rows.append(f"| {what} | {total / 1e12:.4g} TFLOP | {alone / 1e12:.4g} TFLOP | {total / alone:.3f} |")
    return rows


def table_of_growth(model, parts: Parts) -> list[str]:
    """Time and memory of a prefill by clips, windows and batch, which are drawn as well."""
    growth = {
        name: [make_prefills(model, parts, **{name: count}) for count in COUNTS]
        for name in ("clips", "windows", "batch")
    }
    memories = {name: [added_memory(ours) for ours, *_ in points] for name, points in growth.items()}
    times = {name: [in_turns(*point, rounds=3, take=min) for point in points] for name, points in growth.items()}
    draw(times, memories)
    rows = [f"| {COUNTS[-1]}, over {COUNTS[-1]} times one | time here | of the parts | of the encoder | memory |"]
    rows.append("|---|---|---|---|---|")
    for name in growth:
        first, last = ([*times[name][index], memories[name][index]] for index in (0, -1))
        cells = [f"{after / before / COUNTS[-1]:.2f}" for before, after in zip(first, last, strict=True)]
        rows.append(f"| {name} of 5 s | {' | '.join(cells)} |")
    return rows


def measure(options) -> str:
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = make_model(small_config(WINDOW), torch.float32, device)
    parts = Parts(model)
    costs, rounds = table_of_costs(model, parts, options.seconds)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    note = (
        f"{where()}; {size:.0f} million parameters in float32; a clip of 5 s and 64 tokens of text, {rounds}, the "
        "ratio of those of each round."
    )
    return "\n".join([*costs, "", *table_of_operations(), "", *table_of_growth(model, parts), "", note])


if __name__ == "__main__":
    options = {"--seconds": {"type": float, "default": 90, "help": "of each comparison (default: 90)"}}
    report(__file__, __doc__, measure, options)
