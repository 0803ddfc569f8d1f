"""Embeddings of candidates that a pipeline has seen, found again by content."""

import os
import weakref
from collections.abc import Callable, Hashable
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from PIL import Image

from .pipeline_batches import is_url


def picture_key(picture: Any, load: Callable[[Any], Image.Image]) -> tuple[Hashable, Any]:
    """What tells `picture` from others by its content, and the picture, loaded if the key needed that.

    A file is known by its path and by its size and times, so that one that was written anew is another; bytes and
    pixels by their hash, so that nothing depends on which object holds them; a URL by its address alone.
    """
    if is_url(picture):
        return ("url", picture), picture
    if isinstance(picture, (str, os.PathLike)):
        status = os.stat(picture)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return ("file", os.path.realpath(picture), status.st_size, status.st_ino, *times), picture
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return ("bytes", blake2b(picture, digest_size=16).digest()), picture
    loaded = load(picture)
    pixels = np.ascontiguousarray(loaded)
    return ("pixels", loaded.size, blake2b(pixels, digest_size=16).digest()), loaded


class CandidateMemory:
    """Embeddings by key, and the last sets of candidates as whole matrices.

    Args:
        size: number of embeddings that are kept. Those of the latest call are kept whatever their number; beyond that
            the ones that were used longest ago are forgotten.
    """

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"memory_size must be an integer of at least 0, got {size!r}.")
        self.size = size
        self.forget()

    def __len__(self) -> int:
        return len(self._embeddings)

    def forget(self) -> None:
        self._embeddings: dict[Hashable, torch.Tensor] = {}  # oldest first
        self._matrix: tuple[list[Hashable], torch.Tensor] | None = None
        self._summary: tuple[Any, ...] | None = None

    def candidates(
        self, keys: list[Hashable], items: list[Any], embed: Callable[[list[Any]], list[torch.Tensor]]
    ) -> torch.Tensor:
        """`(N, d)` embeddings of the candidates `items`, `embed` called once with those whose key is new."""
        last = self._matrix
        if last is not None and last[0] == keys:
            return last[1]
        known = {key: self._embeddings.get(key) for key in keys}
        new = {key: item for key, item in zip(keys, items, strict=True) if known[key] is None}
        if new:
            known.update(zip(new, embed(list(new.values())), strict=True))
        for key in known:  # the latest used come last
            self._embeddings.pop(key, None)
        self._embeddings.update(known)
        for key in list(self._embeddings)[: max(0, len(self._embeddings) - max(self.size, len(known)))]:
            self._embeddings.pop(key, None)  # another thread may have been here
        matrix = torch.stack([known[key] for key in keys])
        self._matrix = (keys, matrix)
        return matrix

    def summaries(self, summary: Any, setting: Hashable, embed: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`(N, d)` embeddings of a summary: the last ones, where the very same tensor holds the same values."""
        tokens = summary
        if not isinstance(summary, torch.Tensor):
            tokens, setting = summary.tokens, (setting, *summary.lengths.tolist())
        if tokens.is_inference():
            return embed()  # such a tensor does not record its changes
        version = tokens._version
        if self._summary is not None:
            reference, old_version, old_setting, embeddings = self._summary
            if reference() is tokens and version == old_version and setting == old_setting:
                return embeddings
        embeddings = embed()
        self._summary = (weakref.ref(tokens), version, setting, embeddings)
        return embeddings

    def __getstate__(self) -> dict:
        """Without the last summary, which is known by its place in this process."""
        return {**self.__dict__, "_summary": None}
