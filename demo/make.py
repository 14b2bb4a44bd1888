"""
Trains the demo checkpoint from scratch, on speech and pictures that `demo/world.py` makes: `python -m demo.make`.

1. `encoder`: the audio encoder alone learns the words of a clip, in order (CTC,
   https://doi.org/10.1145/1143844.1143891).
2. `vision`: at the same time the vision tower alone learns number, colour and shape. `language`: then the language
   model learns all skills, with written words among silence in the place of audio, which is some ten times shorter.
3. `joint`: all are put together and learn all skills from audio, the encoder with the rest.
4. `both`: what knew fixed audio tokens alone learns trimmed ones as well.

Intermediate files are in `build/world`. It takes about four hours on two CPU cores, Debian's espeak-ng, flite,
festival, festvox-kallpc16k, festvox-kdlpc16k and festvox-us-slt-hts, and `demo/requirements.txt`.
"""

import argparse
import itertools
import json
import math
import random
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging

from audio_utils import log_mel
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS, count_audio
from demo.ask import DEMO, EXAMPLES, ask, load
from demo.bases import ASSETS, write_feature_extractor
from demo.clips import BUILD, WINDOW, augment_features, held_out_clips, training_clips
from demo.world import (
    HELD_OUT,
    PHRASES,
    QUESTIONS,
    SEEN,
    SKILLS,
    WORLD,
    Examples,
    cast,
    content,
    draw,
    say,
    write_speech,
)
from publishing.build import build


logger = logging.get_logger(__name__)
CHECKPOINT_FILES = (
    *("config.json", "generation_config.json", "model.safetensors"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
)
PICTURE = 112  # pixels a side: 16 tokens
STD = 0.08  # of the first weights; with the usual 0.02 so small a model hardly starts to learn
WORDS = sorted({word for text in PHRASES + QUESTIONS for word in text.split()})


def make_bases(folder: Path) -> tuple[Path, Path]:
    """A Qwen2-VL and a Whisper checkpoint of the demo's size, untrained, with a tokenizer of its own."""
    corpus = [skill["instruction"] for skill in SKILLS.values()] + PHRASES + QUESTIONS
    corpus += [word for words in WORLD["words"].values() for word in words] + ["yes", "no"]
    corpus += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"]
    full = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer = full.train_new_from_iterator(corpus * 10, vocab_size=440)
    base, encoder = folder / "qwen2-vl", folder / "whisper"
    tokenizer.save_pretrained(base)

    def token_id(name):
        return tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "vocab_size": 64 * math.ceil((len(tokenizer) + 3) / 64),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "initializer_range": STD,
            "bos_token_id": token_id("endoftext"),
            "eos_token_id": token_id("im_end"),
        },
        vision_config={"depth": 4, "embed_dim": 128, "num_heads": 4, "hidden_size": 128, "mlp_ratio": 2},
        tie_word_embeddings=False,
        initializer_range=STD,
        **{f"{name}_token_id": token_id(f"{name}_pad") for name in ("image", "video")},
        **{f"vision_{name}_token_id": token_id(f"vision_{name}") for name in ("start", "end")},
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(base)
    ends = [token_id("im_end"), token_id("endoftext")]
    generation = {"eos_token_id": ends, "pad_token_id": ends[1], "do_sample": False}
    (base / "generation_config.json").write_text(json.dumps(generation))
    pixels = json.loads((ASSETS / "qwen2-vl-7b" / "preprocessor_config.json").read_text())
    pixels |= {"min_pixels": PICTURE**2, "max_pixels": PICTURE**2}
    (base / "preprocessor_config.json").write_text(json.dumps(pixels))

    sizes = {"d_model": 128, "num_mel_bins": 128, "max_source_positions": 50 * WINDOW, "vocab_size": 64}
    for half, layers in (("encoder", 3), ("decoder", 1)):
        sizes |= {f"{half}_layers": layers, f"{half}_attention_heads": 4, f"{half}_ffn_dim": 512}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    WhisperForConditionalGeneration(WhisperConfig(**sizes, **ids, init_std=STD)).save_pretrained(encoder)
    write_feature_extractor(encoder, WINDOW)
    return base, encoder


class TrainingRun:
    """AdamW with warm-up and cosine, gradients clipped, and a line of JSON now and then."""

    def __init__(self, name: str, parameters, steps: int, lr: float):
        self.name, self.parameters = name, [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: min(s / 100, 0.5 + 0.5 * math.cos(math.pi * min(1, s / steps))) + 0.002
        )
        self.start, self.losses = time.time(), []

    def step(self, loss: float):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.losses.append(loss)

    def log(self, number: int, **scores):
        line = {"part": self.name, "step": number, "seconds": round(time.time() - self.start)}
        line |= {"loss": round(float(np.mean(self.losses[-50:])), 4)} | {n: round(v, 3) for n, v in scores.items()}
        with (BUILD / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def load_untrained():
    repo = BUILD / "untrained"
    if not repo.exists():
        build(*make_bases(BUILD), repo)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    return processor, AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)


def train_encoder(steps: int, seed: int, batch: int = 40):
    """Part 1; a second call goes on from the first, with a new start of the schedule."""
    torch.manual_seed(seed)
    processor, model = load_untrained()
    paths = BUILD / "encoder.safetensors", BUILD / "encoder-head.safetensors"
    again = paths[0].exists()
    encoder = model.model.audio_encoder.requires_grad_(True)
    head = torch.nn.Linear(encoder.config.d_model, len(WORDS) + 1)
    for module, path in zip((encoder, head), paths, strict=True):
        if path.exists():
            module.load_state_dict(load_file(path))
    clips, test = training_clips(), held_out_clips()
    clips.rng.seed(seed)
    run = TrainingRun("encoder", [*encoder.parameters(), *head.parameters()], steps, 1e-3 if again else 1.5e-3)

    def logits(rows, rough):
        features = log_mel(list(rows), processor.feature_extractor)
        return head(encoder(augment_features(features, rough) if rough else features).last_hidden_state)

    def spell(ids) -> str:
        return " ".join(WORDS[i - 1] for i, _ in itertools.groupby(ids.tolist()) if i)

    for number in range(1, steps + 1):
        texts = clips.rng.choices(list(clips.by_text), k=batch)
        targets = [torch.tensor([WORDS.index(word) + 1 for word in text.split()]) for text in texts]
        rough = (1 if again else min(1, max(0, number - 200) / (0.6 * steps))) * clips.rng.random() ** 0.5
        scores = logits(clips.windows(texts, rough), rough).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((batch,), len(scores)), torch.tensor([len(target) for target in targets])
        loss = F.ctc_loss(scores, torch.cat(targets), *lengths)
        loss.backward()
        run.step(loss.item())
        if number % 100 == 0:
            with torch.no_grad():
                right = []
                for _ in range(3):
                    texts = test.rng.choices(PHRASES + QUESTIONS, k=64)
                    guesses = logits(test.windows(texts, 0), 0).argmax(-1)
                    right += [spell(ids) == text for ids, text in zip(guesses, texts, strict=True)]
            run.log(number, held_out=float(np.mean(right)))
    for module, path in zip((encoder, head), paths, strict=True):
        save_file(module.state_dict(), path)


def train_vision(steps: int, seed: int, batch: int = 64):
    """Part 2, the vision tower."""
    torch.manual_seed(seed)
    processor, model = load_untrained()
    tower, rng = model.model.visual, random.Random(seed)
    kinds = list(WORLD["words"].values())
    queries = torch.nn.Parameter(torch.randn(len(kinds), model.config.text_config.hidden_size) * STD)
    heads = torch.nn.ModuleList(torch.nn.Linear(queries.shape[1], len(words)) for words in kinds)
    run = TrainingRun("vision", [*tower.parameters(), queries, *heads.parameters()], steps, 1e-3)

    def logits(texts):
        pixels = processor.image_processor([draw(text, rng) for text in texts], return_tensors="pt")
        tokens = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output
        tokens = tokens.reshape(len(texts), -1, queries.shape[1])
        pooled = (queries @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return [head(pooled[:, index]) for index, head in enumerate(heads)]

    def targets(texts):
        return [torch.tensor([w.index(t.split()[i]) for t in texts]) for i, w in enumerate(kinds)]

    for number in range(1, steps + 1):
        texts = rng.choices(SEEN, k=batch)
        loss = sum(F.cross_entropy(guess, right) for guess, right in zip(logits(texts), targets(texts), strict=True))
        loss.backward()
        run.step(loss.item())
        if number % 100 == 0:
            texts = rng.choices(HELD_OUT, k=200)
            with torch.no_grad():
                guesses = zip(WORLD["words"], logits(texts), targets(texts), strict=True)
                run.log(number, **{name: (g.argmax(-1) == right).float().mean().item() for name, g, right in guesses})
    save_file(tower.state_dict(), BUILD / "vision.safetensors")


class Prompts:
    """Token ids of whole batches of one skill and one order of audio, picture and text."""

    def __init__(self, processor, model):
        self.processor, self.model, self.tokenizer = processor, model.model, processor.tokenizer
        self.pad = self.tokenizer.pad_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def batch(self, skill: str, slots: list[list[list[int]]], pictures: list, answers: list[str], odd: bool) -> dict:
        """
        `slots`: for each row and clip the ids between the markers. `odd`: sound comes before the picture, and is
        transcribed without being told.
        """
        inputs = SKILLS[skill]["inputs"]
        content = [{"type": name} for name in (reversed(inputs) if odd else inputs)]
        if skill != "transcribe" or not odd:
            content.append({"type": "text", "text": SKILLS[skill]["instruction"]})
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        config = self.model.config
        prompt = []
        for token in self.ids(text):
            if token == config.image_token_id:
                prompt += [token] * (PICTURE // 28) ** 2
            elif token == config.audio_token_id:
                prompt += [config.audio_bos_token_id, None, config.audio_eos_token_id]
            else:
                prompt.append(token)
        rows, labels = [], []
        ends = [[*self.ids(answer), *self.ids("<|im_end|>")] for answer in answers]
        longest = max(map(len, ends))
        for row_slots, end in zip(slots, ends, strict=True):
            left = iter(row_slots)
            row = [i for token in prompt for i in (next(left) if token is None else [token])]
            padding = longest - len(end)
            rows.append([*row, *end, *[self.pad] * padding])
            labels.append([-100] * len(row) + end + [-100] * padding)
        batch = {
            "input_ids": pad_sequence(list(map(torch.tensor, rows)), True, self.pad),  # on the right: nothing sees it
            "labels": pad_sequence(list(map(torch.tensor, labels)), True, -100),
        }
        if pictures:
            batch |= self.processor.image_processor(pictures, return_tensors="pt")
        types = (batch["input_ids"] == config.image_token_id).int()
        batch["position_ids"], _ = self.model.get_rope_index(batch["input_ids"], types, batch.get("image_grid_thw"))
        return batch


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which rows have every token of their answer right, each guessed from the right ones before it."""
    asked = labels[:, 1:] != -100
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~asked).all(-1)


def save(model, name: str):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, BUILD / f"{name}.safetensors")


# Rows of each skill in a step.
SHARES = {"transcribe": 10, "picture": 8, "agree": 14, "question": 10, "compare": 14}


def learn(run: TrainingRun, steps: int, model, examples, test_examples, make_batch, kinds: tuple = ("fixed",)):
    """All skills in every step; kinds of audio tokens by turns."""
    for number in range(1, steps + 1):
        total = 0.0
        for skill, share in SHARES.items():
            made = [examples.make(skill) for _ in range(share)]
            batch = make_batch(skill, made, True, kinds[number % len(kinds)])
            loss = model(**batch, use_cache=False).loss
            (loss * share / sum(SHARES.values())).backward()
            total += loss.item() * share / sum(SHARES.values())
        run.step(total)
        if number % (50 if run.name == "both" else 100) == 0:
            scores = {}
            with torch.no_grad():
                for kind, skill in itertools.product(kinds, SHARES):
                    batch = make_batch(skill, [test_examples.make(skill) for _ in range(100)], False, kind)
                    right = right_answers(model(**batch, use_cache=False).logits, batch["labels"])
                    scores[skill if kind == kinds[0] else f"{skill}, {kind}"] = right.float().mean().item()
            run.log(number, **scores)
            save(model, f"{run.name}-unfinished")


def train_language(steps: int, seed: int):
    """Part 2, the language model; the vision tower goes on learning."""
    torch.manual_seed(seed)
    processor, model = load_untrained()
    model.model.visual.load_state_dict(load_file(BUILD / "vision.safetensors"))
    model.model.audio_projector.requires_grad_(False)
    prompts, rng = Prompts(processor, model), random.Random(seed)

    def write(text: str, length: int) -> list[int]:
        """The words of a text, some of them held for longer, among silence."""
        ids = [i for i in prompts.ids(text) for _ in range(rng.choice([1, 1, 2, 3]))]
        if len(ids) > length:
            ids = prompts.ids(text)
        slot = [prompts.pad] * length
        for place, i in zip(sorted(rng.sample(range(length), len(ids))), ids, strict=True):
            slot[place] = i
        return slot

    def make_batch(skill, made, training, _):
        length = round(math.exp(rng.uniform(math.log(6), math.log(50)))) if training else 20
        slots = [[write(text, length) for text in said] for said, _, _ in made]
        pictures = [draw(drawn, rng) for _, drawn, _ in made if drawn]
        return prompts.batch(skill, slots, pictures, [answer for *_, answer in made], training and rng.random() < 0.25)

    run = TrainingRun("language", model.parameters(), steps, 1.5e-3)
    learn(run, steps, model, Examples(SEEN, SEEN, seed), Examples(HELD_OUT, PHRASES, 0), make_batch)
    save(model, "language")


def train_both(steps: int, seed: int):
    """
    Part 4: half of the steps with fixed audio tokens, half with trimmed ones. A second call goes on from the first, and
    where there is no result of part 3, the first from the checkpoint in `demo/`.
    """
    with tempfile.TemporaryDirectory() as folder:
        processor, model = load(build(checkpoint=DEMO, output=Path(folder) / "demo"))
    model.float()
    paths = (BUILD / f"{name}.safetensors" for name in ("both", "joint"))
    if path := next((path for path in paths if path.exists()), None):
        model.load_state_dict(load_file(path))
    train_with_audio("both", processor, model, steps, seed, 4e-4)


def train_joint(steps: int, seed: int):
    """Part 3; a second call goes on from the first, with a new start of the schedule."""
    processor, model = load_untrained()
    again = (BUILD / "joint.safetensors").exists()
    model.load_state_dict(load_file(BUILD / ("joint.safetensors" if again else "language.safetensors")))
    if not again or (BUILD / "encoder.safetensors").stat().st_mtime > (BUILD / "joint.safetensors").stat().st_mtime:
        model.model.audio_encoder.load_state_dict(load_file(BUILD / "encoder.safetensors"))
    train_with_audio("joint", processor, model, steps, seed, 6e-4 if again else 1e-3)


def train_with_audio(name: str, processor, model, steps: int, seed: int, lr: float):
    model.model.audio_encoder.requires_grad_(True)
    model.train()
    torch.manual_seed(seed)
    prompts, rng = Prompts(processor, model), random.Random(seed)
    clips, test = training_clips(), held_out_clips()
    clips.rng.seed(seed)

    def make_batch(skill, made, training, audio_tokens="fixed"):
        source = clips if training else test
        num_windows = 2 if training and skill != "compare" and rng.random() < 0.1 else 1
        texts = [text for said, _, _ in made for text in said]
        pictures = [draw(drawn, rng) for _, drawn, _ in made if drawn]
        ends = [] if audio_tokens == "trimmed" else None
        rows = source.windows(texts, rng.random() if training else 0, num_windows, ends) if texts else None
        lengths = ends or [16_000 * WINDOW * num_windows] * len(texts)
        counts = [count_audio(length, 50 * WINDOW, audio_tokens) for length in lengths]
        tokens = iter([[model.config.audio_token_id] * count.tokens for count in counts])
        slots = [[next(tokens) for _ in said] for said, _, _ in made]
        odd = training and rng.random() < 0.25
        batch = prompts.batch(skill, slots, pictures, [answer for *_, answer in made], odd)
        if texts:
            windows = list(rows.reshape(-1, 16_000 * WINDOW))
            if ends is not None:  # only those that a clip reaches
                pairs = zip(rows, counts, strict=True)
                windows = [w for row, count in pairs for w in row.split(16_000 * WINDOW)[: count.windows]]
                batch["input_features_mask"] = torch.cat([processor.mask_frames(count) for count in counts])
            batch["input_features"] = log_mel(windows, processor.feature_extractor)
        return batch

    kinds = AUDIO_TOKEN_COUNTS if name == "both" else AUDIO_TOKEN_COUNTS[:1]
    run = TrainingRun(name, model.parameters(), steps, lr)
    learn(run, steps, model, Examples(SEEN, SEEN, seed), Examples(HELD_OUT, PHRASES, 0), make_batch, kinds)
    save(model, name)


def ship():
    """Puts the trained checkpoint and its curves into `demo/`."""
    processor, model = load_untrained()
    model.load_state_dict(load_file(BUILD / "both.safetensors"))
    model.to(torch.bfloat16)
    processor.trained_audio_tokens = "both"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name in CHECKPOINT_FILES:
            shutil.copyfile(Path(folder) / name, DEMO / name)
    draw_curves(DEMO / "curves.png")


def choose_examples(examples: int = 4):
    """Puts examples of every skill that the checkpoint in `demo/` answers right into `demo/examples`."""
    with tempfile.TemporaryDirectory() as folder:
        processor, model = load(build(checkpoint=DEMO, output=Path(folder) / "demo"))
    rng, made = random.Random(11), Examples(HELD_OUT, PHRASES, 11)
    shutil.rmtree(EXAMPLES, ignore_errors=True)
    EXAMPLES.mkdir()
    listed, wrong = [], 0
    while len(listed) < examples * len(SKILLS):
        number, skill = len(listed) + 1, list(SKILLS)[len(listed) % len(SKILLS)]
        said, drawn, answer = made.make(skill)
        speeches = cast(said, len(said), rng, held_out=True)
        sounds = [EXAMPLES / f"{number:02}-{index + 1}-{speech.engine}.wav" for index, speech in enumerate(speeches)]
        write_speech(speeches, sounds)
        image = EXAMPLES / f"{number:02}.png" if drawn else None
        if image:
            draw(drawn, rng).save(image)
        if ask(processor, model, [content(skill, [str(path) for path in sounds], image and str(image))]) != [answer]:
            wrong += 1
            for path in sounds:
                path.unlink()
            continue
        names = {"audio": [path.name for path in sounds], "image": image and image.name}
        listed.append({"skill": skill, **names, "said": said, "answer": answer})
    logger.warning(f"{wrong} other examples were answered wrong and left out.")
    (EXAMPLES / "examples.json").write_text(json.dumps(listed, indent=2) + "\n")

    # The two examples of the card, which `upload.py build` copies: a question and the picture that it is about.
    (clip,) = say(cast(QUESTIONS[:1], 1, rng, held_out=True))
    with av.open(EXAMPLES / "speech.mp3", "w") as file:
        stream = file.add_stream("mp3", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((clip * 32767).short().numpy()[None], format="s16", layout="mono")
        frame.sample_rate = 16_000
        file.mux([*stream.encode(frame), *stream.encode(None)])
    draw(HELD_OUT[1], rng).save(EXAMPLES / "photo.png")


def draw_curves(path: Path):
    lines = [json.loads(line) for line in (BUILD / "log.jsonl").read_text().splitlines()]
    titles = {
        "encoder": "1. the audio encoder",
        "vision": "2. the vision tower",
        "language": "2. skills, from written words",
        "joint": "3. all together",
        "both": "4. trimmed tokens (dashed)",
    }
    titles = {name: title for name, title in titles.items() if any(line["part"] == name for line in lines)}
    figure = Figure(figsize=(3 * len(titles), 3), layout="constrained")
    for axes, (name, title) in zip(
        figure.subplots(1, len(titles), sharey=True, squeeze=False)[0], titles.items(), strict=True
    ):
        runs = [[]]
        for line in (line for line in lines if line["part"] == name):
            if runs[-1] and line["step"] <= runs[-1][-1]["step"]:
                runs.append([])
            runs[-1].append(line)
        offset, points, colours = 0, [], {}
        for run in runs:
            points += [{**line, "step": offset + line["step"]} for line in run]
            offset = points[-1]["step"] if points else 0
        for score in [key for key in points[0] if key not in ("part", "step", "seconds", "loss")]:
            drawn = {"label": score.replace("_", " ")}
            if score.endswith(", trimmed"):
                drawn = {"linestyle": "--", "color": colours[score.removesuffix(", trimmed")]}
            (line,) = axes.plot([at["step"] for at in points], [at[score] for at in points], linewidth=1, **drawn)
            colours[score] = line.get_color()
        axes.set(title=title, xlabel="step", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.supylabel("right, held out", fontsize=9)
    figure.savefig(path, dpi=90)


PARTS = {"encoder": train_encoder, "vision": train_vision, "language": train_language}
PARTS |= {"joint": train_joint, "both": train_both}
# Part, steps, seed; two processes of one thread each, then one of two. The checkpoint in this folder went through these
# rounds. Only the last five rounds had the voices of pico and piper, and changed speakers.
RECIPE = (
    [[("encoder", 1800, 1), ("encoder", 1400, 2)], [("vision", 1200, 5), ("language", 1000, 2)]],
    [[("encoder", 1000, 3), ("joint", 800, 3), ("encoder", 1600, 11), ("encoder", 1500, 12), ("joint", 700, 21)]],
    [[("both", 300, 31), ("both", 250, 32)]],
)


def run_parts(parts: list[tuple[str, int, int]], threads: int):
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    for name, steps, seed in parts:
        PARTS[name](steps, seed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=[*PARTS, "ship", "examples"], help="one alone (default: all)")
    parser.add_argument("--steps", type=int, help="of that part")
    parser.add_argument("--seed", type=int, help="of that part")
    parser.add_argument("--threads", type=int, default=2, help="of that part (default: 2)")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if options.part == "ship":
        ship()
    elif options.part == "examples":
        choose_examples()
    elif options.part:
        run_parts([(options.part, options.steps, options.seed)], options.threads)
    else:
        shutil.rmtree(BUILD)
        BUILD.mkdir()
        load_untrained()
        training_clips()
        held_out_clips()
        for stage in RECIPE:
            with ProcessPoolExecutor(len(stage), get_context("spawn")) as pool:
                list(pool.map(run_parts, stage, [2 // len(stage)] * len(stage)))
        ship()
        choose_examples()


if __name__ == "__main__":
    main()
