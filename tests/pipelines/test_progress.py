"""What a person sees while a run goes on."""

from collections import Counter

import pytest

from pipelines import progress
from pipelines.progress import Progress


def test_without_a_terminal_lines_tell_count_rate_and_failures(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0)
    with caplog.at_level("INFO"), Progress(10) as shown:
        shown.add(Counter(restored=3))
        shown.add(Counter(restored=6, unreadable=1))
    assert (shown.done, shown.counts["restored"]) == (10, 9)
    first, last = caplog.messages
    assert first.startswith("3 of 10 images, ")
    assert "s left" in first
    assert last.endswith("0 s left, 1 not restored")


def test_lines_are_seconds_apart(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Progress(100) as shown:
        for _ in range(99):
            shown.add(Counter(restored=1))
    assert caplog.messages == []
