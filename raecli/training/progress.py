"""How far a stage is: a bar on a terminal, a line every so often elsewhere. On stderr, by one rank."""

import os
import sys
import time

from tqdm import tqdm

LINE_SECONDS = 15.0


class Progress:
    """Counts up to `total` of `unit`, e.g. images or steps."""

    def __init__(self, total: int, unit: str, label: str, *, shown: bool, done: int = 0) -> None:
        self.total, self.unit, self.label, self.shown = total, unit, label, shown
        self.done = self.first = done
        self.started = self.told = time.monotonic()
        self.bar, self.note = None, ""
        if shown and sys.stderr and sys.stderr.isatty():
            wide = os.get_terminal_size(sys.stderr.fileno()).columns > 0  # a container's terminal may have no size
            self.bar = tqdm(
                total=total,
                initial=done,
                unit=unit.rstrip("s"),
                desc=label,
                file=sys.stderr,
                dynamic_ncols=wide,
                ncols=None if wide else 100,
            )

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count on; the latest `note` is shown behind the figures."""
        self.done += count
        self.note = note or self.note
        if self.bar is not None:
            self.bar.set_postfix_str(self.note, refresh=False)  # or each step would be drawn, twice
            self.bar.update(count)
        elif self.shown and (self.done >= self.total or time.monotonic() - self.told >= LINE_SECONDS):
            self.told = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.shown:
            print(text, file=sys.stderr, flush=True)

    def line(self) -> str:
        """One line: how far, how fast, how long still."""
        rate = (self.done - self.first) / max(time.monotonic() - self.started, 1e-9)
        left = f", {duration((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        text = f"{self.label}: {self.done}/{self.total} {self.unit}, {told_rate(rate)} {self.unit}/s{left}"
        return f"{text}, {self.note}" if self.note else text

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()


def told_rate(rate: float) -> str:
    """Three digits, and never an exponent: 0.0491, 12.6, 4,410."""
    return f"{float(f'{rate:.3g}'):,.0f}" if rate >= 1000 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    """A time as one reads it: 42 s, 7 min 05 s, 3 h 20 min, 2 d 04 h."""
    whole = round(seconds)
    for unit, size, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part:02d} {below}"
    return f"{whole} s"
