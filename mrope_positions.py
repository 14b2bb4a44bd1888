"""
M-RoPE positions with audio. The positions of cached tokens are kept on their cache, and stay right after the cache was
cropped or its rows were selected, reordered or repeated.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache


GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")  # what the positions of pictures depend on
AUDIO_TOKEN_TYPE = 3  # in `mm_token_type_ids`, beside 0 text, 1 image, 2 video


class CachedPositions(NamedTuple):
    """What `keep_positions` stores on a cache."""

    next_positions: torch.Tensor  # int64 (rows, places): the position that follows each place
    keys: torch.Tensor  # (rows, places): one channel of the first layer's keys, by which a row is recognized


class MRopePositions:
    """Computes the positions of a backbone with M-RoPE, and keeps no state between calls."""

    def get_rope_index(self, input_ids, mm_token_type_ids, *args, **kwargs):
        """
        Computes positions as the base does. Audio counts as text: each audio token advances all three axes by one.

        Raises:
            ValueError: if the images and videos of the tokens do not fit the grids.
        """
        mm_token_type_ids = mm_token_type_ids.masked_fill(mm_token_type_ids == AUDIO_TOKEN_TYPE, 0)
        try:
            return super().get_rope_index(input_ids, mm_token_type_ids, *args, **kwargs)
        except (StopIteration, TypeError, RuntimeError) as error:
            raise ValueError(
                "The image and video tokens do not fit image_grid_thw and video_grid_thw. Give a row there, and the "
                "pixels, for each picture whose tokens the cache does not hold, and for no other. The processor makes "
                f"all of them in one call. ({type(error).__name__}: {error})"
            ) from error

    def compute_3d_position_ids(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None = None,
        video_grid_thw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        Returns M-RoPE positions `(3, batch, sequence)` of the new tokens, which follow those in the cache, or None if
        counting from 0 is right. After a cache the attention mask counts the tokens, because a batch has padding
        between its turns. Upstream keeps the distance between places and positions (`rope_deltas`) on the model, where
        another call or thread would read it; here the cache keeps the positions of its own tokens.
        """
        cache = past_key_values if cache is None else cache
        past_length = cached_length(cache)
        has_pictures = input_ids is not None and (image_grid_thw is not None or video_grid_thw is not None)
        if not past_length and not has_pictures:
            return None
        batch, length = (input_ids if input_ids is not None else inputs_embeds).shape[:2]
        mask = as_mask(attention_mask, batch, past_length + length, self.device)
        if has_pictures:
            if mm_token_type_ids is None:
                is_image, is_video = input_ids == self.config.image_token_id, input_ids == self.config.video_token_id
                mm_token_type_ids = is_image + 2 * is_video
            more = {} if second_per_grid_ts is None else {"second_per_grid_ts": second_per_grid_ts}
            positions, _ = self.get_rope_index(
                input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask=mask[:, -length:], **more
            )
        else:
            positions = (mask[:, -length:].cumsum(1) - 1).expand(3, batch, length)
        if past_length:
            # A place of padding gets the position before it, so that the cache can be cropped there.
            positions = positions.masked_fill(mask[:, -length:] == 0, -1) if has_pictures else positions
            positions = positions + cached_next_positions(cache, past_length, mask)[:, -1:].to(positions.device)
        return positions

    def keep_positions(self, cache: Cache, position_ids: torch.Tensor | None, shape: tuple, attention_mask):
        """
        Stores the positions of new tokens on their cache, which holds these tokens already.

        Args:
            position_ids: `(batch, sequence)` or `(3 or 4, batch, sequence)` with the axes of M-RoPE last. None counts
                the tokens by their places.
            shape: `(batch, sequence)` of the new tokens.
            attention_mask: The argument of `forward`, see [`as_mask`].
        """
        (batch, length), keys = shape, cache.layers[0].keys
        past_length = cached_length(cache) - length
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + length, device=keys.device)[None]
        positions = position_ids[-3:].amax(0) if position_ids.ndim == 3 else position_ids
        mask = as_mask(attention_mask, batch, past_length + length, positions.device)
        # The position that follows a place of padding is the one that follows the token before it.
        positions = positions.expand(batch, length).masked_fill(mask[:, -length:].to(positions.device) == 0, -1)
        next_positions = positions.cummax(1).values + 1
        if past_length:
            before = cached_next_positions(cache, past_length, mask).to(next_positions.device)
            next_positions = torch.cat([before, next_positions.maximum(before[:, -1:])], dim=1)
        # A sliding or quantized layer does not hold all keys; without keys the rows count as unchanged.
        is_sliding = getattr(cache.layers[0], "is_sliding", False)
        holds_all = keys.ndim == 4 and not is_sliding and keys.shape[2] >= past_length + length
        keys = keys[:, 0, : past_length + length, 0].detach().clone() if holds_all else next_positions[:, :0]
        cache.mrope_positions = CachedPositions(next_positions, keys)

    def check_cached_pictures(self, cache: Cache, cached_ids: torch.Tensor):
        """Raises ValueError if `cached_ids` `(batch, places)` have images or videos whose positions were not kept."""
        pictures = torch.tensor([self.config.image_token_id, self.config.video_token_id], device=cached_ids.device)
        if not hasattr(cache, "mrope_positions") and torch.isin(cached_ids, pictures).any():
            raise ValueError(
                "The cache holds images or videos, but not their positions, which this model keeps as an attribute of "
                "the cache that it fills. Give the cache itself or a deep copy, not a new one made of its tensors."
            )


def cached_length(cache: Cache | None) -> int:
    return 0 if cache is None else cache.get_seq_length()


def as_mask(attention_mask, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """
    Returns a mask `(batch, length)`, int64 or bool, that is 0 where a place is padding.

    Args:
        attention_mask: The argument of `forward`: `(batch, places)`, perhaps longer than `length` for a static cache;
            or what `generate` makes of it, `(batch, 1, queries, keys)`, perhaps in a dict by type of layer; or None.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:  # the last token attends to all tokens
        last = attention_mask[:, 0, -1]
        attention_mask = (last if last.dtype == torch.bool else last >= 0).long().expand(batch, -1)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, :length]
    return torch.ones(batch, length, dtype=torch.long, device=device)


def cached_next_positions(cache: Cache, past_length: int, mask: torch.Tensor) -> torch.Tensor:
    """
    Returns the position that follows each of the `past_length` filled places of a cache, int64 `(batch, past_length)`.

    Args:
        mask: Attention mask `(batch, sequence)` of the cached places and perhaps more. It counts the places that single
            tokens have filled since positions were kept. Each of its rows stands for one row of the cache, or for all
            beams of one prompt.
    """
    mask, stored = mask[:, :past_length].long(), getattr(cache, "mrope_positions", None)
    if stored is None:
        return mask.cumsum(1)
    next_positions, old_keys = stored.next_positions[:, :past_length], stored.keys[:, :past_length]
    num_known = torch.tensor(next_positions.shape[1], device=next_positions.device)  # places that did not change
    if old_keys.shape == next_positions.shape:
        new_keys = cache.layers[0].keys[:, 0, : old_keys.shape[1], 0].to(old_keys.device)
        if torch.compiler.is_compiling() or not torch.equal(new_keys, old_keys):
            # The number of equal keys at the start of each pair of rows: [new rows, old rows].
            num_equal = torch.stack([(new_keys == row).cumprod(1).sum(1) for row in old_keys], dim=1)
            next_positions, num_known = next_positions[num_equal.argmax(1)], num_equal.amax(1).min()
    next_positions = next_positions[:: max(1, len(next_positions) // len(mask))]  # one row for the beams of a prompt
    next_positions = F.pad(next_positions, (0, past_length - next_positions.shape[1]))
    # A compiled graph does not know `num_known` on the host, so this compares on the device.
    is_known = torch.arange(past_length, device=next_positions.device) < num_known
    tokens_since = (mask.to(next_positions.device) * ~is_known).cumsum(1)
    return torch.where(is_known, next_positions, (next_positions * is_known).amax(1, keepdim=True) + tokens_since)
