"""
Trains the demo checkpoints on speech and pictures that `demo/world.py` makes: `python -m demo.make`.

1. `encoder`: the audio encoder learns the words of a clip, in order (CTC, https://doi.org/10.1145/1143844.1143891).
2. `vision`: at the same time the vision tower alone learns number, colour and shape. `language`: then the language
   model learns all skills, with written words among silence in the place of audio, which is some ten times shorter.
3. `joint`: all are put together and learn all skills from audio, the encoder with the rest.
4. `both`: the model, which has learned fixed audio tokens alone, learns trimmed ones as well.
5. `tower`: the vision tower of Qwen3-VL learns from that of the trained model. `newer`: then the model on Qwen3-VL,
   which takes its other weights from the trained model, learns all skills.

Intermediate files are in `build/world`. It takes about four hours on two CPU cores, Debian's espeak-ng, flite,
festival, festvox-kallpc16k, festvox-kdlpc16k and festvox-us-slt-hts, and `demo/requirements.txt`.
"""

import argparse
import random
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from safetensors.torch import load_file
from transformers.utils import logging

from demo.ask import DEMO, DEMO_NEWER, EXAMPLES, ask_example, load_demo
from demo.bases import load_untrained
from demo.clips import BUILD, held_out_clips, training_clips
from demo.train import NEWER, PARTS
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SKILLS, Examples, cast, draw, say, write_speech
from evaluation.generate import write_sound
from publishing.paths import write_json


logger = logging.get_logger(__name__)
THREADS = 2
# Part, steps, seed. The parts of two lists run at the same time in a process of one thread each. The checkpoint in this
# folder went through these rounds; only its last five had the voices of pico and piper, and changed speakers. README.md
# says how that on Qwen3-VL came about, which the last list has in short.
RECIPE = (
    [[("encoder", 1800, 1), ("encoder", 1400, 2)], [("vision", 1200, 5), ("language", 1000, 2)]],
    [[("encoder", 1000, 3), ("joint", 800, 3), ("encoder", 1600, 11), ("encoder", 1500, 12), ("joint", 700, 21)]],
    [[("both", 300, 31), ("both", 250, 32)]],
    [[("tower", 600, 41), ("newer", 500, 42), ("newer", 400, 43)]],
)


# The parts whose weights ship: on which base, and where to.
SHIPPED = {"both": ("qwen2_vl", DEMO), "newer": (NEWER, DEMO_NEWER)}


def ship(part: str):
    """Puts the checkpoint that a part has trained into its folder."""
    base_type, target = SHIPPED[part]
    processor, model = load_untrained(base_type)
    model.load_state_dict(load_file(BUILD / f"{part}.safetensors"))
    model.to(torch.bfloat16)
    processor.trained_audio_tokens = "both"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # `upload.py build` adds the code and the chat template.
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.py", "*.jinja"), dirs_exist_ok=True)


def choose_examples(count: int = 4):
    """Writes `count` examples of every skill, which the checkpoint in `demo/` answers right, into `demo/examples`."""
    processor, model = load_demo()
    rng, examples = random.Random(11), Examples(HELD_OUT, PHRASES, 11)
    shutil.rmtree(EXAMPLES, ignore_errors=True)
    EXAMPLES.mkdir()
    chosen, wrong = [], 0
    while len(chosen) < count * len(SKILLS):
        number, skill = len(chosen) + 1, list(SKILLS)[len(chosen) % len(SKILLS)]
        said, phrase, answer = examples.make(skill)
        speeches = cast(said, len(said), rng, held_out=True)
        names = [f"{number:02}-{index}-{speech.engine}.wav" for index, speech in enumerate(speeches, 1)]
        write_speech(speeches, [EXAMPLES / name for name in names])
        image = f"{number:02}.png" if phrase else None
        if image:
            draw(phrase, rng).save(EXAMPLES / image)
        example = {"skill": skill, "audio": names, "image": image, "said": said, "answer": answer}
        if ask_example(processor, model, example) == answer:
            chosen.append(example)
            continue
        wrong += 1
        for name in names:
            (EXAMPLES / name).unlink()
    logger.warning(f"{wrong} other examples were answered wrong and left out.")
    write_json(EXAMPLES / "examples.json", chosen)

    # `upload.py build` copies two examples for the card: a question and the picture that it is about.
    (clip,) = say(cast(QUESTIONS[:1], 1, rng, held_out=True))
    write_sound(clip.numpy(), str(EXAMPLES / "speech.mp3"), "mp3", "mp3")
    draw(HELD_OUT[1], rng).save(EXAMPLES / "photo.png")


def run_parts(parts: list[tuple[str, int, int]], threads: int):
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    for name, steps, seed in parts:
        PARTS[name](steps, seed)


def run_recipe():
    shutil.rmtree(BUILD)
    BUILD.mkdir()
    load_untrained()
    training_clips()
    held_out_clips()
    for stage in RECIPE:
        with ProcessPoolExecutor(len(stage), get_context("spawn")) as pool:
            list(pool.map(run_parts, stage, [THREADS // len(stage)] * len(stage)))
        if (last := stage[-1][-1][0]) in SHIPPED:
            ship(last)
    choose_examples()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*PARTS, *(f"ship-{part}" for part in SHIPPED), "examples"]
    parser.add_argument("part", nargs="?", choices=choices, help="one alone (default: all)")
    parser.add_argument("--steps", type=int, help="of that part")
    parser.add_argument("--seed", type=int, help="of that part")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if options.part in PARTS:
        run_parts([(options.part, options.steps, options.seed)], THREADS)
    elif options.part is None:
        run_recipe()
    elif options.part == "examples":
        choose_examples()
    else:
        ship(options.part.removeprefix("ship-"))


if __name__ == "__main__":
    main()
