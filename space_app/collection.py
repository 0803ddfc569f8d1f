"""The pictures that every visitor finds: those of the package, or those of a store, which is only read."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fwd2bot_cli.showing import original

from fwd2bot import Fwd2BotSummary
from fwd2bot.pipelines.embedded import GalleryPicture

from .uploads import MAX_SIDE, encode
from .visitors import Picture

if TYPE_CHECKING:
    from .service import Service

SHOWN = 60  # pictures of a store that are offered before a search
KEPT = 200  # pictures of a store in memory, so that moving a slider reads none of them anew
CANDIDATES = 200  # rows of a store that are ranked anew at a shorter length


@dataclass(frozen=True)
class Hit:
    """A picture that was found, and its cosine with the query."""

    score: float
    picture: Picture


class Shipped:
    """The pictures of the package, compressed when the server starts.

    Args:
        pictures: those of `gallery()`.
    """

    max_length: int | None = None

    def __init__(self, pictures: Sequence[GalleryPicture]):
        self._entries = list(pictures)
        self.pictures: list[Picture] = []

    def prepare(self, service: "Service") -> None:
        self._embed = service.embed
        images = [entry.image for entry in self._entries]
        self._summary = service.compress(images)
        for index, (entry, image) in enumerate(zip(self._entries, images, strict=True)):
            title = f"Picture {entry.path.stem}"
            name, summary = f"gallery-{entry.path.stem}", self._summary[index]
            self.pictures.append(Picture(name, title, entry.description, encode(image), summary, described=True))
        self._by_id = {picture.id: picture for picture in self.pictures}
        self._embeddings: dict[int, torch.Tensor] = {}

    def get(self, one: str) -> Picture | None:
        return self._by_id.get(one)

    def search(self, embedding: torch.Tensor, query: Fwd2BotSummary, length: int, top_k: int) -> list[Hit]:
        if length not in self._embeddings:
            self._embeddings[length] = self._embed(self._summary, length)  # (N, d)
        return best(self._embeddings[length] @ embedding, self.pictures, top_k)


class StoreCollection:
    """A store made by `fwd2bot index`, of which nothing is changed.

    Args:
        store: a `SummaryStore` that was opened with the model.
    """

    def __init__(self, store: Any):
        self.store = store
        self.max_length: int | None = store.config.num_summary_tokens
        self.pictures: list[Picture] = []
        self._shown: dict[str, Picture] = {}  # by the id in the store, the latest last
        self._lock = threading.Lock()

    def prepare(self, service: "Service") -> None:
        self._embed = service.embed
        ids = list(islice(self.store, SHOWN))
        self.pictures = self._pictures(ids) if ids else []

    def get(self, one: str) -> Picture | None:
        try:
            [picture] = self._pictures([one.removeprefix("store-")])
        except ValueError:
            return None
        return picture

    def search(self, embedding: torch.Tensor, query: Fwd2BotSummary, length: int, top_k: int) -> list[Hit]:
        whole = self._embed(query, self.max_length)[0]  # (d,) as the rows of the store were embedded
        rows = self.store.search(whole, max(CANDIDATES, top_k) if length < self.max_length else top_k)
        if not rows:
            return []
        ids = [row["id"] for row in rows]
        if length == self.max_length:
            scores = torch.tensor([row["score"] for row in rows])
        else:
            scores = self._embed(self.store.summary(ids), length) @ embedding
        order = scores.argsort(descending=True)[:top_k]
        return best(scores[order], self._pictures([ids[index] for index in order]), top_k)

    def _pictures(self, ids: list[str]) -> list[Picture]:
        """Those that were shown lately from memory, the others from the store and their files."""
        with self._lock:
            found = {one: self._shown[one] for one in ids if one in self._shown}
        new = [one for one in dict.fromkeys(ids) if one not in found]
        if new:
            rows, summaries = self.store.get(new), self.store.summary(new).to(torch.float32)
            found |= {one: _stored(row, summary) for one, row, summary in zip(new, rows, summaries, strict=True)}
        with self._lock:
            for one in ids:
                self._shown.pop(one, None)
                self._shown[one] = found[one]
            while len(self._shown) > KEPT:
                del self._shown[next(iter(self._shown))]
        return [found[one] for one in ids]


def best(scores: torch.Tensor, pictures: Sequence[Picture], top_k: int) -> list[Hit]:
    """The pictures of the highest scores `(N,)`, in order."""
    order = scores.argsort(descending=True, stable=True)[:top_k].tolist()
    return [Hit(float(scores[index]), pictures[index]) for index in order]


def _stored(row: dict[str, Any], summary: Fwd2BotSummary) -> Picture:
    image = original(row["source"], MAX_SIDE, enlarge=False)
    title = Path(row["source"]).name if row["source"] else row["id"]
    return Picture(f"store-{row['id']}", title, title, None if image is None else encode(image), summary)
