"""The tasks without a model, from a folder, from a folder alone, and transformers' own image-text-to-text."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from PIL import Image
from transformers import pipeline

from fwd2bot.pipelines import embedded, registry

TASKS = ("fwd2bot-compress", "fwd2bot-retrieval", "fwd2bot-answer")

# Without fwd2bot: every import of it fails, as in an environment where it was never installed.
ALONE = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fwd2bot":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from transformers import pipeline

folder, picture, saved = sys.argv[1:]
load = {"model": folder, "trust_remote_code": True, "device": "cpu"}
compress = pipeline("fwd2bot-compress", **load)
summary = compress([picture, picture], num_summary_tokens=3)
retrieval = pipeline("fwd2bot-retrieval", **load)
answer = pipeline("fwd2bot-answer", **load)
chat = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]}]
built_in = pipeline("image-text-to-text", **load)
compress.save_pretrained(saved)
print(json.dumps({
    "tokens": summary.tokens.tolist(),
    "hits": retrieval("a dog", summary=summary),
    "hits_of_images": retrieval("a dog", images=[picture], num_summary_tokens=3),
    "answer": answer("What?", summary=summary[0], max_new_tokens=4),
    "answer_of_image": answer("What?", images=picture, max_new_tokens=4),
    "built_in": built_in(text=chat, max_new_tokens=4, return_full_text=False)[0]["generated_text"],
    "fwd2bot": "fwd2bot" in sys.modules,
}))
"""


@pytest.fixture
def picture(pictures, tmp_path):
    path = tmp_path / "picture.png"
    pictures(1)[0].save(path)
    return path


@pytest.fixture
def as_default(checkpoint, monkeypatch):
    """The tasks' default model is the test's checkpoint."""
    for task in TASKS:
        targeted = registry.PIPELINE_REGISTRY.supported_tasks[task]
        monkeypatch.setitem(targeted, "default", {"model": (str(checkpoint), None)})


def test_default_model_is_the_checkpoint_in_the_package():
    for task in TASKS:
        default = registry.PIPELINE_REGISTRY.supported_tasks[task]["default"]
        assert default == {"model": (str(embedded.checkpoint_path()), None)}


def test_registering_twice_changes_nothing():
    before = dict(registry.PIPELINE_REGISTRY.supported_tasks)
    registry.register()
    assert registry.PIPELINE_REGISTRY.supported_tasks == before


@pytest.mark.parametrize("task", TASKS)
def test_pipeline_without_model_runs_on_the_default_in_float32(task, as_default):
    pipe = pipeline(task, device="cpu")
    assert type(pipe) is registry.PIPELINES[task]
    assert pipe.dtype == torch.float32


def test_pipeline_of_a_folder_needs_no_trust_where_fwd2bot_is_installed(checkpoint, picture):
    pipe = pipeline("fwd2bot-compress", model=str(checkpoint), device="cpu")
    assert type(pipe) is registry.PIPELINES["fwd2bot-compress"]
    assert len(pipe(picture)) == 1


def test_pipeline_takes_dtype(checkpoint, picture):
    pipe = pipeline("fwd2bot-compress", model=str(checkpoint), device="cpu", dtype="bfloat16")
    assert pipe(picture).tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["image_prompt", "text_prompt"])
def test_processor_with_another_prompt_is_refused(task, name, shared_fwd2bot):
    processor = tiny.tiny_processor()
    expected = getattr(processor, name)
    setattr(processor, name, "Describe it.")
    with pytest.raises(ValueError, match=f"{name} is 'Describe it.'.*but '{expected}' in the model.*AutoProcessor"):
        pipeline(task, model=shared_fwd2bot, processor=processor, device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_processor_with_another_image_token_is_refused(task, shared_fwd2bot):
    processor = tiny.tiny_processor()
    expected, processor.image_token_id = processor.image_token_id, 7
    with pytest.raises(ValueError, match=f"image_token_id is 7 .*but {expected} in the model.*AutoProcessor"):
        pipeline(task, model=shared_fwd2bot, processor=processor, device="cpu")


def test_processor_of_the_backbone_alone_is_refused(shared_fwd2bot):
    with pytest.raises(ValueError, match="image_prompt is None in the LlavaProcessor.*Fwd2BotProcessor"):
        pipeline("fwd2bot-compress", model=shared_fwd2bot, processor=tiny.tiny_backbone_processor(), device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_model_that_is_no_fwd2bot_is_refused(task):
    with pytest.raises(TypeError, match="needs a Fwd2Bot model, got a LlavaForConditionalGeneration.*from_backbone"):
        pipeline(task, model=tiny.tiny_backbone(), processor=tiny.tiny_processor(), device="cpu")


def test_processor_with_more_tokens_than_the_model_is_refused(shared_fwd2bot):
    processor = tiny.tiny_processor()
    words = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<another>"])
    with pytest.raises(ValueError, match=f"{words + 1} tokens, this model reads {words}"):
        pipeline("fwd2bot-compress", model=shared_fwd2bot, processor=processor, device="cpu")


def test_text_stage_answers_and_searches_without_vision_tower(checkpoint, picture):
    load = {"model": str(checkpoint), "device": "cpu"}
    summary = pipeline("fwd2bot-compress", **load)([picture, picture])
    search = pipeline("fwd2bot-retrieval", model_kwargs={"stage": "text"}, **load)
    answer = pipeline("fwd2bot-answer", model=search.model, processor=search.processor, device="cpu")
    whole = pipeline("fwd2bot-answer", **load)
    assert search.model.num_parameters() < whole.model.num_parameters()
    assert [hit["index"] for hit in search("a dog", summary=summary)] == [0, 1]
    expected = whole("What?", images=picture, max_new_tokens=4)
    assert answer("What?", summary=summary[1], max_new_tokens=4) == expected
    with pytest.raises(ValueError, match="stage='text'"):
        search("a dog", images=[picture])


def test_all_tasks_run_from_the_folder_alone(checkpoint, picture, tmp_path):
    folder, saved = tmp_path / "elsewhere" / "model", tmp_path / "saved"
    shutil.copytree(checkpoint, folder)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), str(picture), str(saved)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert "Do you wish to run the custom code" not in done.stdout
    alone = json.loads(done.stdout.splitlines()[-1])
    load = {"model": str(checkpoint), "device": "cpu"}
    summary = pipeline("fwd2bot-compress", **load)([picture, picture], num_summary_tokens=3)
    assert torch.allclose(torch.tensor(alone["tokens"]), summary.tokens, atol=1e-6)
    expected = pipeline("fwd2bot-retrieval", **load)("a dog", summary=summary)
    assert alone["hits"] == [{**hit, "score": pytest.approx(hit["score"], abs=1e-6)} for hit in expected]
    assert alone["hits_of_images"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-5)
    answer = pipeline("fwd2bot-answer", **load)
    assert alone["answer"] == answer("What?", summary=summary[0], max_new_tokens=4)
    assert alone["answer_of_image"] == answer("What?", images=picture, max_new_tokens=4)
    assert alone["built_in"].strip() == alone["answer_of_image"][0]["generated_text"]
    assert not alone["fwd2bot"]
    assert {path.name for path in saved.iterdir()} == {path.name for path in folder.iterdir()}


@pytest.mark.usefixtures("deprecations_are_theirs")
def test_built_in_image_text_to_text_answers_as_ours(vivid_fwd2bot, tiny_processor, answer, pictures):
    pipe = pipeline("image-text-to-text", model=vivid_fwd2bot, processor=tiny_processor, device="cpu")
    options = {"max_new_tokens": 4, "return_full_text": False}
    [expected] = answer("What?", images=pictures(1)[0], max_new_tokens=4)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": pictures(1)[0]}, {"type": "text", "text": "What?"}]}
    ]
    assert pipe(text=chat, **options)[0]["generated_text"].strip() == expected["generated_text"]
    prompt = "<s>USER: <image>\nWhat? ASSISTANT:"
    [output] = pipe(images=pictures(1)[0], text=prompt, **options)
    assert output["generated_text"].strip() == expected["generated_text"]
    outputs = pipe(text=[chat, chat], **options)
    assert [output[0]["generated_text"].strip() for output in outputs] == [expected["generated_text"]] * 2


@pytest.mark.usefixtures("deprecations_are_theirs")
def test_built_in_image_text_to_text_hands_on_the_arguments_of_generate(vivid_fwd2bot, tiny_processor, pictures):
    pipe = pipeline("image-text-to-text", model=vivid_fwd2bot, processor=tiny_processor, device="cpu")
    prompt = "<s>USER: <image>\nWhat? ASSISTANT:"
    options = {"max_new_tokens": 4, "num_summary_tokens": 2, "num_beams": 3}
    outputs = pipe(images=pictures(1)[0], text=prompt, generate_kwargs=options, return_full_text=False)
    inputs = tiny_processor(images=pictures(1), text=prompt)
    ids = vivid_fwd2bot.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    expected = tiny_processor.batch_decode(ids, skip_special_tokens=True)
    assert [output["generated_text"] for output in outputs] == expected
    greedy = vivid_fwd2bot.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert tiny_processor.batch_decode(greedy, skip_special_tokens=True) != expected


def test_saved_pipeline_loads_again(compress, tmp_path, pictures):
    compress.save_pretrained(tmp_path / "saved")
    again = pipeline("fwd2bot-compress", model=str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again(pictures(2)).tokens, compress(pictures(2)).tokens)


def test_push_uploads_model_processor_and_code_at_once(compress, checkpoint, monkeypatch, tmp_path):
    uploads = []

    def upload(self, folder, repo_id, **options):
        uploads.append((repo_id, options["revision"], set(os.listdir(folder))))

    class RepoUrl:
        repo_id = "someone/mine"

    monkeypatch.setattr(type(compress), "_upload_modified_files", upload)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, repo_id, **options: RepoUrl)
    compress.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/mine", revision="next")
    [(repo_id, revision, files)] = uploads
    assert (repo_id, revision) == ("someone/mine", "next")
    assert files == {*os.listdir(checkpoint), "README.md"}
    assert set(os.listdir(tmp_path / "mine")) == set(os.listdir(checkpoint))


def test_processor_that_cannot_be_saved_leaves_the_old_model(compress, checkpoint, monkeypatch, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint, folder)
    before = (folder / "model.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(compress.processor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        compress.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_gallery_is_whole_and_its_texts_fit():
    pictures = embedded.gallery()
    assert len(pictures) == 60
    for picture in pictures:
        assert picture.image.size == (96, 96)
        assert picture.description and len(picture.captions) == 3 and len(picture.questions) == 8
        assert all(question.answer for question in picture.questions)
    assert {path.name for path in embedded.GALLERY.glob("*.png")} == {picture.path.name for picture in pictures}


def test_showcase_is_about_the_gallery():
    by_name = {picture.path.name: picture for picture in embedded.gallery()}
    showcase = embedded.showcase()
    for query in showcase["queries"]:
        assert any(query["text"] in by_name[name].captions for name in query["files"])
    for question in showcase["questions"]:
        asked = embedded.Question(question["kind"], question["text"], question["answer"])
        assert asked in by_name[question["file"]].questions


def test_missing_checkpoint_is_an_error_with_a_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "checkpoint_path", lambda: tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nothing.*Install fwd2bot again"):
        embedded.default_checkpoint()


def test_gallery_pictures_are_plain_rgb():
    for picture in embedded.gallery()[:3]:
        with Image.open(picture.path) as image:
            assert image.mode == "RGB"
