"""Examples in the documentation that say so are run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"<!-- run by tests/test_docs.py -->\n```python\n(.*?)```", re.DOTALL)
EXAMPLES = {
    f"{path.relative_to(ROOT)}-{index}": code
    for path in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for index, code in enumerate(MARKED.findall(path.read_text(encoding="utf-8")))
}


def test_there_are_examples():
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[name], name, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
