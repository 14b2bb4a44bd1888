"""
python -m pytest -m speech tests/test_speech.py: the pretrained parts of speech/. All tests except the first download
243 MB once, into build/speech.
"""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import audio, image, text
from hub import LocalHub
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Qwen2VLForConditionalGeneration,
    WhisperForConditionalGeneration,
    WhisperModel,
    WhisperProcessor,
)

from audio_utils import SAMPLING_RATE, fetch_audio
from configuration_qwen2_audio_vl import TRANSCRIBE
from demo.ask import user
from demo.bases import ASSETS
from evaluation.generate import load
from examples.commands import __main__ as commands
from publishing.build import build
from publishing.paths import ROOT
from speech.ctranslate2 import read_ctranslate2
from speech.parts import GGUF, HUB_SMOLLM2, HUB_WHISPER, make_parts, read_smollm2, read_whisper, write_whisper
from speech.run import REPO, build_repo


JFK = "ask not what your country can do for you, ask what you can do for your country."
PROMPTS = ("The capital of France is", "In 1492 there were 12345 ships.\n\n  Why?", "What is the sun made of?")


def pack_string(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def pack_array(name: str, array: np.ndarray, dtype: int) -> bytes:
    header = pack_string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
    return header + struct.pack("<BI", dtype, array.nbytes) + array.tobytes()


def test_ctranslate2_files_are_read_and_damaged_ones_refused(tmp_path):
    matrix, numbers = np.arange(6, dtype="<f2").reshape(2, 3), np.array([7, -8], "<i2")
    start = struct.pack("<I", 6) + pack_string("Spec") + struct.pack("<II", 3, 2)
    aliases = struct.pack("<I", 1) + pack_string("c") + pack_string("a/b")
    content = start + pack_array("a/b", matrix, dtype=4) + pack_array("n", numbers, dtype=2) + aliases
    file = tmp_path / "model.bin"
    file.write_bytes(content)
    arrays = read_ctranslate2(file)
    assert arrays.keys() == {"a/b", "n", "c"} and arrays["a/b"].dtype == np.float16
    assert (arrays["a/b"] == matrix).all() and (arrays["c"] == matrix).all() and (arrays["n"] == numbers).all()

    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is cut short: .* bytes are needed at byte"):
            read_ctranslate2(file)
    for damaged, message in (
        (content + b"\0", "has 1 bytes after its end"),
        (b"\5" + content[1:], "has version 5 .* expected 6"),
        (start + pack_array("a/b", matrix, dtype=9), "a/b has dtype 9, expected one from 0 to 4"),
        (start + pack_array("a/b", matrix, dtype=0), r"a/b has 3 values, .* shape \[2, 3\]"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_ctranslate2(file)


@pytest.fixture(scope="module")
def speech():
    folder = ROOT / "build" / "speech"
    make_parts(folder)
    return folder


@pytest.fixture(scope="module")
def llama(speech):
    """Stock SmolLM2, as transformers reads its GGUF."""
    return AutoModelForCausalLM.from_pretrained(speech / "parts" / "smollm2", gguf_file=GGUF, dtype=torch.float32)


@pytest.fixture(scope="module")
def qwen(speech):
    return Qwen2VLForConditionalGeneration.from_pretrained(speech / "smollm2", dtype="auto")


@pytest.fixture(scope="module")
def built(speech, tmp_path_factory) -> tuple:
    """The processor and the model of the folder that is built of the parts."""
    folder = tmp_path_factory.mktemp("speech") / "repo"
    return load(build(speech / "smollm2", speech / "whisper", folder, audio_tokens="trimmed"))


@pytest.mark.speech
@pytest.mark.parametrize(("name", "said"), [("jfk.wav", JFK), ("english.wav", "1, 2, 3")])
def test_whisper_transcribes(speech, name, said):
    processor = WhisperProcessor.from_pretrained(speech / "whisper")
    whisper = WhisperForConditionalGeneration.from_pretrained(speech / "whisper", dtype=torch.float32)
    samples = fetch_audio(ASSETS / "audio" / name).numpy()
    inputs = processor(samples, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    ids = whisper.generate(**inputs, language="en", task="transcribe")
    assert said in processor.batch_decode(ids, skip_special_tokens=True)[0].lower()


@pytest.mark.speech
def test_shorter_windows_are_the_same_encoder(speech, tmp_path):
    long, short = (WhisperModel.from_pretrained(speech / name) for name in ("whisper", "whisper-10s"))
    weights = long.encoder.state_dict()
    weights["embed_positions.weight"] = weights["embed_positions.weight"][:500]
    assert all(torch.equal(weights[name], tensor) for name, tensor in short.encoder.state_dict().items())
    extractor = WhisperProcessor.from_pretrained(speech / "whisper-10s").feature_extractor
    assert (extractor.chunk_length, extractor.n_samples, extractor.nb_max_frames) == (10, 160_000, 1000)
    features = torch.zeros(1, 80, 1000, dtype=short.dtype)
    assert short.encoder(features).last_hidden_state.shape == (1, 500, 512)
    with pytest.raises(ValueError, match="window_seconds must be from 1 to 30, got 31"):
        write_whisper(*read_whisper(speech / "parts" / "whisper"), tmp_path / "whisper", window_seconds=31)


@pytest.mark.speech
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_model_is_smollm2_to_the_bit(speech, llama, qwen, prompt):
    tokenizer = AutoTokenizer.from_pretrained(speech / "smollm2")
    inputs = tokenizer(prompt, return_tensors="pt")
    assert tokenizer.decode(inputs["input_ids"][0]) == prompt
    with torch.no_grad():
        assert torch.equal(llama.model(**inputs).last_hidden_state, qwen.model(**inputs).last_hidden_state)
        expected, logits = llama(**inputs).logits, qwen(**inputs).logits
    # Its head has rows for more tokens, and some CPUs multiply a matrix of another shape in another order.
    assert torch.equal(llama.lm_head.weight, qwen.lm_head.weight[: expected.shape[-1]])
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, rtol=0, atol=1e-4)
    assert (logits[..., expected.shape[-1] :].amax(-1) < expected.amax(-1)).all()


@pytest.mark.speech
def test_prompts_of_a_batch_are_padded_on_the_left(built):
    processor, model = built
    inputs = processor.make_inputs([user([text(prompt)]) for prompt in PROMPTS])
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and inputs["attention_mask"][:, -1].all()
    answers = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6)[:, -6:]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        single = model.generate(**processor.make_inputs(user([text(prompt)])), max_new_tokens=6, min_new_tokens=6)
        assert single[0, -6:].tolist() == answer.tolist()


@pytest.mark.speech
def test_digits_are_tokens_of_their_own(speech):
    tokenizer = AutoTokenizer.from_pretrained(speech / "smollm2")
    assert tokenizer.tokenize("in  1492") == ["in", "ĠĠ", "1", "4", "9", "2"]


@pytest.mark.speech
@pytest.mark.parametrize("prompt", PROMPTS)
def test_text_answers_through_a_built_folder_are_those_of_smollm2(llama, built, prompt):
    processor, model = built
    inputs = processor.make_inputs(user([text(prompt)]))
    ends = {"eos_token_id": model.generation_config.eos_token_id, "pad_token_id": 0}
    known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = llama.generate(**known, max_new_tokens=24, do_sample=False, **ends)
    assert model.generate(**inputs, max_new_tokens=24).tolist() == expected.tolist()


@pytest.mark.speech
def test_images_and_audio_are_taken(built):
    processor, model = built
    picture, clip = image(str(ASSETS / "images" / "chelsea.png")), audio(str(ASSETS / "audio" / "english.wav"))
    for content in ([picture], [clip], [picture, clip]):
        inputs = processor.make_inputs(user([*content, text("Describe it.")]))
        answer = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
        assert answer.shape[1] == inputs["input_ids"].shape[1] + 4


@pytest.mark.speech
def test_the_same_parts_come_from_the_hub(speech, tmp_path):
    llama, tokenizer = read_smollm2(speech / "parts" / "smollm2")
    del llama.config.quantization_config  # what was read from a GGUF cannot be saved
    published = LlamaForCausalLM(llama.config).bfloat16()
    published.load_state_dict(llama.state_dict())
    for part in (published, tokenizer):
        part.save_pretrained(tmp_path / "llama")
    with LocalHub() as hub:
        hf, environment = Path(sys.executable).with_name("hf"), hub.environment(tmp_path / "home", hub.token)
        for command in (
            [hf, "upload", HUB_WHISPER, speech / "whisper"],
            [hf, "upload", HUB_SMOLLM2, tmp_path / "llama"],
            [sys.executable, "-m", "speech.parts", "--from-hub", "--output", tmp_path / "parts"],
        ):
            subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
    parts = tmp_path / "parts"
    assert {path.name for path in parts.iterdir()} == {"whisper", "whisper-10s", "smollm2"}
    for name in ("whisper", "whisper-10s", "smollm2"):
        own, known = (load_file(folder / name / "model.safetensors") for folder in (parts, speech))
        assert own.keys() == known.keys()
        for key, tensor in own.items():
            # Behind the words of SmolLM2 are means of them, which are rounded at another place.
            rows = len(tokenizer) if key == "model.embed_tokens.weight" else None
            assert torch.equal(tensor[:rows], known[key][:rows].to(tensor.dtype)), key
    ids = [AutoTokenizer.from_pretrained(folder / "smollm2")(PROMPTS[1]).input_ids for folder in (parts, speech)]
    assert ids[0] == ids[1]


@pytest.mark.speech
def test_a_task_is_taught_and_scored(speech, tmp_path):
    """The example in its short form: it runs, and its report and its folder are those of the task."""
    if not REPO.is_dir():
        build_repo()
    task = json.loads(commands.TASK.read_text())
    phrases, voices = task["phrases"]["training"], task["voices"]["training"]
    for change, reason in (
        ({"instruction": ""}, "The task has no instruction"),
        ({"phrases": {**task["phrases"], "test": []}}, "needs phrases and voices for the part 'test'"),
        ({"phrases": {**task["phrases"], "training": [*phrases, "Turn it {stat}."]}}, r"names \['stat'\]"),
        ({"voices": {**task["voices"], "training": {**voices, "flite": ["kall"]}}}, "flite has no voice kall"),
        ({"voices": {**task["voices"], "training": {"espeak-ng": ["en-us+q7"]}}}, "espeak-ng has no voice en-us"),
    ):
        with pytest.raises(ValueError, match=reason):
            commands.run({**task, **change}, tmp_path, is_short=True)
    results = commands.run(task, tmp_path, is_short=True)
    with pytest.raises(ValueError, match="another number of clips"):
        commands.run(task, tmp_path, is_short=False)
    whole = results["scores"]["arms"]["as given"]["all"]
    assert whole["kind"] == "json" and whole["rows"] == 4 and set(whole["fields"]) >= set(task["words"])
    assert results["training"]["kept"]["metric"] == "word error rate"
    known = json.loads((tmp_path / "model" / "processor_config.json").read_text())["trained_tasks"]
    assert {known_task["instruction"]: known_task["answers"] for known_task in known} == {
        task["instruction"]: "json",
        TRANSCRIBE: "text",
    }
    assert (tmp_path / "results" / "report.html").is_file()
