"""Numbers with units as words: the one place where bytes and seconds are written for people."""

from __future__ import annotations


def size(num_bytes: float) -> str:
    """Memory, disk or a file, to two or three digits: `812 B`, `3.4 MiB`, `780 MiB`, `1.5 GiB`."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        value = num_bytes / 1024**power
        if value >= 1:
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A length of time: `4.25 s`, `42 s`, `3 min 05 s`, `2 h 10 min`, `4 days 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"
