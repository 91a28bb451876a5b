"""Progress of a job, as a batch job's log shows it."""

import logging

import pytest

import pipeline.progress
from pipeline.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [100.0]
    monkeypatch.setattr(pipeline.progress.time, "monotonic", lambda: now[0])
    return now


def test_done_rate_and_remaining_time_are_said(clock):
    with Progress("inverting", 1000, "pixels") as progress:
        clock[0] += 10.0
        progress.advance(250)
        assert progress.line() == "inverting: 250/1000 pixels (25 %), 25.0 pixels/s, ETA 30 s"


def test_slow_work_is_counted_by_the_minute(clock):
    with Progress("synthesising", 4, "atmospheres") as progress:
        clock[0] += 90.0
        progress.advance(1)
        assert progress.line() == "synthesising: 1/4 atmospheres (25 %), 0.7 atmospheres/min, ETA 270 s"


def test_what_an_earlier_run_did_does_not_count_for_the_rate(clock):
    with Progress("inverting", 1000, "pixels", done=500) as progress:
        clock[0] += 10.0
        progress.advance(100)
        assert progress.rate == pytest.approx(10.0)
        assert progress.line() == "inverting: 600/1000 pixels (60 %), 10.0 pixels/s, ETA 40 s"


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(clock, caplog):
    with caplog.at_level(logging.INFO, logger="flarefield"), Progress("inverting", 100, "pixels") as progress:
        for _ in range(100):
            clock[0] += 0.5
            progress.advance(1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 50 // 10  # the last of them is that of the end
    assert lines[-1].startswith("inverting: 100/100 pixels (100 %), 2.0 pixels/s")


def test_the_end_is_said_however_soon_it_comes(clock, caplog):
    with caplog.at_level(logging.INFO, logger="flarefield"), Progress("inverting", 9, "pixels") as progress:
        clock[0] += 0.5
        progress.advance(9)
    (record,) = caplog.records
    assert record.getMessage().startswith("inverting: 9/9 pixels (100 %)")


def test_on_a_terminal_a_bar_is_drawn(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Progress("inverting", 100, "pixels") as progress:
        progress.advance(100)
    shown = capsys.readouterr().err
    assert "inverting" in shown
    assert "100/100" in shown
