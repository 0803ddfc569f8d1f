"""What `SummaryStore.add` takes, as a stream of items: folders, globs, parquet files, data sets, any iterable."""

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..pipeline_batches import is_picture, is_url
from .table import check_metadata_name

IMAGE = "image"  # the column of pictures
PARQUET = ".parquet"
MAX_FILE = 2**30  # bytes of a file that may be a picture; a larger one is not read
# Formats whose endings Pillow knows, but of which it writes alone, or reads with the programs of others.
NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}
END = object()


@dataclass
class Item:
    """One picture on its way into the store.

    Args:
        picture: what `processor.load_image` takes.
        source: where it came from: the absolute path of a file, a URL, a parquet file and row, or the name that a data
            set has for it.
        stamp: size and time of change of a file, `(None, None)` of a URL; None for what has no address of its own, so
            that only its content tells whether it is in the store.
        id: given by the user.
        hash: of the content, once it was read.
        number: its place among those of the call, from 0.
        replaces: ids of rows that the same file had with an older content.
        copies: those of equal content in the same batch, whose fate is that of this one.
        error: why it cannot be used.
    """

    picture: Any
    source: str | None = None
    stamp: tuple[int | None, int | None] | None = None
    id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    hash: str | None = None
    number: int = 0
    replaces: list[str] = field(default_factory=list)
    copies: list["Item"] = field(default_factory=list)
    is_update: bool = False
    error: str | None = None

    @property
    def key(self) -> str:
        """Its id in the store; known once it was read."""
        return self.hash[:32] if self.id is None else self.id

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.source or self.id or f"picture {self.number}"


def each_item(images: Any, ids: Any = None, metadata: Any = None) -> Iterator[Item]:
    """The pictures of `images`, one after the other, as they are read.

    Args:
        images, ids, metadata: see `SummaryStore.add`.

    Raises:
        FileNotFoundError: for a single path that is not there. TypeError: for what holds no pictures. ValueError: for
            a folder, glob or list without pictures, for ids or metadata of another number, or for a name of metadata
            that a column cannot have.
    """
    if isinstance(ids, str):
        ids = [ids]
    shared = metadata if isinstance(metadata, Mapping) else None
    per_item = None if shared is not None else metadata
    for what, values in (("ids", ids), ("metadata", per_item)):
        if isinstance(values, Sized) and _is_sized(images) and len(values) != len(images):
            raise ValueError(f"{len(images)} picture(s) came with {len(values)} {what}. Give one for each.")
    if isinstance(ids, (list, tuple)):
        twice = next((one for one, count in Counter(map(_checked_id, ids)).items() if count > 1), None)
        if twice is not None:
            raise ValueError(f"The id {twice!r} is given to several pictures. Give each one of its own.")
    streams = {"ids": ids, "metadata": per_item}
    ids, per_item = (repeat(None) if values is None else iter(values) for values in streams.values())
    count = 0
    for item in _single(images):
        given, own = next(ids, END), next(per_item, END)
        if given is END or own is END:
            raise ValueError(f"There are more pictures than {'ids' if given is END else 'metadata'}: {count}.")
        if given is not None:
            item.id = _checked_id(given)
        if not (own is None or isinstance(own, Mapping)):
            raise TypeError(f"The metadata of a picture must be a dict, got {type(own).__name__}.")
        item.metadata = {**item.metadata, **(shared or {}), **(own or {})}
        for name in item.metadata:
            check_metadata_name(name)
        item.number = count
        count += 1
        yield item
    if not count:
        raise ValueError("No picture was given: the list, data set or iterator is empty.")
    for (what, values), stream in zip(streams.items(), (ids, per_item), strict=True):
        if values is not None and next(stream, END) is not END:
            raise ValueError(f"There are only {count} picture(s), but more {what}. Give one for each.")


def summary_items(count: int, ids: Any, metadata: Any, sources: Any) -> list[Item]:
    """Items of summaries that were made elsewhere; see `SummaryStore.add_summary`.

    Raises:
        ValueError: for ids, metadata or sources of another number, or ids that are not all different.
    """
    shared = metadata if isinstance(metadata, Mapping) else {}
    columns = {
        "ids": [ids] if isinstance(ids, str) else list(ids),
        "metadata": [{}] * count if metadata is None or metadata is shared else list(metadata),
        "sources": [None] * count if sources is None else list(sources),
    }
    for what, values in columns.items():
        if len(values) != count:
            raise ValueError(f"{count} summaries came with {len(values)} {what}. Give one for each.")
    items = [
        Item(None, source=source, id=_checked_id(one), metadata={**shared, **own})
        for one, own, source in zip(*columns.values(), strict=True)
    ]
    if len({item.id for item in items}) != count:
        raise ValueError("The ids are not all different. Give each summary one of its own.")
    for name in (name for item in items for name in item.metadata):
        check_metadata_name(name)
    return items


def count_items(images: Any) -> int | None:
    """How many pictures there are, where that is known without going through them."""
    return len(images) if _is_sized(images) else 1 if is_picture(images) and not isinstance(images, str) else None


def read(item: Item, load_image: Any) -> Item:
    """Hash the content: of a file's bytes, or of size and pixels where there is no file; and decode the picture."""
    try:
        if isinstance(item.picture, (str, os.PathLike)) and not is_url(item.picture):
            if not os.path.isfile(item.picture):
                raise FileNotFoundError("it does not exist or is no file")
            size = os.path.getsize(item.picture)
            if not size:
                raise ValueError("the file is empty")
            if size > MAX_FILE:
                raise ValueError(f"it has {size:,} bytes, and a file may have {MAX_FILE:,} at most; make it smaller")
            item.picture = Path(item.picture).read_bytes()
        if isinstance(item.picture, (bytes, bytearray, memoryview)):
            item.hash = hash_bytes(item.picture)
            item.picture = load_image(item.picture, name="it")  # the report has its source
        else:
            item.picture = load_image(item.picture, name="it")
            item.hash = hash_pixels(item.picture)
    except (TypeError, ValueError, OSError) as error:
        item.picture, item.error = None, str(error)
    return item


def hash_bytes(content: bytes) -> str:
    """What tells equal files."""
    return hashlib.sha256(content).hexdigest()


def hash_pixels(picture: Image.Image) -> str:
    """What tells equal pictures that come without a file."""
    pixels = np.ascontiguousarray(picture)
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(pixels)
    return digest.hexdigest()


def _is_sized(images: Any) -> bool:
    return isinstance(images, Sized) and not is_picture(images)


def _single(images: Any) -> Iterator[Item]:
    """Like `_expand`, but a single path must lead to something."""
    if isinstance(images, (str, os.PathLike)) and not is_url(images):
        path = os.fspath(images)
        if isinstance(path, str) and glob.has_magic(path) and not os.path.lexists(path):
            found = False
            for name in sorted(glob.iglob(path, recursive=True)):
                if os.path.isfile(name):
                    found = True
                    yield from _expand(name)  # of several files one may be broken
            if not found:
                raise FileNotFoundError(f"No file fits the pattern {path!r}.")
            return
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path!r} does not exist. Give a picture, a folder, a glob or a parquet file.")
        if _is_parquet(images):
            yield from _parquet(os.path.abspath(path))
            return
    yield from _expand(images)


def _expand(images: Any) -> Iterator[Item]:
    if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
        yield from _folder(os.path.abspath(images))
    elif _is_parquet(images):
        yield from _shard(os.path.abspath(images))
    elif is_picture(images):
        yield _picture_item(images)
    elif isinstance(images, Mapping):
        yield _row_item(images)
    elif isinstance(images, (list, tuple)):
        for one in images:
            yield from _expand(one)
    else:
        for one in _rows(images):
            yield from _expand(one)


def _rows(images: Any) -> Iterable[Any]:
    """The rows of a data set or an iterable; a `datasets.Dataset` hands over its files as they are."""
    features = getattr(images, "features", None)
    if features is not None and type(features.get(IMAGE)).__name__ == "Image":
        return images.cast_column(IMAGE, type(features[IMAGE])(decode=False))
    if isinstance(images, Iterable):
        return images
    if hasattr(images, "__getitem__") and isinstance(images, Sized):
        return (images[index] for index in range(len(images)))  # many data sets raise no IndexError behind their end
    raise TypeError(
        "images must be a picture (path, URL, bytes, PIL.Image, uint8 array), a folder, a glob, a parquet file, a "
        f"data set, or an iterable of these, got {type(images).__name__}."
    )


def _folder(path: str) -> Iterator[Item]:
    """The pictures below a folder, by the endings of what Pillow reads; hidden ones are left out.

    Folders that cannot be read are items with an error.

    Without any, those in its parquet files. (Beside pictures, such files hold their captions as a rule.)
    """
    endings = {ending for ending, name in Image.registered_extensions().items() if name not in NO_PICTURES}
    found, shards, unreadable = False, [], []
    for folder, folders, files in os.walk(path, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if os.path.splitext(name)[1].lower() in endings:
                found = True
                yield _file_item(os.path.join(folder, name))
            elif name.endswith(PARQUET):
                shards.append(os.path.join(folder, name))
    for error in unreadable:
        yield Item(None, source=os.fsdecode(error.filename), error=f"The folder cannot be read: {error.strerror}.")
    if found:
        return
    if not shards and not unreadable:
        raise ValueError(
            f"The folder {path!r} holds no picture, nor do the folders in it: no file ends like one (.jpg, .png, "
            f"...), or with {PARQUET}."
        )
    for shard in shards:
        yield from _shard(shard)


def _is_parquet(images: Any) -> bool:
    return isinstance(images, (str, os.PathLike)) and os.fspath(images).endswith(PARQUET)


def _shard(path: str) -> Iterator[Item]:
    """The rows of one parquet file of several; what is wrong with it is an item with an error."""
    try:
        yield from _parquet(path)
    except (ValueError, OSError) as error:
        yield Item(None, source=path, error=str(error))


def _parquet(path: str) -> Iterator[Item]:
    try:
        with pq.ParquetFile(path) as file:
            image = _image_column(path, file.schema_arrow)
            rows = (row for batch in file.iter_batches(batch_size=32) for row in batch.to_pylist())
            for index, row in enumerate(rows):
                row[IMAGE] = row.pop(image)
                item = _row_item(row)
                item.source = f"{path}#{index}"
                yield item
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path!r} cannot be read as a parquet file: {error}") from error


def parquet_row(source: str) -> Item | None:
    """The picture of the row that a source `file.parquet#row` names; None for a source of another form.

    Raises:
        OSError, ValueError: for a file that is not there or cannot be read, or a row that it does not have.
    """
    path, _, number = source.rpartition("#")
    if not (path.endswith(PARQUET) and number.isdecimal()):
        return None
    row = int(number)
    with pq.ParquetFile(path) as file:
        image = _image_column(path, file.schema_arrow)
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                found = file.read_row_group(group, columns=[image])[image][row].as_py()
                return _row_item({IMAGE: found})
            row -= rows
    raise ValueError(f"{path!r} has no row {number}")


def _image_column(path: str, schema: pa.Schema) -> str:
    """The column of pictures."""
    names = [one.name for one in schema if _holds_pictures(one.type)]
    if IMAGE in schema.names:
        return IMAGE
    if len(names) != 1:
        raise ValueError(
            f"{path!r} has the columns {schema.names}, none called {IMAGE!r}, and {len(names)} that may hold "
            f"pictures. Call the column of pictures {IMAGE!r}."
        )
    return names[0]


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _row_item(row: Mapping[str, Any]) -> Item:
    """A row of a data set: "image" is the picture, "id" its id, other columns are metadata."""
    if IMAGE not in row:
        raise ValueError(f"A row has the columns {sorted(map(str, row))}, none of which is {IMAGE!r}. Rename one.")
    metadata = {name: value for name, value in row.items() if name not in (IMAGE, "id")}
    picture = row[IMAGE]
    if isinstance(picture, Mapping):  # datasets.Image without decoding
        content, path = picture.get("bytes"), picture.get("path")
        item = Item(content, source=path) if content is not None else _picture_item(path)
    else:
        item = _picture_item(picture)
    if row.get("id") is not None:
        item.id = _checked_id(row["id"])
    item.metadata = metadata
    return item


def _picture_item(picture: Any) -> Item:
    if is_url(picture):
        return Item(picture, source=picture, stamp=(None, None))
    if isinstance(picture, (str, os.PathLike)):
        return _file_item(os.path.abspath(picture))
    if not is_picture(picture):
        found = type(picture).__name__
        return Item(None, error=f"A picture must be a path, URL, bytes, PIL.Image or uint8 array, got {found}.")
    name = getattr(picture, "filename", None) or None  # of Pillow
    if name is not None and os.path.exists(name):
        name = os.path.abspath(os.fsdecode(name))
    return Item(picture, source=name)


def _file_item(path: str | bytes) -> Item:
    path = os.path.abspath(os.fsdecode(path))
    try:
        path.encode()
    except UnicodeEncodeError:
        name = os.fsencode(path).decode("utf-8", "replace")
        return Item(None, source=name, error="The name of the file is not UTF-8. Rename it.")
    try:
        found = os.stat(path)  # before it is read: a file that changes meanwhile is read anew the next time
    except (OSError, ValueError) as error:
        return Item(None, source=path, error=f"{getattr(error, 'strerror', None) or error}.")
    return Item(path, source=path, stamp=(found.st_size, found.st_mtime_ns))


def _checked_id(value: Any) -> str:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise ValueError(f"An id must be a str that is not empty, or an integer, got {value!r}.")
    return value
