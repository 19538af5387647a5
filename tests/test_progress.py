"""How a long job tells how far it is: a bar for people, a line a minute in a log, and no thread of its own."""

from __future__ import annotations

import logging
import threading

from hf_datavec import progress

GIGABYTE = 10**9


def test_a_log_gets_a_line_a_minute_with_bytes_and_the_time_left(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="hf_datavec")
    with progress.byte_progress(8 * GIGABYTE, text="merge") as tell:
        for _ in range(4):
            now[0] += 45
            tell(GIGABYTE)
    # After 45 s it is too early, after 90 s a quarter is done, after 135 s too early again, after 180 s a half.
    assert caplog.messages == ["merge: 2.0 of 8.0 GB, 4 minutes left", "merge: 4.0 of 8.0 GB, 3 minutes left"]


def test_a_terminal_gets_a_bar_with_bytes_rate_and_time_left_and_no_thread_watches_it(monkeypatch, capsys):
    monkeypatch.setattr(progress, "wanted", lambda: True)
    before = threading.active_count()
    with progress.byte_progress(4 * GIGABYTE, text="merge") as tell:
        tell(GIGABYTE)
        assert threading.active_count() == before
    with_items = list(progress.progress([1, 2], text="search", total=2, unit="scale"))
    assert with_items == [1, 2]
    told = capsys.readouterr().err
    assert "merge:" in told
    assert "4.00G" in told
    assert "B/s" in told
    assert "search:" in told
    assert threading.active_count() == before
