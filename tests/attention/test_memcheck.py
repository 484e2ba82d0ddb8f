"""The suite for compute-sanitizer is sound: it has every kind of mask, and its checks hold and can fail."""

import dataclasses

import pytest
import torch

from tests.attention import memcheck


def test_every_kind_of_mask_is_there():
    for backend, cases in (("triton", memcheck.triton_cases()), ("hopper", memcheck.hopper_cases())):
        variants = [case.variant() for case in cases]
        masks = [variant.mask for variant in variants]
        assert {case.backend for case in cases} == {backend}
        assert {mask.num_intervals for mask in masks} == set(range(6 if backend == "triton" else 4))
        assert {mask.causal for mask in masks} == {True, False}
        assert {(mask.num_rows, mask.num_columns) for mask in masks} == set(memcheck.SIZES)
        assert {(mask.batch, mask.heads) for mask in masks} >= {(1, 1), (2, 1)}
        assert any(not variant.visible.any(-1).all() for variant in variants), "rows that see nothing"
        assert all(mask.num_intervals == case.intervals for mask, case in zip(masks, cases, strict=True))
        assert all(torch.equal(x.mask.to_dense(), x.visible) for x in variants)
        assert any(case.partial for case in cases) and any(case.strided for case in cases)
    assert {case.d for case in memcheck.hopper_cases()} == {64, 128, 256}
    assert {case.d for case in memcheck.triton_cases()} == {32, 64, 80, 128, 192, 256}


@pytest.mark.parametrize("options", [{"softcap": 5.0, "strided": True}, {"partial": True}], ids=["op", "part"])
def test_a_run_checks(options):
    case = memcheck.Case(backend="triton", d=16, dtype=torch.float32, intervals=1, size=(25, 13), **options)
    assert memcheck.refused(case) is None
    variant = case.variant()
    memcheck.run(case, variant)
    with pytest.raises(AssertionError):
        memcheck.run(case, variant._replace(visible=~variant.visible))


def test_a_case_that_a_backend_does_not_take_is_an_error():
    case = memcheck.Case(backend="triton", d=300)
    with pytest.raises(AssertionError, match="head dimension"):
        memcheck._run_one(case)
    assert memcheck.refused(dataclasses.replace(case, d=64, dtype=torch.float32)) is None


def test_the_merge_is_checked(monkeypatch):
    memcheck.run_merge()
    monkeypatch.setattr(memcheck, "merge", lambda out, lse, part, part_lse, result: None)
    with pytest.raises(AssertionError):
        memcheck.run_merge()


def report_of(*places):
    pairs = zip(places[::2], places[1::2], strict=True)
    return "========= COMPUTE-SANITIZER\n" + "".join(
        f"========= Error: Race reported between Read access at k+0xf0 in {a}\n"
        f"=========     and Write access at k+0x95a0 in {b} [51 hazards]\n========= \n"
        for a, b in pairs
    )


def test_races_of_our_own_are_told_from_those_of_the_dispatch(tmp_path, capsys):
    text = (memcheck.HOPPER / "forward.py").read_text().splitlines()
    (entry,) = [i for i, line in enumerate(text, 1) if line.startswith("def forward_kernel(")]
    # One of two consumers, one of three.
    dispatch, other = (i for i, line in enumerate(text, 1) if line.strip() == "gl.warp_specialize(")
    theirs = [f"forward.py:{line}" for line in (entry, dispatch, entry, dispatch - 1, entry, other)]
    words = (memcheck.HOPPER / "primitives.py").read_text().splitlines()
    (read,) = [i for i, line in enumerate(words, 1) if line.strip().startswith("return gl.max(slot.load(")]
    (write,) = [i for i, line in enumerate(words, 1) if line.strip().startswith("slot.store(")]
    handed = [f"primitives.py:{line}" for line in (read, write)]
    assert memcheck.races_elsewhere(report_of(*theirs, *handed)) == []
    for place in (f"forward.py:{dispatch + 1}", f"forward.py:{entry - 3}", "merge.py:51", handed[0]):
        (found,) = memcheck.races_elsewhere(report_of(*theirs, theirs[0], place))
        assert place in found

    path = tmp_path / "races.txt"
    path.write_text(report_of(*theirs))
    with pytest.raises(SystemExit, match="no whole report"):
        memcheck.main(["--races", str(path)])
    path.write_text(report_of(*theirs) + "all 6 checks run and right\n========= RACECHECK SUMMARY: 1 hazard")
    with pytest.raises(SystemExit) as ended:
        memcheck.main(["--races", str(path)])
    assert ended.value.code == 0 and "no hazards but" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU only")
def test_it_refuses_to_run_where_it_would_show_nothing():
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        memcheck.main([])
