"""
Compares fixed with trimmed audio tokens, with random weights. At full size in bfloat16, which takes 20 GB of memory, it
measures tokens, operations, time to the first token and memory of the cache; at a tenth of it, clips per second of
training. With `--small` all of it is at a tenth.

    python -m benchmarks.tokens [--small] [--readme]
"""

import time
from collections.abc import Callable, Iterable, Iterator

import torch

from audio_utils import SAMPLING_RATE
from benchmarks.measure import count_operations, in_turns, synchronize, where
from benchmarks.parts import TEXT, count_parameters, full_config, make_model, make_prompt, prefill, small_config
from benchmarks.report import report, table
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS, IGNORED_LABEL, count_audio


CLIPS = (1, 3, 5, 10, 30)  # seconds
# Seconds of the clip, and pictures beside it: the last is what the first user of this model asks.
PROMPTS = (*((seconds, 0) for seconds in CLIPS), (3.4, 8))
COLUMNS = {"tokens": "{:,}", "TFLOP": "{:.2f}", "seconds to the first token": "{:.1f}", "cache, MB": "{:.0f}"}
# The largest share of fixed tokens that a clip of 3 s may cost.
PROMISED = {"TFLOP": 1 / 4, "seconds to the first token": 1 / 3, "cache, MB": 1 / 6}


def measure_prefill(model, inputs: dict[str, torch.Tensor]) -> tuple[float, ...]:
    """Returns the figures that `COLUMNS` names."""
    synchronize()
    start = time.perf_counter()
    outputs, operations = count_operations(lambda: prefill(model, **inputs))
    outputs.logits.argmax().item()
    seconds = time.perf_counter() - start
    layers = outputs.past_key_values.layers
    cache = sum(2 * tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))  # bytes in bfloat16
    return inputs["input_ids"].shape[1], operations / 1e12, seconds, cache / 1e6


def measure_step(model, inputs: dict[str, torch.Tensor]) -> float:
    """Returns the seconds of a training step."""
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, IGNORED_LABEL)
    return in_turns(lambda: model(**inputs, labels=labels, use_cache=False).loss.backward(), rounds=1)[0]


def make_inputs(model, seconds: float, audio_tokens: str, pictures: int = 0) -> dict[str, torch.Tensor]:
    samples, window_tokens = round(seconds * SAMPLING_RATE), model.config.audio_config.max_source_positions
    windows, tokens = count_audio(samples, window_tokens, audio_tokens)
    return make_prompt(model, windows=windows, audio_tokens=tokens, pictures=pictures)[0]


def measure_both(model, measure: Callable, prompts: Iterable[tuple[float, int]]) -> Iterator[list]:
    """Yields what is measured for each of `prompts` (seconds and pictures) with fixed and with trimmed tokens."""
    measured = {}  # by length: prompts of one length are the same, as all fixed ones of up to 30 s
    for seconds, pictures in prompts:
        pair = []
        for audio_tokens in AUDIO_TOKEN_COUNTS:
            inputs = make_inputs(model, seconds, audio_tokens, pictures)
            length = inputs["input_ids"].shape[1]
            if length not in measured:
                measured[length] = measure(model, inputs)
            pair.append(measured[length])
        yield pair


def compare_prefills(model) -> list[str]:
    """Returns a table and a note. Raises a ValueError if a clip of 3 s costs more than was promised."""
    measure_prefill(model, make_inputs(model, 1, "trimmed"))  # the first prefill takes longer
    rows = []
    for (seconds, pictures), pair in zip(PROMPTS, measure_both(model, measure_prefill, PROMPTS), strict=True):
        row = [f"{seconds:g} s" + (f", {pictures} pictures of 384 x 384" if pictures else "")]
        for (column, form), fixed, trimmed in zip(COLUMNS.items(), *pair, strict=True):
            share = trimmed / fixed
            row += [form.format(fixed), f"{form.format(trimmed)} ({share:.3f})"]
            if seconds == 3 and share > PROMISED.get(column, 1):
                raise ValueError(f"{column}: a clip of 3 s has {share:.3f} of fixed, above {PROMISED[column]:.3f}.")
        rows.append(row)
    head = ["prompt", *(cell for column in COLUMNS for cell in (f"{column}, fixed", "trimmed"))]
    size = f"{count_parameters(model) / 1e9:.1f} billion random parameters in bfloat16"
    note = f"{where()}; {size}; {TEXT} tokens of text; each prompt once; in brackets the share of fixed."
    return [table(head, rows), note]


def compare_steps(model) -> list[str]:
    """Returns a table and a note."""
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    pairs = measure_both(model, measure_step, [(seconds, 0) for seconds in CLIPS])
    rows = [
        (f"{seconds} s", f"{1 / fixed:.2f}", f"{1 / trimmed:.2f}", f"{fixed / trimmed:.1f}")
        for seconds, (fixed, trimmed) in zip(CLIPS, pairs, strict=True)
    ]
    head = ("training step of the projector", "clips per second, fixed", "trimmed", "times as fast")
    size = f"{count_parameters(model) / 1e9:.2f} billion random parameters in bfloat16"
    return [table(head, rows), f"{size}, one clip and {TEXT} tokens of text a step."]


def main(small: bool = False) -> list[str]:
    model = make_model(small_config() if small else full_config(), torch.bfloat16)
    prefills = compare_prefills(model)
    del model
    return [*prefills, *compare_steps(make_model(small_config(), torch.bfloat16))]


if __name__ == "__main__":
    report(__file__, __doc__, main)
