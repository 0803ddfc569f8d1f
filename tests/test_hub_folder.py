"""The shipped checkpoint and the sources belong together."""

import json
from pathlib import Path

import pytest

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.folder_fwd2bot import SENTENCE_TRANSFORMERS, find_code
from fwd2bot.pipelines.embedded import default_checkpoint


def test_code_in_the_hub_folder_equals_the_sources():
    folder = default_checkpoint()
    model = Fwd2BotForConditionalGeneration.from_pretrained(folder)
    sources = {path.name: path.read_text() for path in find_code(model.config)}
    assert {path.name: path.read_text() for path in folder.glob("*.py")} == sources


def test_hub_folder_holds_what_sentence_transformers_reads():
    folder = default_checkpoint()
    assert {name: json.loads((folder / name).read_text()) for name in SENTENCE_TRANSFORMERS} == SENTENCE_TRANSFORMERS


def test_hub_folder_fits_into_16_megabytes():
    assert sum(path.stat().st_size for path in Path(default_checkpoint()).rglob("*.*")) <= 16e6


def test_card_and_figures_are_of_this_checkpoint():
    folder = default_checkpoint()
    figures = json.loads((folder / "evaluation.json").read_text())
    assert figures["fingerprint"] == json.loads((folder / "config.json").read_text())["fingerprint"]
    card = (folder / "README.md").read_text()
    for setting in ("uncompressed", "k=8", "k=1"):
        assert f"{100 * figures[setting]['answers']['all']:.1f}" in card


@pytest.mark.parametrize("name", ["config.json", "processor_config.json"])
def test_hub_folder_names_no_machine(name):
    text = (default_checkpoint() / name).read_text()
    assert '"/' not in text
