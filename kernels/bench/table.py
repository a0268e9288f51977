"""The figures as rows: one a (case, provider, pass), appended to a CSV file, read back, or printed.

Columns beside the obvious:
    pass             forward | backward | forward+backward
    samples          timed runs behind the quantiles: fewer for a slow provider, 0 with a note
                     where one failed
    host_ms          GPU only: until the host had issued the pass, median; close to median_ms,
                     launching sets the pace
    matmul_ms        the bare X·Xᵀ in the same dtype, median over the same rounds
    ratio_to_ours    this median over ours in the same pass; empty unless both agree with the
                     definition (or differ from it by definition), and where ours has done the work
                     in its forward pass already
    peak_extra_mib   of one forward and backward pass, the leaves' gradients included
    floor_share      floor (see cases.py) over the median
    agrees           yes | no | differs by definition | witness
    gate             what the results were compared with, and on how many rows
    cold_start_s     first call of every pass in this case; what an earlier case of the process, or
                     a cache on disk, has compiled already is not compiled again
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

Value = str | int | float | None
Row = dict[str, Value]

COLUMNS = (
    "timestamp",
    "device",
    "platform",
    "torch",
    "triton",
    "commit",
    "dtype",
    "loss",
    "provider",
    "B",
    "D",
    "pass",
    "samples",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "host_ms",
    "matmul_ms",
    "ratio_to_ours",
    "peak_extra_mib",
    "floor_share",
    "agrees",
    "loss_error",
    "gradient_error",
    "gate",
    "cold_start_s",
    "note",
)
AGREES, WRONG, DIFFERS, WITNESS = "yes", "no", "differs by definition", "witness"


class RefusedError(ValueError):
    """Something given by the user cannot be used; the message says why and what to do."""


def check_csv(path: Path) -> None:
    """Raise RefusedError unless rows can be appended to `path`: no file, an empty one, or one with
    these columns."""
    if path.is_dir():
        raise RefusedError(f"{path} is a folder; give a file")
    if not path.is_file() or path.stat().st_size == 0:
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        if next(csv.reader(file), None) != list(COLUMNS):
            raise RefusedError(
                f"{path} has other columns than this version writes; move it away or give another --csv"
            )


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add whole lines with one write, on the disk when this returns; the header comes first in a
    new file.

    A line torn by an earlier crash is closed, so that it spoils no other.
    """
    check_csv(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            writer.writeheader()
        elif os.pread(descriptor, 1, size - 1) != b"\n":
            text.write("\n")
        writer.writerows(rows)
        os.write(descriptor, text.getvalue().encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(path: Path) -> list[dict[str, str]]:
    """The complete rows of a file; a torn line is passed over.  Raises RefusedError for any other
    file."""
    if not path.is_file():
        raise RefusedError(
            f"there is no file {path}; run the benchmark first, or give the file it wrote"
        )
    check_csv(path)
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        return [
            dict(zip(COLUMNS, line, strict=True))
            for line in lines
            if len(line) == len(COLUMNS) and line[0] != COLUMNS[0]
        ]


def _number(value: Value, spec: str = "") -> str:
    if not isinstance(value, int | float):
        return "–"
    return format(
        value, spec or (".0f" if abs(value) >= 1000 else ".1f" if abs(value) >= 10 else ".3g")
    )


_HEAD = (
    f"  {'provider':8} {'pass':16} {'ms':>7} {'[p20–p80]':14} {'÷ ours':>7} {'floor':>6} {'MiB':>6}  "
    "agrees (errors of loss, gradient)"
)


def _line(row: Row) -> str:
    quantiles = f"[{_number(row['p20_ms'])}–{_number(row['p80_ms'])}]" if row["samples"] else ""
    share = row["floor_share"]
    percent = f"{100 * share:.0f} %" if isinstance(share, float) else "–"
    said = [str(row["agrees"]).removesuffix(" by definition")]
    if row["loss_error"] is not None:
        said[0] += f" ({_number(row['loss_error'], '.0e')} {_number(row['gradient_error'], '.0e')})"
    said += [str(row["note"])] if row["note"] else []
    text = (
        f"  {row['provider']:8} {row['pass']:16} {_number(row['median_ms']):>7} {quantiles:14} "
        f"{_number(row['ratio_to_ours']):>7} {percent:>6} {_number(row['peak_extra_mib']):>6}  {': '.join(said)}"
    )
    return text if len(text) <= 120 else text[:119] + "…"


def render(rows: Sequence[Row]) -> str:
    """The rows as text, 120 columns wide at most; long notes are cut, the CSV has them whole."""
    lines: list[str] = []
    shown: tuple[Value, ...] = ()
    for row in rows:
        case = tuple(row[name] for name in ("loss", "B", "D", "dtype"))
        if case != shown:
            shown = case
            loss, B, D, dtype = case
            lines += [
                "",
                f"{loss}  B {B}  D {D}  {dtype}  (X·Xᵀ {_number(row['matmul_ms'])} ms)",
                _HEAD,
            ]
        lines.append(_line(row))
    return "\n".join(
        [
            *lines,
            "",
            "÷ ours: how many times faster ours is. MiB: extra memory of forward and backward. "
            "floor: least possible time",
            "over measured time. errors: relative to the float64 definition. "
            "differs: by definition, see the note.",
        ]
    )
