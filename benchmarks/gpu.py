"""
Measures how much of a GPU's own rates this model reaches, at full size with random bf16 weights that are made there,
beside the sum of its parts and transformers' Qwen2-Audio and Qwen2.5-Omni at their own sizes. Needs 40 GB on the card.

    python -m benchmarks.gpu [--limit SECONDS] [--readme]
    python -m benchmarks.gpu --small      the same with small models on the CPU, which only shows that it runs

Decoding comes last and takes most of the time, as each model is compiled twice. After `--limit` no figure is begun.
"""

import gc
import io
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import soundfile
import soxr
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, WhisperFeatureExtractor

from audio_utils import SAMPLING_RATE, fetch_audio, log_mel
from benchmarks.measure import added_memory, count_operations, decode_step, in_turns, synchronize, where
from benchmarks.parts import TEXT, Parts, count_parameters, full_config, make_model, make_prompt, prefill, small_config
from benchmarks.report import report, table
from benchmarks.sound import make_speech, read_by_soundfile


COLUMNS = ("this model", "sum of the parts", "Qwen2-Audio", "Qwen2.5-Omni")
# Both peers: a clip of 30 s is 3,000 frames and 750 tokens between two markers.
FRAMES, TOKENS, AUDIO_BOS, AUDIO_EOS = 3_000, 750, 151_647, 151_648


class Scale(NamedTuple):
    """How much is measured, and on what."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    clips: int = 16  # in a prefill
    batches: tuple[int, ...] = (1, 16, 64)  # rows of decoding, the first one stream
    steps: int = 64  # tokens of an answer
    seconds: float = 4  # of a comparison
    matrix: int = 8192  # rows and columns of a large product


SMALL = Scale("cpu", torch.float32, clips=1, batches=(1, 2), steps=4, seconds=0, matrix=512)
SMALL_TEXT = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 64}
SMALL_TEXT |= {"num_attention_heads": 2, "num_key_value_heads": 1}
SMALL_AUDIO = {"encoder_layers": 1, "d_model": 64, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
SMALL_VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 256}


class Subject(NamedTuple):
    """What is measured. Each row of a batch is a clip of 30 s and `TEXT` tokens of text."""

    model: PreTrainedModel  # holds the weights
    make_inputs: Callable[[int], dict]  # for a batch of so many rows
    prefill: Callable  # computes the logits that follow such inputs
    generate: Callable

    def bytes_per_step(self, length: int) -> int:
        """Returns what a decode step has to read: the weights except the embeddings, and the cache of the prompt."""
        decoder = self.model.get_decoder()
        config = decoder.config
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        cache = 2 * config.num_hidden_layers * config.num_key_value_heads * width * length
        weights = count_parameters(decoder.layers) + count_parameters(self.model.get_output_embeddings())
        return self.model.dtype.itemsize * (cache + weights)


def make_ours(config, scale: Scale) -> dict[str, Subject]:
    model = make_model(config, scale.dtype, scale.device)
    parts = Parts(model)
    prompts = [lambda batch, i=i: make_prompt(model, batch=batch)[i] for i in range(2)]
    return {
        "this model": Subject(model, prompts[0], partial(prefill, model), model.generate),
        "sum of the parts": Subject(model, prompts[1], parts.prefill, parts.generate),
    }


def make_peer(name: str, model_class: type[PreTrainedModel], config, scale: Scale) -> dict[str, Subject]:
    with torch.device(scale.device):
        model = model_class._from_config(config, dtype=scale.dtype).eval()

    def make_inputs(batch):
        clip = torch.tensor([AUDIO_BOS, *[config.audio_token_index] * TOKENS, AUDIO_EOS])
        rows = torch.randint(0, 100_000, (batch, len(clip) + TEXT), generator=torch.Generator().manual_seed(0))
        rows[:, : len(clip)] = clip
        inputs = {
            "input_ids": rows,
            "attention_mask": torch.ones_like(rows),
            "input_features": torch.randn(batch, config.audio_config.num_mel_bins, FRAMES).to(model.dtype),
            "feature_attention_mask": torch.ones(batch, FRAMES, dtype=torch.long),
        }
        return {name: tensor.to(model.device) for name, tensor in inputs.items()}

    return {name: Subject(model, make_inputs, partial(prefill, model), model.generate)}


def makers_of(scale: Scale) -> list[Callable[[], dict[str, Subject]]]:
    """Returns functions that make the subjects, because not all of them fit on the card at once."""
    is_small = scale is SMALL
    text, audio, omni_sizes = {}, None, {}
    if is_small:
        text, audio = SMALL_TEXT, SMALL_AUDIO
        omni_sizes = {"text_config": SMALL_TEXT, "audio_config": {**SMALL_AUDIO, "output_dim": 256}}
        omni_sizes["vision_config"] = SMALL_VISION
    # Sizes of Qwen/Qwen2-Audio-7B-Instruct, where they are not the defaults of its configuration.
    full = {"model_type": "qwen2", "vocab_size": 156_032, "intermediate_size": 11_008, "rms_norm_eps": 1e-5}
    qwen2_audio = transformers.Qwen2AudioConfig(text_config=full | text, audio_config=audio)
    # The sizes of Qwen/Qwen2.5-Omni-7B's thinker are the defaults, except a token that its model reads.
    omni = transformers.Qwen2_5OmniThinkerConfig(**omni_sizes, vision_start_token_id=151_652)
    return [
        partial(make_ours, small_config(layers=1) if is_small else full_config(), scale),
        partial(make_peer, "Qwen2-Audio", transformers.Qwen2AudioForConditionalGeneration, qwen2_audio, scale),
        partial(make_peer, "Qwen2.5-Omni", transformers.Qwen2_5OmniThinkerForConditionalGeneration, omni, scale),
    ]


def measure_rates(scale: Scale) -> tuple[float, float]:
    """Returns the operations per second of a large matrix product, and the bytes per second of a large copy."""
    size = scale.matrix
    left, right = (torch.randn(size, size, device=scale.device, dtype=scale.dtype) for _ in range(2))
    source = torch.empty(size * size * 16, device=scale.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product, copy = in_turns(lambda: left @ right, lambda: target.copy_(source), seconds=scale.seconds)
    return 2 * size**3 / product, 2 * source.numel() / copy


def measure_features(scale: Scale) -> list[str]:
    """Returns the seconds of audio that become features in a second, here and by soundfile, soxr and transformers."""
    file = io.BytesIO()
    soundfile.write(
        file, np.stack([soxr.resample(make_speech(), SAMPLING_RATE, 44_100)] * 2, axis=1), 44_100, format="wav"
    )
    files, extractor = [file.getvalue()] * scale.clips, WhisperFeatureExtractor(feature_size=128)

    def ours():
        log_mel([fetch_audio(content, SAMPLING_RATE, scale.device) for content in files], extractor)

    def theirs():
        clips = [read_by_soundfile(content) for content in files]
        extractor(clips, sampling_rate=SAMPLING_RATE, return_tensors="pt", device=scale.device)

    return [f"{scale.clips * 30 / seconds:,.0f}" for seconds in in_turns(ours, theirs, seconds=scale.seconds)]


def measure_prefill(subject: Subject, rates: tuple[float, float], scale: Scale) -> Iterator[tuple[str, str]]:
    """Yields the names of figures and the figures."""
    yield "parameters", f"{count_parameters(subject.model) / 1e9:.2f} billion"
    inputs = subject.make_inputs(scale.clips)
    yield f"prompt of a clip of 30 s and {TEXT} tokens", f"{inputs['input_ids'].shape[1]:,} tokens"
    run = partial(subject.prefill, **inputs)
    # The counter does not know attention with fewer heads of keys, as fused on a GPU.
    with sdpa_kernel(SDPBackend.MATH):
        _, operations = count_operations(run)
    (seconds,) = in_turns(run, seconds=scale.seconds)
    yield f"prefill of {scale.clips} such", f"{seconds * 1e3:,.0f} ms"
    yield "that, as a share of the matrix rate", f"{operations / seconds / rates[0]:.0%}"
    yield "memory of it, above the weights", f"{added_memory(run) / 1e9:.1f} GB"


def measure_decoding(subject: Subject, rates: tuple[float, float], scale: Scale) -> Iterator[tuple[str, str]]:
    """Yields the names of figures and the figures."""
    for batch in scale.batches:
        inputs = subject.make_inputs(batch)
        # `generate` compiles with a static cache on a GPU, and the first answer waits for that.
        _, step = (decode_step(subject.generate, inputs, scale.steps, cache_implementation="static") for _ in range(2))
        if batch == 1:
            yield "decode of one stream, a token", f"{step * 1e3:.1f} ms"
            share = subject.bytes_per_step(inputs["input_ids"].shape[1]) / step / rates[1]
            yield "that, as a share of the memory rate", f"{share:.0%}"
        yield f"tokens a second, {batch} stream{'s' if batch > 1 else ''}", f"{batch / step:,.0f}"


def main(small: bool = False, limit: float = float("inf")) -> list[str]:
    if not small and not torch.cuda.is_available():
        raise SystemExit("There is no GPU; --small tries the script without one.")
    scale, end = SMALL if small else Scale(), time.monotonic() + limit
    rates = measure_rates(scale)
    rows = defaultdict(dict)  # name of a figure -> column -> figure
    features = measure_features(scale)
    rows["seconds of audio to features in a second"] = {"this model": features[0], "Qwen2-Audio": features[1]}
    for measure, make in itertools.product((measure_prefill, measure_decoding), makers_of(scale)):
        for column, subject in make().items() if time.monotonic() < end else ():
            figures = measure(subject, rates, scale)
            while time.monotonic() < end and (pair := next(figures, None)):
                name, rows[name][column] = pair
                print(f"{column}: {name}: {pair[1]}", file=sys.stderr, flush=True)
            del subject, figures
            synchronize()
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    cells = ((name, *(figures.get(column, "") for column in COLUMNS)) for name, figures in rows.items())
    note = (
        f"{where()}; {rates[0] / 1e12:.1f} TFLOP/s and {rates[1] / 1e12:.2f} TB/s measured; random weights, "
        f"{scale.dtype}. Features: Qwen2-Audio's extractor, behind soundfile and soxr."
    )
    return [table(("", *COLUMNS), cells), note]


if __name__ == "__main__":
    report(__file__, __doc__, main)
