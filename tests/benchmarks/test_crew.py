"""A process of the crew that measures: what becomes of its row when it fails, hangs or dies."""

import math

import pytest

from benchmarks import crew
from benchmarks.cells import Cell
from benchmarks.peers import Settings
from benchmarks.race import ContextLost


def cell():
    return Cell(section="cases", case="causal_document", n=96, d=16, heads=4, kv_heads=2, batch=2)


class Connection:
    """An end of a pipe: hands out messages, keeps what it is sent. Without messages, its other end is gone."""

    def __init__(self, *messages, answers=True):
        self.messages, self.answers, self.sent = list(messages), answers, []

    def poll(self, timeout):
        return self.answers

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, message):
        if self.messages is None:
            raise BrokenPipeError
        self.sent.append(message)


class Process:
    exitcode = -11

    def kill(self):
        pass

    def join(self):
        pass


@pytest.fixture
def crew_of_one(monkeypatch):
    """Makes a crew whose one process, and those that replace it, are these ends of pipes; returns it."""

    def make(*ends, **options):
        left = list(ends)
        monkeypatch.setattr(crew.Crew, "_start", lambda self: crew._Member(Process(), left.pop(0)))
        options = {"deadline": math.inf, "patience": 100.0} | options
        return crew.Crew(1, Settings(), "cpu", TIMING, **options)

    return make


TIMING = crew.Timing(budget_ms=0.0, least=3, long_ms=400.0)
OK = {"competitor": "triton", "status": "ok"}
DONE = ("done", None)


def test_a_lost_context_costs_its_process_and_no_other_competitor(crew_of_one, monkeypatch):
    def breaks(cell, names, settings, device, timer, announce):
        announce(names[0])
        yield {"competitor": names[0], "status": "failed", "note": "illegal memory access"}
        raise ContextLost("gone")

    monkeypatch.setattr(crew, "measure", breaks)
    worker = Connection((cell(), ("hopper", "triton")), (cell(), ("triton",)))
    crew._work(worker, Settings(), "cpu", TIMING)
    assert [kind for kind, _ in worker.sent] == ["running", "row", "lost"] and len(worker.messages) == 1
    second = Connection(("row", OK), DONE)
    rows = list(crew_of_one(Connection(*worker.sent), second).measure(cell(), ["hopper", "triton"]))
    assert [(row["competitor"], row["status"]) for row in rows] == [("hopper", "failed"), ("triton", "ok")]
    assert second.sent == [(cell(), ("triton",))]


@pytest.mark.parametrize(
    "first, words",
    [
        (Connection(), "its process ended with exit code -11"),
        (Connection(answers=False), "no answer in 100 s (--patience)"),
        (Connection(("error", "out of memory")), "out of memory"),
    ],
)
def test_what_ends_a_measurement_is_the_row_of_the_competitor_that_ran(first, words, crew_of_one):
    again = Connection(("row", OK), DONE)
    if first.messages:
        first.messages += [("row", OK), DONE]  # that process goes on
    rows = list(crew_of_one(first, again).measure(cell(), ["flex", "triton"]))
    assert rows == [{"competitor": "flex", "status": "failed", "note": words}, OK]


def test_who_was_running_is_told_from_who_waits_to_be_timed(crew_of_one):
    """triton has passed its check and is not timed yet when flex dies: triton runs again, and cudnn is not lost."""
    first = Connection(("running", "triton"), ("running", "flex"))
    cudnn = {"competitor": "cudnn", "status": "refused"}
    again = Connection(("running", "triton"), ("running", "cudnn"), ("row", cudnn), ("row", OK), DONE)
    rows = list(crew_of_one(first, again).measure(cell(), ["triton", "flex", "cudnn"]))
    assert [(row["competitor"], row["status"]) for row in rows] == [
        ("flex", "failed"),
        ("cudnn", "refused"),
        ("triton", "ok"),
    ]
    assert again.sent == [(cell(), ("triton", "cudnn"))]


def test_a_process_that_died_in_between_is_replaced(crew_of_one):
    dead, again = Connection(), Connection(("row", OK), DONE)
    dead.messages = None
    one = crew_of_one(dead, again)
    assert list(one.measure(cell(), ["triton"])) == [OK]
    assert again.sent == [(cell(), ("triton",))]


def test_nothing_is_measured_past_the_deadline(crew_of_one):
    idle = Connection()
    assert list(crew_of_one(idle, deadline=0.0).measure(cell(), ["triton"])) == [] and idle.sent == []
    assert list(crew_of_one(Connection(answers=False), patience=0.0, deadline=1.0).measure(cell(), ["triton"])) == []
