"""Figures as people read them."""

GIB = 2**30


def gib(count: float) -> str:
    """Bytes."""
    return f"{count / GIB:,.2f} GiB" if abs(count) < 100 * GIB else f"{count / GIB:,.0f} GiB"


def amount(count: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    return gib(count * 2**20 * 1024)


def seconds(time: float) -> str:
    """Seconds, milliseconds or microseconds, with three digits that count."""
    if abs(time) < 5e-10:
        return "0"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if time * factor >= 1:
            return f"{digits(time * factor)} {unit}"
    return f"{digits(time * 1e6)} µs"


def flop(count: float) -> str:
    """Operations; "–" for none."""
    return f"{_scaled(count, ('', 'k', 'M', 'G', 'T', 'P', 'E'))}FLOP" if count else "–"


def number(count: float) -> str:
    """How many, in thousands (K), millions (M), billions (B) or trillions (T)."""
    return _scaled(count, ("", "K", "M", "B", "T")).replace(" ", "")


def _scaled(count: float, prefixes: tuple[str, ...]) -> str:
    step = 0
    while abs(count) >= 999.5 and step < len(prefixes) - 1:
        count, step = count / 1000, step + 1
    return f"{digits(count)} {prefixes[step]}"


def digits(value: float) -> str:
    """Three digits that count, and thousands set off."""
    for limit, places in ((10, 2), (100, 1)):
        if abs(value) < limit:
            return f"{value:,.{places}f}"
    return f"{value:,.0f}"


def share(part: float, whole: float) -> str:
    """In percent; "–" of nothing."""
    return f"{part / whole:.1%}" if whole else "–"


def times(ratio: float) -> str:
    """The change to `ratio` times as much."""
    return f"{ratio:.2f} x"
