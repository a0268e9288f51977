"""What the structure embedding costs at the size of Stanford Online Products: seconds of each part
on one thread, in the CPU's time and by the clock, and how far the resident memory of its process
rises above what it held before, the rows among it. Each part runs in a process of its own.

    python tools/structure_at_scale.py > docs/results/structure-at-scale.txt
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import torch
from clustered_gaussians import PROTOCOL, TRAIN_ROWS, WIDTH, clustered_gaussians

from namr_dist.config import StructureConfig
from namr_dist.data.shardset.manifest import ROLES
from namr_dist.parallel.host import HostGroup
from namr_dist.provenance import provenance
from namr_dist.retrieval.evaluate import evaluate
from namr_dist.structure.centres import Centres, default_centres
from namr_dist.train.phases import take_peak_bytes
from namr_dist.train.structure_fit import Embedded, fit_structure, rho_of

SEED = 0
QUERY_EVERY = 10


class TimedCentres(Centres):
    """Counts what its k-means takes."""

    def fit(self, z_ND: torch.Tensor, *, seed: int) -> None:
        """Place the centres, and print the time."""
        began, used = time.perf_counter(), time.process_time()
        super().fit(z_ND, seed=seed)
        line(
            began,
            used,
            "",
            f"k-means within fit_structure: {len(self.centres_MD)} centres of {len(z_ND):,} rows",
        )


def new_centres() -> Centres:
    """Of the recipe's number, not yet placed."""
    return TimedCentres(
        centres=default_centres(TRAIN_ROWS),
        width=WIDTH,
        nearest=StructureConfig().nearest,
        unit=False,
    )


def fitted_centres(folder: Path) -> Centres:
    """Those that the part before has fitted and written."""
    centres = new_centres()
    centres.load_state_dict(torch.load(folder / "centres.pt", weights_only=True))
    return centres


def rows(folder: Path, split: str) -> Embedded:
    """The rows of a split."""
    return Embedded(
        z_ND=np.load(folder / f"{split}-z.npy"), label_N=np.load(folder / f"{split}-label.npy")
    )


def choice(folder: Path) -> Callable[[], str]:
    """Place the centres and choose γ."""
    train, centres = rows(folder, "train"), new_centres()

    def part() -> str:
        fitted = fit_structure(centres, train, None, gamma=None, seed=SEED, host=HostGroup())
        torch.save(centres.state_dict(), folder / "centres.pt")
        return f"fit_structure: k-means twice, ρ, γ = {fitted.gamma:g} chosen on held-out classes"

    return part


def rho(folder: Path) -> Callable[[], str]:
    """ρ of all test rows."""
    z_ND, centres = rows(folder, "test").z_ND, fitted_centres(folder)

    def part() -> str:
        rho_N = rho_of(centres, z_ND)
        np.save(folder / "rho.npy", rho_N)
        return f"ρ of {len(rho_N):,} rows"

    return part


def evaluation(folder: Path) -> Callable[[], str]:
    """Every mode of a model with centres, and the control, for one image in QUERY_EVERY; the others
    are only searched."""
    test, centres = rows(folder, "test"), fitted_centres(folder)
    bonus_N = centres.bonus(np.load(folder / "rho.npy"))
    role_N = np.full(len(test.z_ND), ROLES.index("gallery"))
    role_N[::QUERY_EVERY] = ROLES.index("")

    def part() -> str:
        figures = evaluate(
            test.z_ND,
            None,
            test.label_N,
            delta=0.5,
            bonus_N=bonus_N,
            roles_N=role_N,
            clustering=False,
        )
        return f"evaluate, {figures['test_counts']['queries']:,} queries, MAP@R: " + ", ".join(
            f"{mode} {of_mode['MAP@R']:.1f}" for mode, of_mode in figures["test"].items()
        )

    return part


PARTS = {
    "choice": choice,
    "rho": rho,
    "evaluation": evaluation,
}


def line(began: float, used: float, memory: str, said: str) -> None:
    """Print a part's line, from when it began, by the clock and in the process's own time."""
    seconds, of_cpu = time.perf_counter() - began, time.process_time() - used
    print(f"{of_cpu:8.1f}{seconds:9.1f}{memory:20}  {said}", flush=True)


def measure(name: str, folder: Path) -> None:
    """Run a part, and print its line."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    part = PARTS[name](folder)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    began, used = time.perf_counter(), time.process_time()
    said = part()
    peak = take_peak_bytes(torch.device("cpu"))
    line(began, used, f"{(peak - resident) >> 20:10,}{peak >> 20:10,}", said)


def main() -> None:
    """Draw the rows, and measure every part in turn."""
    here = provenance()
    print(
        f"{here['machine']}; {here['versions']}, numpy {np.__version__}, faiss {faiss.__version__}"
    )
    print(f"commit {here['commit']}; Linux {platform.release()}; one thread per process")
    print(
        "The machine had other work on it: load average at the start "
        f"{', '.join(f'{load:.1f}' for load in os.getloadavg())}."
    )
    print(f"Random rows, seed {SEED}: {PROTOCOL}.")
    print("\n   CPU s        s  MiB more  MiB peak", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for split, drawn in zip(("train", "test"), clustered_gaussians(seed=SEED), strict=True):
            np.save(Path(folder) / f"{split}-z.npy", drawn.z_ND)
            np.save(Path(folder) / f"{split}-label.npy", drawn.label_N)
        del drawn
        for name in PARTS:
            subprocess.run([sys.executable, __file__, name, folder], check=True)
    print(f"Load average at the end {', '.join(f'{load:.1f}' for load in os.getloadavg())}.")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
