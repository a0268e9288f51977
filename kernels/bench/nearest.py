"""Nearest centres compared with plain PyTorch and torch.compile, by
`python -m namr_dist.kernels.bench.nearest`.

A module of its own, for the op is no loss: its data are N rows and M centres, without labels, and
its witness is the product of the two.  Rows lie in loose clusters about the centres, which are
moved a little, as in a later iteration of k-means.  All run in one process, turn by turn
(measure.py), after each has shown that it computes the same on CHECKED rows as the definition in
float64: squared distances to a share of 1e-4 (a matrix form cancels), gradients to 1e-3.  Peak
memory is that of one forward and backward pass in a process of its own, gradients included, inputs
not (memory.py).  On a CPU milliseconds are processor time, summed over threads: what else the
machine does then counts little.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from .. import nearest, reference
from .machine import describe
from .measure import Stopwatch, Timing, affordable, spread
from .memory import cuda_peak_mib, resident_peak_mib

CHECKED = 256
SIZES = ((2_000, 500, 128), (59_551, 512, 512))
PASSES = ("forward", "forward+backward")
COLUMNS = ("device", "platform", "torch", "triton", "commit", "dtype", "provider", "N", "M", "D", "k", "pass",
           "samples", "median_ms", "p20_ms", "p80_ms", "ratio_to_ours", "product_ms", "peak_extra_mib",
           "distance_error", "gradient_error")  # fmt: skip

Leaves = tuple[Tensor, Tensor]
Form = Callable[[Tensor, Tensor, int], Tensor]
"""(z_ND, centres_MD, k) -> the squared distances (N, k)."""


def ours(z_ND: Tensor, centres_MD: Tensor, k: int) -> Tensor:
    """The op."""
    return nearest.nearest_centres(z_ND, centres_MD, k=k)[0]


def matmul(z_ND: Tensor, centres_MD: Tensor, k: int) -> Tensor:
    """‖z‖² + ‖c‖² − 2 z·c of all pairs, and topk; in float32."""
    z_ND, centres_MD = z_ND.float(), centres_MD.float()
    norm_N1, norm_M = z_ND.square().sum(1, keepdim=True), centres_MD.square().sum(1)
    squared_NM = torch.addmm(norm_M, z_ND, centres_MD.T, alpha=-2) + norm_N1
    return squared_NM.topk(k, dim=1, largest=False).values


def cdist(z_ND: Tensor, centres_MD: Tensor, k: int) -> Tensor:
    """torch.cdist, and topk; in float32."""
    distance_NM = torch.cdist(z_ND.float(), centres_MD.float())
    return distance_NM.topk(k, dim=1, largest=False).values.square()


FORMS: dict[str, Form] = {"ours": ours, "matmul": matmul, "cdist": cdist}
PROVIDERS = (*FORMS, "compile")


def find_form(provider: str) -> Form:
    """A provider's form; "compile" is torch.compile of the matrix form."""
    if provider == "compile":
        compiled: Form = torch.compile(matmul, dynamic=False)
        return compiled
    return FORMS[provider]


@dataclass(frozen=True)
class Case:
    """One size; plain values, so that it travels to another process."""

    rows: int
    centres: int
    width: int
    k: int
    dtype: str
    device: str

    def data(self) -> tuple[Tensor, Tensor]:
        """z (N, D) and centres (M, D), leaves; the same in every process."""
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, self.width, generator=generator, device=self.device)

        centres_MD = normal(self.centres) / (2 * self.width) ** 0.5
        class_N = torch.arange(self.rows, device=self.device) % self.centres
        z_ND = centres_MD[class_N] + normal(self.rows) / (2 * self.width) ** 0.5
        centres_MD = centres_MD + 0.2 * normal(self.centres) / (2 * self.width) ** 0.5
        dtype = getattr(torch, self.dtype)
        return z_ND.to(dtype).requires_grad_(), centres_MD.to(dtype).requires_grad_()


class ProcessorClock(Stopwatch):
    """A stopwatch that on a CPU reads the processor time of this process."""

    def __call__(self, call: Callable[[], object]) -> Timing:
        """The time of one call."""
        if self.cuda:
            return super().__call__(call)
        began = time.process_time()
        call()
        spent_ms = 1000 * (time.process_time() - began)
        return Timing(spent_ms, spent_ms)


def run_pass(form: Form, leaves: Leaves, k: int, part: str) -> None:
    """One pass; gradients of a mean are dropped."""
    if part == "forward":
        with torch.no_grad():
            form(*leaves, k)
    else:
        torch.autograd.grad(form(*leaves, k).mean(), leaves)


def errors(form: Form, case: Case) -> tuple[float, float]:
    """Largest relative error of a squared distance, and of a gradient over its largest entry."""
    z_ND, centres_MD = (leaf.detach() for leaf in case.data())
    leaves = z_ND[:CHECKED].clone().requires_grad_(), centres_MD.clone().requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    squared_NK = form(*leaves, case.k)
    wanted_NK, _ = reference.nearest_centres(*exact, k=case.k)
    gradients = torch.autograd.grad(squared_NK.mean(), leaves)
    wanted = torch.autograd.grad(wanted_NK.mean(), exact)
    return float(((squared_NK.double() - wanted_NK) / wanted_NK).abs().max().detach()), max(
        float((one.double() - other).abs().max() / other.abs().max())
        for one, other in zip(gradients, wanted, strict=True)
    )


def peak_mib(case: Case, provider: str, form: Form) -> float:
    """MiB of one forward and backward pass: on a CPU in a process of its own."""
    if torch.device(case.device).type == "cuda":
        leaves = case.data()
        return cuda_peak_mib(
            lambda: run_pass(form, leaves, case.k, PASSES[1]), torch.device(case.device)
        )
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_in_fresh_process, case, provider, torch.get_num_threads()).result()


def _in_fresh_process(case: Case, provider: str, threads: int) -> float:
    torch.set_num_threads(threads)
    (z_ND, centres_MD), form = case.data(), find_form(provider)
    # Loads libraries; torch.compile must meet its full size before.
    few_ND = z_ND if provider == "compile" else z_ND.detach()[:64].requires_grad_()
    run_pass(form, (few_ND, centres_MD), case.k, PASSES[1])
    return resident_peak_mib(lambda: run_pass(form, (z_ND, centres_MD), case.k, PASSES[1]))


def measure(
    case: Case, providers: Sequence[str], *, rounds: int, budget_s: float
) -> list[dict[str, object]]:
    """The rows of one case.  Raises RuntimeError for a provider that does not agree."""
    torch._dynamo.reset()
    forms = {name: find_form(name) for name in providers}
    found = {name: errors(form, case) for name, form in forms.items()}
    for name, (distance_error, gradient_error) in found.items():
        if not (distance_error <= 1e-4 and gradient_error <= 1e-3):
            raise RuntimeError(f"{name} does not agree: {distance_error:.1e}, {gradient_error:.1e}")
    leaves, watch = case.data(), ProcessorClock(torch.device(case.device))
    times: dict[tuple[str, str], list[float]] = {
        (name, part): [] for name in forms for part in PASSES
    }
    product: list[float] = []
    shares = {}
    for name, form in forms.items():
        for part in PASSES:
            run_pass(form, leaves, case.k, part)
        once = watch(lambda form=form: run_pass(form, leaves, case.k, PASSES[1]))  # type: ignore[misc]
        shares[name] = affordable(once.ms, passes=2, rounds=rounds, budget_s=budget_s)
    names = list(forms)
    for turn in range(rounds):
        with torch.no_grad():
            product.append(watch(lambda: leaves[0] @ leaves[1].T).ms)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if (turn + 1) * shares[name] // rounds == turn * shares[name] // rounds:
                continue
            for part in PASSES:
                timing = watch(
                    lambda name=name, part=part: run_pass(forms[name], leaves, case.k, part)  # type: ignore[misc]
                )
                times[name, part].append(timing.ms)
    rows: list[dict[str, object]] = []
    constant = describe(torch.device(case.device))
    for (name, part), samples in times.items():
        spent = spread(samples)
        base = spread(times["ours", part]).median if "ours" in forms else None
        rows.append(
            {**constant, "dtype": case.dtype, "provider": name, "N": case.rows, "M": case.centres, "D": case.width,
             "k": case.k, "pass": part, "samples": len(samples), "median_ms": spent.median, "p20_ms": spent.p20,
             "p80_ms": spent.p80, "ratio_to_ours": base and spent.median / base,
             "product_ms": spread(product).median,
             "peak_extra_mib": peak_mib(case, name, forms[name]) if part == PASSES[1] else None,
             "distance_error": found[name][0], "gradient_error": found[name][1]})  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m namr_dist.kernels.bench.nearest",
        description="Time and memory of nearest centres.",
    )
    parser.add_argument("--size", nargs=3, type=int, action="append", metavar=("N", "M", "D"),
                        help="rows, centres, width; may be repeated (2000 500 128, 59551 512 512)")  # fmt: skip
    parser.add_argument("--k", type=int, default=5, help="centres of a row (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--providers", choices=PROVIDERS, nargs="+", default=list(PROVIDERS))
    parser.add_argument("--samples", type=int, default=15, help="rounds (%(default)s)")
    parser.add_argument("--budget", type=float, default=60, metavar="SECONDS",
                        help="what a provider's rounds may take in a case (%(default)s)")  # fmt: skip
    parser.add_argument("--csv", type=Path, default=Path("runs/bench/nearest-centres.csv"), metavar="FILE",
                        help="replaced (%(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    rows = []
    for N, M, D in options.size or SIZES:
        case = Case(N, M, D, options.k, options.dtype, options.device)
        rows += measure(case, options.providers, rounds=options.samples, budget_s=options.budget)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    options.csv.parent.mkdir(parents=True, exist_ok=True)
    part = options.csv.with_name(options.csv.name + ".part")
    part.write_text(text.getvalue(), encoding="utf-8")
    os.replace(part, options.csv)
    print(text.getvalue(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
