"""
A page to try the model: give it audio and a picture, ask, and see what the answer attends to; or give it a long
recording, read it with its times, and take subtitles home. Spaces run it.

    python app.py [REPO]    a folder or a Hub id; the default is $REPO, or else the folder of this file
"""

import argparse
import os
import queue
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers import AutoModel, AutoProcessor, BatchFeature, TextIteratorStreamer
from transformers.utils import logging

import handler
from audio_streaming import find_duration
from configuration_qwen2_audio_vl import ENCODER_STRIDE, FAMILIES, TRANSCRIBE
from shipped_files import WHOLE_MODEL, find_folder
from transcribe import BATCH_SIZE, join_batches, make_transcriber
from transcripts import FORMATS, Segment


logger = logging.get_logger(__name__)

MAX_VISITORS = 32  # visitors who wait for an answer; one is answered at a time
POLL = 0.5  # seconds after which Gradio is asked whether the visitor has left
MAX_RECORDING = 3600.0  # seconds of a recording to transcribe
MAX_RECORDING_BYTES = 2**28  # as much as an upload may have
DOWNLOADS = ("srt", "vtt", "txt")  # of `FORMATS`
NO_FILES = [gr.DownloadButton(value=None, interactive=False)] * len(DOWNLOADS)
# A click on a segment plays the recording from there. The list is drawn anew as it grows; its frame stays.
PLAY = """
element.addEventListener("click", event => {
    const segment = event.target.closest("[data-start]");
    const player = document.querySelector("#recording audio");
    if (segment && player) {
        player.currentTime = Number(segment.dataset.start);
        player.play();
    }
});
"""
SEGMENTS_STYLE = """
button.segment {
    display: flex; gap: 1em; width: 100%; margin: 0; padding: 0.5em 0.7em; border: 0;
    border-left: 3px solid transparent; border-radius: 0; background: none;
    font-size: 1em; font-weight: 400; text-align: left; cursor: pointer;
}
button.segment:hover, button.segment:focus-visible { background: var(--background-fill-secondary); }
button.segment time { flex: 0 0 8.5em; opacity: 0.7; font-variant-numeric: tabular-nums; }
button.segment.doubtful { border-left-color: #d97706; }
button.segment small { display: block; color: #b45309; }
.dark button.segment small { color: #fbbf24; }
"""
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


@contextmanager
def logged(what: str, title: str):
    """Logs an error of the block, and turns it into one that the page shows. Those made for the page pass."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        logger.exception(f"{what} failed.")
        raise gr.Error(f"{what} failed; this is logged.", title=title) from error


def stop_at(has_left: threading.Event) -> Callable[..., torch.BoolTensor]:
    """Returns a stopping criterion of `generate`: the visitor has left."""

    def stop(input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), has_left.is_set(), device=input_ids.device)

    return stop


class StoppableModel:
    """Behaves as a model whose `generate` stops after the visitor has left."""

    def __init__(self, model: torch.nn.Module, has_left: threading.Event):
        self.model, self.criteria = model, [stop_at(has_left)]

    def generate(self, **inputs):
        return self.model.generate(**inputs, stopping_criteria=self.criteria)

    def __getattr__(self, name: str):
        return getattr(self.model, name)


class DemoModel:
    """A loaded repository. It answers questions, and shows which tokens of the prompt the answer attends to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="auto", device_map="auto").eval()
        self.base_name = FAMILIES[self.model.config.model_type].base_name
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
                item = {"type": "audio", "audio": Path(audio).read_bytes()}
                # In a process of its own, because a small file can take gigabytes or minutes.
                clip = self.processor.open_item(item, public_only=True, **limits)["audio"]
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
        output = self.executor.submit(
            self.model.generate,
            **inputs,
            max_new_tokens=handler.NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            streamer=streamer,
            stopping_criteria=[stop_at(has_left)],
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
        with logged("The answer", "Answer"):
            return text, output.result()

    def transcribe(self, recording: str | None):
        """
        Yields the segments of a recording as HTML as they are transcribed, how far that is, and updates of the buttons
        of `DOWNLOADS`, which have files once the recording has ended.

        Raises:
            gr.Error: if the recording cannot be transcribed; the page shows it.
        """
        if not recording:
            raise gr.Error("Give a recording.", title="Nothing to transcribe")
        total = find_duration(recording, in_worker=True)
        with shown("Recording"):  # or an hour would be transcribed before the limit is met
            handler.check_limit(round(total or 0), "seconds", round(MAX_RECORDING))
        yield "", "Waiting", *NO_FILES
        batches = []
        with closing(self.stream_batches(recording)) as stream:
            for batch in stream:
                if batch is None:
                    yield [gr.skip()] * (2 + len(DOWNLOADS))
                    continue
                batches.append(batch)
                transcript = join_batches(batches, None)
                length = f" of {total:.0f}" if total else ""
                yield list_segments(transcript.segments), f"{transcript.duration:.0f}{length} s", *NO_FILES
        transcript = join_batches(batches, None)
        listed, count = list_segments(transcript.segments), len(transcript.segments)
        facts = f"{transcript.duration:.1f} s, {count} segment{'s' * (count != 1)}"
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the files at the `yield`
            paths = [Path(folder, f"{Path(recording).stem}.{ending}") for ending in DOWNLOADS]
            for path in paths:
                path.write_text(FORMATS[path.suffix[1:]](transcript), encoding="utf-8")
            yield listed, facts, *(gr.DownloadButton(value=str(path), interactive=True) for path in paths)

    def stream_batches(self, recording: str):
        """
        Yields what `Transcriber.batches` yields, and None while there is nothing new. Each batch is a task of its own
        for the one thread, so that questions are answered between the batches of a long recording.
        """
        has_left = threading.Event()
        # On a CPU several pieces at once take about as long as one after another, and are seen later.
        batch_size = 1 if self.model.device.type == "cpu" else BATCH_SIZE
        transcriber = make_transcriber(StoppableModel(self.model, has_left), self.processor, batch_size=batch_size)
        path, limits = Path(recording), {"max_bytes": MAX_RECORDING_BYTES, "max_seconds": MAX_RECORDING}
        batches = transcriber.batches(path.open("rb"), public_only=True, **limits)  # decoded in a process of its own
        try:
            while True:
                task = self.executor.submit(next, batches, None)
                while not wait([task], POLL).done:
                    yield None
                with logged("The transcription", "Recording"), shown("Recording", "This cannot be transcribed: "):
                    batch = task.result()
                if batch is None:
                    return
                yield batch
        finally:  # Gradio closes this generator at a `yield` after the visitor has left
            has_left.set()
            task.cancel()
            self.executor.submit(batches.close)  # only the thread that runs it can close it

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
    Draws the clip's part of the log-mel spectrogram that the encoder gets, and over it the attention to its tokens.

    Args:
        features: `[windows, mel bins, frames]`.
        clip: `[samples]`; the rest of the windows is padding, which is left out.
        extractor: The feature extractor.
        attention: `[audio tokens]` of whole windows, or of the clip alone.
    """
    num_frames = -(-len(clip) // extractor.hop_length)
    mel = torch.cat(list(features.float().cpu()), dim=1)[:, :num_frames].numpy()
    attention = attention[: -(-num_frames // ENCODER_STRIDE)]
    seconds = len(clip) / extractor.sampling_rate
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    frame_seconds = extractor.hop_length / extractor.sampling_rate
    extent = (0, num_frames * frame_seconds, 0, len(mel))
    axes.imshow(mel, origin="lower", aspect="auto", extent=extent, cmap="magma")
    axes.set(xlabel="seconds", ylabel="mel bin")
    over = axes.twinx()
    times = (np.arange(len(attention)) + 0.5) * ENCODER_STRIDE * frame_seconds
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


def list_segments(segments: tuple[Segment, ...]) -> str:
    """Writes segments as HTML that [`PLAY`] plays. The model's text is escaped: it may hold anything."""
    rows = []
    for segment in segments:
        times = f"{show_time(segment.start)} \u2013 {show_time(segment.end)}"
        text, doubt, kind = escape(segment.text) or "(no text)", "", "segment"
        if segment.doubt:
            doubt, kind = f"<small>Doubtful: {escape(segment.doubt)}</small>", "segment doubtful"
        content = f"<time>{times}</time><span>{text}{doubt}</span>"
        rows.append(f'<button type="button" class="{kind}" data-start="{segment.start}">{content}</button>')
    return "".join(rows)


def show_time(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths / 10:04.1f}"


def make_page(model: DemoModel) -> gr.Blocks:
    title = f"{model.base_name} with audio"
    with gr.Blocks(title=title, delete_cache=(3600, 86_400)) as page:  # hourly, what visitors left a day ago
        gr.Markdown(f"# {title}")
        with gr.Tab("Ask"):
            add_questions(model)
        with gr.Tab("Transcribe"):
            add_recordings(model)
    return page.queue(api_open=False, max_size=MAX_VISITORS)  # nobody skips the queue


def add_questions(model: DemoModel):
    """Adds what answers questions to the page."""
    speech, photo = (str(model.folder / "examples" / name) for name in ("speech.mp3", "photo.png"))
    sees = model.model.config.vision_is_trained
    gr.Markdown("Record or drop audio, drop a picture, ask about either or both.")
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
    examples = [
        [speech if has_audio else None, photo if has_picture else None, words]
        for (has_audio, has_picture), words in QUESTIONS.items()
        if sees or not has_picture
    ]
    taught = [task["instruction"] for task in getattr(model.processor, "trained_tasks", None) or ()]
    asked = [words for _, _, words in examples]
    gr.Examples(examples + [[speech, None, words] for words in taught if words not in asked], inputs)


def add_recordings(model: DemoModel):
    """Adds what transcribes recordings to the page."""
    gr.Markdown("Record or drop up to an hour of audio. Click a segment to play it.")
    with gr.Row():
        with gr.Column(scale=2):
            # A waveform would need the whole recording decoded in the browser.
            recording = gr.Audio(
                type="filepath",
                label="Recording",
                elem_id="recording",
                waveform_options=gr.WaveformOptions(show_recording_waveform=False),
            )
            button = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
            progress = gr.Textbox(label="Transcribed", elem_id="progress")
            with gr.Row():
                downloads = [
                    gr.DownloadButton(f".{ending}", interactive=False, min_width=60, elem_id=f"download-{ending}")
                    for ending in DOWNLOADS
                ]
        with gr.Column(scale=3):
            gr.Markdown("### Segments")
            segments = gr.HTML(css_template=SEGMENTS_STYLE, js_on_load=PLAY, elem_id="segments")
    outputs = [segments, progress, *downloads]
    transcribing = button.click(model.transcribe, [recording], outputs, concurrency_limit=1)
    # The segments of another recording would play the wrong places of this one. Gradio runs the functions of an event
    # in their order, and `cancels` of a function after it: segments would come after these had been removed.
    recording.change(None, cancels=[transcribing])
    recording.change(lambda: ["", "", *NO_FILES], None, outputs, queue=False)


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
    page.launch(server_port=options.port, allowed_paths=[examples], max_file_size=MAX_RECORDING_BYTES)


if __name__ == "__main__":
    main()
