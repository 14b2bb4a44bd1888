"""The parts of the demo checkpoint's training; `demo/make.py` says what they are, and runs them."""

import itertools
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from audio_utils import SAMPLING_RATE, log_mel
from configuration_qwen2_audio_vl import AUDIO_TOKEN_COUNTS, IGNORED_LABEL, count_audio
from demo.ask import DEMO, load_demo
from demo.bases import PICTURE_TOKENS, STD, load_untrained
from demo.clips import BUILD, WINDOW, augment_features, held_out_clips, training_clips
from demo.world import HELD_OUT, PHRASES, QUESTIONS, SEEN, SKILLS, WORLD, Examples, draw


WORDS = sorted({word for text in PHRASES + QUESTIONS for word in text.split()})
SHARES = {"transcribe": 10, "picture": 8, "agree": 14, "question": 10, "compare": 14}  # rows of a step, by skill
NEWER = "qwen3_vl"  # the base of the second checkpoint
WINDOW_SAMPLES = SAMPLING_RATE * WINDOW


def fit(name: str, parameters, steps: int, lr: float, backward: Callable, evaluate: Callable, every: int = 100):
    """
    Trains by AdamW with warm-up, a cosine schedule and clipped gradients. `backward` computes the gradients of a step,
    given its number, and returns its loss. Every `every` steps `evaluate` returns scores by their names, without
    gradients, for a line of `log.jsonl`.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(s / 100, 0.5 + 0.5 * math.cos(math.pi * min(1, s / steps))) + 0.002
    )
    start, losses = time.time(), []
    for number in range(1, steps + 1):
        losses.append(backward(number))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if number % every == 0:
            with torch.no_grad():
                scores = {score: round(value, 3) for score, value in evaluate().items()}
            line = {"part": name, "step": number, "seconds": round(time.time() - start)}
            line |= {"loss": round(float(np.mean(losses[-50:])), 4), **scores}
            with (BUILD / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def save(module: torch.nn.Module, path: Path):
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, path)


def train_encoder(steps: int, seed: int, batch: int = 40):
    """Part 1. A second call goes on with the weights of the first, and starts the schedule anew."""
    torch.manual_seed(seed)
    processor, model = load_untrained()
    paths = BUILD / "encoder.safetensors", BUILD / "encoder-head.safetensors"
    again = paths[0].exists()
    encoder = model.model.audio_encoder.requires_grad_(True)
    head = torch.nn.Linear(encoder.config.d_model, len(WORDS) + 1)
    if again:
        for module, path in zip((encoder, head), paths, strict=True):
            module.load_state_dict(load_file(path))
    clips, test = training_clips(), held_out_clips()
    clips.rng.seed(seed)

    def logits(rows, rough):
        features = log_mel(list(rows), processor.feature_extractor)
        return head(encoder(augment_features(features, rough) if rough else features).last_hidden_state)

    def spell(ids) -> str:
        return " ".join(WORDS[i - 1] for i, _ in itertools.groupby(ids.tolist()) if i)

    def backward(number: int) -> float:
        texts = clips.rng.choices(list(clips.by_text), k=batch)
        targets = [torch.tensor([WORDS.index(word) + 1 for word in text.split()]) for text in texts]
        rough = (1 if again else min(1, max(0, number - 200) / (0.6 * steps))) * clips.rng.random() ** 0.5
        rows, _ = clips.windows(texts, rough)
        scores = logits(rows, rough).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((batch,), len(scores)), torch.tensor([len(target) for target in targets])
        loss = F.ctc_loss(scores, torch.cat(targets), *lengths)
        loss.backward()
        return loss.item()

    def evaluate() -> dict[str, float]:
        right = []
        for _ in range(3):
            texts = test.rng.choices(PHRASES + QUESTIONS, k=64)
            rows, _ = test.windows(texts, 0)
            guesses = logits(rows, 0).argmax(-1)
            right += [spell(ids) == text for ids, text in zip(guesses, texts, strict=True)]
        return {"held_out": float(np.mean(right))}

    parameters = [*encoder.parameters(), *head.parameters()]
    fit("encoder", parameters, steps, 1e-3 if again else 1.5e-3, backward, evaluate)
    for module, path in zip((encoder, head), paths, strict=True):
        save(module, path)


def see(tower, processor, pictures: list) -> torch.Tensor:
    """Returns the tokens of all pictures, float32 `[tokens, hidden size of the language model]`."""
    pixels = processor.image_processor(pictures, return_tensors="pt")
    return tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).pooler_output


def train_vision(steps: int, seed: int, batch: int = 64):
    """Part 2, the vision tower."""
    torch.manual_seed(seed)
    processor, model = load_untrained()
    tower, rng = model.model.visual, random.Random(seed)
    columns = list(WORLD["words"].values())
    queries = torch.nn.Parameter(torch.randn(len(columns), model.config.text_config.hidden_size) * STD)
    heads = torch.nn.ModuleList(torch.nn.Linear(queries.shape[1], len(words)) for words in columns)

    def logits(texts):
        tokens = see(tower, processor, [draw(text, rng) for text in texts])
        tokens = tokens.reshape(len(texts), -1, queries.shape[1])
        pooled = (queries @ tokens.transpose(1, 2)).softmax(-1) @ tokens
        return [head(pooled[:, index]) for index, head in enumerate(heads)]

    def targets(texts):
        spoken = zip(*(text.split() for text in texts), strict=True)
        return [torch.tensor(list(map(words.index, said))) for words, said in zip(columns, spoken, strict=True)]

    def backward(_) -> float:
        texts = rng.choices(SEEN, k=batch)
        loss = sum(F.cross_entropy(guess, right) for guess, right in zip(logits(texts), targets(texts), strict=True))
        loss.backward()
        return loss.item()

    def evaluate() -> dict[str, float]:
        texts = rng.choices(HELD_OUT, k=200)
        guesses = zip(WORLD["words"], logits(texts), targets(texts), strict=True)
        return {name: (guess.argmax(-1) == right).float().mean().item() for name, guess, right in guesses}

    fit("vision", [*tower.parameters(), queries, *heads.parameters()], steps, 1e-3, backward, evaluate)
    save(tower, BUILD / "vision.safetensors")


def make_prompts(processor, model, skill: str, slots: list, pictures: list, answers: list[str], odd: bool) -> dict:
    """
    Tokenizes a batch of one skill, padded on the right, where nothing attends to it. `slots` has the ids between the
    audio markers for each row and clip. If `odd`, audio comes before the picture, and no instruction to transcribe.
    """
    config, tokenizer = model.config, processor.tokenizer
    inputs = SKILLS[skill]["inputs"]
    content = [{"type": name} for name in (reversed(inputs) if odd else inputs)]
    if skill != "transcribe" or not odd:
        content.append({"type": "text", "text": SKILLS[skill]["instruction"]})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = []
    for token in tokenizer(text)["input_ids"]:
        if token == config.image_token_id:
            prompt += [token] * PICTURE_TOKENS
        elif token == config.audio_token_id:
            prompt += [config.audio_bos_token_id, None, config.audio_eos_token_id]
        else:
            prompt.append(token)
    rows, labels = [], []
    ends = [tokenizer(f"{answer}<|im_end|>")["input_ids"] for answer in answers]
    for row_slots, end in zip(slots, ends, strict=True):
        clips = iter(row_slots)
        row = [i for token in prompt for i in (next(clips) if token is None else [token])]
        rows.append(torch.tensor([*row, *end]))
        labels.append(torch.tensor([IGNORED_LABEL] * len(row) + end))
    batch = {
        "input_ids": pad_sequence(rows, True, tokenizer.pad_token_id),
        "labels": pad_sequence(labels, True, IGNORED_LABEL),
    }
    if pictures:
        batch |= processor.image_processor(pictures, return_tensors="pt")
    types = (batch["input_ids"] == config.image_token_id).int()
    batch["position_ids"], _ = model.model.get_rope_index(batch["input_ids"], types, batch.get("image_grid_thw"))
    return batch


def right_answers(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether all tokens of a row's answer are right, each predicted from the right ones before it: bool `[rows]`."""
    asked = labels[:, 1:] != IGNORED_LABEL
    return ((logits[:, :-1].argmax(-1) == labels[:, 1:]) | ~asked).all(-1)


def learn(name: str, model, steps: int, seed: int, lr: float, make_batch, token_counts: tuple[str, ...]):
    """Trains all skills in every step, with the counts of audio tokens in turn, and saves the weights."""
    examples, test_examples = Examples(SEEN, SEEN, seed), Examples(HELD_OUT, PHRASES, 0)

    def backward(number: int) -> float:
        total, audio_tokens = 0.0, token_counts[number % len(token_counts)]
        for skill, share in SHARES.items():
            batch = make_batch(skill, [examples.make(skill) for _ in range(share)], True, audio_tokens)
            loss = model(**batch, use_cache=False).loss * share / sum(SHARES.values())
            loss.backward()
            total += loss.item()
        return total

    def evaluate() -> dict[str, float]:
        scores = {}
        for audio_tokens, skill in itertools.product(token_counts, SHARES):
            batch = make_batch(skill, [test_examples.make(skill) for _ in range(100)], False, audio_tokens)
            right = right_answers(model(**batch, use_cache=False).logits, batch["labels"])
            scores[f"{skill}, {audio_tokens}"] = right.float().mean().item()
        return scores

    fit(name, model.parameters(), steps, lr, backward, evaluate, every=50 if len(token_counts) > 1 else 100)
    save(model, BUILD / f"{name}.safetensors")


def train_language(steps: int, seed: int):
    """Part 2, the language model; the vision tower goes on learning."""
    torch.manual_seed(seed)
    processor, model = load_untrained()
    model.model.visual.load_state_dict(load_file(BUILD / "vision.safetensors"))
    model.model.audio_projector.requires_grad_(False)
    tokenizer, rng = processor.tokenizer, random.Random(seed)

    def write(text: str, length: int) -> list[int]:
        """Returns the tokens of a text, some of them repeated, at random places among padding."""
        once = tokenizer(text)["input_ids"]
        ids = [i for i in once for _ in range(rng.choice([1, 1, 2, 3]))]
        if len(ids) > length:
            ids = once
        slot = [tokenizer.pad_token_id] * length
        for place, i in zip(sorted(rng.sample(range(length), len(ids))), ids, strict=True):
            slot[place] = i
        return slot

    def make_batch(skill, examples, training, _):
        length = round(math.exp(rng.uniform(math.log(6), math.log(50)))) if training else 20
        slots = [[write(text, length) for text in texts] for texts, _, _ in examples]
        pictures = [draw(phrase, rng) for _, phrase, _ in examples if phrase]
        odd = training and rng.random() < 0.25
        return make_prompts(processor, model, skill, slots, pictures, [answer for *_, answer in examples], odd)

    learn("language", model, steps, seed, 1.5e-3, make_batch, AUDIO_TOKEN_COUNTS[:1])


def train_joint(steps: int, seed: int):
    """Part 3. A second call goes on with the weights of the first, and starts the schedule anew."""
    processor, model = load_untrained()
    encoder, joint = BUILD / "encoder.safetensors", BUILD / "joint.safetensors"
    again = joint.exists()
    model.load_state_dict(load_file(joint if again else BUILD / "language.safetensors"))
    if not again or encoder.stat().st_mtime > joint.stat().st_mtime:
        model.model.audio_encoder.load_state_dict(load_file(encoder))
    train_with_audio("joint", processor, model, steps, seed, 6e-4 if again else 1e-3, AUDIO_TOKEN_COUNTS[:1])


def train_both(steps: int, seed: int):
    """
    Part 4: half of the steps with fixed audio tokens, half with trimmed ones. It starts from its own weights, else from
    those of part 3, else from the checkpoint in `demo/`.
    """
    processor, model = load_demo()
    model.float()
    paths = (BUILD / f"{name}.safetensors" for name in ("both", "joint"))
    if path := next((path for path in paths if path.exists()), None):
        model.load_state_dict(load_file(path))
    train_with_audio("both", processor, model, steps, seed, 4e-4, AUDIO_TOKEN_COUNTS)


def train_tower(steps: int, seed: int, batch: int = 64):
    """Part 5: the vision tower of Qwen3-VL learns to give the tokens that that of the checkpoint in `demo/` gives."""
    torch.manual_seed(seed)
    (processor, teacher), (newer, model) = load_demo(), load_untrained(NEWER)
    teacher, tower, rng = teacher.model.visual.float(), model.model.visual, random.Random(seed)

    def loss(texts) -> torch.Tensor:
        """Returns the squared error as a share of the energy of the tokens."""
        pictures = [draw(text, rng) for text in texts]
        with torch.no_grad():
            expected = see(teacher, processor, pictures)
        return F.mse_loss(see(tower, newer, pictures), expected) / expected.square().mean()

    def backward(_) -> float:
        share = loss(rng.choices(SEEN, k=batch))
        share.backward()
        return share.item()

    def evaluate() -> dict[str, float]:
        return {"held_out": loss(rng.choices(HELD_OUT, k=200)).item()}

    fit("tower", tower.parameters(), steps, 1e-3, backward, evaluate)
    save(tower, BUILD / "tower.safetensors")


def train_newer(steps: int, seed: int):
    """
    Part 6: the model on Qwen3-VL, with both kinds of audio tokens. It starts from its own weights, else from the tower
    of part 5 and what fits of the checkpoint in `demo/`: all but the biases and norms of attention.
    """
    processor, model = load_untrained(NEWER)
    own = BUILD / "newer.safetensors"
    if again := own.exists():
        model.load_state_dict(load_file(own))
    else:
        weights = {
            name: tensor for name, tensor in load_file(DEMO / "model.safetensors").items() if "visual" not in name
        }
        model.load_state_dict(weights, strict=False)
        model.model.visual.load_state_dict(load_file(BUILD / "tower.safetensors"))
    train_with_audio("newer", processor, model, steps, seed, 4e-4 if again else 1e-3, AUDIO_TOKEN_COUNTS)


def train_with_audio(name: str, processor, model, steps: int, seed: int, lr: float, token_counts: tuple[str, ...]):
    model.model.audio_encoder.requires_grad_(True)
    model.train()
    torch.manual_seed(seed)
    rng, clips, test = random.Random(seed), training_clips(), held_out_clips()
    clips.rng.seed(seed)

    def make_batch(skill, examples, training, audio_tokens):
        num_windows = 2 if training and skill != "compare" and rng.random() < 0.1 else 1
        texts = [text for said, _, _ in examples for text in said]
        pictures = [draw(phrase, rng) for _, phrase, _ in examples if phrase]
        is_trimmed, lengths = audio_tokens == "trimmed", []
        if texts:
            rough = rng.random() if training else 0
            rows, lengths = (clips if training else test).windows(texts, rough, num_windows, is_trimmed)
        counts = [count_audio(length, 50 * WINDOW, audio_tokens) for length in lengths]
        tokens = iter([[model.config.audio_token_id] * count.tokens for count in counts])
        slots = [[next(tokens) for _ in said] for said, _, _ in examples]
        odd = training and rng.random() < 0.25
        batch = make_prompts(processor, model, skill, slots, pictures, [answer for *_, answer in examples], odd)
        if texts:
            if is_trimmed:
                batch["input_features_mask"] = torch.cat([processor.mask_frames(count) for count in counts])
            pairs = zip(rows, counts, strict=True)  # windows behind the end of a clip are left out
            windows = [window for row, count in pairs for window in row.split(WINDOW_SAMPLES)[: count.windows]]
            batch["input_features"] = log_mel(windows, processor.feature_extractor)
        return batch

    learn(name, model, steps, seed, lr, make_batch, token_counts)


PARTS = {"encoder": train_encoder, "vision": train_vision, "language": train_language}
PARTS |= {"joint": train_joint, "both": train_both, "tower": train_tower, "newer": train_newer}
