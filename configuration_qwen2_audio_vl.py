"""The configurations of the bases with a Whisper encoder and three audio tokens, and what all files agree on."""

from transformers.utils.versions import require_version


# This check comes first because the imports below fail on older releases without naming the reason. The processing
# file repeats it, because a processor is loaded without the configuration.
require_version("transformers>=5.16.1,<6", "Install one with: pip install 'transformers>=5.16.1,<6'")

import importlib.metadata
import shutil
from pathlib import Path
from typing import ClassVar, NamedTuple

from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig, WhisperConfig
from transformers.models.whisper.tokenization_whisper import LANGUAGES
from transformers.utils import logging


NEWEST_PROVED = "5.24.0"  # the newest transformers on which the test suite passed

installed = importlib.metadata.version("transformers")
if Version(installed) > Version(NEWEST_PROVED):
    # The logger of transformers warns once per process. This file runs anew, as a new module, for every loaded folder.
    logging.get_logger().warning_once(
        f"transformers {installed} is newer than {NEWEST_PROVED}, the newest release on which qwen2-audio-vl was "
        f"tested. If something fails, try `pip install transformers=={NEWEST_PROVED}`."
    )


class Family(NamedTuple):
    """A base with audio: what its classes are named after, and what it is made of."""

    prefix: str  # of the names of the classes
    base_type: str  # `model_type` of the base
    base_name: str
    system: str | None  # the system message of a conversation that has none

    @property
    def auto_map(self) -> dict[str, str]:
        """The classes by Auto class. By the convention of remote code `AutoModel` loads the one that can `generate`."""
        auto_map = {"AutoConfig": f"configuration_qwen2_audio_vl.{self.prefix}Config"}
        auto_map["AutoProcessor"] = f"processing_qwen2_audio_vl.{self.prefix}Processor"
        names = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForImageTextToText", "AutoModelForCausalLM")
        return auto_map | dict.fromkeys(names, f"modeling_qwen2_audio_vl.{self.prefix}ForConditionalGeneration")


ASSISTANT = "You are a helpful assistant."
FAMILIES = {  # by `model_type`
    "qwen2_audio_vl": Family("Qwen2AudioVL", "qwen2_vl", "Qwen2-VL", ASSISTANT),
    "qwen2_5_audio_vl": Family("Qwen2_5AudioVL", "qwen2_5_vl", "Qwen2.5-VL", ASSISTANT),
    "qwen3_audio_vl": Family("Qwen3AudioVL", "qwen3_vl", "Qwen3-VL", None),
}

CODE_FILES = (
    "configuration_qwen2_audio_vl.py",
    "modeling_qwen2_audio_vl.py",
    "processing_qwen2_audio_vl.py",
    "mrope_positions.py",
    "content_items.py",
    "audio_utils.py",
    "audio_download.py",
    "audio_decoding.py",
)

KINDS_OF_ANSWERS = ("text", "classes", "json")  # that a model was trained to give
TRANSCRIBE = "Transcribe the audio."  # the instruction for a clip that comes without one
PIECE_SECONDS = 28.0  # the longest piece of a recording that is transcribed, where the model names no other
LONGER = 1.2  # a model may leave out words of a clip that is longer than its longest piece by this factor
SHORTEST_PIECE, LONGEST_PIECE = 2.0, 600.0  # seconds; bounds of such a length
IGNORED_LABEL = -100  # the label of a token without a loss
HOP_LENGTH = 160  # samples at 16 kHz from one log-mel frame to the next
ENCODER_STRIDE = 2  # log-mel frames per audio token: the stride of the Whisper encoder's second convolution
AUDIO_TOKEN_COUNTS = ("fixed", "trimmed")  # the rules by which `count_audio` counts the audio tokens of a clip
TRAINED_AUDIO_TOKENS = (*AUDIO_TOKEN_COUNTS, "both")  # the rules that a model can be trained with
# The fields of a configuration that hold the ids of special tokens.
VISION_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
AUDIO_TOKEN_IDS = ("audio_token_id", "audio_bos_token_id", "audio_eos_token_id")

QWEN2_VL_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_window_layers": 28,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
QWEN3_VL_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
}
WHISPER_LARGE_V3_TURBO = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
}


class AudioCount(NamedTuple):
    windows: int
    tokens: int


def tokens_per_window(feature_extractor) -> int:
    """Returns the audio tokens of one window: 3000 log-mel frames -> 1500 tokens in Whisper's own sizes."""
    return feature_extractor.nb_max_frames // ENCODER_STRIDE


def check_audio_tokens(audio_tokens: str, known: tuple = AUDIO_TOKEN_COUNTS):
    """Raises ValueError if `audio_tokens` is not one of the `known` rules."""
    if audio_tokens not in known:
        raise ValueError(f"audio_tokens must be {', '.join(known[:-1])} or {known[-1]}, got {audio_tokens!r}.")


def check_piece_seconds(seconds: float):
    """Raises ValueError if `seconds` is no length of a piece."""
    if not isinstance(seconds, (int, float)) or not SHORTEST_PIECE <= seconds <= LONGEST_PIECE:
        raise ValueError(f"piece_seconds must be from {SHORTEST_PIECE:g} to {LONGEST_PIECE:g} s, got {seconds!r}.")


def check_tasks(tasks: list[dict]):
    for task in tasks if isinstance(tasks, list) else [tasks]:
        if not isinstance(task, dict) or not task.get("instruction") or task.get("answers") not in KINDS_OF_ANSWERS:
            kinds = ", ".join(KINDS_OF_ANSWERS)
            raise ValueError(f"trained_tasks must be dicts of `instruction` and `answers` ({kinds}), got {task!r}.")


def name_language(language: str) -> str:
    """Returns the English name of a language, for a name or code that Whisper knows."""
    name = LANGUAGES.get(language.lower(), language.lower()) if isinstance(language, str) else None
    if name not in LANGUAGES.values():
        raise ValueError(f"language must be a code or name of Whisper's, such as en or English, got {language!r}.")
    return name.title()


def ask_for_words(language: str | None = None, prompt: str | None = None) -> str:
    """Returns the instruction that asks for the words of a clip, perhaps in a language by its code or name."""
    return (prompt or TRANSCRIBE) + ("" if language is None else f" The language is {name_language(language)}.")


def count_audio(num_samples: int, window_tokens: int, audio_tokens: str = "fixed") -> AudioCount:
    """
    Samples -> windows -> tokens. The processor, the model's check and the documents count with this function alone.

    Args:
        num_samples: Length of a clip at 16 kHz.
        window_tokens: Audio tokens of one window: `audio_config.max_source_positions`, 1500 in Whisper's own sizes,
            where a window is 480,000 samples (30 s).
        audio_tokens: "fixed": every window has all its tokens, also the last one, which is padded to its full length.
            "trimmed": the clip has one token for each 320 samples, and its padding has none.
    """
    check_audio_tokens(audio_tokens)
    num_tokens = max(1, -(-num_samples // (HOP_LENGTH * ENCODER_STRIDE)))  # rounded up
    num_windows = -(-num_tokens // window_tokens)
    return AudioCount(num_windows, num_tokens if audio_tokens == "trimmed" else num_windows * window_tokens)


@strict
class AudioConfig(PreTrainedConfig):
    """
    What a configuration with audio adds to that of its base. The default encoder is whisper-large-v3-turbo's.

    Args:
        audio_config (`WhisperConfig` or `dict`, *optional*): The Whisper encoder. Its decoder is not used.
        audio_token_id (`int`): Id of `<|audio_pad|>`. The model replaces its embeddings by audio.
        audio_bos_token_id (`int`): Id of `<|audio_bos|>`, which opens a clip.
        audio_eos_token_id (`int`): Id of `<|audio_eos|>`, which closes a clip.
        audio_encoder_origin (`str`, *optional*): Hub id, perhaps with `@` and a commit, of the complete Whisper of the
            encoder. Its decoder finds the times of words.
        vision_is_trained (`bool`, defaults to `True`): False if answers about pictures mean nothing, so that the page
            offers none.

    All other arguments are those of the base's configuration. Values that contradict each other raise a ValueError.
    """

    default_text: ClassVar[dict] = {}
    default_vision: ClassVar[dict] = {}

    audio_config: dict | PreTrainedConfig | None = None
    audio_token_id: int = 151657
    audio_bos_token_id: int = 151658
    audio_eos_token_id: int = 151659
    audio_encoder_origin: str | None = None
    vision_is_trained: bool = True

    def __post_init__(self, **kwargs):
        if self.text_config is None and "hidden_size" not in kwargs:  # older files have its values at the top
            self.text_config = dict(self.default_text)
        if self.vision_config is None:
            self.vision_config = dict(self.default_vision)
        if self.audio_config is None:
            self.audio_config = dict(WHISPER_LARGE_V3_TURBO)
        if isinstance(self.audio_config, dict):
            self.audio_config = WhisperConfig(**self.audio_config)
        if isinstance(self.vision_config, dict):
            # Newer releases save the type of the vision tower's rotary embeddings, and older ones warn about it. All
            # releases compute the same, so it is removed where the release does not know it.
            default = getattr(self.sub_configs["vision_config"], "default_rope_type", None)
            stored = self.vision_config.get("rope_parameters") or {}
            if stored.get("rope_type") == "axial" != default:
                self.vision_config = {k: v for k, v in self.vision_config.items() if k != "rope_parameters"}
        super().__post_init__(**kwargs)
        self._refuse_contradictions()

    def _refuse_contradictions(self):
        hidden_size = self.text_config.hidden_size
        # The width of the merger's output; Qwen2-VL calls it `hidden_size`.
        name = "out_hidden_size" if hasattr(self.vision_config, "out_hidden_size") else "hidden_size"
        if getattr(self.vision_config, name) != hidden_size:
            raise ValueError(
                f"vision_config.{name} is {getattr(self.vision_config, name)} but text_config.hidden_size is "
                f"{hidden_size}: the vision merger must project to the width of the language model."
            )
        if self.audio_config.d_model % self.audio_config.encoder_attention_heads:
            raise ValueError(
                "audio_config.d_model must be a multiple of audio_config.encoder_attention_heads, got "
                f"{self.audio_config.d_model} and {self.audio_config.encoder_attention_heads}."
            )
        ids = {name: getattr(self, name) for name in (*VISION_TOKEN_IDS, *AUDIO_TOKEN_IDS)}
        for name, token_id in ids.items():
            if name.startswith("audio") and not 0 <= token_id < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} is {token_id}, outside the vocabulary of {self.text_config.vocab_size} ids "
                    "(text_config.vocab_size)."
                )
            equal_ids = [other for other in ids if ids[other] == token_id]
            if len(equal_ids) > 1:
                raise ValueError(f"{' and '.join(equal_ids)} are all {token_id}: each needs an id of its own.")

    def save_pretrained(self, save_directory, **kwargs):
        """
        Saves as [`PreTrainedConfig`] does, with every Auto class and the code that they load, so that a fine-tuned
        folder needs no other repository.
        """
        # A configuration from the Hub names its classes as `repo--module.Class`, and a saved model has only the Auto
        # class that it was loaded with.
        self.auto_map = FAMILIES[self.model_type].auto_map
        super().save_pretrained(save_directory, **kwargs)
        # transformers copies the code of a Hub repository into one folder, and that of a local folder into several.
        origins = [Path(__file__).parent, *([Path(self.name_or_path)] if self.name_or_path else [])]
        for name in CODE_FILES:
            origin = next((folder / name for folder in origins if (folder / name).is_file()), None)
            target = Path(save_directory) / name
            if origin is not None and not (target.exists() and target.samefile(origin)):
                shutil.copyfile(origin, target)


@strict
class Qwen2AudioVLConfig(AudioConfig, Qwen2VLConfig):
    """[`Qwen2VLConfig`] with the arguments of [`AudioConfig`]. The defaults are Qwen2-VL-7B."""

    model_type = "qwen2_audio_vl"
    sub_configs: ClassVar[dict] = {**Qwen2VLConfig.sub_configs, "audio_config": WhisperConfig}
    default_text: ClassVar[dict] = QWEN2_VL_7B


@strict
class Qwen2_5AudioVLConfig(AudioConfig, Qwen2_5_VLConfig):
    """[`Qwen2_5_VLConfig`] with the arguments of [`AudioConfig`]. The defaults are Qwen2.5-VL-7B."""

    model_type = "qwen2_5_audio_vl"
    sub_configs: ClassVar[dict] = {**Qwen2_5_VLConfig.sub_configs, "audio_config": WhisperConfig}
    default_text: ClassVar[dict] = {**QWEN2_VL_7B, "max_position_embeddings": 128000}
    default_vision: ClassVar[dict] = {"hidden_size": 1280, "tokens_per_second": 2}

    audio_token_id: int = 151665
    audio_bos_token_id: int = 151666
    audio_eos_token_id: int = 151667


@strict
class Qwen3AudioVLConfig(AudioConfig, Qwen3VLConfig):
    """[`Qwen3VLConfig`] with the arguments of [`AudioConfig`]. The defaults are Qwen3-VL-8B."""

    model_type = "qwen3_audio_vl"
    sub_configs: ClassVar[dict] = {**Qwen3VLConfig.sub_configs, "audio_config": WhisperConfig}
    default_text: ClassVar[dict] = QWEN3_VL_8B
    default_vision: ClassVar[dict] = {"out_hidden_size": 4096}

    audio_token_id: int = 151669
    audio_bos_token_id: int = 151670
    audio_eos_token_id: int = 151671


Qwen2AudioVLConfig.register_for_auto_class()
Qwen2_5AudioVLConfig.register_for_auto_class()
Qwen3AudioVLConfig.register_for_auto_class()
