"""Every benchmark starts with the package as it is; what it measures is measured when it is run."""

import runpy
from pathlib import Path

import pytest

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
