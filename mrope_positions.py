"""
M-RoPE positions with audio. Those of what a cache holds are kept on the cache, and found again after it was cropped, or
its rows were selected, reordered or repeated.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache


AUDIO_TOKEN_TYPE = 3  # in `mm_token_type_ids`, beside 0 text, 1 image, 2 video


class CachedPositions(NamedTuple):
    """
    What is kept on a cache: the position that follows each of its places, int64 `(rows, places)`, and one channel of
    the first layer's keys, `(rows, places)`, by which a row is found again.
    """

    following: torch.Tensor
    keys: torch.Tensor


class MRopePositions:
    """Positions of a Qwen2-VL backbone, which keeps no state between calls."""

    def get_rope_index(self, input_ids, mm_token_type_ids, *args, **kwargs):
        """
        As in Qwen2-VL, with audio counted as text: each audio token advances all three axes by one.

        Raises:
            ValueError: if there are more images or videos in the tokens than grids.
        """
        mm_token_type_ids = mm_token_type_ids.masked_fill(mm_token_type_ids == AUDIO_TOKEN_TYPE, 0)
        try:
            return super().get_rope_index(input_ids, mm_token_type_ids, *args, **kwargs)
        except (StopIteration, TypeError) as error:
            raise ValueError(
                "The prompt has placeholders of more images or videos than image_grid_thw and video_grid_thw have "
                "rows. Every picture needs its row there and its pixels; the processor makes all from one call."
            ) from error
        except RuntimeError as error:
            raise ValueError(
                "The image and video tokens do not fit image_grid_thw and video_grid_thw. Give a row of these for each "
                f"picture whose tokens the cache does not hold, and for no other: {error}"
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
    ) -> torch.Tensor | None:
        """
        M-RoPE positions `(3, batch, sequence)` of the tokens given, which follow those in the cache; None where plain
        counting is right. After a cache tokens are counted by the attention mask, because a batch has padding between
        its turns. Qwen2-VL keeps the distance between a token's place and its position (`rope_deltas`) on the model,
        where the next call or another thread finds it; here positions are kept on the cache that they belong to.
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
                mm_token_type_ids = (input_ids == self.config.image_token_id) + 2 * (
                    input_ids == self.config.video_token_id
                )
            positions, _ = self.get_rope_index(
                input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask=mask[:, -length:]
            )
        else:
            positions = (mask[:, -length:].cumsum(1) - 1).expand(3, batch, length)
        if past_length:
            # A place of padding gets the position before it, so that the cache may be cropped there.
            positions = positions.masked_fill(mask[:, -length:] == 0, -1) if has_pictures else positions
            positions = positions + positions_after(cache, past_length, mask)[:, -1:].to(positions.device)
        return positions

    def keep_positions(self, cache: Cache, position_ids: torch.Tensor | None, shape: tuple, attention_mask):
        """
        Keeps the positions of new tokens on their cache, which holds these tokens already.

        Args:
            position_ids: Of the new tokens, `(batch, sequence)`, or `(3 or 4, batch, sequence)` with the axes of M-RoPE
                last; None if they are counted by their places.
            shape: `(batch, sequence)` of the new tokens.
            attention_mask: As in `forward`.
        """
        (batch, length), keys = shape, cache.layers[0].keys
        past_length = cached_length(cache) - length
        if position_ids is None:
            position_ids = torch.arange(past_length, past_length + length, device=keys.device)[None]
        positions = position_ids[-3:].amax(0) if position_ids.ndim == 3 else position_ids
        mask = as_mask(attention_mask, batch, past_length + length, positions.device)
        # Nothing follows a place of padding but what follows the token before it.
        positions = positions.expand(batch, length).masked_fill(mask[:, -length:].to(positions.device) == 0, -1)
        following = positions.cummax(1).values + 1
        if past_length:
            before = positions_after(cache, past_length, mask).to(following.device)
            following = torch.cat([before, following.maximum(before[:, -1:])], dim=1)
        # A sliding or quantized layer does not hold all keys. Its rows are taken to be those that were kept.
        is_sliding = getattr(cache.layers[0], "is_sliding", False)
        holds_all = keys.ndim == 4 and not is_sliding and keys.shape[2] >= past_length + length
        keys = keys[:, 0, : past_length + length, 0].detach().clone() if holds_all else following[:, :0]
        cache.mrope_positions = CachedPositions(following, keys)

    def check_cached_pictures(self, cache: Cache, cached_ids: torch.Tensor):
        """
        Raises:
            ValueError: if a cache holds pictures `(batch, cached tokens)`, but not their positions.
        """
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
    Where `forward` was told that tokens stand, not 0, and where padding: int64 or bool `(batch, length)`.

    Args:
        attention_mask: Of 2 axes, perhaps longer, as for a static cache; or what `generate` makes of it, of 4 axes
            `(batch, 1, queries, keys)` and perhaps in a dict by the kind of layer; or None.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:  # what the last token attends to
        last = attention_mask[:, 0, -1]
        attention_mask = (last if last.dtype == torch.bool else last >= 0).long().expand(batch, -1)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        return attention_mask[:, :length]
    return torch.ones(batch, length, dtype=torch.long, device=device)


def positions_after(cache: Cache, past_length: int, mask: torch.Tensor) -> torch.Tensor:
    """
    Args:
        past_length: Places of the cache that are filled.
        mask: Attention mask `(batch, sequence)` of the cached places and perhaps more. It counts the places that were
            filled by single tokens since positions were kept. Each of its rows stands for one row of the cache, or for
            as many as it was repeated for beams.

    Returns:
        The positions that follow the places of the cache, int64 `(batch, past_length)`.
    """
    mask, kept = mask[:, :past_length].long(), getattr(cache, "mrope_positions", None)
    if kept is None:
        return mask.cumsum(1)
    following, then = kept.following[:, :past_length], kept.keys[:, :past_length]
    num_known = torch.tensor(following.shape[1], device=following.device)  # places that are as they were
    if then.shape == following.shape:
        now = cache.layers[0].keys[:, 0, : then.shape[1], 0].to(then.device)
        if torch.compiler.is_compiling() or not torch.equal(now, then):
            # How many keys a row and one that was kept have in common from the start: [rows now, rows then].
            common = torch.stack([(now == row).cumprod(1).sum(1) for row in then], dim=1)
            following, num_known = following[common.argmax(1)], common.amax(1).min()
    following = following[:: max(1, len(following) // len(mask))]  # the rows of one prompt's beams stand together
    following = F.pad(following, (0, past_length - following.shape[1]))
    # Without a number on the host, which a compiled graph does not know.
    is_known = torch.arange(past_length, device=following.device) < num_known
    since = (mask.to(following.device) * ~is_known).cumsum(1)
    return torch.where(is_known, following, (following * is_known).amax(1, keepdim=True) + since)
