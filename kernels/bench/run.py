"""One case from data to rows: warm up, gate, time, weigh."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from .cases import PASSES, Batch, Case, Form, make_batch
from .gate import Verdict, Yardstick, judge, yardsticks
from .machine import describe
from .measure import (
    Rounds,
    Stopwatch,
    Timing,
    affordable,
    cold_start,
    interleave,
    release,
    sample,
    spread,
    told,
)
from .memory import peak_extra_mib
from .providers import GRADIENT_IN_FORWARD, bare_product, difference, find_form, obstacle
from .table import AGREES, COLUMNS, DIFFERS, WITNESS, WRONG, Row, append

Result = TypeVar("Result")


@dataclass(kw_only=True)
class _Entry:
    """One provider in one case."""

    provider: str
    form: Form | None = None
    cold_s: float | None = None
    agrees: str = ""
    verdict: Verdict | None = None
    gate: str = ""
    peak_mib: float | None = None
    share: int = 0
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def _exact_products(case: Case) -> Iterator[None]:
    # TF32 holds every value of a half type exactly; for float32 it would be a loss of precision.
    # Not by the newer fp32_precision, which torch.compile, asking for this one, would find
    # contradicted.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype != "float32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run(
    cases: Sequence[Case],
    providers: Sequence[str],
    *,
    passes: Sequence[str],
    samples: int,
    budget_s: float,
    csv: Path,
) -> list[Row]:
    """Measure every case; its rows are in the file before the next one starts.  Progress goes to
    stderr."""
    rows: list[Row] = []
    constant: Row = {**describe(torch.device(cases[0].device))}
    for number, case in enumerate(cases, 1):
        began = time.perf_counter()
        constant["timestamp"] = datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        )
        with _exact_products(case):
            case_rows, remarks = measure(
                case, providers, passes=passes, samples=samples, budget_s=budget_s
            )
        case_rows = [{**constant, **row} for row in case_rows]
        append(csv, case_rows)
        rows += case_rows
        print(
            f"[{number}/{len(cases)}] {case}: {'; '.join([f'{time.perf_counter() - began:.0f} s', *remarks])}",
            file=sys.stderr,
            flush=True,
        )
    return rows


def measure(
    case: Case,
    providers: Sequence[str],
    *,
    passes: Sequence[str] = PASSES,
    samples: int,
    budget_s: float = 10.0,
) -> tuple[list[Row], list[str]]:
    """The rows of one case without the machine's columns, and what a reader of the progress should
    know.

    samples: rounds.  budget_s: seconds that the rounds of one provider may take; a slower one takes
        part in fewer.
    """
    device = torch.device(case.device)
    batch, watch = make_batch(case), Stopwatch(device)
    remarks = [
        f"without {name} ({reason})" for name in providers if (reason := obstacle(name, case))
    ]
    entries = [
        _Entry(provider=name) for name in providers if name != "matmul" and not obstacle(name, case)
    ]
    for entry in entries:
        # Before the gate, which would warm it up.
        _attempt(entry, "first call", batch, partial(_start, entry, case, batch, passes))
    against = yardsticks(case, batch)
    for entry in entries:
        if entry.form is not None:
            _examine(entry, entry.form, case, batch, against)
    del against  # gradients in float64: the passes below may need the room
    longest = PASSES[-1] if set(passes) != {"forward"} else "forward"
    for entry in entries:
        if entry.form is not None:
            once = _attempt(
                entry, "second call", batch, partial(sample, longest, entry.form, batch, watch)
            )
            entry.share = (
                affordable(once.ms, passes=len(passes), rounds=samples, budget_s=budget_s)
                if once
                else 0
            )
    forms = {
        entry.provider: entry.form for entry in entries if entry.form is not None and entry.share
    }
    timed = interleave(
        forms,
        bare_product,
        batch,
        watch,
        rounds=samples,
        passes=passes,
        shares={entry.provider: entry.share for entry in entries},
    )
    for entry in entries:
        if entry.provider in timed.failures:
            entry.notes.append(f"rounds failed: {timed.failures[entry.provider]}")
        elif entry.provider in forms and PASSES[-1] in passes:
            peak = partial(peak_extra_mib, case, entry.provider, forms[entry.provider], batch)
            entry.peak_mib = _attempt(entry, "memory", batch, peak)
    release(batch)
    remarks += [
        f"{entry.provider}: {entry.notes[-1]}"
        for entry in entries
        if (entry.provider, passes[-1]) not in timed.timings
    ]
    remarks += [f"{entry.provider} does NOT agree" for entry in entries if entry.agrees == WRONG]
    return _rows(case, entries, timed, passes=passes, witness="matmul" in providers), remarks


def _attempt(entry: _Entry, step: str, batch: Batch, call: Callable[[], Result]) -> Result | None:
    """Whatever breaks in a provider becomes a note and must not end the others."""
    try:
        return call()
    except Exception as error:
        entry.notes.append(f"{step} failed: {told(error)}")
    release(batch)  # not in the handler, where the error still holds the broken pass
    return None


def _start(entry: _Entry, case: Case, batch: Batch, passes: Sequence[str]) -> None:
    form = find_form(entry.provider, case.loss)
    entry.cold_s = cold_start(form, batch, torch.device(case.device), passes)
    entry.form = form


def _examine(entry: _Entry, form: Form, case: Case, batch: Batch, against: list[Yardstick]) -> None:
    reason = difference(entry.provider, case.loss)
    if reason:
        entry.agrees = DIFFERS
        entry.notes.append(reason)
        return
    entry.agrees = WRONG
    if entry.provider == "compile":
        against = against[-1:]  # for another number of rows it would be compiled once more
    entry.verdict = _attempt(entry, "gate", batch, partial(judge, form, case, batch, against))
    if entry.verdict is None:
        return
    entry.gate = " + ".join(f"{yardstick.name} B {yardstick.rows}" for yardstick in against)
    if entry.verdict.agrees:
        entry.agrees = AGREES
    if entry.verdict.apart:
        entry.notes.append(f"{entry.verdict.apart} rows apart beside near ties")


def _rows(
    case: Case, entries: Sequence[_Entry], timed: Rounds, *, passes: Sequence[str], witness: bool
) -> list[Row]:
    matmul_ms = spread([timing.ms for timing in timed.witnessed]).median
    median_ms = {
        key: spread([timing.ms for timing in timings]).median
        for key, timings in timed.timings.items()
    }
    ours = any(entry.provider == "ours" and entry.agrees == AGREES for entry in entries)
    rows = []
    for part in passes:
        for entry in entries:
            timings = timed.timings.get((entry.provider, part))
            if timings is None and part != passes[-1]:
                continue  # a failure is told once
            verdict, row = entry.verdict, _row(case, entry.provider, part, matmul_ms, timings or [])
            row.update(
                agrees=entry.agrees,
                cold_start_s=entry.cold_s,
                gate=entry.gate,
                loss_error=verdict.loss_error if verdict else None,
                gradient_error=verdict.gradient_error if verdict else None,
                peak_extra_mib=entry.peak_mib if part == PASSES[-1] else None,
            )
            notes = list(entry.notes)
            if timings:
                if part == "backward" and entry.provider in GRADIENT_IN_FORWARD:
                    notes.insert(0, "in forward")
                elif case.floor_flops(part):
                    floor_ms = matmul_ms * case.floor_flops(part) / case.matmul_flops()
                    row["floor_share"] = floor_ms / median_ms[entry.provider, part]
                if (
                    ours
                    and entry.agrees != WRONG
                    and part != "backward"
                    and ("ours", part) in median_ms
                ):
                    row["ratio_to_ours"] = median_ms[entry.provider, part] / median_ms["ours", part]
            rows.append({**row, "note": "; ".join(notes)})
    if witness:
        row = _row(case, "matmul", "forward", matmul_ms, timed.witnessed)
        row["agrees"] = WITNESS
        if ours and ("ours", "forward") in median_ms:
            row["ratio_to_ours"] = matmul_ms / median_ms["ours", "forward"]
        rows.append(row)
    return rows


def _row(case: Case, provider: str, part: str, matmul_ms: float, timings: Sequence[Timing]) -> Row:
    """A row with its case and its times, the rest empty."""
    row: Row = {
        **dict.fromkeys(COLUMNS[6:]),
        "dtype": case.dtype,
        "loss": case.loss,
        "provider": provider,
        "B": case.rows,
        "D": case.width,
        "pass": part,
        "samples": len(timings),
        "matmul_ms": matmul_ms,
        "agrees": "",
        "gate": "",
        "note": "",
    }
    if timings:
        times = spread([timing.ms for timing in timings])
        row.update(median_ms=times.median, p20_ms=times.p20, p80_ms=times.p80)
        if torch.device(case.device).type == "cuda":
            row["host_ms"] = spread([timing.host_ms for timing in timings]).median
    return row
