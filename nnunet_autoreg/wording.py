"""Numbers, counts and durations as people write them."""

import math

VOWELS = "aeiou"


def counted(number: int, noun: str) -> str:
    """Return a count with its noun: "1 scan", "1,200 scans", "2 patches", "3 copies"."""
    return f"{number:,} {noun if number == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return the plural of a regular noun."""
    if noun.endswith("y") and noun[-2:-1] not in VOWELS:
        return f"{noun[:-1]}ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun}s"


def amount(number: float) -> str:
    """Return a large number with two digits: "950", "12,000", "1.3 million", "2 billion"."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        # What rounds to the next unit is written in it.
        if abs(number) >= 0.995 * size:
            return f"{float(f'{number / size:.2g}'):,g} {word}"

    if abs(number) < 1000:
        return f"{number:.3g}"
    return f"{float(f'{number:.2g}'):,.0f}"


def duration(seconds: float) -> str:
    """Return a time in its natural unit: "0.4 s", "25 s", "3 min", "2.5 h", "4 days"."""
    if seconds < 9.95:
        return f"{seconds:.2g} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.2g} h"
    return f"{seconds / 86400:.2g} days"


def storage(num_bytes: float) -> str:
    """Return a size on disk or in memory: "3 MiB", "850 MiB", "2.5 GiB", "31 GiB"."""
    mebibytes = num_bytes / 2**20
    if mebibytes < 999.5:
        return f"{math.ceil(mebibytes)} MiB"
    return f"{float(f'{mebibytes / 1024:.2g}'):,g} GiB"
