"""mteb's own evaluation on tiny local tasks, with a tiny random model."""

import shutil

import pytest
import tiny
import torch
from datasets import Dataset, Features, Image, Value

mteb = pytest.importorskip("mteb", reason="needs the extra mteb")

from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification  # noqa: E402
from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from fwd2bot.training.metrics import recall_at_k  # noqa: E402
from fwd2bot.training.mteb_model import Fwd2BotEncoder, model_meta  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
CAPTIONS = ["a red dog", "two cats in a row", "no", "a boat", "seven tall trees", "an owl"]


def with_pictures(columns):
    features = Features({name: Value("string") for name in columns} | {"image": Image()})
    return Dataset.from_dict(columns | {"image": tiny.pictures(len(CAPTIONS))}, features=features)


def metadata(name, kind, category, score):
    return TaskMetadata(
        name=name,
        dataset={"path": "local", "revision": "0"},
        description="Made here.",
        type=kind,
        category=category,
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
    )


class Captions(AbsTaskRetrieval):
    """Each caption looks for one of six pictures; no data is downloaded."""

    metadata = metadata("LocalCaptionsT2I", "Any2AnyRetrieval", "t2i", "ndcg_at_10")
    sides = ("queries", "corpus")  # that the captions and the pictures are on

    def load_data(self, **kwargs):
        ids = [str(number) for number in range(len(CAPTIONS))]
        both = (Dataset.from_dict({"id": ids, "text": CAPTIONS}), with_pictures({"id": ids}))
        relevant = {one: {one: 1} for one in ids}
        split = dict(zip(self.sides, both, strict=True)) | {"relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Pictures(Captions):
    """Each of six pictures looks for its caption."""

    metadata = metadata("LocalCaptionsI2T", "Any2AnyRetrieval", "i2t", "ndcg_at_10")
    sides = ("corpus", "queries")


class Crepe(AbsTaskImageTextPairClassification):
    """A picture, its true caption and a false one, as SugarCrepe has them."""

    metadata = metadata("LocalCrepe", "Compositionality", "i2t", "text_acc")
    texts_column_names = ("caption", "negative_caption")

    def load_data(self, **kwargs):
        rows = with_pictures({"caption": CAPTIONS, "negative_caption": CAPTIONS[1:] + CAPTIONS[:1]})
        self.dataset = {"test": rows}
        self.data_loaded = True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.tiny_fwd2bot().save_pretrained(folder)
    tiny.tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return Fwd2BotEncoder(str(checkpoint), num_summary_tokens=2, device="cpu")


def scores(encoder, k):
    model, processor = encoder.model, encoder.processor
    images = model.embed(**processor.process_images(tiny.pictures(len(CAPTIONS))), num_summary_tokens=k)
    return model.embed(**processor.process_texts(CAPTIONS), num_summary_tokens=k) @ images.T  # (captions, pictures)


def run(encoder, task, size):
    results = mteb.evaluate(
        encoder, task, encode_kwargs={"batch_size": size}, cache=None, show_progress_bar=False, co2_tracker=False
    )
    return results.task_results[0].scores["test"][0]


@pytest.mark.parametrize(("task", "batch_size"), [(Captions, 2), (Captions, 6), (Pictures, 4)])
def test_retrieval_of_mteb_finds_what_the_embeddings_find(encoder, task, batch_size):
    found = run(encoder, task(), batch_size)
    ours = scores(encoder, 2)
    own = recall_at_k(ours if task is Captions else ours.T, torch.eye(6, dtype=torch.bool), (1, 5))
    assert found["recall_at_1"] == pytest.approx(own["recall@1"], abs=1e-5)
    assert found["recall_at_5"] == pytest.approx(own["recall@5"], abs=1e-5)


def test_compositionality_of_mteb_prefers_what_the_embeddings_prefer(encoder):
    found = run(encoder, Crepe(), 4)
    ours = scores(encoder, 2)
    rows = torch.arange(6)
    assert found["text_acc"] == pytest.approx((ours[rows, rows] > ours[(rows + 1) % 6, rows]).float().mean().item())


def test_results_of_each_length_and_of_each_checkpoint_are_kept_apart(checkpoint, encoder):
    meta = encoder.mteb_model_meta
    other = Fwd2BotEncoder(str(checkpoint), num_summary_tokens=4, device="cpu").mteb_model_meta
    assert meta.name == other.name and meta.name.startswith("fwd2bot/checkpoint")
    assert meta.experiment_name != other.experiment_name
    assert len(meta.revision) == 64 and str(checkpoint.parent) not in meta.to_dict().__repr__()


def test_a_row_of_both_is_the_sum_and_one_of_neither_is_refused(encoder):
    [picture], text = tiny.pictures(1), "a boat"
    image, words, both = (
        encoder.encode([batch])
        for batch in ({"image": [picture]}, {"text": [text]}, {"image": [picture], "text": [text]})
    )
    assert torch.allclose(both, torch.nn.functional.normalize(image + words), atol=1e-6)
    with pytest.raises(ValueError, match=r"Row\(s\) \[1\] of a batch have neither"):
        encoder.encode([{"image": [picture, None]}])


def test_a_length_that_the_model_does_not_have_is_refused(checkpoint):
    with pytest.raises(ValueError, match="num_summary_tokens"):
        Fwd2BotEncoder(str(checkpoint), num_summary_tokens=9, device="cpu")


def test_a_dtype_that_there_is_not_is_refused(checkpoint):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'fp16'"):
        Fwd2BotEncoder(str(checkpoint), dtype="fp16", device="cpu")


def test_results_of_each_dtype_and_of_each_commit_of_a_hub_id_are_kept_apart(checkpoint, encoder):
    half = Fwd2BotEncoder(str(checkpoint), num_summary_tokens=2, dtype="bfloat16", device="cpu").mteb_model_meta
    assert half.experiment_name != encoder.mteb_model_meta.experiment_name


def test_revision_of_a_hub_id_is_the_commit_that_was_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "a" * 40
    repo = tmp_path / "models--owner--name"
    shutil.copytree(checkpoint, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    for revision in (None, "main", commit):
        assert model_meta("owner/name", revision, tiny.tiny_fwd2bot(), 2).revision == commit
