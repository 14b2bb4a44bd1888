"""Content items, conversations, Python in fresh processes, and the sum of parts that the model has to equal."""

import copy
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Cache, GenerationConfig, WhisperForConditionalGeneration, WhisperModel

from benchmarks.parts import Parts
from demo.ask import user
from demo.bases import ASSETS


PREFIX = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]  # of Whisper's transcripts
BASE = os.environ.get("BASE", "qwen2_vl")  # the type of the base of the model that is tested
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
# Those that the base takes as well.
WITHOUT_AUDIO = {
    "picture": [["picture", "What is this?"]],
    "film": [["picture", "film", "What is this?"]],
    "batch without audio": [["What is this?"], ["picture", "Why?", "picture"], ["film", "And this, which is longer?"]],
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


def greedy_output(model, inputs, steps, **more):
    """Decodes greedily; the logits are those of all tokens, as random weights often choose the same token anyway."""
    more = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **more}
    return model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, **more)


def greedy(model, inputs, steps=4, **more):
    return greedy_output(model, inputs, steps, **more).sequences[:, -steps:]


def step_logits(model, inputs, steps=3, **more):
    """Logits `[steps, batch, vocabulary]` of greedy decoding."""
    return torch.stack(greedy_output(model, inputs, steps, **more).logits)


def turn_inputs(processor, content: list[dict], is_first: bool = True, **kwargs):
    """Model inputs of a user's message. Those of a later turn begin with the end of the answer before it."""
    messages = user(content) if is_first else [{"role": "system", "content": ""}, *user(content)]
    inputs = processor.make_inputs(messages, **kwargs)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    start = 0 if is_first else inputs["input_ids"][0].tolist().index(end)
    return {name: tensor[:, start:] if name in TEXT else tensor for name, tensor in inputs.items()}


def assert_refused(model, message: str, **inputs):
    """Expects a ValueError of a pass and of `generate`."""
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=message):
            call(**inputs)


def two_turns(processor, model, first: list[dict], second: list[dict]) -> tuple[dict, dict, dict, Cache]:
    """
    Returns the model inputs of both turns, the tokens of both with the answer between them, without media, and the
    cache of the first turn and its answer.
    """
    first, second = turn_inputs(processor, first), turn_inputs(processor, second, is_first=False)
    output = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    answer = output.sequences[:, first["input_ids"].shape[1] :]
    ids = torch.cat([first["input_ids"], answer, second["input_ids"]], dim=1)
    types = [first["mm_token_type_ids"], torch.zeros_like(answer), second["mm_token_type_ids"]]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.cat(types, dim=1)}
    return first, second, whole, output.past_key_values


def start_python(code: str, *arguments: str, **settings) -> subprocess.Popen:
    """Starts Python on some code, which prints a line that begins with TOKENS for [`answer`] to read."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


def finish(process: subprocess.Popen) -> str:
    """Waits for a process that must not fail. Returns what it printed."""
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def answer(process: subprocess.Popen) -> str:
    return next(line for line in finish(process).splitlines() if line.startswith("TOKENS"))


class SumOfParts(Parts):
    """A stock base, stock Whisper encoder and a matrix product, put together by hand; no cache, one row at a time."""

    def __init__(self, model, whisper_folder):
        super().__init__(copy.deepcopy(model))  # whatever a test does to the model, these weights stay
        self.encoder = WhisperModel.from_pretrained(whisper_folder).eval().get_encoder()
        self.config = model.config

    def logits(self, inputs, last: int) -> torch.Tensor:
        """Logits `[batch, last, vocabulary]` of the last tokens, row by row, with audio tokens as text."""
        config, per_window = self.config, self.config.audio_config.max_source_positions
        windows = iter(self.embed_audio(inputs["input_features"])) if "input_features" in inputs else iter(())
        vision_names = {
            config.image_token_id: ("image_grid_thw", "pixel_values"),
            config.video_token_id: ("video_grid_thw", "pixel_values_videos", "second_per_grid_ts"),
        }
        # The grid and the patches of one picture after another, by the names of the inputs. Qwen3-VL has a run of
        # tokens for each grid in time.
        vision, splits = {}, self.config.vision_config.to_dict().get("deepstack_visual_indexes") is not None
        for grids, patches, *seconds in vision_names.values():
            if grids in inputs:
                grid = inputs[grids]
                if splits:
                    grid = grid.repeat_interleave(grid[:, 0], dim=0).index_fill(1, torch.tensor(0), 1)
                vision[grids] = iter(grid.split(1))
                vision[patches] = iter(inputs[patches].split(grid.prod(1).tolist()))
                vision |= {name: iter(inputs[name].split(1)) for name in seconds if name in inputs}
        rows = []
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            ids = ids[mask.bool()]
            embeds, is_audio = self.qwen.get_input_embeddings()(ids), ids == config.audio_token_id
            clips, pictures = [embeds[:0]], []
            for token_id, run in itertools.groupby(ids.tolist()):
                if token_id == config.audio_token_id:
                    length = len(list(run))
                    clips.append(torch.cat([next(windows) for _ in range(-(-length // per_window))])[:length])
                elif token_id in vision_names:
                    pictures.append({name: next(vision[name]) for name in vision_names[token_id] if name in vision})
            embeds[is_audio] = torch.cat(clips)
            pictures, stock = join(vision, *pictures), self.qwen.model
            types = (ids == config.image_token_id) + 2 * (ids == config.video_token_id)
            where = {name: value for name, value in pictures.items() if not name.startswith("pixel")}
            positions, _ = stock.get_rope_index(ids.masked_fill(is_audio, 0)[None], types[None], **where)
            # Without ids stock finds the pictures by the embeddings of their tokens, which nothing else here equals.
            embedded = {"inputs_embeds": embeds[None], "position_ids": positions, **pictures}
            states = stock(**embedded, use_cache=False).last_hidden_state
            rows.append(self.qwen.lm_head(states[0, -last:]))
        return torch.stack(rows)


def complete_whisper(folder: Path, text: str, heads: list[list[int]]) -> Path:
    """Gives a Whisper of random weights a tokenizer of the words of a text, and alignment heads."""
    full = AutoTokenizer.from_pretrained(ASSETS / "qwen2-vl-7b")
    tokenizer = full.train_new_from_iterator([text] * 10, vocab_size=300)
    tokenizer.add_tokens(PREFIX, special_tokens=True)
    tokenizer.save_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config = GenerationConfig(alignment_heads=heads)
    model.save_pretrained(folder)
    return folder
