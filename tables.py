"""Tables of figures: on the screen, as a JSON file, and the interval of a share."""

import math

import scipy.stats

from files import write_json


def wilson(successes, n) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): inside [0, 1], and it holds for small n, 0 too."""
    if n == 0:
        return 0.0, 1.0
    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    return float(low), float(high)


def print_table(rows, columns):
    """columns: {heading: key of a row, or function row -> text}; text is flush left, numbers flush right."""
    def cell(row, column):
        value = column(row) if callable(column) else row[column]
        return ("-" if math.isnan(value) else f"{value:.3f}") if isinstance(value, float) else str(value)

    lines = [list(columns), *([cell(row, c) for c in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [isinstance(c, str) and isinstance(rows[0][c], str) for c in columns.values()]
    for line in [lines[0], ["-" * w for w in widths], *lines[1:]]:
        cells = zip(line, widths, left, strict=True)
        padded = (c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in cells)
        print("  ".join(padded).rstrip())


def write_table(path, table):
    """The table as a JSON file. What could not be tested, NaN in the rows, is null: JSON has no NaN."""
    def known(value):
        if isinstance(value, dict):
            return {k: known(v) for k, v in value.items()}
        if isinstance(value, list):
            return [known(v) for v in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None

    write_json(path, known(table))


def is_number(value):
    """A finite number of a file. A comparison, which NaN fails, since an int of 400 digits is no float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def interval(row):
    return f"{row['low']:.2f}-{row['high']:.2f}"
