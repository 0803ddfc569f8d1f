"""Codecs: what comes back is within the documented bound, and what cannot be written is an error."""

import numpy as np
import pytest

from fwd2bot.pipelines.store.codecs import CODECS, decode, encode, error_bound, token_bytes

SHAPES = [(1, 1, 1), (3, 2, 31), (2, 4, 32), (2, 3, 33), (1, 2, 7), (5, 1, 192)]
KINDS = ["normal", "tiny", "huge", "one large", "zeros", "subnormal"]


def drawn(shape, kind, seed=0):
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape).astype(np.float32)
    if kind == "one large":
        values[..., 0] = 1000
    factor = {"tiny": 1e-6, "huge": 10_000, "zeros": 0, "subnormal": 1e-9}.get(kind, 1)
    return np.clip(values * np.float32(factor), -65504, 65504)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_its_bound(codec, kind, shape):
    for seed in range(5):
        tokens = drawn(shape, kind, seed)
        back = decode(encode(tokens, codec), codec, shape[-1])
        assert back.shape == shape and back.dtype == np.float32
        assert (np.abs(back.astype(np.float64) - tokens) <= error_bound(tokens, codec)).all()


def test_fp16_input_comes_back_exactly_from_fp16():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    tokens = every[np.isfinite(every)].reshape(1, 16, -1)
    assert (decode(encode(tokens, "fp16"), "fp16", tokens.shape[-1]) == tokens).all()


@pytest.mark.parametrize("codec", CODECS)
def test_row_takes_the_documented_bytes(codec):
    codes = encode(drawn((3, 4, 192), "normal"), codec)
    assert codes.dtype == np.uint8 and codes.shape == (3, 4 * token_bytes(codec, 192))
    assert token_bytes(codec, 192) == {"fp16": 384, "int8": 194, "int4": 108}[codec]


@pytest.mark.parametrize("codec", CODECS)
def test_first_bytes_of_a_row_are_its_first_tokens(codec):
    tokens = drawn((2, 4, 33), "normal")
    size = token_bytes(codec, 33)
    assert (encode(tokens, codec)[:, : 2 * size] == encode(tokens[:, :2], codec)).all()


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_largest_number_of_a_group_comes_back_at_full_scale(codec):
    tokens = np.zeros((1, 1, 32), np.float32)
    tokens[0, 0, 3], tokens[0, 0, 4] = 2.0, -2.0
    back = decode(encode(tokens, codec), codec, 32)
    assert back[0, 0, 3] == -back[0, 0, 4] == pytest.approx(2.0, rel=1e-3)
    assert (back[0, 0, 5:] == 0).all()


def test_int4_has_a_scale_for_each_32_numbers():
    tokens = np.concatenate([np.full((1, 1, 32), 1000.0), np.full((1, 1, 32), 0.001)], -1)
    assert decode(encode(tokens, "int4"), "int4", 64)[0, 0, 40] == pytest.approx(0.001, rel=1e-3)
    assert decode(encode(tokens, "int8"), "int8", 64)[0, 0, 40] == 0


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, "does not fit"), (70_000, "does not fit")])
def test_what_cannot_be_written_is_an_error(codec, value, message):
    tokens = drawn((1, 1, 8), "normal")
    tokens[0, 0, 5] = value
    with pytest.raises(ValueError, match=message):
        encode(tokens, codec)


def test_unknown_codec_is_an_error_that_names_all():
    with pytest.raises(ValueError, match="codec='int2' is unknown; choose one of 'fp16', 'int8', 'int4'"):
        encode(np.zeros((1, 1, 1)), "int2")
