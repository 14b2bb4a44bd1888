"""`make speech`: joins the pretrained parts with the trained adapter, and transcribes recordings of people."""

import itertools
import shutil
import tempfile
import textwrap
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers.utils import logging

from audio_utils import SAMPLING_RATE, fetch_audio
from configuration_qwen2_audio_vl import TRANSCRIBE, count_audio
from demo.ask import read_rows, user
from demo.bases import ASSETS
from demo.run import draw_clip
from evaluation.generate import load
from evaluation.scoring import percent, score
from publishing.build import build
from publishing.paths import ROOT
from speech.parts import make_parts
from speech.recordings import BUILD, GROUPS, write_recordings


ADAPTER = ROOT / "speech" / "adapter"
REPO = BUILD / "qwen2-audio-vl"
DTYPE = "float32"  # bfloat16 is a quarter faster on CPUs that multiply in it, and far slower on others
MAX_NEW_TOKENS = 128
PIECE_SECONDS = 10.0  # a third of the words is lost in 2 of 31 clips of 10 s, and in 9 of 20 clips of 15 s
PROMPTS = 8  # how many telephone prompts are transcribed
JFK = "And so my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
KNOWN = {ASSETS / "audio" / "jfk.wav": JFK, ASSETS / "audio" / "english.wav": "One two three."}


def has_fast_bfloat16() -> bool:
    """Tells whether this CPU multiplies in bfloat16, which then takes two thirds of the time of float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch do not tell
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def build_repo(output: Path = REPO, adapter: Path = ADAPTER) -> Path:
    """
    Downloads the pretrained parts where they are missing, and makes a folder of them and the adapter that loads like
    any other. Raises a FileNotFoundError if there is no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json; expected the adapter that training wrote.")
    make_parts(BUILD)
    shutil.rmtree(output, ignore_errors=True)
    bases = BUILD / "smollm2", BUILD / "whisper"
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        # The sum of a weight and LoRA's update would lose most of the update in bfloat16.
        processor, model = load(build(*bases, Path(folder) / "untrained", audio_tokens="trimmed"), "float32")
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        processor.trained_audio_tokens, processor.piece_seconds = "both", PIECE_SECONDS
        for part in (model, processor):
            part.save_pretrained(Path(folder) / "merged")
        return build(*bases, output, adapter=Path(folder) / "merged")


def transcribe(processor, model, recording: Path) -> str:
    content = [{"type": "audio", "path": str(recording)}, {"type": "text", "text": TRANSCRIBE}]
    (answer,) = processor.answer(model, [user(content)], MAX_NEW_TOKENS)
    return " ".join(answer.split())


def known_recordings() -> dict[Path, str]:
    """Returns recordings and their texts: those of this repository and, if apt-get can download them, some prompts."""
    folder = BUILD / "recordings"
    try:
        if not (folder / "rows.jsonl").is_file():
            write_recordings(folder)
    except RuntimeError as error:
        print(f"Without the telephone prompts: {error}")
        return KNOWN
    rows = (row for row in read_rows(folder / "rows.jsonl") if row["group"] == GROUPS[0])
    return KNOWN | {folder / row["audio"]: row["text"] for row in itertools.islice(rows, PROMPTS)}


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start, rows = time.perf_counter(), []
    processor, model = load(build_repo(), DTYPE)
    print(f"\n{'file':<34}{'seconds':>9}{'tokens':>8}{'took, s':>9}")
    for recording, text in known_recordings().items():
        samples = fetch_audio(recording)
        length = len(samples) / SAMPLING_RATE
        tokens = count_audio(len(samples), processor.tokens_per_window, processor.audio_tokens).tokens
        before = time.perf_counter()
        answer = transcribe(processor, model, recording)
        print(f"{recording.name:<34}{length:>9.1f}{tokens:>8}{time.perf_counter() - before:>9.1f}")
        print(f"    reference  {text}\n    answer     {answer}", flush=True)
        picture = BUILD / f"{recording.stem}.png"
        draw_clip(recording, textwrap.fill(answer, 70), processor.feature_extractor, picture, min(30, length))
        rows.append({"text": text, "pred_text": answer})
    scores = score(rows)
    print(f"\n{len(rows)} recordings of {scores['words']} words, word error rate in %: {percent(scores['wer'])}")
    print(f"Everything took {time.perf_counter() - start:.0f} s; {model.num_parameters():,} parameters.")
    print(f"The log-mel spectrogram of each recording: {BUILD.relative_to(ROOT)}/*.png")
    print(f"The model, for app.py, evaluation and upload.py: {REPO.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
