"""
A page to try the model: give it audio and a picture, ask, and see what the answer attends to. Spaces run it.

    python app.py [REPO]    a folder or a Hub id; the default is $REPO, or else the folder of this file
"""

import argparse
import os
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoProcessor, BatchFeature, TextIteratorStreamer
from transformers.utils import logging

import handler
from configuration_qwen2_audio_vl import ENCODER_STRIDE, TRANSCRIBE, WHOLE_MODEL, find_folder


logger = logging.get_logger(__name__)

MAX_VISITORS = 32  # visitors who wait for an answer; one is answered at a time
POLL = 0.5  # seconds after which Gradio is asked whether the visitor has left
# The question where a visitor asks none, by whether there is audio and whether there is a picture.
QUESTIONS = {
    (True, True): "Answer the spoken question about the photo.",
    (True, False): TRANSCRIBE,
    (False, True): handler.DESCRIBE,
}


@contextmanager
def shown(title: str, words: str = ""):
    """Turns a ValueError of the block into an error that the page shows. `words` come before its message."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(f"{words}{error}", title=title) from error


class DemoModel:
    """A loaded repository. It answers questions, and shows which tokens of the prompt the answer attends to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", device_map="auto").eval()
        self.executor = ThreadPoolExecutor(1)  # one thread, so that one answer is computed at a time

    def answer(self, audio: str | None, picture: str | None, question: str | None):
        """
        Yields the answer as it grows, what went in, and the two figures, which are None until the answer has ended.

        Args:
            audio, picture: Paths of files, or None.
            question: If it is empty, one of `QUESTIONS` is asked.

        Raises:
            gr.Error: if there is no answer; the page shows it.
        """
        clip, image = self.open(audio, picture)
        inputs = self.prepare(clip, image, question)
        facts = self.describe(inputs, clip)
        text, output = yield from self.stream(inputs, facts)
        attention = self.executor.submit(self.attend, inputs, output).result()
        yield text, facts, *self.draw(inputs, attention, clip, image)

    def open(self, audio: str | None, picture: str | None) -> tuple[torch.Tensor | None, Image.Image | None]:
        limits = {"max_bytes": handler.MAX_BYTES, "max_seconds": handler.MAX_SECONDS, "formats": handler.IMAGE_FORMATS}
        clip, image = None, None
        if audio:
            with shown("Audio", "This audio cannot be opened: "):
                clip = self.processor.open_item({"type": "audio", "audio": audio}, **limits)["audio"]
        if picture:
            with shown("Picture", "This picture cannot be opened: "):
                image = self.processor.open_item({"type": "image", "image": picture}, **limits)["image"]
                handler.check_limit(image.width * image.height, "pixels", handler.MAX_PIXELS)  # before it is decoded
                image = handler.decode_image(image).convert("RGB")
        return clip, image

    def prepare(self, clip: torch.Tensor | None, image: Image.Image | None, question: str | None) -> BatchFeature:
        """Returns the model's inputs for what a visitor sent."""
        question = question or QUESTIONS.get((clip is not None, image is not None))
        if not question:
            raise gr.Error("Give audio, a picture or a question.", title="Nothing to answer")
        sources = {"image": image, "audio": clip, "text": question}
        content = [{"type": modality, modality: source} for modality, source in sources.items() if source is not None]
        with shown("Question"):
            handler.check_limit(len(question), "characters of text", handler.MAX_TEXT)
            inputs = self.processor.make_inputs([{"role": "user", "content": content}])
            positions = self.model.config.text_config.max_position_embeddings
            handler.check_length(inputs["input_ids"].shape[1], handler.NEW_TOKENS, positions)
        return inputs.to(self.model.device)

    def stream(self, inputs: BatchFeature, facts: str):
        """Yields what [`answer`] yields as the answer grows. Returns its text, and the output of `generate`."""
        settings = {"skip_prompt": True, "skip_special_tokens": True, "timeout": POLL}
        streamer = TextIteratorStreamer(self.processor.tokenizer, **settings)
        has_left, text = threading.Event(), ""

        def stop(input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
            return torch.full((len(input_ids),), has_left.is_set(), device=input_ids.device)

        output = self.executor.submit(
            self.model.generate,
            **inputs,
            max_new_tokens=handler.NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=streamer,
            stopping_criteria=[stop],
        )
        output.add_done_callback(lambda _: streamer.end())  # also after an error
        try:
            while True:
                try:
                    text += next(streamer)
                except StopIteration:
                    break
                except queue.Empty:  # there was nothing new for `POLL` seconds
                    pass
                yield text, facts, None, None
        finally:  # Gradio closes this generator at a `yield` after the visitor has left
            has_left.set()
            output.cancel()
        try:
            return text, output.result()
        except Exception as error:
            logger.exception("The answer failed.")
            raise gr.Error("The answer failed; this is logged.", title="Answer") from error

    def describe(self, inputs: BatchFeature, clip: torch.Tensor | None) -> str:
        """Counts the seconds and tokens that went in."""
        config, ids = self.model.config, inputs["input_ids"][0]
        parts = [] if clip is None else [f"{len(clip) / self.processor.feature_extractor.sampling_rate:.2f} s of audio"]
        for modality, token_id in (("audio", config.audio_token_id), ("image", config.image_token_id)):
            if count := int((ids == token_id).sum()):
                parts.append(f"{count} {modality} tokens")
        return ", ".join([*parts, f"{len(ids)} tokens in all"])

    @torch.no_grad()
    def attend(self, inputs: BatchFeature, output) -> torch.Tensor:
        """
        Returns how much the answer attends to each token of the prompt, float32 `[tokens]`: the mean over the layers
        and heads of the language model and over the answer's tokens. The answer is computed once more by eager
        attention, on the cache of its prompt, because the kernels that `generate` uses do not return these weights.
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

    def draw(self, inputs, attention, clip, image) -> tuple[Figure | None, Figure | None]:
        """Draws the attention to the clip and to the picture, None where there is none."""
        config, ids, audio_figure, picture_figure = self.model.config, inputs["input_ids"][0].cpu(), None, None
        if clip is not None:
            to_audio = attention[ids == config.audio_token_id]
            audio_figure = draw_spectrogram(inputs["input_features"], clip, self.processor.feature_extractor, to_audio)
        if image is not None:
            rows = int(inputs["image_grid_thw"][0, 1]) // config.vision_config.spatial_merge_size
            picture_figure = draw_picture(image, attention[ids == config.image_token_id].reshape(rows, -1))
        return audio_figure, picture_figure


def draw_spectrogram(features: torch.Tensor, clip: torch.Tensor, extractor, attention: torch.Tensor) -> Figure:
    """
    Draws the log-mel spectrogram that the encoder gets, and over it the attention to the clip's tokens.

    Args:
        features: `[windows, mel bins, frames]`.
        clip: `[samples]`; the rest of the windows is padding.
        extractor: The feature extractor.
        attention: `[audio tokens]` of whole windows, or of the clip alone.
    """
    mel = torch.cat(list(features.float().cpu()), dim=1).numpy()  # [mel bins, frames of all windows]
    seconds = len(features) * extractor.chunk_length
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(mel, origin="lower", aspect="auto", extent=(0, seconds, 0, len(mel)), cmap="magma")
    axes.axvline(len(clip) / extractor.sampling_rate, color="white", linewidth=0.8)
    axes.set(xlabel="seconds", ylabel="mel bin")
    over = axes.twinx()
    token_seconds = ENCODER_STRIDE * extractor.hop_length / extractor.sampling_rate
    times = (np.arange(len(attention)) + 0.5) * token_seconds
    over.fill_between(times, attention / attention.max(), color="cyan", alpha=0.45, linewidth=0)
    over.set(ylim=(0, 1.05), xlim=(0, seconds), yticks=[], ylabel="attention of the answer")
    return figure


def draw_picture(image: Image.Image, attention: torch.Tensor) -> Figure:
    """Draws a picture, and over it the attention to its tokens, `[rows, columns]`."""
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
                [speech if has_audio else None, photo if has_picture else None, words]
                for (has_audio, has_picture), words in QUESTIONS.items()
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
    page = make_page(DemoModel(folder))
    examples = str(folder / "examples")
    page.launch(server_port=options.port, allowed_paths=[examples], max_file_size=handler.MAX_BYTES)


if __name__ == "__main__":
    main()
