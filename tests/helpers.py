"""Content items, conversations, Python in fresh processes, and the sum of parts that the model has to equal."""

import copy
import itertools
import subprocess
import sys
import textwrap
from typing import NamedTuple

import torch
from transformers import Cache, WhisperModel

from benchmarks.parts import Parts


TOKENS = 50  # audio tokens per window of 1 s in the small models
CHAT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}  # what makes a chat template return model inputs
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids")
AUDIO = ("input_features", "input_features_mask")
VISION = ("pixel_values", "image_grid_thw")

# The kinds of input that a user has: rows of content items, see the fixture `kinds`.
KINDS = {
    "text": [["What is this?"]],
    "audio": [["clip", "What is this?"]],
    "image": [["picture", "What is this?"]],
    "image, audio": [["picture", "clip", "What is this?"]],
    "audio, image": [["clip", "picture", "What is this?"]],
    "video, audio": [["film", "clip", "What is this?"]],
    "two audios": [["0.7/1", "1.9/2", "What is this?"]],
    "left padded": [["2.5/0", "Say it again, slowly."], ["clip", "Hm?"]],
    "mixed batch": [["picture", "What is this?"], ["clip", "picture", "Why?"], ["What is this?"]],
    "mixed batch of two audios": [["1.2/3", "picture", "0.4/4"], ["What is this?", "clip"]],
    "audio alone": [["clip"]],
    "interleaved": [["picture", "0.7/1", "film", "1.1/2", "picture", "What is this?"]],
}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def audio(source, **more) -> dict:
    return {"type": "audio", "audio": source, **more}


def image(source) -> dict:
    return {"type": "image", "image": source}


def video(frames) -> dict:
    return {"type": "video", "video": frames}


def join(names, *inputs) -> dict[str, torch.Tensor]:
    """The named tensors of several inputs, one after another; names that none has are left out."""
    parts = {name: [each[name] for each in inputs if name in each] for name in names}
    return {name: torch.cat(tensors) for name, tensors in parts.items() if tensors}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


def greedy(model, inputs, steps=4, **more):
    output = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **more)
    return output[:, inputs["input_ids"].shape[1] :]


def step_logits(model, inputs, steps=3, **more):
    """Logits `[steps, batch, vocabulary]` of greedy decoding: random weights often choose the same token anyway."""
    more = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **more}
    output = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, **more)
    return torch.stack(output.logits)


def turn_inputs(processor, content: list[dict], is_first: bool = True, **kwargs):
    """Model inputs of a user's message. Those of a later turn begin with the end of the answer before it."""
    messages = [{"role": "user", "content": content}]
    messages = messages if is_first else [{"role": "system", "content": ""}, *messages]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **CHAT, **kwargs)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = 0 if is_first else inputs["input_ids"][0].tolist().index(end)
    return {name: tensor[:, start:] if name in TEXT else tensor for name, tensor in inputs.items()}


class TwoTurns(NamedTuple):
    first: dict[str, torch.Tensor]  # model inputs of the first turn
    second: dict[str, torch.Tensor]  # those of the second turn
    whole: dict[str, torch.Tensor]  # tokens of both with the answer between them, without media
    cache: Cache  # of the first turn and its answer


def two_turns(processor, model, first: list[dict], second: list[dict]) -> TwoTurns:
    first, second = turn_inputs(processor, first), turn_inputs(processor, second, is_first=False)
    output = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    answer = output.sequences[:, first["input_ids"].shape[1] :]
    ids = torch.cat([first["input_ids"], answer, second["input_ids"]], dim=1)
    types = [first["mm_token_type_ids"], torch.zeros_like(answer), second["mm_token_type_ids"]]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.cat(types, dim=1)}
    return TwoTurns(first, second, whole, output.past_key_values)


def start_python(code: str, *arguments: str, **settings) -> subprocess.Popen:
    """Starts Python on some code, which prints a line that begins with TOKENS for [`answer`] to read."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def answer(process: subprocess.Popen) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return next(line for line in output.splitlines() if line.startswith("TOKENS"))


class SumOfParts(Parts):
    """Stock Qwen2-VL, stock Whisper encoder and a matrix product, put together by hand; no cache, one row at a time."""

    def __init__(self, model, whisper_folder):
        super().__init__(copy.deepcopy(model))  # whatever a test does to the model, these weights stay
        self.encoder = WhisperModel.from_pretrained(whisper_folder).eval().get_encoder()
        self.config = model.config

    def positions(self, ids, image_grids, video_grids):
        """M-RoPE written out: text and audio advance by one; a grid spans t, h, w from where it starts."""
        grids = {self.config.image_token_id: list(image_grids), self.config.video_token_id: list(video_grids)}
        merge, position, rows, i = self.config.vision_config.spatial_merge_size, 0, [], 0
        while i < len(ids):
            if ids[i] in grids:
                t, h, w = (int(size) for size in grids[ids[i]].pop(0))
                h, w = h // merge, w // merge
                rows += [
                    (position + a, position + b, position + c) for a in range(t) for b in range(h) for c in range(w)
                ]
                position, i = max(max(row) for row in rows[-t * h * w :]) + 1, i + t * h * w
            else:
                rows.append((position,) * 3)
                position, i = position + 1, i + 1
        return torch.tensor(rows).T[:, None]  # [3, 1, sequence]

    @torch.no_grad()
    def hidden_states(self, inputs) -> list[torch.Tensor]:
        """The last hidden states `[sequence, hidden]` of every row, without its padding."""
        inputs = dict(inputs)
        windows = iter(self.embed_audio(inputs["input_features"])) if "input_features" in inputs else iter(())
        grids = {name: iter(inputs.get(f"{name}_grid_thw", [])) for name in ("image", "video")}
        patches = {"image": inputs.get("pixel_values"), "video": inputs.get("pixel_values_videos")}
        rows = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            embeds = self.qwen.get_input_embeddings()(ids)
            is_audio = ids == self.config.audio_token_id
            if is_audio.any():
                per_window = self.config.audio_config.max_source_positions
                runs = [len(list(run)) for is_clip, run in itertools.groupby(is_audio.tolist()) if is_clip]
                clips = [torch.cat([next(windows) for _ in range(-(-run // per_window))])[:run] for run in runs]
                embeds[is_audio] = torch.cat(clips)
            own_grids = {"image": [], "video": []}
            for name, token_id in (("image", self.config.image_token_id), ("video", self.config.video_token_id)):
                missing = int((ids == token_id).sum())
                features = []
                while missing:
                    grid = next(grids[name])
                    size = int(grid.prod())
                    own, patches[name] = patches[name][:size], patches[name][size:]
                    features.append(self.qwen.model.visual(own, grid_thw=grid[None]).pooler_output)
                    own_grids[name].append(grid)
                    missing -= len(features[-1])
                if features:
                    embeds[ids == token_id] = torch.cat(features)
            positions = self.positions(ids.tolist(), own_grids["image"], own_grids["video"])
            states = self.qwen.model.language_model(inputs_embeds=embeds[None], position_ids=positions, use_cache=False)
            rows.append(states.last_hidden_state[0])
        return rows

    def logits(self, inputs, last: int) -> torch.Tensor:
        with torch.no_grad():
            return torch.stack([self.qwen.lm_head(row[-last:]) for row in self.hidden_states(inputs)])

    def greedy(self, inputs, steps: int) -> torch.Tensor:
        inputs = dict(inputs)
        for _ in range(steps):
            chosen = self.logits(inputs, last=1).argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], chosen], dim=1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(chosen)], dim=1)
        return inputs["input_ids"][:, -steps:]
