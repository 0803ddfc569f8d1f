"""Every benchmark starts with the package as it is; what it measures is measured when it is run.

What it computes of its measurements is tested where it is more than a mean.
"""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
BENCHMARKS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "measuring")  # what they share


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_finds_all_that_it_imports_and_tells_its_options(path, monkeypatch, capsys):
    if path.stem == "space_load":
        pytest.importorskip("gradio_client", reason="the extra 'space' is not installed")
    monkeypatch.setattr("sys.argv", [str(path), "--help"])
    monkeypatch.syspath_prepend(FOLDER)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.fixture
def attention():
    return SimpleNamespace(**runpy.run_path(str(FOLDER / "attention.py")))


def test_maps_that_depend_on_the_token_alone_are_told_from_those_of_the_things(attention):
    of_tokens = torch.eye(2).expand(3, 2, 2)  # token 1 looks left, token 2 right, in each of three pictures
    assert attention.overlaps(of_tokens) == {
        "two tokens, one picture": 0.0,
        "one token, two pictures": 1.0,
        "two tokens, two pictures": 0.0,
    }
    assert attention.variance(of_tokens) == {"common": 0, "token": 1, "picture": 0, "token in a picture": 0}
    of_things = torch.eye(2)[:, None].expand(
        2, 3, 2
    )  # all look at the one thing: left in one picture, right in the other
    assert attention.overlaps(of_things) == {
        "two tokens, one picture": 1.0,
        "one token, two pictures": 0.0,
        "two tokens, two pictures": 0.0,
    }
    assert attention.variance(of_things) == {"common": 0, "token": 0, "picture": 1, "token in a picture": 0}


def test_patches_of_a_thing_are_those_whose_middles_it_covers(attention):
    thing = SimpleNamespace(x=24, y=72, pixels=30)  # 9 to 39 across, 57 to 87 down, of 96 pixels in 4 x 4 patches
    found = attention.covered(SimpleNamespace(things=[thing]), 4, 96).view(4, 4)
    assert found.nonzero().tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
