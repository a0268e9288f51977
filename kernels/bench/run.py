"""One case from data to rows: warm up, gate, time, weigh."""

from __future__ import annotations

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .cases import PASSES, Batch, Case, Form, make_batch
from .gate import Verdict, Yardstick, judge, yardsticks
from .machine import describe
from .measure import Spread, Stopwatch, cold_start, interleave, spread
from .memory import peak_extra_mib
from .providers import GRADIENT_IN_FORWARD, bare_product, difference, find_form, obstacle
from .table import AGREES, DIFFERS, WITNESS, WRONG, Row, append


@dataclass(kw_only=True)
class _Entry:
    """One provider in one case."""

    provider: str
    form: Form | None = None
    cold_s: float | None = None
    agrees: str = ""
    verdict: Verdict | None = None
    peak_mib: float | None = None
    notes: list[str] = field(default_factory=list)

    def fail(self, step: str, error: Exception) -> None:
        first = (str(error).strip() or "no message").splitlines()[0]
        self.notes.append(f"{step} failed: {type(error).__name__}: {first}")


@contextlib.contextmanager
def _exact_products(case: Case) -> Iterator[None]:
    # TF32 holds every value of a half type exactly; for float32 it would be a loss of precision.
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = case.dtype != "float32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def run(cases: Sequence[Case], providers: Sequence[str], *, samples: int, csv: Path) -> list[Row]:
    """Measure every case; its rows are in the file before the next one starts.  Progress goes to stderr."""
    rows: list[Row] = []
    constant: Row = {**describe(torch.device(cases[0].device))}
    for number, case in enumerate(cases, 1):
        began = time.perf_counter()
        constant["timestamp"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with _exact_products(case):
            found, remarks = measure(case, providers, samples=samples)
        found = [{**constant, **row} for row in found]
        append(csv, found)
        rows += found
        print(f"[{number}/{len(cases)}] {case}: {'; '.join([f'{time.perf_counter() - began:.0f} s', *remarks])}",
              file=sys.stderr, flush=True)
    return rows


def measure(case: Case, providers: Sequence[str], *, samples: int) -> tuple[list[Row], list[str]]:
    """The rows of one case without the machine's columns, and what a reader of the progress should know."""
    device = torch.device(case.device)
    batch, watch = make_batch(case), Stopwatch(device)
    remarks = [f"without {name} ({reason})" for name in providers if (reason := obstacle(name, case))]
    entries = [_Entry(provider=name) for name in providers if name != "matmul" and not obstacle(name, case)]
    for entry in entries:
        # Before the gate, which would warm it up.
        try:
            form = find_form(entry.provider, case.loss)
            entry.cold_s = cold_start(form, batch, device)
            entry.form = form
        except Exception as error:  # whatever breaks in a provider must not end the others
            entry.fail("first call", error)
    against = yardsticks(case, batch)
    for entry in entries:
        if entry.form is not None:
            _examine(entry, entry.form, case, batch, against)
    forms = {entry.provider: entry.form for entry in entries if entry.form is not None}
    timed, witnessed = interleave(forms, bare_product, batch, watch, rounds=samples)
    for entry in entries:
        if entry.form is not None:
            try:
                entry.peak_mib = peak_extra_mib(case, entry.provider, entry.form, batch)
            except Exception as error:
                entry.fail("memory", error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    remarks += [f"{entry.provider}: {entry.notes[0]}" for entry in entries if entry.form is None]
    remarks += [f"{entry.provider} does NOT agree" for entry in entries if entry.agrees == WRONG]
    return _rows(case, entries, timed, witnessed, against, witness="matmul" in providers), remarks


def _examine(entry: _Entry, form: Form, case: Case, batch: Batch, against: list[Yardstick]) -> None:
    reason = difference(entry.provider, case.loss)
    if reason:
        entry.agrees = DIFFERS
        entry.notes.append(reason)
        return
    entry.agrees = WRONG
    try:
        entry.verdict = judge(form, case, batch, against)
    except Exception as error:
        entry.fail("gate", error)
        return
    if entry.verdict.agrees:
        entry.agrees = AGREES
    if entry.verdict.apart:
        entry.notes.append(f"{entry.verdict.apart} rows apart beside near ties")


def _rows(case: Case, entries: Sequence[_Entry], timed: dict[tuple[str, str], list[float]],
          witnessed: list[float], against: list[Yardstick], *, witness: bool) -> list[Row]:
    matmul = spread(witnessed)
    spreads = {key: spread(samples) for key, samples in timed.items()}
    ours = next((entry for entry in entries if entry.provider == "ours" and entry.agrees == AGREES), None)
    gate = " + ".join(f"{yardstick.name} B {yardstick.rows}" for yardstick in against)
    rows = []
    for part in PASSES:
        for entry in entries:
            if entry.form is None and part != PASSES[-1]:
                continue  # a failure is told once
            verdict, row = entry.verdict, _blank(case, entry.provider, part, matmul)
            row.update(agrees=entry.agrees, cold_start_s=entry.cold_s, gate=gate if verdict else "",
                       loss_error=verdict.loss_error if verdict else None,
                       gradient_error=verdict.gradient_error if verdict else None,
                       peak_extra_mib=entry.peak_mib if part == PASSES[-1] else None)
            notes = list(entry.notes)
            measured = spreads.get((entry.provider, part))
            if measured:
                _fill(row, measured, len(witnessed))
                hollow = part == "backward" and entry.provider in GRADIENT_IN_FORWARD
                if hollow:
                    notes.insert(0, "in forward")
                elif case.floor_flops(part):
                    floor_ms = matmul.median * case.floor_flops(part) / case.matmul_flops()
                    row["floor_share"] = floor_ms / measured.median
                if ours and entry.agrees != WRONG and part != "backward":
                    row["ratio_to_ours"] = measured.median / spreads["ours", part].median
            rows.append({**row, "note": "; ".join(notes)})
        if witness and part == "forward":
            row = _blank(case, "matmul", part, matmul)
            _fill(row, matmul, len(witnessed))
            row["agrees"] = WITNESS
            if ours:
                row["ratio_to_ours"] = matmul.median / spreads["ours", part].median
            rows.append(row)
    return rows


def _blank(case: Case, provider: str, part: str, matmul: Spread) -> Row:
    return {"dtype": case.dtype, "loss": case.loss, "provider": provider, "B": case.rows, "D": case.width, "pass": part,
            "samples": 0, "median_ms": None, "p20_ms": None, "p80_ms": None, "matmul_ms": matmul.median,
            "ratio_to_ours": None, "peak_extra_mib": None, "floor_share": None, "agrees": "", "loss_error": None,
            "gradient_error": None, "gate": "", "cold_start_s": None, "note": ""}


def _fill(row: Row, measured: Spread, samples: int) -> None:
    row.update(samples=samples, median_ms=measured.median, p20_ms=measured.p20, p80_ms=measured.p80)
