"""`make demo`: builds a small folder and asks it about a real recording and a real photo, the way a user does."""

import shutil
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor

import upload
from audio_utils import fetch_audio
from demo.bases import ASSETS, make_qwen2_vl, make_whisper


BUILD = Path(__file__).resolve().parent.parent / "build" / "demo"
SPEECH = ASSETS / "audio" / "jfk.mp3"
PHOTO = ASSETS / "images" / "chelsea.png"


@contextmanager
def step(name: str):
    start = time.perf_counter()
    yield
    print(f"  {name:<52} {time.perf_counter() - start:6.2f} s", flush=True)


def main():
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    print("Steps")
    with step("make two small base checkpoints, random weights"):
        base, encoder = make_qwen2_vl(BUILD / "qwen2-vl"), make_whisper(BUILD / "whisper")
    with step("upload.py build"):
        repo = upload.build(base, encoder, BUILD / "qwen2-audio-vl")
    with step("load with AutoModel and AutoProcessor"):
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        model = AutoModel.from_pretrained(repo, trust_remote_code=True, dtype="auto", device_map="auto")

    question = "Answer the spoken question about the photo."
    content = [
        {"type": "image", "url": str(PHOTO)},
        {"type": "audio", "url": str(SPEECH)},
        {"type": "text", "text": question},
    ]
    with step("photo and sound -> model inputs"):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
    with step("audio encoder and projector, alone"), torch.no_grad():
        model.get_audio_features(inputs["input_features"])
    with step("generate 16 tokens"):
        output = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]

    types = inputs["mm_token_type_ids"]
    seconds = len(fetch_audio(SPEECH)) / processor.feature_extractor.sampling_rate
    windows, bins, frames = inputs["input_features"].shape
    print("\nWhat went in")
    print(f"  {PHOTO.name}: {int((types == 1).sum())} tokens")
    print(f"  {SPEECH.name}: {seconds:.1f} s, {windows} window of {bins} x {frames}, {int((types == 3).sum())} tokens")
    print(f"  with the text {question!r}: {types.numel()} tokens in all")
    print("\nWhat came out")
    print(f"  {answer!r}")
    print("  The weights are random, so these words mean nothing: the path is real, the answer is not.")


if __name__ == "__main__":
    main()
