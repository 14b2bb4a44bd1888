"""`make speech`: joins the pretrained parts with the trained adapter, and transcribes recordings of people."""

import itertools
import shutil
import textwrap
import time
from pathlib import Path

import torch
from eval import answer
from peft import PeftModel
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging

from audio_utils import fetch_audio
from configuration_qwen2_audio_vl import count_audio
from demo.bases import ASSETS
from demo.run import draw_clip
from evaluation.scoring import percent, score
from publishing import paths
from publishing.build import build
from speech.parts import make_parts
from speech.recordings import BUILD, GROUPS, read_rows, write_recordings


ADAPTER = paths.ROOT / "speech" / "adapter"
REPO = BUILD / "qwen2-audio-vl"
DTYPE = torch.float32  # bfloat16 is a quarter faster where the CPU has its products, and far slower elsewhere
INSTRUCTION = "Transcribe the audio."  # as in training
MAX_NEW_TOKENS = 128
PROMPTS = 8  # how many telephone prompts are transcribed
KNOWN = {
    ASSETS / "audio" / "jfk.wav": (
        "And so my fellow Americans, ask not what your country can do for you, ask what you can do for your country."
    ),
    ASSETS / "audio" / "english.wav": "One two three.",
}


def build_repo(output: Path = REPO, adapter: Path = ADAPTER) -> Path:
    """
    Downloads the pretrained parts if they are not there, and makes a repository folder of them and the adapter, which
    loads like any other.

    Raises:
        FileNotFoundError: if there is no adapter.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter_config.json; expected the adapter that training wrote.")
    make_parts(BUILD)
    untrained, merged = output.with_name(f"{output.name}-untrained"), output.with_name(f"{output.name}-merged")
    for folder in (untrained, merged, output):
        shutil.rmtree(folder, ignore_errors=True)
    bases = BUILD / "smollm2", BUILD / "whisper"
    build(*bases, untrained, audio_tokens="trimmed")
    processor = AutoProcessor.from_pretrained(untrained, trust_remote_code=True)
    # In float32: the sum of a weight and what LoRA adds to it would lose most of that in bfloat16.
    model = AutoModel.from_pretrained(untrained, trust_remote_code=True, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    processor.trained_audio_tokens = processor.audio_tokens
    model.save_pretrained(merged)
    processor.save_pretrained(merged)
    build(*bases, output, adapter=merged)
    for folder in (untrained, merged):
        shutil.rmtree(folder)
    return output


def load(repo: Path):
    """The processor and the model of a built folder."""
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    return processor, AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=DTYPE).eval()


def transcribe(processor, model, recordings: list[Path]) -> list[str]:
    """What is said in each recording; all are asked in one batch."""
    conversations = []
    for recording in recordings:
        asked = [{"type": "audio", "path": str(recording)}, {"type": "text", "text": INSTRUCTION}]
        conversations.append([{"role": "user", "content": asked}])
    return [" ".join(given.split()) for given in answer(processor, model, conversations, MAX_NEW_TOKENS)]


def known_recordings() -> dict[Path, str]:
    """Recordings and what they say: those of this repository and, where apt-get can download them, some prompts."""
    folder = BUILD / "recordings"
    try:
        if not (folder / "rows.jsonl").is_file():
            write_recordings(folder)
    except RuntimeError as error:
        print(f"Without the telephone prompts: {error}")
        return KNOWN
    prompts = {folder / row["audio"]: row["text"] for row in read_rows(folder) if row["group"] == GROUPS[0]}
    return KNOWN | dict(itertools.islice(prompts.items(), PROMPTS))


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start, rows = time.perf_counter(), []
    processor, model = load(build_repo())
    print(f"\n{'file':<34}{'seconds':>9}{'tokens':>8}{'took, s':>9}")
    for recording, text in known_recordings().items():
        samples = fetch_audio(recording)
        tokens = count_audio(len(samples), processor.tokens_per_window, processor.audio_tokens).tokens
        before = time.perf_counter()
        (given,) = transcribe(processor, model, [recording])
        seconds = time.perf_counter() - before
        print(f"{recording.name:<34}{len(samples) / 16_000:>9.1f}{tokens:>8}{seconds:>9.1f}")
        print(f"    reference  {text}\n    answer     {given}", flush=True)
        picture, title = BUILD / f"{recording.stem}.png", textwrap.fill(given, 70)
        draw_clip(recording, title, processor.feature_extractor, picture, min(30, len(samples) / 16_000))
        rows.append({"text": text, "pred_text": given})
    found = score(rows)
    seconds = time.perf_counter() - start
    print(f"\n{len(rows)} recordings of {found['words']} words, word error rate in %: {percent(found['wer'])}")
    print(f"Everything took {seconds:.0f} s; {model.num_parameters():,} parameters.")
    print(f"The log-mel spectrogram of each recording: {BUILD.relative_to(paths.ROOT)}/*.png")
    print(f"The model, for app.py, eval.py and upload.py: {REPO.relative_to(paths.ROOT)}")


if __name__ == "__main__":
    main()
