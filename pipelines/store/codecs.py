"""How summary tokens are written: two bytes a number, one, or half of one. Pure functions on arrays.

A token is written by itself, scales first, so the first j tokens of a row are its first j * `token_bytes` bytes. Of a
number x, in a group (a token in int8, 32 numbers of a token in int4) whose largest magnitude is m, what comes back
differs from x by at most:

| codec | bound |
|---|---|
| fp16 | 0 for what fits float16 exactly; otherwise |x| * 2^-11 + 2^-25 |
| int8 | m / 254 * (1 + 2^-10) + 2^-25 |
| int4 | m / 14 * (1 + 2^-10) + 2^-25 |

The terms in 2^-10 and 2^-25 are the rounding of the scales, which are float16 and never below m / 127 or m / 7.
"""

import numpy as np

LEVELS = {"int8": 127, "int4": 7}  # codes go from -levels to levels
INT4_GROUP = 32
CODECS = ("fp16", "int8", "int4")
LARGEST = float(np.finfo(np.float16).max)


def check_codec(codec: str) -> str:
    """Return `codec`, or raise `ValueError` for one that is unknown."""
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r} is unknown; choose one of {', '.join(map(repr, CODECS))}.")
    return codec


def token_bytes(codec: str, width: int) -> int:
    """Bytes of one token of `width` numbers."""
    if check_codec(codec) == "fp16":
        return 2 * width
    codes = width if codec == "int8" else (width + 1) // 2
    return 2 * _num_groups(codec, width) + codes


def encode(tokens: np.ndarray, codec: str) -> np.ndarray:
    """Summary tokens `(N, k, d)` to `(N, k * token_bytes)` uint8.

    Raises:
        ValueError: for NaN, infinity or a number that float16 cannot hold.
    """
    tokens = np.asarray(tokens, dtype=np.float32)
    if np.isnan(tokens).any():
        raise ValueError("The summary holds NaN. Compress the picture anew in float32.")
    largest = np.abs(tokens).max(initial=0)
    if largest > LARGEST:
        raise ValueError(
            f"A summary value of {largest:.4g} does not fit the store (largest {LARGEST:.0f}). The model's summaries "
            "are out of the usual range."
        )
    num_rows, _, width = tokens.shape
    if check_codec(codec) == "fp16":
        return tokens.astype("<f2").view(np.uint8).reshape(num_rows, -1)
    groups = _in_groups(tokens, codec)  # (N, k, G, size)
    scales = _scales(np.abs(groups).max(-1), LEVELS[codec])  # (N, k, G)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[..., None]
    codes = np.rint(groups / divisors).astype(np.int8)
    codes = codes.reshape(*codes.shape[:2], -1)[:, :, :width]  # (N, k, d)
    if codec == "int4":
        codes = _pack(codes)
    parts = [scales.astype("<f2").view(np.uint8), codes.view(np.uint8)]
    return np.concatenate(parts, axis=-1).reshape(num_rows, -1)


def decode(codes: np.ndarray, codec: str, width: int) -> np.ndarray:
    """What `encode` made, `(N, k * token_bytes)` uint8, to tokens `(N, k, d)` float32."""
    num_rows = len(codes)
    codes = np.ascontiguousarray(codes).reshape(num_rows, -1, token_bytes(codec, width))
    if codec == "fp16":
        return codes.view("<f2").astype(np.float32)
    num_groups = _num_groups(codec, width)
    scales = np.ascontiguousarray(codes[:, :, : 2 * num_groups]).view("<f2").astype(np.float32)  # (N, k, G)
    numbers = np.ascontiguousarray(codes[:, :, 2 * num_groups :])
    numbers = numbers.view(np.int8) if codec == "int8" else _unpack(numbers)[:, :, :width]
    groups = _in_groups(numbers.astype(np.float32), codec)
    return (groups * scales[..., None]).reshape(*scales.shape[:2], -1)[:, :, :width]


def error_bound(tokens: np.ndarray, codec: str) -> np.ndarray:
    """The bound of the table above for each number of `(N, k, d)`."""
    tokens = np.asarray(tokens, dtype=np.float64)
    if check_codec(codec) == "fp16":
        return np.abs(tokens) * 2.0**-11 + 2.0**-25
    groups = np.abs(_in_groups(tokens, codec))
    bound = groups.max(-1, keepdims=True) / (2 * LEVELS[codec]) * (1 + 2.0**-10) + 2.0**-25
    return np.broadcast_to(bound, groups.shape).reshape(*tokens.shape[:2], -1)[:, :, : tokens.shape[-1]]


def _group_size(codec: str, width: int) -> int:
    return width if codec == "int8" else INT4_GROUP


def _num_groups(codec: str, width: int) -> int:
    return -(-width // _group_size(codec, width))


def _in_groups(values: np.ndarray, codec: str) -> np.ndarray:
    """`(N, k, d)` -> `(N, k, G, size)`, the last group filled up with zeros."""
    num_rows, k, width = values.shape
    num_groups, size = _num_groups(codec, width), _group_size(codec, width)
    values = np.pad(values, ((0, 0), (0, 0), (0, num_groups * size - width)))
    return values.reshape(num_rows, k, num_groups, size)


def _scales(largest: np.ndarray, levels: int) -> np.ndarray:
    """The smallest float16 scales at which no code is beyond `levels`."""
    exact = largest / np.float32(levels)
    scales = exact.astype(np.float16)
    return np.where(scales.astype(np.float32) < exact, np.nextafter(scales, np.float16(np.inf)), scales)


def _pack(codes: np.ndarray) -> np.ndarray:
    """int8 codes -8..7 `(N, k, d)` -> `(N, k, ceil(d / 2))` uint8: the first of two numbers in the lower half."""
    codes = np.pad(codes, ((0, 0), (0, 0), (0, codes.shape[-1] % 2))).view(np.uint8) & 15
    return codes[:, :, ::2] | (codes[:, :, 1::2] << 4)


def _unpack(packed: np.ndarray) -> np.ndarray:
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1).astype(np.int8)
    return np.where(both > 7, both - 16, both)
