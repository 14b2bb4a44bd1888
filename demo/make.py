"""
Trains the demo checkpoint from scratch, on speech and pictures that `demo/world.py` makes: `python -m demo.make`.

1. The audio encoder alone learns to hear the words, in order (CTC, https://doi.org/10.1145/1143844.1143891).
2. Beside it, the vision tower alone learns to see number, colour and shape; then the language model learns all skills,
   with written words among silence in the place of sound, which is some ten times shorter.
3. All are put together; the encoder is frozen from here on, as it is for every user, and the rest learns to read it.

Every part is kept in `build/world` and not made again.
"""

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
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

import upload
from audio_utils import log_mel
from demo.bases import ASSETS
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SEEN, WORLD, cast, draw, say


logger = logging.get_logger(__name__)
BUILD = Path(__file__).resolve().parent.parent / "build" / "world"
WINDOW = 3  # seconds; Whisper's own 30 would cost ten times as much
PICTURE = 112  # pixels a side: 16 tokens
STD = 0.08  # of the first weights; with the usual 0.02 so small a model hardly starts to learn
WORDS = sorted({word for text in PHRASES + QUESTIONS for word in text.split()})
SKILLS = WORLD["skills"]


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
    extractor = json.loads((ASSETS / "whisper-large-v3-turbo" / "preprocessor_config.json").read_text())
    extractor |= {"chunk_length": WINDOW, "n_samples": 16_000 * WINDOW, "nb_max_frames": 100 * WINDOW}
    (encoder / "preprocessor_config.json").write_text(json.dumps(extractor))
    return base, encoder


class Clips:
    """All that was said, by text, and how training hears it: placed, played faster or slower, in rooms and noise."""

    def __init__(self, name: str, texts: list[str], count: int, held_out: bool, seed: int):
        path = BUILD / f"{name}.safetensors"
        if not path.exists():
            speeches = cast(texts, count, random.Random(seed), held_out)
            samples = [(clip * 32767).short() for clip in say(speeches)]
            ends = torch.tensor([len(clip) for clip in samples]).cumsum(0)
            said = torch.tensor([texts.index(speech.text) for speech in speeches])
            save_file({"samples": torch.cat(samples), "ends": ends, "texts": said}, path)
        stored = load_file(path)
        clips = stored["samples"].float().div(32768).tensor_split(stored["ends"][:-1])
        self.by_text = {text: [] for text in texts}
        for clip, text in zip(clips, stored["texts"].tolist(), strict=True):
            self.by_text[texts[text]].append(clip)
        self.rng = random.Random(seed)

    def windows(self, texts: list[str], rough: float, num_windows: int = 1) -> torch.Tensor:
        """
        float32 `[texts, samples of the windows]`, each text by any voice that says it; `rough` from 0, as it was
        synthesized, to 1, at another pace, anywhere in its windows, in a room, through a channel, in noise.
        """
        rng, size = self.rng, num_windows * 16_000 * WINDOW
        rows = torch.zeros(len(texts), size)
        for row, text in zip(rows, texts, strict=True):
            clip = rng.choice(self.by_text[text])
            pace = 1 + rng.uniform(-0.15, 0.2) * rough
            pace = max(pace, len(clip) / size)
            at = np.arange(0, len(clip) - 1, pace)
            clip = torch.from_numpy(np.interp(at, np.arange(len(clip)), clip.numpy())).float()[:size]
            room = size - len(clip)
            start = rng.randint(0, round(min(8000, room) * (1 - rough) + room * rough))
            row[start : start + len(clip)] = clip * rng.uniform(0.2, 1) / clip.abs().max().clamp(min=1e-3)
        return roughen(rows, rough) if rough else rows


def roughen(rows: torch.Tensor, rough: float) -> torch.Tensor:
    """Puts half of the rows into rooms, all of them through some channel, and most into noise."""
    count, size = rows.shape
    length = 2 ** math.ceil(math.log2(size + 4000))
    spectrum = torch.fft.rfft(rows, length)
    bands = F.interpolate(torch.randn(count, 1, 8) * 4 * rough, spectrum.shape[1], mode="linear")[:, 0]  # dB
    cut = torch.where(torch.rand(count, 1) < 0.3 * rough, torch.empty(count, 1).uniform_(0.4, 0.9), 1.0)
    frequency = torch.linspace(0, 1, spectrum.shape[1])
    spectrum = spectrum * 10 ** (bands / 20) * torch.sigmoid((cut - frequency) * 60)
    time_ = torch.arange(8000) / 16_000
    decay = torch.exp(-6.9 * time_ / torch.empty(count, 1).uniform_(0.1, 0.5))
    wet = torch.empty(count, 1).uniform_(0, 0.08) * (torch.rand(count, 1) < 0.5 * rough)
    room = torch.randn(count, 8000) * decay * wet
    room[:, 0] = 1
    rows = torch.fft.irfft(spectrum * torch.fft.rfft(room, length), length)[:, :size]
    colour = frequency.clamp(min=0.01) ** -torch.empty(count, 1).uniform_(0, 1)
    noise = torch.fft.irfft(torch.fft.rfft(torch.randn(count, length)) * colour, length)[:, :size]
    babble = rows.roll(1, 0).roll(size // 3, 1) * (torch.rand(count, 1) < 0.15 * rough)
    level = rows.square().mean(1, keepdim=True).sqrt()
    for sound, low, high in ((noise, 40 - 34 * rough, 50), (babble, 12, 25)):
        ratio = torch.empty(count, 1).uniform_(low, high)
        rows = rows + sound * level / sound.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6) * 10 ** (-ratio / 20)
    return rows / rows.abs().amax(1, keepdim=True).clamp(min=1e-3) * torch.empty(count, 1).uniform_(0.1, 0.95)


def smear(features: torch.Tensor, rough: float) -> torch.Tensor:
    """Other vocal tracts, by stretching the mel axis, and SpecAugment's masks (https://arxiv.org/abs/1904.08779)."""
    count, bins, _ = features.shape
    stretch = 1 + torch.empty(count, 1).uniform_(-0.12, 0.14) * rough
    at = (torch.arange(bins) * stretch).clamp(max=bins - 1)
    low, part = at.long(), (at - at.long()).unsqueeze(-1)
    rows = torch.arange(count).unsqueeze(1)
    features = features[rows, low] * (1 - part) + features[rows, (low + 1).clamp(max=bins - 1)] * part
    for axis, widest in ((1, 20), (1, 20), (2, 25)):
        width = (torch.randint(widest, (count, 1)) * rough).long()
        start = torch.randint(features.shape[axis] - widest, (count, 1))
        place = torch.arange(features.shape[axis])
        mask = ((place >= start) & (place < start + width)).unsqueeze(3 - axis)
        features = features.masked_fill(mask, features.min())
    return features


class Schedule:
    """AdamW with warm-up and cosine, gradients clipped, and a line of JSON now and then."""

    def __init__(self, name: str, parameters, steps: int, lr: float):
        self.name, self.steps, self.parameters = name, steps, [p for p in parameters if p.requires_grad]
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
        upload.build(*make_bases(BUILD), repo)
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    return processor, AutoModel.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32)


def training_clips() -> Clips:
    return Clips("train", SEEN + QUESTIONS * 4, 14_000, held_out=False, seed=0)


def held_out_clips() -> Clips:
    return Clips("held-out", PHRASES + QUESTIONS, 1_000, held_out=True, seed=1)


def hear(steps: int, batch: int = 40):
    """Part 1; a second call goes on from the first, with a new start of the schedule."""
    torch.manual_seed(1)
    processor, model = load_untrained()
    path = BUILD / "hear.safetensors"
    again = path.exists()
    if again:
        model.model.audio_encoder.load_state_dict(load_file(path))
    encoder = model.model.audio_encoder.requires_grad_(True)
    head = torch.nn.Linear(encoder.config.d_model, len(WORDS) + 1)
    clips, test = training_clips(), held_out_clips()
    run = Schedule("hear", [*encoder.parameters(), *head.parameters()], steps, 1.5e-3)

    def logits(rows, rough):
        features = log_mel(list(rows), processor.feature_extractor)
        return head(encoder(smear(features, rough) if rough else features).last_hidden_state)

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
                    heard = logits(test.windows(texts, 0), 0).argmax(-1)
                    right += [spell(ids) == text for ids, text in zip(heard, texts, strict=True)]
            run.log(number, held_out=float(np.mean(right)))
    save_file(encoder.state_dict(), path)
    save_file(head.state_dict(), BUILD / "hear-head.safetensors")


def see(steps: int, batch: int = 64):
    """Part 2, the vision tower."""
    torch.manual_seed(5)
    processor, model = load_untrained()
    tower, rng = model.model.visual, random.Random(7)
    kinds = list(WORLD["words"].values())
    queries = torch.nn.Parameter(torch.randn(len(kinds), model.config.text_config.hidden_size) * STD)
    heads = torch.nn.ModuleList(torch.nn.Linear(queries.shape[1], len(words)) for words in kinds)
    run = Schedule("see", [*tower.parameters(), queries, *heads.parameters()], steps, 1e-3)

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
    save_file(tower.state_dict(), BUILD / "see.safetensors")


class Examples:
    """Examples of every skill: texts for the sound, pictures, and the answer."""

    def __init__(self, phrases: list[str], others: list[str], seed: int):
        self.phrases, self.others, self.rng = phrases, others, random.Random(seed)

    def other(self, phrase: str) -> str:
        """Another phrase, as a rule one that differs in one word only."""
        distance = 1 if self.rng.random() < 0.7 else 2
        words = phrase.split()
        differences = {o: sum(a != b for a, b in zip(words, o.split(), strict=True)) for o in self.others}
        return self.rng.choice([other for other in self.others if differences[other] == distance])

    def make(self, skill: str) -> tuple[list[str], str | None, str]:
        """What is said, what is drawn, and the answer."""
        phrase = self.rng.choice(self.phrases)
        if skill == "transcribe":
            said = self.rng.choice(QUESTIONS) if self.rng.random() < 0.1 else phrase
            return [said], None, said
        if skill == "picture":
            return [], phrase, phrase
        if skill == "question":
            said = self.rng.choice(QUESTIONS)
            kinds = list(WORLD["words"])
            return [said], phrase, phrase.split()[kinds.index(WORLD["questions"][said])]
        same = self.rng.random() < 0.5
        other = phrase if same else self.other(phrase)
        answer = "yes" if same else "no"
        return ([phrase], other, answer) if skill == "agree" else ([phrase, other], None, answer)


class Prompts:
    """Token ids of whole batches of one skill; a batch has one layout, so nothing is padded but answers."""

    def __init__(self, processor, model):
        self.processor, self.model, self.tokenizer = processor, model.model, processor.tokenizer
        self.pad = self.tokenizer.pad_token_id

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"]

    def batch(self, skill: str, slots: list[list[list[int]]], pictures: list, answers: list[str], flip: bool) -> dict:
        """`slots`: for each row and clip the ids between the markers."""
        inputs = SKILLS[skill]["inputs"]
        content = [{"type": name} for name in (reversed(inputs) if flip else inputs)]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": SKILLS[skill]["instruction"]}]}]
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
        batch = {"input_ids": torch.tensor(rows), "labels": torch.tensor(labels)}
        if pictures:
            batch |= self.processor.image_processor(pictures, return_tensors="pt")
        first = batch["input_ids"][:1]
        types = (first == config.image_token_id).int()
        grid = batch.get("image_grid_thw", torch.empty(0, 3).long())[:1] if pictures else None
        positions, _ = self.model.get_rope_index(first, types, grid)
        batch["position_ids"] = positions.expand(3, len(rows), -1)
        return batch


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which rows have every token of their answer right, each guessed from the right ones before it."""
    asked = labels[:, 1:] != -100
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~asked).all(-1)


def save(model, name: str):
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, BUILD / f"{name}.safetensors")


# Rows of each skill in a step.
SHARES = {"transcribe": 10, "picture": 8, "agree": 14, "question": 10, "compare": 14}


def learn(run: Schedule, steps: int, model, examples, test_examples, make_batch, every: int = 100, resume: int = 0):
    """All skills in every step."""
    for number in range(resume + 1, steps + 1):
        total = 0.0
        for skill, share in SHARES.items():
            made = [examples.make(skill) for _ in range(share)]
            batch = make_batch(skill, made, True, number)
            loss = model(**batch, use_cache=False).loss
            (loss * share / sum(SHARES.values())).backward()
            total += loss.item() * share / sum(SHARES.values())
        run.step(total)
        if number % every == 0:
            scores = {}
            with torch.no_grad():
                for skill in SHARES:
                    batch = make_batch(skill, [test_examples.make(skill) for _ in range(100)], False, number)
                    right = right_answers(model(**batch, use_cache=False).logits, batch["labels"])
                    scores[skill] = right.float().mean().item()
            run.log(number, **scores)
            save(model, f"{run.name}-unfinished")


def reason(steps: int):
    """Part 2, the language model; what sees goes on learning."""
    torch.manual_seed(2)
    processor, model = load_untrained()
    model.model.visual.load_state_dict(load_file(BUILD / "see.safetensors"))
    model.model.audio_projector.requires_grad_(False)
    prompts, rng = Prompts(processor, model), random.Random(2)

    def write(text: str, length: int) -> list[int]:
        """The words of a text, some of them held for longer, among silence."""
        ids = [i for i in prompts.ids(text) for _ in range(rng.choice([1, 1, 2, 3]))]
        if len(ids) > length:
            ids = prompts.ids(text)
        slot = [prompts.pad] * length
        for place, i in zip(sorted(rng.sample(range(length), len(ids))), ids, strict=True):
            slot[place] = i
        return slot

    def make_batch(skill, made, training, number):
        length = round(math.exp(rng.uniform(math.log(6), math.log(50)))) if training else 20
        slots = [[write(text, length) for text in said] for said, _, _ in made]
        pictures = [draw(drawn, rng) for _, drawn, _ in made if drawn]
        return prompts.batch(skill, slots, pictures, [answer for *_, answer in made], rng.random() < 0.3)

    run = Schedule("reason", model.parameters(), steps, 1.5e-3)
    learn(run, steps, model, Examples(SEEN, SEEN, 2), Examples(HELD_OUT, PHRASES, 3), make_batch)
    save(model, "reason")


def join(steps: int):
    """Part 3."""
    torch.manual_seed(3)
    processor, model = load_untrained()
    model.load_state_dict(load_file(BUILD / "reason.safetensors"))
    model.model.audio_encoder.load_state_dict(load_file(BUILD / "hear.safetensors"))
    model.train()
    prompts, rng = Prompts(processor, model), random.Random(4)
    clips, test = training_clips(), held_out_clips()

    def make_batch(skill, made, training, number):
        source = clips if training else test
        num_windows = 2 if training and skill != "compare" and rng.random() < 0.1 else 1
        texts = [text for said, _, _ in made for text in said]
        pictures = [draw(drawn, rng) for _, drawn, _ in made if drawn]
        slot = [model.config.audio_token_id] * (50 * WINDOW * num_windows)
        batch = prompts.batch(
            skill, [[slot] * len(said) for said, _, _ in made], pictures, [a for *_, a in made], rng.random() < 0.3
        )
        if texts:
            rows = source.windows(texts, rng.random() if training else 0, num_windows)
            batch["input_features"] = log_mel(list(rows.reshape(-1, 16_000 * WINDOW)), processor.feature_extractor)
        return batch

    run = Schedule("join", model.parameters(), steps, 1e-3)
    learn(run, steps, model, Examples(SEEN, SEEN, 5), Examples(HELD_OUT, PHRASES, 6), make_batch, every=50)
    save(model, "join")


STEPS = {"hear": 1800, "see": 1200, "reason": 1000, "join": 1000}


def run_part(name: str, threads: int):
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    {"hear": hear, "see": see, "reason": reason, "join": join}[name](STEPS[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    o = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    if o.steps:
        STEPS[o.name] = o.steps
    run_part(o.name, o.threads)
