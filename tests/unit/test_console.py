"""Signals that come while libraries are imported: one of them may swallow what a handler raises."""

import signal

import pytest

from raecli import console


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_that_a_library_swallowed_still_ends_before_work_starts(monkeypatch, capsys, number, code):
    monkeypatch.setattr(console, "caught", [])
    console.end_if_caught()  # nothing came: nothing happens
    with pytest.raises(SystemExit) as first:
        console.end_early(number, None)
    with pytest.raises(SystemExit) as again:
        console.end_if_caught()
    assert first.value.code == again.value.code == code
    assert signal.Signals(number).name in capsys.readouterr().err
