"""
A page to try the model: give it audio and a picture, ask, and see what the answer attends to. What Spaces run.

    python app.py [REPO]    a folder or a Hub id; the default is $REPO, or else the folder of this file
"""

import argparse
import os
import queue
import threading
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoProcessor, StoppingCriteria, TextIteratorStreamer
from transformers.utils import logging

from configuration_qwen2_audio_vl import TRANSCRIBE, WHOLE_MODEL, find_folder
from handler import DESCRIBE, IMAGE_FORMATS, MAX_BYTES, MAX_PIXELS, MAX_SECONDS, MAX_TEXT, decode_image


logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 256
MAX_VISITORS = 32  # who wait for an answer; one is answered at a time
POLL = 0.5  # seconds after which Gradio is asked whether the visitor has left
QUESTIONS = {
    (True, True): "Answer the spoken question about the photo.",
    (True, False): TRANSCRIBE,
    (False, True): DESCRIBE,
}


class StopWhenSet(StoppingCriteria):
    """Ends `generate` with the step in which an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


class DemoModel:
    """A loaded repository that answers questions, and shows what in the prompt the answer attends to."""

    def __init__(self, folder: Path):
        self.folder = folder
        code = {"trust_remote_code": True}
        self.processor = AutoProcessor.from_pretrained(self.folder, **code)
        self.model = AutoModel.from_pretrained(self.folder, dtype="auto", device_map="auto", **code).eval()
        self.turn = threading.Lock()  # held by the answer that is generated

    def open(self, audio: str | None, picture: str | None) -> tuple[torch.Tensor | None, Image.Image | None]:
        """
        Raises:
            gr.Error: if a file cannot be opened; shown on the page.
        """
        clip, limits = None, {"max_bytes": MAX_BYTES, "max_seconds": MAX_SECONDS}
        try:
            if audio:
                clip = self.processor.open_item({"type": "audio", "path": audio}, **limits)["audio"]
        except ValueError as error:
            raise gr.Error(f"This audio cannot be opened: {error}", title="Audio") from error
        try:
            image = Image.open(picture, formats=IMAGE_FORMATS) if picture else None
            if image is not None and image.width * image.height > MAX_PIXELS:  # by its header, before it is decoded
                raise gr.Error(f"A picture must have at most {MAX_PIXELS} pixels.", title="Picture")
            return clip, image and decode_image(image).convert("RGB")
        except gr.Error:
            raise
        except Exception as error:  # of many types, in Pillow's parsers of broken files
            raise gr.Error("This picture cannot be opened: the file must be a whole image.", title="Picture") from error

    def answer(self, audio: str | None, picture: str | None, question: str | None):
        """
        Yields, as the answer grows: the answer, what went in, and at the end the two figures (None before).

        Args:
            audio, picture: Paths of files, or None.
            question: Where it is empty, the one of `QUESTIONS` for what is given.
        """
        clip, image = self.open(audio, picture)
        question = question or QUESTIONS.get((clip is not None, image is not None))
        if len(question or "") > MAX_TEXT:
            raise gr.Error(
                f"A question must have at most {MAX_TEXT} characters, got {len(question)}.", title="Question"
            )
        if not question:
            raise gr.Error("Give audio, a picture or a question.", title="Nothing to answer")
        content = [{"type": "text", "text": question}]
        if clip is not None:
            content.insert(0, {"type": "audio", "audio": clip})
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        try:
            inputs = self.processor.make_inputs([{"role": "user", "content": content}]).to(self.model.device)
        except ValueError as error:  # such as a prompt that is too long
            raise gr.Error(str(error), title="Question") from error
        length, positions = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if length + MAX_NEW_TOKENS > positions:
            raise gr.Error(
                f"Prompt and answer must fit the model's {positions} positions, but the prompt has {length} tokens and "
                f"the answer may have {MAX_NEW_TOKENS}.",
                title="Question",
            )
        facts = self.describe(inputs, clip)

        settings = {"skip_prompt": True, "skip_special_tokens": True, "timeout": POLL}
        streamer = TextIteratorStreamer(self.processor.tokenizer, **settings)
        done, has_left = {}, threading.Event()

        def generate():
            try:
                with self.turn:
                    if has_left.is_set():
                        return
                    done["output"] = self.model.generate(
                        **inputs,
                        max_new_tokens=MAX_NEW_TOKENS,
                        do_sample=False,
                        return_dict_in_generate=True,
                        streamer=streamer,
                        stopping_criteria=[StopWhenSet(has_left)],
                    )
            except Exception:
                logger.exception("The answer failed.")
                streamer.end()

        thread = threading.Thread(target=generate)
        thread.start()
        text = ""
        try:
            for piece in iterate(streamer):
                text += piece
                yield text, facts, None, None
        finally:  # Gradio closes this generator at a `yield` after the visitor has left
            has_left.set()
        thread.join()
        if "output" not in done:
            raise gr.Error("The answer failed; this is logged.", title="Answer")
        with self.turn:  # the model attends in another way meanwhile
            attention, audio_figure, picture_figure = self.attend(inputs, done["output"]), None, None
        config, ids = self.model.config, inputs["input_ids"][0]
        if clip is not None:
            extractor = self.processor.feature_extractor
            to_audio = attention[ids == config.audio_token_id]
            token_seconds = extractor.chunk_length / config.audio_config.max_source_positions
            audio_figure = draw_spectrogram(inputs["input_features"], len(clip), extractor, to_audio, token_seconds)
        if image is not None:
            height = int(inputs["image_grid_thw"][0, 1])
            rows = height // config.vision_config.spatial_merge_size
            picture_figure = draw_picture(image, attention[ids == config.image_token_id].reshape(rows, -1))
        yield text, facts, audio_figure, picture_figure

    def describe(self, inputs, clip: torch.Tensor | None) -> str:
        config, ids = self.model.config, inputs["input_ids"][0]
        parts = [] if clip is None else [f"{len(clip) / self.processor.feature_extractor.sampling_rate:.2f} s of audio"]
        for kind, token_id in (("audio", config.audio_token_id), ("image", config.image_token_id)):
            if count := int((ids == token_id).sum()):
                parts.append(f"{count} {kind} tokens")
        return ", ".join([*parts, f"{len(ids)} tokens in all"])

    @torch.no_grad()
    def attend(self, inputs, output) -> torch.Tensor:
        """
        How much the answer attends to each token of the prompt, float32 `[tokens]`: the mean over the layers and heads
        of the language model and over the answer's tokens. The answer is computed once more by eager attention, on the
        cache of its prompt, because the kernels that `generate` uses do not return these weights.
        """
        prompt = inputs["input_ids"].shape[1]
        cache = output.past_key_values
        if answered := cache.get_seq_length() - prompt:
            cache.crop(-answered)
        usual = self.model.config.text_config._attn_implementation
        self.model.set_attn_implementation({"text_config": "eager"})
        try:
            outputs = self.model(
                input_ids=output.sequences[:, prompt:],
                attention_mask=torch.ones_like(output.sequences),
                past_key_values=cache,
                output_attentions=True,
            )
        finally:
            self.model.set_attn_implementation({"text_config": usual})
        layers = [layer[0].float().mean((0, 1))[:prompt].cpu() for layer in outputs.attentions]  # [heads, answer, all]
        return torch.stack(layers).mean(0)


def iterate(streamer: TextIteratorStreamer):
    """Yields the pieces of an answer, and an empty one whenever there was none for `POLL` seconds."""
    while True:
        try:
            yield next(streamer)
        except queue.Empty:
            yield ""
        except StopIteration:
            return


def draw_spectrogram(
    features: torch.Tensor, num_samples: int, feature_extractor, attention: torch.Tensor, token_seconds: float
) -> Figure:
    """
    The log-mel spectrogram that the encoder is given, under the attention to its tokens.

    Args:
        features: `[windows, mel bins, frames]`.
        num_samples: Of the clip; what follows is padding.
        attention: `[audio tokens]`, of whole windows or of the clip alone.
        token_seconds: The seconds that a token stands for.
    """
    mel = torch.cat(list(features.float().cpu()), dim=1).numpy()  # [mel bins, frames of all windows]
    seconds = len(features) * feature_extractor.chunk_length
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, len(mel)), cmap="magma")
    axes.axvline(num_samples / feature_extractor.sampling_rate, color="white", linewidth=0.8)
    axes.set(xlabel="seconds", ylabel="mel bin")
    over = axes.twinx()
    times = (np.arange(len(attention)) + 0.5) * token_seconds
    over.fill_between(times, attention / attention.max(), color="cyan", alpha=0.45, linewidth=0)
    over.set(ylim=(0, 1.05), xlim=(0, seconds), yticks=[], ylabel="attention of the answer")
    return figure


def draw_picture(image: Image.Image, attention: torch.Tensor) -> Figure:
    """A picture under the attention to its tokens, `[rows, columns]`."""
    height = min(max(image.height / image.width, 0.25), 4.0)  # a strip of a picture is squeezed
    figure = Figure(figsize=(4, 4 * height), layout="constrained")
    axes = figure.subplots()
    extent = (0, image.width, image.height, 0)
    axes.imshow(image, extent=extent, aspect="auto")
    axes.imshow(attention, extent=extent, aspect="auto", cmap="turbo", alpha=0.45, interpolation="bilinear")
    axes.set_axis_off()
    return figure


def make_page(model: DemoModel) -> gr.Blocks:
    speech, photo = (str(model.folder / "examples" / name) for name in ("speech.mp3", "photo.png"))
    with gr.Blocks(title="Qwen2-VL with audio") as page:
        gr.Markdown("# Qwen2-VL with audio\nRecord or drop audio, drop a picture, ask about either or both.")
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(type="filepath", label="Audio", elem_id="audio")
                picture = gr.Image(type="filepath", label="Picture", elem_id="picture")
                question = gr.Textbox(label="Question", placeholder="or ask it in the audio", elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                answer = gr.Textbox(label="Answer", elem_id="answer")
                facts = gr.Textbox(label="What went in", elem_id="facts")
                audio_figure = gr.Plot(label="Log-mel, and the attention to it", elem_id="audio-figure")
                picture_figure = gr.Plot(label="Attention to the picture", elem_id="picture-figure")
        inputs, outputs = [audio, picture, question], [answer, facts, audio_figure, picture_figure]
        gr.on([button.click, question.submit], model.answer, inputs, outputs, concurrency_limit=1)
        gr.Examples(
            [
                [speech, photo, QUESTIONS[True, True]],
                [speech, None, QUESTIONS[True, False]],
                [None, photo, QUESTIONS[False, True]],
            ],
            inputs,
        )
    return page.queue(api_open=False, max_size=MAX_VISITORS)  # nobody skips the queue


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", nargs="?", default=os.environ.get("REPO", str(Path(__file__).resolve().parent)))
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    options = parser.parse_args()
    try:
        folder = find_folder(options.repo, needed=WHOLE_MODEL)
    except ValueError as error:
        parser.exit(1, f"app.py: {error}\n")
    model = DemoModel(folder)
    page = make_page(model)
    page.launch(server_port=options.port, allowed_paths=[str(model.folder / "examples")], max_file_size=MAX_BYTES)


if __name__ == "__main__":
    main()
