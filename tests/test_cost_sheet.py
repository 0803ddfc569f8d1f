"""The arithmetic of `benchmarks/cost_sheet.py`, against figures worked out by hand."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "cost_sheet.py"
MILLION, BILLION = 10**6, 10**9


def size(rows, exact_ms, ivf_ms, hnsw_ms):
    """Of a store of width 192: 64 bytes of a row beside tokens and embedding, indices of 20 and 400 bytes."""

    def search(name, milliseconds):
        return {"name": name, "median_ms": milliseconds, "import": 500 * MILLION, "peak": 100 * MILLION}

    return {
        "rows": rows,
        "bytes_per_row": {"tokens": 864.0, "embedding": 384.0, "rest": 40.0, "look_up_indices": 24.0},
        "indices": {"ivf_pq": {"bytes_per_row": 20.0}, "hnsw_sq": {"bytes_per_row": 400.0}},
        "searches": [search("exact", exact_ms), search("ivf_pq", ivf_ms), search("hnsw_sq", hnsw_ms)],
    }


@pytest.fixture
def figures():
    """Exact search takes 10 ms and 90 ms for each 100,000 rows."""
    return {
        "config": {"num_summary_tokens": 8, "width": 192, "codec": "int4"},
        "sizes": [size(100_000, 100.0, 8.0, 5.0), size(MILLION, 910.0, 10.0, 6.0)],
        "search": {"nprobes": 20},
        "machine": "a machine",
    }


@pytest.fixture(scope="module")
def sheet():
    return runpy.run_path(str(SCRIPT))


def test_costs_of_the_measured_setting(figures, sheet):
    found = sheet["cost"](figures, 10 * BILLION, 8, 192, "int4", 100 * MILLION)
    assert found["machines"] == 100
    assert found["tokens"] == 8_640 * BILLION and found["embedding"] == 3_840 * BILLION
    assert found["rest"] == pytest.approx(640 * BILLION)
    assert found["ivf_pq_bytes"] == pytest.approx(200 * BILLION)
    assert found["exact_memory"] == 600 * MILLION
    assert found["ivf_pq_memory"] == pytest.approx((600 + 100 * 20) * MILLION)
    assert found["hnsw_sq_memory"] == pytest.approx((600 + 100 * 400) * MILLION)
    assert found["exact_ms"] == pytest.approx(10 + 100 * 900)
    assert found["ivf_pq_ms"] == pytest.approx(10 + 99 * 900 / 8192)
    assert found["hnsw_sq_ms"] == pytest.approx(6 * 20)  # 95 partitions, of which 20 are searched


def test_largest_measured_store_costs_what_was_measured(figures, sheet):
    found = sheet["cost"](figures, MILLION, 8, 192, "int4", 100 * MILLION)
    assert [found[f"{name}_ms"] for name in ("exact", "ivf_pq", "hnsw_sq")] == pytest.approx([910, 10, 6])
    assert found["machines"] == 1


def test_wide_setting_is_computed_by_format(figures, sheet):
    found = sheet["cost"](figures, MILLION, 16, 4096, "fp16", 100 * MILLION)
    assert found["tokens"] == 16 * 2 * 4096 * MILLION and found["embedding"] == 2 * 4096 * MILLION
    assert found["rest"] == pytest.approx(64 * MILLION)  # does not grow with the width
    assert found["ivf_pq_bytes"] == pytest.approx((20 + (4096 - 192) / 8) * MILLION)
    assert found["hnsw_sq_bytes"] == pytest.approx((400 + 4096 - 192) * MILLION)
    assert found["exact_ms"] == pytest.approx(10 + 900 * 4096 / 192)
    assert found["ivf_pq_ms"] == pytest.approx(10 * 4096 / 192)


def test_sheet_prints_a_line_for_each_size_and_prices_only_when_given(figures, sheet, tmp_path, monkeypatch, capsys):
    path = tmp_path / "figures.json"
    path.write_text(json.dumps(figures))
    monkeypatch.setattr("sys.argv", ["cost_sheet.py", str(path)])
    sheet["main"]()
    printed = capsys.readouterr().out
    assert "$" not in printed
    assert printed.count("\n| 10,000,000,000 | ") == 1 + 4
    assert "| 1,000,000 | 8 | 192 | int4 | 1 | 864 MB | 384 MB | 64 MB | 20 MB | 400 MB | 600 MB | 620 MB |" in printed
    monkeypatch.setattr("sys.argv", ["cost_sheet.py", str(path), "--dollars-per-gb-month", "0.5"])
    sheet["main"]()
    assert "| 0.67 |" in capsys.readouterr().out  # (864 + 384 + 64 + 20) MB


def test_figures_that_do_not_grow_with_the_rows_are_refused(figures, sheet):
    figures["sizes"][1]["searches"][0]["median_ms"] = 90.0
    with pytest.raises(ValueError, match="no longer in 1,000,000 rows than in 100,000"):
        sheet["cost"](figures, MILLION, 8, 192, "int4", 100 * MILLION)
