"""Data sets of a few rows in the formats that lie around, written into a folder, with pictures that are drawn here."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import tiny

from fwd2bot.training.source_recipe import SourceRecipe, SourcesData
from fwd2bot.training.sources import ConversationEncoder, SamplePreparer, Source, SourceMixture


def picture_bytes(count: int, seed: int = 0) -> list[bytes]:
    encoded = []
    for picture in tiny.pictures(count, seed):
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    return encoded


def write_images(folder: Path, count: int) -> list[str]:
    """Files `0.png`, `1.png`, ... in `folder`; their names."""
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(picture_bytes(count)):
        (folder / f"{number}.png").write_bytes(content)
    return [f"{number}.png" for number in range(count)]


def write_json(path: Path, rows: list[dict]) -> str:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows), encoding="utf-8")
    return str(path)


def llava_rows(names: list[str]) -> list[dict]:
    return [
        {
            "id": f"chat-{number}",
            "image": name,
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is number {number}?"},
                {"from": "gpt", "value": f"It is {number}."},
            ],
        }
        for number, name in enumerate(names)
    ]


def write_llava(folder: Path, count: int = 8) -> SourceRecipe:
    path = write_json(folder / "chat.json", llava_rows(write_images(folder / "images", count)))
    return SourceRecipe(name="chat", format="llava", path=path, images=str(folder / "images"))


def caption_rows(count: int) -> list[dict]:
    return [
        {"id": f"photo-{number}", "image": content, "captions": [f"photo {number}", f"a long text on {number} " * 4]}
        for number, content in enumerate(picture_bytes(count, seed=1))
    ]


def write_captions(folder: Path, count: int = 8, files: int = 1, **fields) -> SourceRecipe:
    rows = caption_rows(count)
    for number in range(files):
        part = datasets.Dataset.from_list(rows[number::files])
        part.to_parquet(folder / f"captions-{number}.parquet")
    return SourceRecipe(name="photos", format="captions", path=str(folder / "captions-*.parquet"), **fields)


def write_tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def mixture_of(*recipes: SourceRecipe, length: int = 100, batch_size: int = 4, processes: int = 1, **fields):
    """A `SourceMixture` of these sources as a tiny Fwd2Bot would read it."""
    data = SourcesData(sources=list(recipes), **fields)
    prepare = SamplePreparer(data, ConversationEncoder(tiny.tiny_processor()))
    return SourceMixture([Source(one) for one in recipes], data, prepare, length, batch_size, processes)
