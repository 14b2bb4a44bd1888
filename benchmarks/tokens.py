"""
Fixed and trimmed audio tokens side by side, with random weights. At full size in bfloat16, which takes 20 GB of memory:
tokens, operations, time to the first token and memory of the cache. At a tenth of it: clips per second of training.

    python -m benchmarks.tokens [--small] [--float32-products] [--readme]
"""

import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import in_turns, synchronize, where
from benchmarks.parts import full_config, make_model, make_prompt, small_config
from benchmarks.report import report
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS, count_audio


TEXT = 64  # tokens of text in each prompt
CLIPS = (1, 3, 5, 10, 30)  # seconds
# Seconds of the clip, and pictures beside it: the last is what the first user of this model asks.
PROMPTS = (*((seconds, 0) for seconds in CLIPS), (3.4, 8))
# What a clip of 3 s may cost of fixed tokens: operations, time to the first token, cache.
PROMISED = {1: 1 / 4, 2: 1 / 3, 3: 1 / 6}
COLUMNS = ("tokens", "TFLOP", "seconds to the first token", "cache, MB")
CHUNK = 2**27  # weights that are converted at a time


class Float32Linear(nn.Linear):
    """Keeps its weight in bfloat16, and multiplies in float32: many CPUs have no products of bfloat16."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = max(1, CHUNK // self.in_features)
        made = [F.linear(hidden.float(), weight.float()) for weight in self.weight.split(rows)]
        made = made[0] if len(made) == 1 else torch.cat(made, -1)
        return made if self.bias is None else made + self.bias


def multiply_in_float32(model):
    """Everything but the matrices becomes float32."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Float32Linear
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.float())
        elif not list(module.children()):
            module.float()
    return model


def make_inputs(model, seconds: float, kind: str, pictures: int = 0) -> dict[str, torch.Tensor]:
    windows, tokens = count_audio(round(seconds * 16_000), model.config.audio_config.max_source_positions, kind)
    return make_prompt(model, windows=windows, text=TEXT, audio_tokens=tokens, pictures=pictures)[0]


@torch.no_grad()
def measure_prefill(model, inputs: dict[str, torch.Tensor]) -> tuple[float, ...]:
    """What `COLUMNS` names."""
    with FlopCounterMode(display=False) as counter:
        synchronize()
        start = time.perf_counter()
        outputs = model(**inputs, use_cache=True, logits_to_keep=1)
        outputs.logits.argmax().item()
        seconds = time.perf_counter() - start
    layers = outputs.past_key_values.layers
    cache = sum(2 * tensor.numel() for layer in layers for tensor in (layer.keys, layer.values))  # bytes in bfloat16
    return inputs["input_ids"].shape[1], counter.get_total_flops() / 1e12, seconds, cache / 1e6


def measure_both(prompts: Iterable[tuple[float, int]], model, measure: Callable) -> Iterator[list]:
    """For prompts of so many seconds and pictures, what is measured with fixed and with trimmed tokens."""
    measured = {}
    for seconds, pictures in prompts:
        found = []
        for kind in AUDIO_TOKEN_COUNTS:
            inputs = make_inputs(model, seconds, kind, pictures)
            length = inputs["input_ids"].shape[1]
            if length not in measured:  # prompts of one length are the same: all fixed ones of up to 30 s
                measured[length] = measure(model, inputs)
            found.append(measured[length])
        yield found


def table_of_prefills(model) -> list[str]:
    """
    Raises:
        ValueError: if a clip of 3 s costs more than was promised.
    """
    measure_prefill(model, make_inputs(model, 1, "trimmed"))
    rows = ["| prompt | " + " | ".join(f"{column}, fixed | trimmed" for column in COLUMNS) + " |", "|---" * 9 + "|"]
    for (seconds, pictures), found in zip(PROMPTS, measure_both(PROMPTS, model, measure_prefill), strict=True):
        shares = [trimmed / fixed for fixed, trimmed in zip(*found, strict=True)]
        formats = ("{:,}", "{:.2f}", "{:.1f}", "{:.0f}")
        cells = [
            f"{text.format(fixed)} | {text.format(trimmed)} ({share:.3f})"
            for text, fixed, trimmed, share in zip(formats, *found, shares, strict=True)
        ]
        name = f"{seconds:g} s" + (f", {pictures} pictures of 384 x 384" if pictures else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
        broken = [COLUMNS[column] for column, share in PROMISED.items() if seconds == 3 and shares[column] > share]
        if broken:
            raise ValueError(f"{', '.join(broken)} of a clip of 3 s are not what was promised:\n" + "\n".join(rows))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    products = ", multiplied in float32" if isinstance(model.lm_head, Float32Linear) else ""
    note = f"{size:.1f} billion random parameters in bfloat16{products}; {TEXT} tokens of text; each prompt once"
    return [*rows, "", f"{where()}; {note}; in brackets the share of fixed."]


def measure_step(model, inputs: dict[str, torch.Tensor]) -> float:
    """Seconds of one step."""
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)
    return in_turns(lambda: model(**inputs, labels=labels, use_cache=False).loss.backward(), rounds=1)[0]


def table_of_steps(model) -> list[str]:
    model.requires_grad_(False)
    model.model.audio_projector.requires_grad_(True)
    rows = ["| training step of the projector | clips per second, fixed | trimmed | times as fast |", "|---" * 4 + "|"]
    both = measure_both([(seconds, 0) for seconds in CLIPS], model, measure_step)
    for seconds, (fixed, trimmed) in zip(CLIPS, both, strict=True):
        rows.append(f"| {seconds} s | {1 / fixed:.2f} | {1 / trimmed:.2f} | {fixed / trimmed:.1f} |")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return [*rows, "", f"{size:.2f} billion random parameters in bfloat16, one clip and {TEXT} tokens of text a step."]


def measure(options) -> str:
    model = make_model(small_config() if options.small else full_config(), torch.bfloat16)
    prefills = table_of_prefills(multiply_in_float32(model) if options.float32_products else model)
    del model
    return "\n".join([*prefills, "", *table_of_steps(make_model(small_config(), torch.bfloat16))])


if __name__ == "__main__":
    options = {
        "--small": {"action": "store_true", "help": "prefills at a tenth of the size"},
        "--float32-products": {"action": "store_true", "help": "for a CPU without products of bfloat16"},
    }
    report(__file__, __doc__, measure, options)
