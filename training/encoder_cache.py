"""The outputs of the frozen audio encoder, kept in files from one epoch to the next."""

import hashlib
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging


logger = logging.get_logger(__name__)


class CachedEncoder(WhisperEncoder):
    """
    A frozen encoder that writes its output for a window to a file, and reads it when the window comes again. With
    trimmed tokens only the rows of the clip are written. A file that was damaged is written again.
    """

    @classmethod
    def of(cls, encoder: WhisperEncoder, folder: str) -> "CachedEncoder":
        with torch.device("meta"):
            cached = cls(encoder.config)
        cached.load_state_dict(encoder.state_dict(), assign=True)
        # Each encoder has a folder of its own.
        weights = [digest(name, tensor) for name, tensor in encoder.state_dict().items()]
        cached.folder = Path(folder) / hashlib.sha256("".join(weights).encode()).hexdigest()[:16]
        cached.folder.mkdir(parents=True, exist_ok=True)
        return cached.requires_grad_(False).eval()

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """The last hidden state alone. `attention_mask` `(windows, frames)` marks the clips; rows behind them are 0."""
        device, num_rows = input_features.device, self.config.max_source_positions
        precision = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype
        lengths = [num_rows] * len(input_features)
        if attention_mask is not None:
            places = torch.arange(1, num_rows + 1, device=device)
            lengths = (attention_mask[:, :: self.conv1.stride[0] * self.conv2.stride[0]] * places).amax(1).tolist()
        paths = [self.folder / f"{digest(str(precision), window)}.safetensors" for window in input_features]
        rows = [read_rows(path).to(device) for path in paths]
        # What was stored for trimmed tokens is too short for fixed ones.
        if missing := [index for index, length in enumerate(lengths) if len(rows[index]) < length]:
            encoded = super().forward(input_features[missing], **kwargs).last_hidden_state
            for index, states in zip(missing, encoded, strict=True):
                rows[index] = states[: lengths[index]]
                write_rows(paths[index], rows[index].cpu().contiguous())
        padded = [F.pad(states, (0, 0, 0, num_rows - len(states))) for states in rows]
        return BaseModelOutput(last_hidden_state=torch.stack(padded))


def digest(name: str, tensor: torch.Tensor) -> str:
    """SHA-256 of a name, and of the dtype, shape and content of a tensor."""
    header = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    return hashlib.sha256(header + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def write_rows(path: Path, rows: torch.Tensor):
    unfinished = path.with_suffix(f".{uuid4().hex}")  # machines may share the folder
    save_file({"last_hidden_state": rows}, unfinished, {"sha256": digest(path.stem, rows)})
    unfinished.replace(path)


def read_rows(path: Path) -> torch.Tensor:
    """The rows `(tokens, d_model)` of a window, none if they are not stored or if their file was damaged."""
    if not path.exists():
        return torch.empty(0)
    with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
        rows = file.get_tensor("last_hidden_state")
        if (file.metadata() or {}).get("sha256") == digest(path.stem, rows):
            return rows
    logger.warning(f"{path} was damaged, or is of an earlier release; its window is encoded again.")
    return torch.empty(0)
