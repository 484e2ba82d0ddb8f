"""The attention benchmark's rows, and the figures, tables and targets that are made of them."""

import numpy as np
import pytest

from benchmarks import attention, tables
from benchmarks.cells import Cell
from benchmarks.records import Records, read
from benchmarks.sparsity import fit_line, pays_until
from benchmarks.targets import targets_table

ABOUT = {"date": "2026-01-01", "device": "CPU", "torch": "2", "triton": "3", "cuda": "none", "python": "3"}
ABOUT |= {"commit": "abc", "command": "python"}


def cell(case="causal_document", **changes):
    return Cell(**{"section": "cases", "case": case, "n": 96, "d": 16, "heads": 4, "kv_heads": 2, "batch": 2} | changes)


# Rows


def test_a_rerun_skips_what_is_measured(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    records = Records(path, ABOUT)
    records.add(cell(), {"competitor": "flex", "status": "ok"})
    records.add(cell(), {"competitor": "dense", "status": "failed", "note": "x"})
    again = Records(path, ABOUT)
    assert again.missing(cell(), ["flex", "dense", "triton"]) == ["triton"]
    assert again.missing(cell(), ["flex", "dense", "triton"], retry=True) == ["dense", "triton"]
    for changes in ({"n": 97}, {"d": 32}, {"batch": 1}, {"seed": 1}, {"kv_heads": 4}, {"case": "document"}):
        assert again.missing(cell(**changes), ["flex"]) == ["flex"]
    for changes in ({"commit": "abd"}, {"device": "H200"}):
        other = Records(path, ABOUT | changes)
        assert other.missing(cell(), ["flex"]) == ["flex"] and other.rows() == []
    fresh = Records(tmp_path / "other.jsonl", ABOUT, [path])
    assert fresh.missing(cell(), ["flex"]) == [] and len(fresh.rows()) == 2
    with pytest.raises(ValueError, match="absent"):
        Records(path, ABOUT, [tmp_path / "absent.jsonl"])


def test_the_last_of_two_rows_counts(tmp_path):
    records = Records(tmp_path / "rows.jsonl", ABOUT)
    records.add(cell(), {"competitor": "flex", "status": "failed"})
    records.add(cell(), {"competitor": "flex", "status": "ok"})
    assert [row["status"] for row in Records(records.path, ABOUT).rows()] == ["ok"]


def test_one_page_of_several_runs(tmp_path, capsys):
    """What was measured again replaces what it was, whatever the commit; a refusal or another card replaces nothing."""
    files = [tmp_path / f"2026-01-0{day}-attention.jsonl" for day in (1, 2, 3)]
    old, new, h200 = (
        Records(file, ABOUT | {"device": device, "date": file.name[:10], "commit": commit})
        for file, device, commit in zip(files, ("H100", "H100", "H200"), ("old", "new", "new"), strict=True)
    )
    times = {"area": 10, "forward_ms": 1.0, "backward_ms": 2.0, "status": "ok"}
    for case in ("causal", "document"):
        for name in ("hopper", "flex", "fa4"):
            old.add(cell(case), {"competitor": name} | times)
    new.add(cell("causal"), {"competitor": "hopper"} | times | {"forward_ms": 0.125})
    new.add(cell("causal"), {"competitor": "flex", "status": "failed", "note": "x"})
    new.add(cell("causal"), {"competitor": "fa4", "status": "refused", "note": "not installed"})
    new.add(cell("full"), {"competitor": "hopper"} | times)
    h200.add(cell("document"), {"competitor": "hopper"} | times)

    attention.main(["--report", str(files[2]), str(files[0]), str(files[1])])
    page = (tmp_path / "2026-01-02-attention.md").read_text()
    said = capsys.readouterr().out
    assert "left out: rows of H200" in said and page.strip() in said
    assert page.startswith("# Attention benchmark, 2026-01-01, 2026-01-02\n") and "- commit: new, old\n" in page
    lines = [x.strip("| ").split(" | ") for x in page.splitlines() if x.startswith("|")]
    rows = {(x[0], x[5]): (x[6], x[7]) for x in lines if len(x) > 7 and x[2] == "16" and x[5] != "competitor"}
    assert rows[("causal", "hopper")] == ("new", "0.125") and rows[("causal", "fa4")] == ("old", "1.000")
    assert rows[("document", "hopper")] == ("old", "1.000") and rows[("full", "hopper")] == ("new", "1.000")
    assert rows[("causal", "flex")] == ("new", "**FAILED**")
    assert "In 1 of 3 cells not all are of one run, first in cases/causal/" in page


def test_a_line_that_was_cut_off_is_measured_again(tmp_path):
    records = Records(tmp_path / "rows.jsonl", ABOUT)
    records.add(cell(), {"competitor": "flex", "status": "ok"})
    whole = records.path.read_text()
    records.path.write_text(whole + whole[:40])
    again = Records(records.path, ABOUT)
    again.add(cell(), {"competitor": "dense", "status": "ok"})
    assert [row["competitor"] for row in read(records.path)] == ["flex", "dense"]


# Figures


def row(competitor="triton", key="a", status="ok", **figures):
    shape = {"case": key, "n": 1000, "d": 128, "heads": 4, "kv_heads": 4, "batch": 2, "seed": 0, "area": 10**6}
    return ABOUT | shape | {"key": key, "section": "cases", "competitor": competitor, "status": status} | figures


def test_rates():
    one = row(forward_ms=2.0, backward_ms=8.0)
    # 4 x 128 x 10^6 scores x 4 heads x 2 samples = 4.096e9 operations.
    assert tables.tflops(one, "forward") == pytest.approx(4.096e9 / 2e-3 / 1e12)
    assert tables.tflops(one, "backward") == pytest.approx(2.5 * 4.096e9 / 8e-3 / 1e12)
    assert tables.tflops(one, "total") == pytest.approx(3.5 * 4.096e9 / 10e-3 / 1e12)
    assert tables.tflops(row(forward_ms=2.0), "total") is None
    assert tables.tflops(row(status="wrong", forward_ms=2.0), "forward") is None


def test_geometric_mean():
    assert tables.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="no values"):
        tables.geometric_mean([])


def test_ours_against_a_peer():
    rows = [row(key="a", forward_ms=1.0, backward_ms=4.0), row("flex", "a", forward_ms=2.0, backward_ms=2.0)]
    rows += [row(key="b", forward_ms=1.0, backward_ms=1.0), row("flex", "b", forward_ms=8.0, backward_ms=8.0)]
    rows += [row(key="c", forward_ms=1.0, backward_ms=1.0), row("flex", "c", status="failed", note="out | of\nmemory")]
    assert tables.ratios(rows, "triton", "flex", "forward") == {"a": 2.0, "b": 8.0}
    lines = [line.strip("| \n").split(" | ") for line in tables.summary_table(rows).splitlines()[2:]]
    assert lines == [
        ["triton", "flex", "forward", "2", "4.00", "2.00", "a", "0 of 2"],
        ["triton", "flex", "backward", "2", "2.00", "0.50", "a", "1 of 2"],
        ["triton", "flex", "total", "2", "2.53", "0.80", "a", "1 of 2"],
    ]
    table = tables.race_table(rows)
    assert "**FAILED**" in table and table.count("\n") == 2 + len(rows)
    first = table.splitlines()[2].strip("| ").split(" | ")
    assert (first[5], first[9], first[12], first[15]) == ("triton", "2.00", "0.50", "0.80")
    assert "| flex | failed | 1 | c | out / of memory |" in tables.notes_table(rows)


def test_a_wrong_result_has_no_speed_in_the_table():
    table = tables.race_table([row(status="wrong", note="dk", forward_ms=1.234, backward_ms=5.678)])
    assert "**WRONG**" in table and "1.234" not in table and "5.678" not in table


def test_fit_line():
    x = np.linspace(0, 1, 11)
    exact = fit_line(list(x), list(10 - 9 * x))
    assert exact == pytest.approx((10, -9, 1))
    y = 10 - 9 * x + np.random.default_rng(0).normal(0, 1, 11)
    slope, intercept = np.polyfit(x, y, 1)
    assert fit_line(list(x), list(y)) == pytest.approx((intercept, slope, np.corrcoef(x, y)[0, 1] ** 2))
    with pytest.raises(ValueError, match="two different x"):
        fit_line([1, 1], [2, 3])


def test_sparsity_table():
    areas = [(10 - i) * 10**5 for i in range(11)]
    rows = [row(key=f"band@{i}", area=area, forward_ms=2 + area / 1e5) for i, area in enumerate(areas)]
    (line,) = tables.sparsity_table([r | {"case": "band@0"} for r in rows]).splitlines()[2:]
    assert line == "| band | triton | forward | 11 | 1.0000 | 12.000 | 2.000 | 12.000 | 2.000 | 100% |"


def test_targets():
    """The slowest length counts; what was not measured is not reached, and what was in part is so far."""
    shape = {"section": "cases", "case": "causal", "d": 128, "competitor": "hopper"}
    # 4.096e9 operations forward: 680 TFLOP/s are 6.0 us.
    rows = [row(key=f"c{n}", forward_ms=ms, backward_ms=1.0) | shape | {"n": n} for n, ms in ((8192, 1), (32768, 5e-3))]
    line = next(x for x in targets_table(rows).splitlines() if "forward TFLOP/s, causal, D 128" in x)
    assert line.endswith("| >= 680 | 819 | so far |")
    longest = row(key="d", forward_ms=6e-3, backward_ms=1.0) | shape | {"n": 131072}
    line = next(x for x in targets_table([*rows, longest]).splitlines() if "forward TFLOP/s, causal, D 128" in x)
    assert line.endswith("| >= 680 | 683 | yes |")
    rows += [row(key="c", forward_ms=7e-3, backward_ms=1.0) | shape | {"n": 131072}]
    line = next(x for x in targets_table(rows).splitlines() if "forward TFLOP/s, causal, D 128" in x)
    assert line.endswith("| >= 680 | 585 | no |")
    assert "| forward TFLOP/s, full, D 128, N 32768 and more | >= 700 | - | - |" in targets_table(rows)
    ours = [row("triton", key, forward_ms=1.0, backward_ms=1.0) for key in "ab"]
    flex = [row("flex", key, forward_ms=ms, backward_ms=0.9) for key, ms in (("a", 1.5), ("b", 1.01))]
    table = targets_table([*ours, *flex])
    assert "| triton | forward over flex, 2 of 72 cells: least | >= 1 | 1.01 | so far |" in table
    assert "| triton | backward over flex, 2 of 72 cells: least | >= 1 | 0.90 | no |" in table
    other = [x | {"d": 256} for x in (row("triton", "c", forward_ms=2.0), row("flex", "c", forward_ms=1.0))]
    assert targets_table([*ours, *flex, *other]) == table


def test_targets_of_the_schedule():
    """Both passes count: their time at 128K against one forward, their bytes at 1M."""
    cost = {"section": "schedule", "forward_ms": 4.0, "both_schedule_ms": 0.03, "both_schedule_bytes": 50 * 10**6}
    rows = [row("hopper", "pack") | cost | {"n": 131072}, row("hopper", "long") | cost | {"n": 2**20}]
    rows += [row("triton", "long") | cost | {"n": 2**20, "both_schedule_bytes": 65 * 10**6, "both_schedule_ms": 9.0}]
    lines = [line for line in targets_table(rows).splitlines() if "schedules" in line]
    assert [line.split(" | ")[2:] for line in lines] == [
        ["<= 1", "0.75", "yes |"],
        ["<= 64", "50.00", "yes |"],
        ["<= 1", "-", "- |"],
        ["<= 64", "65.00", "no |"],
    ]


def test_where_skipping_stops_paying():
    x = [i / 10 for i in range(11)]
    assert pays_until(x, [10 - 10 * a for a in x]) == 1.0
    assert pays_until(x, [max(10 - 10 * a, 3) for a in x]) == pytest.approx(0.7)
    assert pays_until(x, [10] * 11) is None
    # Half the scores are hidden at the start: a step of 10% saves a fifth when cost is proportional.
    assert pays_until([0.5, 0.6, 0.7], [10, 8.9, 8.1]) == pytest.approx(0.6)
