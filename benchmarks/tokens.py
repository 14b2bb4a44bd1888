"""
Fixed and trimmed audio tokens side by side: tokens, operations, time to the first token and memory of the cache, at
full size with random weights in bfloat16, which takes 20 GB of memory.

    python -m benchmarks.tokens [--small] [--readme]
"""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import synchronize, where
from benchmarks.parts import full_config, make_model, small_config
from benchmarks.report import report
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS, count_audio


TEXT = 64  # tokens of text in each prompt
PICTURE = 28  # patches a side of a picture of 384 x 384, which are 14 x 14 tokens
# Seconds of the clip, and pictures beside it: the last is what the first user of this model asks.
PROMPTS = ((1, 0), (3, 0), (5, 0), (10, 0), (30, 0), (3.4, 8))


def make_inputs(model, seconds: float, pictures: int, audio_tokens: str) -> dict[str, torch.Tensor]:
    """What the processor would give for a clip of noise, grey pictures and random text."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    audio, per_picture = config.audio_config, (PICTURE // config.vision_config.spatial_merge_size) ** 2
    count = count_audio(round(seconds * 16_000), audio.max_source_positions, audio_tokens)
    ids = [config.vision_start_token_id, *[config.image_token_id] * per_picture, config.vision_end_token_id] * pictures
    ids += [config.audio_bos_token_id, *[config.audio_token_id] * count.tokens, config.audio_eos_token_id]
    ids += torch.randint(0, 5_000, (TEXT,), generator=generator).tolist()
    ids = torch.tensor([ids])
    types = (ids == config.image_token_id) + 3 * (ids == config.audio_token_id)
    shape = (count.windows, audio.num_mel_bins, 2 * audio.max_source_positions)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
        "input_features": torch.randn(shape, generator=generator).to(model.dtype),
    }
    if pictures:
        inputs["image_grid_thw"] = torch.tensor([[1, PICTURE, PICTURE]] * pictures)
        inputs["pixel_values"] = torch.zeros(pictures * PICTURE**2, 3 * 2 * 14 * 14, dtype=model.dtype)
    return inputs


@torch.no_grad()
def measure_prompt(model, inputs: dict[str, torch.Tensor]) -> tuple[int, int, float, int]:
    """Tokens, operations, seconds to the first token, and bytes of the cache."""
    with FlopCounterMode(display=False) as counter:
        synchronize()
        start = time.perf_counter()
        outputs = model(**inputs, use_cache=True, logits_to_keep=1)
        outputs.logits.argmax().item()
        seconds = time.perf_counter() - start
    layers = outputs.past_key_values.layers
    cache = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    return inputs["input_ids"].shape[1], counter.get_total_flops(), seconds, cache


def measure(options) -> str:
    model = make_model(small_config() if options.small else full_config(), torch.bfloat16)
    measure_prompt(model, make_inputs(model, 1, 0, "trimmed"))
    rows = [
        "| prompt | tokens, fixed | trimmed | TFLOP, fixed | trimmed | seconds to first token, fixed | trimmed "
        "| cache, fixed | trimmed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for seconds, pictures in PROMPTS:
        found = [measure_prompt(model, make_inputs(model, seconds, pictures, kind)) for kind in AUDIO_TOKEN_COUNTS]
        cells = []
        for values, text in zip(zip(*found, strict=True), ("{:,}", "{:.2f}", "{:.1f}", "{:.0f} MB"), strict=True):
            scale = {"{:.2f}": 1e-12, "{:.0f} MB": 1e-6}.get(text, 1)
            fixed, trimmed = (value * scale if scale != 1 else value for value in values)
            cells += [text.format(fixed), f"{text.format(trimmed)} ({trimmed / fixed:.2f})"]
        name = f"{seconds:g} s" + (f", {pictures} pictures of 384 x 384" if pictures else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    note = (
        f"{where()}; {size:.1f} billion random parameters in bfloat16, {TEXT} tokens of text, each prompt once with "
        "either kind, one after the other; in brackets the share of fixed."
    )
    return "\n".join([*rows, "", note])


if __name__ == "__main__":
    report(__file__, __doc__, measure, {"--small": {"action": "store_true", "help": "at a tenth of the size"}})
