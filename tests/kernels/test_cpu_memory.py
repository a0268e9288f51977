"""A batch of 65,536 rows on a CPU: no loss takes 2 GiB for its 4.3 billion pairs."""

from __future__ import annotations

import pytest

from namr_dist.kernels.bench.cases import LOSSES, Case, make_batch
from namr_dist.kernels.bench.memory import peak_extra_mib
from namr_dist.kernels.bench.providers import find_form


@pytest.mark.whole
@pytest.mark.timeout(900)
@pytest.mark.parametrize("loss", LOSSES)
def test_65536_rows_take_less_than_two_gib(loss: str) -> None:
    case = Case(loss=loss, rows=65536, width=128, dtype="float32", device="cpu")
    peak_mib = peak_extra_mib(case, "ours", find_form("ours", loss), make_batch(case))
    print(f"{loss}: {peak_mib:.0f} MiB")
    assert peak_mib < 2048
