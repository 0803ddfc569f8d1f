"""`Fwd2BotSummary`: the compressed images themselves, with what made them, in memory and on disk."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as serialize

FORMAT = "fwd2bot-summary"
FORMAT_VERSION = "1"
METADATA_KEYS = ("model", "revision", "fingerprint", "prompt", "dtype")


class Fwd2BotSummary:
    """The summaries of N images: a padded tensor, the length of each, and a record of what made them.

    Args:
        tokens: `(N, k_max, d)` floating point; vectors beyond a summary's length are set to zero.
        lengths: `(N,)` integers in 1..k_max. Default: k_max for all.
        metadata: what made it: `model` (id or path), `revision`, `fingerprint` (hash of the trained weights),
            `prompt`, `dtype`. What is not known is `None`; the length k is in `lengths`, image by image. A model
            refuses a summary of another fingerprint or prompt.

    Raises:
        TypeError, ValueError: for a tensor of the wrong type, number of dimensions or size, or for no summary at all.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        lengths: torch.Tensor | Sequence[int] | None = None,
        metadata: dict[str, str | None] | None = None,
    ):
        _check_floating(tokens)
        if tokens.ndim != 3 or 0 in tokens.shape:
            raise ValueError(
                f"Summary tokens must have shape (N, k, d) with no empty dimension, got {tuple(tokens.shape)}."
            )
        num_images, k_max, _ = tokens.shape
        if lengths is None:
            lengths = torch.full((num_images,), k_max, device=tokens.device)
            shortest = longest = k_max
        else:
            lengths = torch.as_tensor(lengths, dtype=torch.long, device=tokens.device).clone()
            shortest, longest = read_range(lengths) if lengths.numel() else (0, 0)
        if lengths.shape != (num_images,) or shortest < 1 or longest > k_max:
            raise ValueError(
                f"lengths must hold {num_images} integers in 1..{k_max} for tokens of shape {tuple(tokens.shape)}, "
                f"got {lengths.tolist()}."
            )
        unknown = sorted(set(metadata or {}) - set(METADATA_KEYS))
        if unknown:
            raise ValueError(f"Unknown summary metadata {unknown}; allowed: {list(METADATA_KEYS)}.")
        self._tokens = tokens
        self._lengths = lengths
        self._shortest, self._longest = shortest, longest  # on the host, where they are asked for
        if shortest < k_max:
            self._tokens = tokens.masked_fill(~self.mask[:, :, None], 0)
        self.metadata = {key: (metadata or {}).get(key) for key in METADATA_KEYS}

    @property
    def tokens(self) -> torch.Tensor:
        """`(N, k_max, d)`. Others may take their place, of the same shape: quantised ones, for example."""
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: torch.Tensor) -> None:
        _check_floating(tokens)
        if tokens.shape != self._tokens.shape:
            raise ValueError(
                f"Summary tokens of shape {tuple(self._tokens.shape)} cannot be replaced by some of shape "
                f"{tuple(tokens.shape)}. Make a new summary: Fwd2BotSummary(tokens, lengths, metadata)."
            )
        checked = Fwd2BotSummary(tokens, self._known_lengths)  # zeros beyond the lengths, on one device
        self._tokens, self._lengths = checked.tokens, checked.lengths

    @property
    def lengths(self) -> torch.Tensor:
        """A copy, `(N,)` long, on the device of the tokens; other lengths make another summary (`truncate`)."""
        return self._lengths.clone()

    @property
    def _known_lengths(self) -> torch.Tensor | None:
        """The lengths, or None where all are that of the tensor: then nobody has to read them."""
        return None if self._shortest == self.tokens.shape[1] else self._lengths

    @property
    def num_summary_tokens(self) -> int:
        """The largest length in the batch."""
        return self._longest

    @property
    def min_summary_tokens(self) -> int:
        """The smallest length in the batch."""
        return self._shortest

    @property
    def nbytes(self) -> int:
        """Bytes of the summary vectors alone, without padding."""
        return int(self.lengths.sum()) * self.tokens.shape[-1] * self.tokens.element_size()

    @property
    def mask(self) -> torch.Tensor:
        """`(N, k_max)` bool, true where a vector belongs to the summary."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self._lengths[:, None]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> "Fwd2BotSummary":
        """The summaries at `index`, always as a batch: `summary[3]` has length 1.

        Raises:
            IndexError: for one that does not exist, or none at all. TypeError: for another sort of index.
        """
        if hasattr(index, "__index__") and getattr(index, "ndim", 0) == 0:  # int, numpy integer, tensor of one
            index = int(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"Summary {index} does not exist: there are {len(self)}.")
            index = [index]
        elif isinstance(index, slice):
            index = index if (index.step or 1) > 0 else list(range(len(self))[index])
        else:
            index = _as_index(index, self.tokens.device)
        tokens = self.tokens[index]
        if len(tokens) == 0:
            raise IndexError(f"{index!r} selects none of the {len(self)} summaries.")
        if self._known_lengths is None:
            return Fwd2BotSummary(tokens, metadata=self.metadata)
        lengths = self._lengths[index]
        _, longest = read_range(lengths)
        return Fwd2BotSummary(tokens[:, :longest], lengths, self.metadata)

    def __iter__(self) -> Iterator["Fwd2BotSummary"]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"Fwd2BotSummary(images={len(self)}, lengths={sorted(set(self.lengths.tolist()))}, "
            f"width={self.tokens.shape[-1]}, dtype={self.tokens.dtype}, model={self.metadata['model']!r})"
        )

    def truncate(self, num_summary_tokens: int) -> "Fwd2BotSummary":
        """The first `num_summary_tokens` vectors of every summary: what compressing at that length gives.

        Raises:
            ValueError: when a summary is shorter than that. TypeError: for what is no whole number.
        """
        if isinstance(num_summary_tokens, bool) or not hasattr(num_summary_tokens, "__index__"):
            raise TypeError(f"num_summary_tokens must be a whole number, got {num_summary_tokens!r}.")
        if not 1 <= num_summary_tokens <= self.min_summary_tokens:
            raise ValueError(
                f"Cannot truncate to {num_summary_tokens}: choose 1 to {self.min_summary_tokens}, the shortest "
                "summary of this batch."
            )
        return Fwd2BotSummary(self.tokens[:, :num_summary_tokens], metadata=self.metadata)

    def to(self, *args: Any, **kwargs: Any) -> "Fwd2BotSummary":
        """Like `torch.Tensor.to`; a cast that overflows (float32 to float16) is an error, not an infinity."""
        tokens = self.tokens.to(*args, **kwargs)
        if tokens is self.tokens:
            return self
        if tokens.dtype != self.tokens.dtype and all_finite(self.tokens) and not all_finite(tokens):
            raise ValueError(
                f"A summary value of {self.tokens.abs().max().item():.4g} does not fit {tokens.dtype} "
                f"(largest {torch.finfo(tokens.dtype).max:.4g}). Keep it in {self.tokens.dtype} or torch.bfloat16."
            )
        return Fwd2BotSummary(tokens, self._known_lengths, self.metadata)

    @staticmethod
    def cat(summaries: Sequence["Fwd2BotSummary"]) -> "Fwd2BotSummary":
        """One batch out of several, padded to the longest.

        Raises:
            ValueError: for an empty list, or when the parts differ in what made them, in width or in dtype.
        """
        summaries = [summary_from(summary) for summary in summaries]
        if not summaries:
            raise ValueError("Fwd2BotSummary.cat needs at least one summary, got an empty list.")
        first = summaries[0]
        for other in summaries[1:]:
            if (other.tokens.shape[-1], other.tokens.dtype) != (first.tokens.shape[-1], first.tokens.dtype):
                raise ValueError(
                    "Summaries of different width or dtype cannot be joined: "
                    f"{first.tokens.shape[-1]} {first.tokens.dtype} and {other.tokens.shape[-1]} {other.tokens.dtype}."
                )
            if (other.metadata["fingerprint"], other.metadata["prompt"]) != (
                first.metadata["fingerprint"],
                first.metadata["prompt"],
            ):
                raise ValueError(
                    "Summaries of different models or prompts cannot be joined: "
                    f"{first.metadata} and {other.metadata}."
                )
        width = max(summary.tokens.shape[1] for summary in summaries)
        tokens = [F.pad(summary.tokens, (0, 0, 0, width - summary.tokens.shape[1])) for summary in summaries]
        if all(summary._shortest == width for summary in summaries):
            return Fwd2BotSummary(torch.cat(tokens), metadata=first.metadata)
        lengths = torch.cat([summary._lengths for summary in summaries])
        return Fwd2BotSummary(torch.cat(tokens), lengths, first.metadata)

    def save_file(self, path: str | os.PathLike) -> None:
        """Write one safetensors file. A file that exists is replaced at once or not at all.

        Raises:
            ValueError: for NaN or infinity. OSError: for a path that cannot be written.
        """
        path = Path(path)
        if not all_finite(self.tokens):
            raise ValueError(
                "The summary holds NaN or infinity and was not saved. Compress the images anew in float32."
            )
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "made_by": json.dumps(self.metadata)}
        tensors = {"tokens": self.tokens.detach().cpu().contiguous(), "lengths": self.lengths.cpu()}
        temporary = path.with_name(f".{path.name}.{uuid4().hex}")
        try:
            temporary.write_bytes(serialize(tensors, metadata=header))
            os.replace(temporary, path)
        except OSError as error:
            reason = f"The summary was not saved ({error.strerror}). Choose a path in a folder that can be written to"
            raise OSError(error.errno, reason, os.fspath(path)) from error
        finally:
            with suppress(OSError):  # it is gone when all went well
                temporary.unlink()

    @staticmethod
    def load_file(path: str | os.PathLike) -> "Fwd2BotSummary":
        """Read what `save_file` wrote.

        Raises:
            ValueError: when the file is no summary file, damaged, or of a newer format. OSError: when it is not there.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist or is no file.")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") == FORMAT and header.get("format_version") == FORMAT_VERSION:
                    made_by = json.loads(header["made_by"])
                    return Fwd2BotSummary(file.get_tensor("tokens"), file.get_tensor("lengths"), made_by)
        except OSError:
            raise
        except Exception as error:  # safetensors raises its own type for a damaged file
            raise ValueError(f"{path} cannot be read as a summary file: {error}") from error
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} holds no summary: its format is {header.get('format')!r}, not {FORMAT!r}.")
        raise ValueError(
            f"{path} has summary format {header.get('format_version')!r}; this version of fwd2bot reads "
            f"{FORMAT_VERSION!r}. Update fwd2bot."
        )


def _check_floating(tokens: Any) -> None:
    if not isinstance(tokens, torch.Tensor) or not tokens.is_floating_point():
        found = f"{tokens.dtype} tensor" if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise TypeError(f"Summary tokens must be a floating point tensor of shape (N, k, d), got a {found}.")


def _as_index(index: Any, device: torch.device) -> torch.Tensor:
    """Rows as a tensor of integers, or a mask of booleans."""
    try:
        rows = torch.as_tensor(index, device=device)
        rows = rows if rows.numel() else rows.long()
    except (TypeError, ValueError, RuntimeError):
        rows = None
    if rows is None or rows.is_floating_point() or rows.is_complex():
        raise TypeError(f"Summaries are chosen by an int, a slice, or a list or tensor of ints, got {index!r}.")
    return rows


def summary_from(value: Any) -> Fwd2BotSummary:
    """`value` as a summary: one already, of this module or of another copy of it, or a bare `(N, k, d)` tensor."""
    if type(value) is Fwd2BotSummary:
        return value
    if hasattr(value, "tokens") and hasattr(value, "lengths"):
        return Fwd2BotSummary(value.tokens, value.lengths, getattr(value, "metadata", None))
    return Fwd2BotSummary(value)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: seen from the smallest and the largest, which are NaN where any is."""
    return values.numel() == 0 or all(math.isfinite(value) for value in read_range(values.detach()))


def read_range(values: torch.Tensor) -> tuple[int | float, int | float]:
    """The smallest and the largest value, in one transfer: an accelerator is waited for once."""
    smallest, largest = torch.stack(values.aminmax()).tolist()
    return smallest, largest


def pool_summary(tokens: torch.Tensor, num_summary_tokens: int) -> torch.Tensor:
    """`(N, k_max, d)` -> `(N, d)` float32 of unit norm: the mean of the first k vectors (pooling is our choice)."""
    return F.normalize(tokens[:, :num_summary_tokens].float().mean(1), dim=-1)
