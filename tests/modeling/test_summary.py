"""`Fwd2BotSummary`: a batch of summaries of different length, in memory and on disk."""

import json
import pickle
import re
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fwd2bot import Fwd2BotSummary
from fwd2bot.summary_fwd2bot import all_finite, pool_summary, summary_from

MADE_BY = {"model": "someone/model", "revision": "abc", "fingerprint": "0123", "prompt": "Sum.", "dtype": "float32"}


@pytest.fixture
def summary():
    """Lengths 2, 3 and 1, width 2; the vectors count up from 1."""
    tokens = torch.arange(1.0, 19.0).reshape(3, 3, 2)
    return Fwd2BotSummary(tokens, [2, 3, 1], MADE_BY)


def assert_equal(one: Fwd2BotSummary, other: Fwd2BotSummary):
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.lengths, other.lengths)
    assert one.metadata == other.metadata


# In memory


def test_vectors_beyond_the_length_are_zero(summary):
    assert summary.tokens.tolist() == [
        [[1, 2], [3, 4], [0, 0]],
        [[7, 8], [9, 10], [11, 12]],
        [[13, 14], [0, 0], [0, 0]],
    ]
    assert summary.mask.int().tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]


def test_zeroing_leaves_the_given_tensor_alone_and_lets_gradients_through():
    tokens = torch.ones(1, 2, 2, requires_grad=True)
    Fwd2BotSummary(torch.cat([tokens, tokens]), [1, 2]).tokens.sum().backward()
    assert tokens.detach().eq(1).all()
    assert tokens.grad.tolist() == [[[2, 2], [1, 1]]]


def test_sizes(summary):
    assert len(summary) == 3
    assert summary.num_summary_tokens == 3
    assert summary.nbytes == (2 + 3 + 1) * 2 * 4
    assert "images=3, lengths=[1, 2, 3], width=2" in repr(summary)


@pytest.mark.parametrize("index", [1, -2, np.int64(1), torch.tensor(1)])
def test_one_index_gives_a_batch_of_one(summary, index):
    assert summary[index].tokens.tolist() == [[[7, 8], [9, 10], [11, 12]]]
    assert summary[index].metadata == MADE_BY


@pytest.mark.parametrize(
    "index", [[2, 0], (2, 0), torch.tensor([2, 0]), np.array([2, 0]), slice(None, None, 2), [True, False, True]]
)
def test_several_indices_and_padding_cut_to_the_longest(summary, index):
    chosen = summary[index]
    assert sorted(chosen.lengths.tolist()) == [1, 2]
    assert chosen.tokens.shape == (2, 2, 2)


def test_iteration_gives_batches_of_one(summary):
    assert [one.tokens.shape for one in summary] == [(1, 2, 2), (1, 3, 2), (1, 1, 2)]


@pytest.mark.parametrize("index", [3, -4, slice(3, None), [], [3]])
def test_index_that_selects_nothing_is_an_error(summary, index):
    with pytest.raises(IndexError):
        summary[index]


def test_cat_of_the_parts_is_the_whole(summary):
    assert_equal(Fwd2BotSummary.cat(list(summary)), summary)
    assert_equal(Fwd2BotSummary.cat(iter([summary])), summary)


def test_cat_pads_to_the_longest(summary):
    joined = Fwd2BotSummary.cat([summary[2], summary[1]])
    assert joined.lengths.tolist() == [1, 3]
    assert joined.tokens[0].tolist() == [[13, 14], [0, 0], [0, 0]]


def test_cat_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one summary"):
        Fwd2BotSummary.cat([])


@pytest.mark.parametrize("key", ["fingerprint", "prompt"])
def test_cat_refuses_summaries_of_different_origin(summary, key):
    other = Fwd2BotSummary(summary.tokens, summary.lengths, {**MADE_BY, key: "other"})
    with pytest.raises(ValueError, match="different models or prompts.*other"):
        Fwd2BotSummary.cat([summary, other])


@pytest.mark.parametrize("tokens", [torch.ones(1, 1, 3), torch.ones(1, 1, 2, dtype=torch.float64)])
def test_cat_refuses_other_width_and_dtype(summary, tokens):
    with pytest.raises(ValueError, match="different width or dtype"):
        Fwd2BotSummary.cat([summary, Fwd2BotSummary(tokens, metadata=MADE_BY)])


def test_truncate_takes_the_first_vectors(summary):
    short = summary[:2].truncate(2)
    assert short.tokens.tolist() == [[[1, 2], [3, 4]], [[7, 8], [9, 10]]]
    assert short.lengths.tolist() == [2, 2]
    assert short.metadata == MADE_BY


@pytest.mark.parametrize("length", [0, 2, -1])
def test_truncate_out_of_range_names_the_range(summary, length):
    with pytest.raises(ValueError, match=f"Cannot truncate to {length}: choose 1 to 1"):
        summary.truncate(length)


def test_tokens_of_the_same_shape_may_take_the_place_of_others(summary):
    changed = summary[:]
    changed.tokens = torch.ones(3, 3, 2)
    assert_equal(changed, Fwd2BotSummary(torch.ones(3, 3, 2), summary.lengths, MADE_BY))  # zeros beyond the lengths


@pytest.mark.parametrize("shape", [(2, 3, 2), (4, 3, 2), (3, 2, 2), (3, 4, 2), (3, 3, 5), (9, 2)])
def test_tokens_of_another_shape_are_refused_with_both_shapes(summary, shape):
    expected = rf"shape \(3, 3, 2\) cannot be replaced by some of shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=expected):
        summary.tokens = torch.ones(shape)


def test_tokens_of_another_type_are_refused(summary):
    for tokens in (torch.ones(3, 3, 2, dtype=torch.long), [1.0], None):
        with pytest.raises(TypeError, match="must be a floating point tensor"):
            summary.tokens = tokens
    with pytest.raises(AttributeError, match="lengths"):
        summary.lengths = torch.tensor([1, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_casts_and_keeps_the_rest(summary, dtype):
    cast = summary.to(dtype)
    assert cast.tokens.dtype == dtype
    assert torch.equal(cast.tokens.float(), summary.tokens)
    assert torch.equal(cast.lengths, summary.lengths)
    assert cast.metadata == MADE_BY
    assert summary.to(device="cpu", dtype=dtype).tokens.dtype == dtype


def test_to_refuses_a_cast_that_overflows():
    summary = Fwd2BotSummary(torch.full((1, 1, 1), 70000.0))
    with pytest.raises(
        ValueError, match=r"value of 7e\+04 does not fit torch.float16 \(largest 6.55e\+04\).*bfloat16"
    ):
        summary.to(torch.float16)
    assert torch.isfinite(summary.to(torch.bfloat16).tokens).all()


def test_to_integers_is_refused(summary):
    with pytest.raises(TypeError, match="floating point tensor.*torch.int64"):
        summary.to(torch.int64)


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        ([[1.0]], TypeError, "got a list"),
        (torch.zeros(1, 1, 1, dtype=torch.int8), TypeError, "got a torch.int8 tensor"),
        (torch.zeros(2, 3), ValueError, r"shape \(N, k, d\).*got \(2, 3\)"),
        (torch.zeros(0, 2, 3), ValueError, r"no empty dimension, got \(0, 2, 3\)"),
    ],
)
def test_tokens_of_another_kind_are_refused(tokens, error, message):
    with pytest.raises(error, match=message):
        Fwd2BotSummary(tokens)


@pytest.mark.parametrize("index", ["a", ..., None, 1.5, [0.5], torch.tensor([0.0]), object()])
def test_what_is_no_index_is_named(summary, index):
    with pytest.raises(TypeError, match=r"chosen by an int, a slice, or a list or tensor of ints, got "):
        summary[index]


def test_slice_may_go_backwards(summary):
    assert_equal(summary[::-1], summary[[2, 1, 0]])
    assert_equal(summary[2:0:-1], summary[[2, 1]])
    with pytest.raises(IndexError, match="selects none of the 3"):
        summary[[]]


@pytest.mark.parametrize("length", ["2", 2.0, True, None])
def test_length_that_is_no_whole_number_is_named(summary, length):
    with pytest.raises(TypeError, match=f"num_summary_tokens must be a whole number, got {length!r}"):
        summary.truncate(length)


@pytest.mark.parametrize("lengths", [[1], [0, 1], [1, 4], [1, 2, 3]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match=r"2 integers in 1\.\.3"):
        Fwd2BotSummary(torch.zeros(2, 3, 1), lengths)


def test_unknown_metadata_is_refused():
    with pytest.raises(ValueError, match=r"\['author'\]; allowed: \['model'"):
        Fwd2BotSummary(torch.zeros(1, 1, 1), metadata={"author": "me"})


def test_summary_of_another_copy_of_the_class_is_taken_as_one(summary):
    class Other:
        tokens, lengths, metadata = summary.tokens, summary.lengths, summary.metadata

    assert_equal(summary_from(Other()), summary)


def test_pooling_is_the_normalised_mean_in_float32(summary):
    pooled = pool_summary(summary.tokens[:2].to(torch.bfloat16), 2)
    assert pooled.dtype == torch.float32
    expected = torch.tensor([[2.0, 3.0], [8.0, 9.0]])
    torch.testing.assert_close(pooled, expected / expected.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(dtype, value):
    values = torch.linspace(-3, 3, 66, dtype=dtype, requires_grad=True)
    assert all_finite(values) and all_finite(values[:0])
    for place in (0, 40, 65):
        assert not all_finite(values.detach().index_fill(0, torch.tensor([place]), value))


def test_pickle_round_trip(summary):
    assert_equal(pickle.loads(pickle.dumps(summary)), summary)


# On disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_file_gives_back_exactly_what_was_saved(summary, tmp_path, dtype):
    summary = summary.to(dtype)
    summary.save_file(tmp_path / "s.safetensors")
    assert_equal(Fwd2BotSummary.load_file(tmp_path / "s.safetensors"), summary)
    assert_equal(Fwd2BotSummary.load_file(str(tmp_path / "s.safetensors")), summary)


def test_file_is_plain_safetensors_with_its_origin_in_the_header(summary, tmp_path):
    summary.save_file(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"tokens", "lengths"}
        assert file.metadata()["format"] == "fwd2bot-summary"
        assert json.loads(file.metadata()["made_by"]) == MADE_BY


def test_saving_replaces_a_file_and_leaves_no_other(summary, tmp_path):
    path = tmp_path / "s.safetensors"
    path.write_text("old")
    summary.save_file(path)
    assert_equal(Fwd2BotSummary.load_file(path), summary)
    assert list(tmp_path.iterdir()) == [path]


def test_file_can_be_read_by_whom_the_umask_allows(summary, tmp_path):
    plain, path = tmp_path / "plain", tmp_path / "s.safetensors"
    plain.write_text("")
    summary.save_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_not_saved(summary, tmp_path, value):
    summary.tokens[1, 1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity and was not saved"):
        summary.save_file(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_saving_where_nothing_can_be_written_is_a_clear_error(summary, tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file" / "s.safetensors", tmp_path / "missing" / "s.safetensors"):
        with pytest.raises(OSError, match="summary was not saved .* Choose a path.*s.safetensors"):
            summary.save_file(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="summary was not saved .*folder"):
        summary.save_file(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "precious"


def test_failed_saving_keeps_the_old_file(summary, tmp_path, monkeypatch):
    path = tmp_path / "s.safetensors"
    summary.save_file(path)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fwd2bot.summary_fwd2bot.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        summary[0].save_file(path)
    assert_equal(Fwd2BotSummary.load_file(path), summary)
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"{path.name} does not exist or is no file"):
            Fwd2BotSummary.load_file(path)


def test_damaged_file_is_named(summary, tmp_path):
    path = tmp_path / "s.safetensors"
    summary.save_file(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:-3], whole[:30], b"hello, this is no summary file at all"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="s.safetensors cannot be read as a summary file"):
            Fwd2BotSummary.load_file(path)


@pytest.mark.parametrize(
    "tensors, header",
    [
        ({"tokens": torch.zeros(1, 1, 1)}, {"made_by": "{}"}),
        ({"tokens": torch.zeros(1, 1, 1), "lengths": torch.tensor([5])}, {"made_by": "{}"}),
        ({"tokens": torch.zeros(1, 1, 1), "lengths": torch.tensor([1])}, {"made_by": "{"}),
        ({"tokens": torch.zeros(1, 1, 1), "lengths": torch.tensor([1])}, {}),
    ],
)
def test_file_that_contradicts_itself_is_named(tmp_path, tensors, header):
    path = tmp_path / "s.safetensors"
    save_file(tensors, path, metadata={"format": "fwd2bot-summary", "format_version": "1", **header})
    with pytest.raises(ValueError, match="s.safetensors cannot be read as a summary file"):
        Fwd2BotSummary.load_file(path)


def test_file_of_another_format_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    save_file({"tokens": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no summary: its format is None, not 'fwd2bot-summary'"):
        Fwd2BotSummary.load_file(path)


def test_file_of_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    save_file({"tokens": torch.zeros(1)}, path, metadata={"format": "fwd2bot-summary", "format_version": "2"})
    with pytest.raises(ValueError, match="summary format '2'; this version of fwd2bot reads '1'. Update fwd2bot"):
        Fwd2BotSummary.load_file(path)
