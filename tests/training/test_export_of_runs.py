"""Export of runs on data sets: dtypes, adapters alone, and what the card says with and without figures."""

import json

import pytest
import tiny
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.training.export import export, main
from fwd2bot.training.model_card import CardOptions

RUN = {
    "kind": "fwd2bot",
    "data": {
        "sources": [
            {
                "name": "chat | short",
                "format": "llava",
                "path": "/home/somebody/chat.json",
                "split": "train",
                "use": "ar",
                "weight": 2.0,
                "license": "cc-by-4.0",
            },
            {
                "name": "hub",
                "format": "captions",
                "path": "some/captions",
                "split": "train",
                "use": "both",
                "weight": 1,
            },
        ],
        "contrastive_max_tokens": 30,
    },
    "optimizer": {"name": "adamw", "learning_rate": 1e-4},
    "training": {"output_dir": "/home/somebody/runs", "max_steps": 1200, "per_device_train_batch_size": 128},
}
FIGURES = {
    "checkpoint": "final",
    "dtype": "float32",
    "versions": {"torch": "2", "transformers": "5"},
    "max_new_tokens": 64,
    "command": "python -m fwd2bot.training.evaluate final --data recipe.json",
    "sources": {
        "flickr8k": {
            "format": "captions",
            "split": "test",
            "rows": 5000,
            "pictures": 1000,
            "uncompressed": {"captions": {"cider": 0.71, "bleu": 0.2}, "bytes_per_image": 1000},
            "k=4": {
                "captions": {"cider": 0.5, "bleu": 0.1},
                "text_to_image": {"recall@1": 0.25},
                "bytes_per_image": 256,
            },
        }
    },
}


@pytest.fixture
def run(tmp_path):
    """The folder of a run: `final`, recipe and command."""
    model = tiny.tiny_fwd2bot()
    model.save_pretrained(tmp_path / "run" / "final")
    tiny.tiny_processor().save_pretrained(tmp_path / "run" / "final")
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(RUN))
    (tmp_path / "run" / "command.txt").write_text("python -m fwd2bot.training.train mine.yaml model.dtype=bfloat16\n")
    return tmp_path / "run"


def test_card_of_a_run_tells_data_recipe_command_and_no_folder(run, tmp_path):
    options = CardOptions("mine", license="cc-by-nc-4.0", languages=["en", "de"])
    export(run / "final", tmp_path / "hub", base_model="some/llava", options=options)
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.license == "cc-by-nc-4.0" and card.data.language == ["en", "de"]
    assert (card.data.base_model, card.data.base_model_relation) == ("some/llava", "finetune")
    assert card.data.datasets == ["some/captions"] and card.data.eval_results is None
    assert "Nothing was measured" in card.text and "drawn scenes" not in card.text
    assert "train mine.yaml model.dtype=bfloat16" in card.text
    assert "| chat \\| short | llava |  | `chat.json` | ar | 2 | cc-by-4.0 |" in card.text
    assert "1,200 steps of 128 samples" in card.text and "output_dir: runs" in card.text
    assert "/home/somebody" not in card.content


def test_card_of_drawn_scenes_tells_what_the_last_run_left_alone(run, tmp_path):
    model = {"trained_stage": "generate", "init_from": "runs/before/final"}
    (run / "recipe.json").write_text(json.dumps(RUN | {"data": {"pictures": 10}, "model": model}))
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "The last run went on from a trained Fwd2Bot. In it these learnt with an autoregressive loss" in text
    assert "generate adapter. These stayed as they were: compress adapter, summary queries" in text


@pytest.mark.parametrize("data", [RUN["data"], {"pictures": 10}])
def test_card_tells_what_was_frozen(run, tmp_path, data):
    model = {"trained_stage": "both", "freeze": ["logit_scale", "projector", "layers[.]0[.].*[.]compress[.]"]}
    (run / "recipe.json").write_text(json.dumps(RUN | {"data": data, "model": model}))
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "compress adapter in part, generate adapter and summary queries" in text
    assert "These stayed as they were: summary projector, temperature." in text
    if "sources" in data:
        names = tiny.tiny_fwd2bot().trained_parameters()
        fixed = [name for name in names if "layers.0." in name and ".compress." in name]
        fixed += ["logit_scale", "summary_projector.weight", "summary_projector.bias"]
        count = sum(value.numel() for name, value in names.items() if name not in fixed)
        assert f"of which {count / 1e6:.1f} million learn (compress adapter in part" in text


def test_card_has_the_figures_as_tables_and_as_model_index(run, tmp_path):
    model = Fwd2BotForConditionalGeneration.from_pretrained(run / "final")
    (run / "final" / "evaluation.json").write_text(json.dumps(FIGURES | {"fingerprint": model.fingerprint}))
    export(run / "final", tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    values = {(one.metric_name, one.dataset_split): one.metric_value for one in card.data.eval_results}
    assert values["CIDEr-D, uncompressed", "test"] == 71 and values["Text to image, recall@1, k=4", "test"] == 25
    assert "| captions cider | 71.0 | 50.0 |" in card.text and "| bytes per image | 1,000 | 256 |" in card.text
    assert "evaluate final --data recipe.json" in card.text and "Nothing was measured" not in card.text
    assert card.data.license is None and "No licence was stated" in card.text


def test_card_without_a_recipe_says_that_the_training_is_not_known(run, tmp_path):
    (run / "recipe.json").unlink()
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "How it was trained was not recorded" in text and "Nothing was measured" in text


def test_card_of_a_drawn_run_without_figures_is_about_drawn_scenes(run, tmp_path):
    (run / "recipe.json").write_text(json.dumps(RUN | {"data": {"pictures": 10}}))
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "drawn scenes, not photographs" in text and "Nothing was measured" in text
    assert "embedded default" not in text


def test_card_of_a_model_that_is_pushed_loads_it_from_the_hub(run, tmp_path):
    export(run / "final", tmp_path / "hub", options=CardOptions("mine", repo="you/mine"))
    assert '"you/mine"' in (tmp_path / "hub" / "README.md").read_text(encoding="utf-8")


def test_card_tells_after_which_step_the_weights_are(run, tmp_path):
    (run / "final" / "steps.json").write_text('{"steps": 900, "weights_of_step": 600}')
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "900 steps of 128 samples" in text and "those after step 600, the best by the validation" in text
    assert "1,200 steps" not in text


def test_card_has_the_trained_lengths_and_no_rank_beside_other_adapters(run, tmp_path):
    recipe = RUN | {"model": {"lora_rank": 48, "adapters": {"r": 16}}}
    (run / "recipe.json").write_text(json.dumps(recipe))
    model = tiny.tiny_fwd2bot(num_summary_tokens=4, summary_lengths=[2, 4])
    model.save_pretrained(run / "final")
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "compresses a picture into 2 or 4 summary tokens" in text and "drawn from 2 and 4" in text
    assert "num_summary_tokens=4)" in text  # of the example
    assert "lora_rank" not in text and "r: 16" in text


def test_card_names_no_split_of_a_file(run, tmp_path):
    figures = json.loads(json.dumps(FIGURES))
    figures["sources"]["flickr8k"] |= {"split": None, "path": "val.parquet", "rows": 1000, "captions": 5000}
    model = Fwd2BotForConditionalGeneration.from_pretrained(run / "final")
    (run / "final" / "evaluation.json").write_text(json.dumps(figures | {"fingerprint": model.fingerprint}))
    export(run / "final", tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert "flickr8k (captions, `val.parquet`): 1,000 rows, 1,000 pictures, 5,000 captions" in card.text
    assert {one.dataset_split for one in card.data.eval_results} == {None}


def test_example_of_the_card_prints_the_answer_alone(run, tmp_path):
    export(run / "final", tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", str(tmp_path / "hub"))
    tiny.pictures(1)[0].save(tmp_path / "photo.jpg")
    names: dict = {}
    exec(code.replace("photo.jpg", str(tmp_path / "photo.jpg")), names)
    assert names["answer"].shape[1] == names["ids"].shape[1] - names["inputs"]["input_ids"].shape[1]


def test_readme_that_no_export_wrote_is_left_alone(run, tmp_path):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("# My own words\n")
    with pytest.raises(ValueError, match="README.md was not written by an export.*Move it away"):
        export(run / "final", tmp_path / "hub")
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["README.md"]
    (tmp_path / "hub" / "README.md").unlink()
    for _ in range(2):  # its own is brought up to date
        export(run / "final", tmp_path / "hub")


def test_folder_that_is_not_there_is_one_line_of_the_export(tmp_path):
    with pytest.raises(SystemExit, match="^error: there is no folder .*nowhere; give that of a trained"):
        main([str(tmp_path / "nowhere"), str(tmp_path / "hub")])


def test_export_onto_the_checkpoint_itself_is_refused(run):
    final = run / "final"
    before = (final / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(final, final / ".." / "final")
    assert (final / "model.safetensors").read_bytes() == before


def test_licence_is_that_of_the_backbones_card_where_it_lies_here(run, tmp_path):
    backbone = tmp_path / "backbone"
    backbone.mkdir()
    (backbone / "README.md").write_text("---\nlicense: llama2\n---\nx\n")
    config = json.loads((run / "final" / "config.json").read_text())
    (run / "final" / "config.json").write_text(json.dumps(config | {"backbone_name_or_path": str(backbone)}))
    export(run / "final", tmp_path / "hub")
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.license == "llama2"
    assert str(backbone) not in (tmp_path / "hub" / "config.json").read_text()


@pytest.mark.parametrize(
    ("trained", "asked", "stored"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtype_of_the_export(trained, asked, stored, run, tmp_path):
    model = tiny.tiny_fwd2bot().to(trained)
    for parameter in model.mark_trainable().values():
        parameter.data = parameter.data.float()  # as a run trains it on a frozen backbone
    model.save_pretrained(run / "final")
    export(run / "final", tmp_path / "hub", dtype=asked)
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {stored}
    exported = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "hub", dtype=torch.float32)
    assert exported.fingerprint == model.fingerprint
    for name, value in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], value.to(stored).float()), name


def test_adapters_alone_name_their_backbone_and_load_on_it(run, tmp_path):
    export(run / "final", tmp_path / "hub", adapter_only=True, base_model="some/llava", base_model_revision="abc")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["backbone_name_or_path"], config["backbone_revision"]) == ("some/llava", "abc")
    assert not (tmp_path / "hub" / "model.safetensors").exists()
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model_relation == "adapter" and "loaded from `some/llava`" in card.text
    loaded = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "hub", backbone=tiny.tiny_backbone())
    trained = Fwd2BotForConditionalGeneration.from_pretrained(run / "final")
    assert loaded.fingerprint == trained.fingerprint
    for name, value in trained.trained_parameters().items():
        assert torch.equal(loaded.state_dict()[name], value.half().float()), name


def test_full_export_of_a_checkpoint_of_adapters_holds_the_backbone(run, tmp_path):
    backbone = tmp_path / "backbone"
    tiny.tiny_backbone().save_pretrained(backbone)
    tiny.tiny_backbone_processor().save_pretrained(backbone)
    model = Fwd2BotForConditionalGeneration.from_backbone(str(backbone), lora_rank=4, num_summary_tokens=4)
    model.save_pretrained(tmp_path / "adapters", adapter_only=True)
    tiny.tiny_processor().save_pretrained(tmp_path / "adapters")
    export(tmp_path / "adapters", tmp_path / "hub")
    exported = Fwd2BotForConditionalGeneration.from_pretrained(tmp_path / "hub")
    assert exported.fingerprint == model.fingerprint
    assert str(backbone) not in (tmp_path / "hub" / "config.json").read_text()
