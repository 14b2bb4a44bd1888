"""
Measures what the audio path costs beside the sum of its parts (stock Qwen2-VL on as many tokens, a stock Whisper
encoder, a matrix product), on the same random weights and in turns in one run, and how time and memory grow.

    python -m benchmarks.model [--seconds SECONDS] [--readme]

A comparison of times takes 90 s unless `--seconds` is given.
"""

import operator
import statistics
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.measure import added_memory, count_operations, decode_step, in_turns, where
from benchmarks.parts import TEXT, Parts, count_parameters, full_config, make_model, make_prompt, prefill, small_config
from benchmarks.report import report, table
from configuration_qwen2_audio_vl import FAMILIES


STEPS = 32  # tokens of an answer
WINDOW = 250  # audio tokens, a window of 5 s
ROUNDS = 20  # answers of each model
MANY = 16  # clips, windows or rows of a prompt


def make_prefills(model, parts: Parts, **sizes: int) -> tuple[Callable, ...]:
    """Returns three functions: a prefill of this model, one of its parts, and encoder and projector alone."""
    inputs, parts_inputs = make_prompt(model, **sizes)
    encode = torch.no_grad()(lambda: parts.embed_audio(inputs["input_features"]))
    return partial(prefill, model, **inputs), partial(parts.prefill, **parts_inputs), encode


def make_steps(model, parts: Parts) -> tuple[Callable, ...]:
    """Returns three functions: a training step of this model, one of its parts, and one of the language model alone."""
    inputs, parts_inputs = make_prompt(model)
    words = parts_inputs["input_ids"]
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    embeds = parts.qwen.get_input_embeddings()(words).requires_grad_()

    def train_model():
        model(**inputs, labels=words, use_cache=False).loss.backward()

    def train_language_model():
        parts.qwen(inputs_embeds=embeds, labels=words, use_cache=False).loss.backward()

    def train_parts():
        audio_embeds = parts.embed_audio(inputs["input_features"])
        train_language_model()
        audio_embeds.backward(torch.ones_like(audio_embeds))

    return train_model, train_parts, train_language_model


def time_decoding(model, parts: Parts) -> list[tuple[float, ...]]:
    """Returns the median seconds of a decode step in each answer, of this model and of stock Qwen2-VL, in turns."""
    pairs = list(zip((model.generate, parts.generate), make_prompt(model), strict=True))
    rounds = [[decode_step(generate, inputs, STEPS) for generate, inputs in pairs] for _ in range(ROUNDS)]
    return list(zip(*rounds, strict=True))


def compare_costs(model, parts: Parts, seconds: float) -> tuple[str, str]:
    """Returns the table, and how many rounds its medians are of."""
    prefills, steps = make_prefills(model, parts), make_steps(model, parts)
    prefill_memory, step_memory = ([[added_memory(each)] for each in group[:2]] for group in (prefills, steps))
    prefill_times = in_turns(*prefills[:2], seconds=seconds, take=list)
    step, step_of_parts, step_alone = in_turns(*steps, seconds=seconds, take=list)
    rows = []
    for what, unit, factor, (ours, theirs) in (
        ("prefill", "ms", 1e3, prefill_times),
        ("decode, a token", "ms", 1e3, time_decoding(model, parts)),
        ("training step of the projector", "ms", 1e3, (step, step_of_parts)),
        ("the same beside the language model alone", "ms", 1e3, (step, step_alone)),
        ("memory of a prefill above the weights", "MB", 1e-6, prefill_memory),
        ("memory of a training step above the weights", "MB", 1e-6, step_memory),
    ):
        # Ratios are taken within a round, because the speed of a shared machine changes between rounds.
        ratio = statistics.median(map(operator.truediv, ours, theirs))
        medians = (f"{statistics.median(values) * factor:.1f} {unit}" for values in (ours, theirs))
        rows.append((what, *medians, f"{ratio:.3f}"))
    note = f"medians of {len(prefill_times[0])}, {ROUNDS} and {len(step)} rounds in turns"
    return table(("what", "here", "sum of the parts", "ratio"), rows), note


def compare_bases(seconds: float, device) -> str:
    """Returns the ratios of times of small models on the newer bases to their parts."""
    rows = []
    for model_type in list(FAMILIES)[1:]:
        model = make_model(small_config(WINDOW, model_type=model_type), torch.float32, device)
        parts = Parts(model)
        times = in_turns(*make_prefills(model, parts)[:2], seconds=seconds, take=list), time_decoding(model, parts)
        ratios = [statistics.median(map(operator.truediv, *pair)) for pair in times]
        rows.append((FAMILIES[model_type].base_name, *(f"{ratio:.3f}" for ratio in ratios)))
    return table(("base", "prefill, ratio to the parts", "decode, ratio to the parts"), rows)


def compare_operations() -> str:
    rows = []
    for size, config in (("at this size", small_config(WINDOW)), ("at full size", full_config())):
        model = make_model(config, torch.bfloat16, "meta")
        total, alone = (count_operations(step)[1] for step in make_steps(model, Parts(model))[1:])
        rows.append((size, f"{total / 1e12:.4g} TFLOP", f"{alone / 1e12:.4g} TFLOP", f"{total / alone:.3f}"))
    return table(("operations of a training step", "sum of the parts", "language model alone", "ratio"), rows)


def measure_growth(model, parts: Parts) -> str:
    """Measures time and memory of a prefill by clips, windows and batch."""
    rows = []
    for name in ("clips", "windows", "batch"):
        figures = []
        for count in (1, MANY):
            prefills = make_prefills(model, parts, **{name: count})
            figures.append([*in_turns(*prefills, rounds=3, take=min), added_memory(prefills[0])])
        growth = (after / before / MANY for before, after in zip(*figures, strict=True))
        rows.append((f"{name} of 5 s", *(f"{factor:.2f}" for factor in growth)))
    return table((f"{MANY}, over {MANY} times one", "time here", "of the parts", "of the encoder", "memory"), rows)


def main(seconds: float = 90) -> list[str]:
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = make_model(small_config(WINDOW), torch.float32, device)
    parts = Parts(model)
    costs, rounds = compare_costs(model, parts, seconds)
    size = f"{count_parameters(model) / 1e6:.0f} million parameters in float32"
    note = f"{where()}; {size}; a clip of 5 s and {TEXT} tokens of text, {rounds}, the ratio of those of each round."
    return [costs, compare_bases(seconds, device), compare_operations(), measure_growth(model, parts), note]


if __name__ == "__main__":
    report(__file__, __doc__, main)
