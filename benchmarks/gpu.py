"""
Full size on a GPU, with random bf16 weights that are made there: how much of the card's own rates this model reaches,
beside the sum of its parts and transformers' Qwen2-Audio and Qwen2.5-Omni at their own sizes. Needs 40 GB on the card.

    python -m benchmarks.gpu [--readme] [--limit SECONDS]
    python -m benchmarks.gpu --small      the same with small models, where there is no GPU: shows only that it runs

Prefill and features come first; decoding, where each model is compiled twice, takes most of the time.
"""

import gc
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import soxr
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperFeatureExtractor,
)

from audio_utils import fetch_audio, log_mel
from benchmarks.measure import added_memory, decode_step, in_turns, synchronize, where
from benchmarks.parts import Parts, full_config, make_model, make_prompt, small_config
from benchmarks.report import report
from demo.bases import ASSETS


TEXT = 64  # tokens beside a clip
RATE = 16_000  # Hz
COLUMNS = ("this model", "sum of the parts", "Qwen2-Audio", "Qwen2.5-Omni")
AUDIO_BOS, AUDIO_EOS = 151_647, 151_648  # of both peers


@dataclass
class Scale:
    """How much is measured."""

    clips: int = 16  # of a prefill
    batches: tuple[int, ...] = (1, 16, 64)  # of decoding, the first one stream
    steps: int = 64  # tokens of an answer
    seconds: float = 4  # of a comparison
    matrix: int = 8192  # rows and columns of a large product


@dataclass
class Subject:
    """
    What is measured.

    Args:
        model: Holds the weights.
        prompt: Inputs for a batch of rows, each a clip of 30 s and `TEXT` tokens of text.
        prefill: Computes the logits that follow such inputs.
        generate: Answers them.
        language_model: The part whose weights every decode step reads, with `lm_head`.
    """

    model: PreTrainedModel
    prompt: Callable[[int], dict]
    prefill: Callable[[dict], object]
    generate: Callable
    language_model: torch.nn.Module
    lm_head: torch.nn.Module

    def step_bytes(self, length: int) -> int:
        """What a decode step has to read: the weights but the embeddings, and the cache of the prompt."""
        config = self.language_model.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * width * length
        weights = itertools.chain(self.language_model.layers.parameters(), self.lm_head.parameters())
        return self.model.dtype.itemsize * (cache + sum(parameter.numel() for parameter in weights))


def measure_rates(device: str, dtype: torch.dtype, scale: Scale) -> tuple[float, float]:
    """The operations per second of a large matrix product, and the bytes per second of a large copy."""
    size = scale.matrix
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(size * size * 16, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = in_turns(lambda: left @ right, lambda: target.copy_(source), seconds=scale.seconds)
    return 2 * size**3 / product, 2 * source.numel() / copy


def ours_and_parts(config, device: str, dtype: torch.dtype) -> dict[str, Subject]:
    model = make_model(config, dtype, device)
    parts = Parts(model)

    def prompt(batch):
        return make_prompt(model, text=TEXT, batch=batch)[0]

    def words(batch):
        inputs, stock = make_prompt(model, text=TEXT, batch=batch)
        return {**stock, "input_features": inputs["input_features"]}

    def sum_of_parts(inputs):
        inputs = dict(inputs)
        parts.embed_audio(inputs.pop("input_features"))
        return parts.qwen(**inputs, use_cache=True, logits_to_keep=1)

    def stock(input_features, **inputs):
        return parts.qwen.generate(**inputs)

    weights = model.model.language_model, model.lm_head
    return {
        "this model": Subject(model, prompt, prefill_of(model), model.generate, *weights),
        "sum of the parts": Subject(model, words, sum_of_parts, stock, *weights),
    }


def prefill_of(model: PreTrainedModel) -> Callable[[dict], object]:
    return lambda inputs: model(**inputs, use_cache=True, logits_to_keep=1)


def qwen2_audio(sizes: dict, device: str, dtype: torch.dtype) -> dict[str, Subject]:
    """Sizes of Qwen/Qwen2-Audio-7B-Instruct: Whisper large-v3's encoder, 750 tokens a window."""
    text = {"model_type": "qwen2", "vocab_size": 156_032, "intermediate_size": 11_008, "rms_norm_eps": 1e-5}
    config = Qwen2AudioConfig(text_config={**text, **sizes.get("text", {})}, audio_config=sizes.get("audio"))
    with torch.device(device):
        model = Qwen2AudioForConditionalGeneration._from_config(config, dtype=dtype).eval()

    def prompt(batch):
        return peer_prompt(model, config.audio_token_index, batch)

    return {"Qwen2-Audio": subject_of(model, prompt)}


def qwen2_5_omni(sizes: dict, device: str, dtype: torch.dtype) -> dict[str, Subject]:
    """The thinker of Qwen/Qwen2.5-Omni-7B, whose sizes are the defaults of its configuration."""
    config = Qwen2_5OmniThinkerConfig(
        text_config=sizes.get("text"),
        audio_config=sizes.get("audio"),
        vision_config=sizes.get("vision"),
        vision_start_token_id=151_652,  # read by its model, but no default of its configuration
    )
    with torch.device(device):
        model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, dtype=dtype).eval()

    def prompt(batch):
        return peer_prompt(model, config.audio_token_index, batch)

    return {"Qwen2.5-Omni": subject_of(model, prompt)}


def subject_of(model: PreTrainedModel, prompt: Callable[[int], dict]) -> Subject:
    weights = model.get_decoder(), model.get_output_embeddings()
    return Subject(model, prompt, prefill_of(model), model.generate, *weights)


def peer_prompt(model: PreTrainedModel, audio_token: int, batch: int) -> dict:
    """Noise of 30 s, which is 3,000 frames and 750 tokens, and text."""
    row = torch.randint(0, 100_000, (batch, 752 + TEXT), generator=torch.Generator().manual_seed(0))
    row[:, :752] = torch.tensor([AUDIO_BOS, *[audio_token] * 750, AUDIO_EOS])
    bins = model.config.audio_config.num_mel_bins
    inputs = {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "input_features": torch.randn(batch, bins, 3000).to(model.dtype),
        "feature_attention_mask": torch.ones(batch, 3000, dtype=torch.long),
    }
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@torch.no_grad()
def measure_prefill(subject: Subject, rates: tuple[float, float], scale: Scale) -> Iterator[tuple[str, str]]:
    """Figures of a prefill by their names."""
    size = sum(parameter.numel() for parameter in subject.model.parameters())
    yield "parameters", f"{size / 1e9:.2f} billion"
    inputs = subject.prompt(scale.clips)
    yield f"prompt of a clip of 30 s and {TEXT} tokens", f"{inputs['input_ids'].shape[1]:,} tokens"
    # The counter does not know attention with fewer heads of keys, as fused on a GPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        subject.prefill(inputs)
    (prefill,) = in_turns(lambda: subject.prefill(inputs), seconds=scale.seconds)
    yield f"prefill of {scale.clips} such", f"{prefill * 1e3:,.0f} ms"
    yield "that, as a share of the matrix rate", f"{counter.get_total_flops() / prefill / rates[0]:.0%}"
    memory = added_memory(lambda: subject.prefill(inputs))
    yield "memory of it, above the weights", f"{memory / 1e9:.1f} GB"


@torch.no_grad()
def measure_decoding(subject: Subject, rates: tuple[float, float], scale: Scale) -> Iterator[tuple[str, str]]:
    """Figures of decoding by their names."""
    for batch in scale.batches:
        inputs = subject.prompt(batch)
        # Compiled where `generate` compiles with a static cache, on a GPU: the first answer waits for that.
        _, step = (decode_step(subject.generate, inputs, scale.steps, cache_implementation="static") for _ in range(2))
        if batch == 1:
            yield "decode of one stream, a token", f"{step * 1e3:.1f} ms"
            read = subject.step_bytes(inputs["input_ids"].shape[1])
            yield "that, as a share of the memory rate", f"{read / step / rates[1]:.0%}"
        yield f"tokens a second, {batch} stream{'s' if batch > 1 else ''}", f"{batch / step:,.0f}"


def measure_sound(device: str, scale: Scale) -> list[str]:
    """Seconds of sound that become `input_features` in a second, from files of 30 s, wav of 44.1 kHz stereo."""
    speech = np.resize(fetch_audio(ASSETS / "audio" / "jfk.wav").numpy(), 30 * RATE)
    file = io.BytesIO()
    soundfile.write(file, np.stack([soxr.resample(speech, RATE, 44_100)] * 2, axis=1), 44_100, format="wav")
    files, extractor = [file.getvalue()] * scale.clips, WhisperFeatureExtractor(feature_size=128)

    def ours():
        log_mel([fetch_audio(content, RATE, device) for content in files], extractor)

    def theirs():
        clips = []
        for content in files:
            samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
            clips.append(soxr.resample(samples.mean(axis=1), rate, RATE))
        extractor(clips, sampling_rate=RATE, return_tensors="pt", device=device)

    return [f"{scale.clips * 30 / seconds:,.0f}" for seconds in in_turns(ours, theirs, seconds=scale.seconds)]


def compare(options) -> str:
    if not options.small and not torch.cuda.is_available():
        raise SystemExit("There is no GPU; --small tries the script without one.")
    device, dtype, config, peers, scale = "cuda", torch.bfloat16, full_config(), ({}, {}), Scale()
    if options.small:
        device, dtype, config = "cpu", torch.float32, small_config(layers=1)
        scale = Scale(clips=1, batches=(1, 2), steps=4, seconds=0, matrix=512)
        text = {"num_hidden_layers": 1, "intermediate_size": 64, "hidden_size": 256}
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
        audio = {"encoder_layers": 1, "d_model": 64, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
        vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}
        peers = (
            {"text": text, "audio": audio},
            {"text": text, "audio": {**audio, "output_dim": 256}, "vision": vision},
        )
    end = time.monotonic() + options.limit
    rates = measure_rates(device, dtype, scale)
    table = {name: {} for name in COLUMNS}

    def fill(name: str, figures: Iterator[tuple[str, str]]):
        while time.monotonic() < end and (found := next(figures, None)):
            table[name][found[0]] = found[1]
            print(f"{name}: {found[0]}: {found[1]}", file=sys.stderr, flush=True)

    for name, figure in zip(("this model", "Qwen2-Audio"), measure_sound(device, scale), strict=True):
        table[name]["seconds of sound to features in a second"] = figure
    makers = (
        lambda: ours_and_parts(config, device, dtype),
        lambda: qwen2_audio(peers[0], device, dtype),
        lambda: qwen2_5_omni(peers[1], device, dtype),
    )
    for measure, make in itertools.product((measure_prefill, measure_decoding), makers):
        for name, subject in make().items() if time.monotonic() < end else ():
            fill(name, measure(subject, rates, scale))
            del subject
            synchronize()
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    lines = [f"| | {' | '.join(table)} |", "|---|" + "---|" * len(table)]
    for what in dict.fromkeys(what for column in table.values() for what in column):
        lines.append(f"| {what} | {' | '.join(column.get(what, '') for column in table.values())} |")
    note = (
        f"{where()}; {rates[0] / 1e12:.1f} TFLOP/s and {rates[1] / 1e12:.2f} TB/s measured; random weights, {dtype}. "
        "Features: Qwen2-Audio's extractor, behind soundfile and soxr."
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    options = {
        "--small": {"action": "store_true", "help": "small models on the CPU, to try the script"},
        "--limit": {"type": float, "default": float("inf"), "help": "seconds after which no figure is begun"},
    }
    report(__file__, __doc__, compare, options)
