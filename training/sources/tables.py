"""Data sets opened by the `datasets` library: tables on disk with random access, or streams; pictures undecoded."""

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset

from ..source_recipe import SourceRecipe
from .rows import MalformedRowError

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".tar": "webdataset",
}
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def open_table(recipe: SourceRecipe) -> Dataset | IterableDataset:
    """The rows of a source; an `IterableDataset` if it is streamed. Images are `{"bytes", "path"}`, not decoded.

    Raises:
        FileNotFoundError: nothing lies at the path.
        ValueError: naming the source, for an empty table, a split that is not there, or files that cannot be read.
    """
    with reading(recipe):
        numbered = _numbered_rows(recipe)
        table = _undecoded(_open(recipe.path, _name(recipe), recipe)) if numbered is None else numbered
    if isinstance(table, Dataset) and len(table) == 0:
        raise ValueError(_empty(recipe))
    return table


def first_row(table: Dataset | IterableDataset, recipe: SourceRecipe) -> dict[str, Any]:
    """The first row of a source, with the errors of `open_table`."""
    with reading(recipe):
        row = table[0] if isinstance(table, Dataset) else next(rows_of(table), None)
    if row is None:
        raise ValueError(_empty(recipe))
    return row


@contextmanager
def reading(recipe: SourceRecipe) -> Iterator[None]:
    """Errors of `datasets` and of the files become a ValueError that names the source."""
    try:
        yield
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        if str(error).startswith(_name(recipe)):
            raise
        reason = (str(error.__cause__ or error).strip() or repr(error)).splitlines()[0]
        if "corresponds to no data" in reason:
            raise ValueError(_empty(recipe)) from error
        raise ValueError(f"{_name(recipe)}.path {recipe.path} cannot be read: {reason}") from error


def _empty(recipe: SourceRecipe) -> str:
    split = f" in split {recipe.split!r}" if has_splits(recipe.path) else ""
    return f"{_name(recipe)} is empty: {recipe.path} has no rows{split}. Correct the path, or leave this source out"


def open_images(recipe: SourceRecipe) -> "ImageTable | ImageFolder":
    """Where the images of a source's rows are found."""
    where = f"{_name(recipe)}.images"
    if recipe.images is None or os.path.isdir(recipe.images):
        return ImageFolder(recipe.images)
    if not any(character in recipe.images for character in "*?[") and not os.path.exists(recipe.images):
        raise FileNotFoundError(
            f"{where} is {recipe.images!r}, which is not there; give a folder, or a table of images"
        )
    with reading(recipe):
        table = _undecoded(_open(recipe.images, where))
    return ImageTable(table, recipe, where)


class ImageFolder:
    """Images by their name below a folder; names are used as they are if there is no folder."""

    def __init__(self, folder: str | None):
        self.folder = folder

    def __call__(self, reference: Any) -> bytes | str:
        reference = _content(reference)
        if isinstance(reference, bytes):
            return reference
        if ADDRESS.match(reference):
            raise MalformedRowError(
                f"its image is an address ({reference[:100]}), which training does not fetch; download it first"
            )
        path = reference if self.folder is None else os.path.join(self.folder, reference)
        if not os.path.isfile(path):
            raise MalformedRowError(f"its image {path!r} is not there")
        return path


class ImageTable:
    """Images by an id, from a table beside the questions or captions."""

    def __init__(self, table: Dataset, recipe: SourceRecipe, where: str):
        self.where = where
        self.id_column = recipe.columns.get("image_id", "image_id")
        self.image_column = recipe.columns.get("image", "image")
        for column in (self.id_column, self.image_column):
            if column not in table.column_names:
                raise ValueError(
                    f"{where} has no column {column!r}; it has {', '.join(table.column_names)}. Name the ones for the "
                    f"id and the image in columns: {{image_id: ..., image: ...}} of the source"
                )
        self.images = table.select_columns([self.image_column])
        self.rows: dict[str, int] = {}
        for row, one in enumerate(table[self.id_column]):
            self.rows.setdefault(str(one), row)

    def __call__(self, reference: Any) -> bytes | str:
        row = self.rows.get(str(reference))
        if row is None:
            raise MalformedRowError(f"{self.where} has no image {str(reference)[:100]!r}")
        return ImageFolder(None)(self.images[row][self.image_column])


def rows_of(stream: IterableDataset) -> Iterator[dict[str, Any]]:
    """The rows of a stream, all of them.

    Iterating over the stream itself would give each worker of a DataLoader a part, which here is done for positions.
    """
    for batch in stream.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def _name(recipe: SourceRecipe) -> str:
    return f"data.sources[{recipe.name!r}]"


def _content(image: Any) -> bytes | str:
    if isinstance(image, dict):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    if isinstance(image, (bytearray, memoryview)):
        image = bytes(image)
    if not isinstance(image, (bytes, str)) or not image:
        raise MalformedRowError(f"its image is {type(image).__name__}; bytes or a name are needed")
    return image


def _open(path: str, where: str, recipe: SourceRecipe | None = None) -> Dataset | IterableDataset:
    """Any path by the right builder of `datasets`; without a recipe as a table."""
    streaming = recipe is not None and recipe.streaming
    split = recipe.split if recipe is not None else "train"
    folder = Path(path)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        table = _split(datasets.load_from_disk(path), split, where)
        return table.to_iterable_dataset() if streaming else table
    if folder.is_dir():
        return _load(path, split, streaming)
    builder = _builder(path)
    if builder is not None:
        files: str | list[str] = path
        if not ADDRESS.match(path):
            files = sorted(glob.glob(path, recursive=True))
            if not files:
                raise FileNotFoundError(f"{where}.path is {path!r}, where no file is; correct the path")
            if recipe is not None and not any(map(os.path.getsize, files)):
                raise ValueError(_empty(recipe))
        options = {"sep": "\t"} if ".tsv" in path else {}
        if recipe is not None and ".jsonl" in path.lower():
            builder = "text"  # rows may differ in their columns' types; each line is parsed when it is used
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=streaming, **options)
    if not HUB_ID.fullmatch(path):
        raise FileNotFoundError(
            f"{where}.path is {path!r}, which is no file or folder and no Hub id (owner/name); files end in "
            f"{', '.join(BUILDERS)}, a folder holds such files or was saved by datasets"
        )
    return _load(path, split, streaming, recipe)


def _numbered_rows(recipe: SourceRecipe) -> Dataset | None:
    """The rows of SugarCrepe's own files, `{"0": {"filename", "caption", "negative_caption"}, ...}` for each sort; the
    file's name is the sort. None where the path holds something else."""
    if recipe.format != "sugarcrepe":
        return None
    folder = Path(recipe.path)
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [Path(p) for p in sorted(glob.glob(recipe.path))]
    if not files or any(file.suffix != ".json" for file in files):
        return None
    rows = []
    for file in files:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not all(isinstance(row, dict) for row in values.values()):
            return None
        rows += [{"id": f"{file.stem}/{key}", "category": file.stem, **row} for key, row in values.items()]
    return Dataset.from_list(rows)


def _load(path: str, split: str, streaming: bool, recipe: SourceRecipe | None = None) -> Any:
    name, revision = (None, None) if recipe is None else (recipe.subset, recipe.revision)
    return datasets.load_dataset(path, name=name, split=split, revision=revision, streaming=streaming)


def _split(table: Dataset | DatasetDict, split: str, where: str) -> Dataset:
    if isinstance(table, Dataset):
        return table
    if split not in table:
        raise ValueError(f"{where}.split is {split!r}; {', '.join(table)} are there")
    return table[split]


def has_splits(path: str) -> bool:
    """Whether `split` of a source counts: of a folder or a data set of the Hub, not of files that are named."""
    return _builder(path) is None


def _builder(path: str) -> str | None:
    ending = path.lower()
    for compressed in COMPRESSED:
        ending = ending.removesuffix(compressed)
    return BUILDERS.get(os.path.splitext(ending)[1])


def _undecoded(table: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Image columns as bytes and paths: a picture is decoded when it is used, and its errors are our own."""
    for name, feature in (table.features or {}).items():
        undecoded = _without_decoding(feature)
        if undecoded != feature:
            table = table.cast_column(name, undecoded)
    return table


def _without_decoding(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return type(feature)(_without_decoding(feature.feature), **_length(feature))
    if isinstance(feature, dict):
        return {name: _without_decoding(inner) for name, inner in feature.items()}
    return feature


def _length(feature: Any) -> dict[str, int]:
    return {"length": feature.length} if hasattr(feature, "length") else {}
