"""Tuning of tile sizes, as far as a machine without a GPU can show it."""

import csv
from collections.abc import Callable
from pathlib import Path


def test_tuning_compiles_ahead_what_is_then_timed(forked_python: Callable) -> None:
    ended = forked_python(
        """
import torch
from namr_dist.kernels import aot
from namr_dist.kernels.gpu import tune
from namr_dist.kernels.gpu.launch import recording
for kind, cases in tune.KINDS.items():
    for task in tune.tasks([kind], ['float32', 'bfloat16'], [128, 512], 90):
        marked = task.table._replace(config=tune.Config(64, 64, 32, 4, 7))
        for case in cases:
            for inputs in (tune.MetaInputs, aot.Inputs):  # those that are timed, those that limits are looked up for
                with tune.trial(marked), recording(90) as seen:
                    aot.CASES[case](inputs(task.width, aot.DTYPES[task.dtype]))
                assert any(launch.config == marked.config for launch in seen.launches), (task, case, inputs)
assert {task.kind for task in tune.tasks(list(tune.KINDS), ['float32', 'bfloat16'], [128, 512], 90)} == set(tune.KINDS)
tune.KINDS['scan'] = ('proxy_sums',)
tune.stand_in(90)
row = tune.Task('scan', 90, 'bfloat16', 128).table
assert tune.compile_ahead(row, 'bfloat16') == ''
assert 'shared memory' in tune.compile_ahead(row._replace(config=tune.Config(128, 128, 64, 8, 8)), 'bfloat16')
with recording(90) as seen:
    aot.CASES['proxy_sums'](tune.MetaInputs(128, torch.bfloat16))
launch, = seen.launches
real = {name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()}
size = {'num_warps': launch.config.warps, 'num_stages': launch.config.stages}
started = [launch.kernel.run(grid=(1,), warmup=True, **given, **size) for given in (launch.arguments, real)]
assert started[0] is started[1], 'with numbers in them it is another kernel'
"""
    )
    assert ended.returncode == 0, ended.stderr


def test_tuning_takes_the_fastest_that_agrees_and_is_within_the_limits(
    tmp_path: Path, forked_python: Callable
) -> None:
    ended = forked_python(
        """
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
import torch
from namr_dist.kernels.gpu import configs, tune
task = tune.Task('rank', 90, 'bfloat16', 128)
rows = task.rows
assert rows[0] == task.table and len(rows) == len(set(rows)) > 20
wrong, broken, spills, best = rows[5:9]
def run(case, inputs, watch):
    now = tune.config('rank', 90, 128, torch.bfloat16)
    if now == broken.config:
        raise RuntimeError('out of resources')
    order = {wrong.config: 1.0, spills.config: 2.0, best.config: 3.0}
    return order.get(now, 10.0), [torch.ones(4) * (2 if now == wrong.config else 1)]
tune.run, tune.Stopwatch, tune.RealInputs = run, lambda device: None, lambda *given: None
tune.fits = lambda row, case, dtype: row != spills
compiled = [Future() for row in rows]
for position, future in enumerate(compiled):
    future.set_result('takes too much' if position == 9 else '')
with ThreadPoolExecutor(1) as pool:
    chosen, tried = tune.search(task, compiled, pool, 5)
assert chosen == best, chosen
tune.log(Path(sys.argv[1]), task, chosen, tried)
""",
        tmp_path / "tune.csv",
    )
    assert ended.returncode == 0, ended.stderr
    with (tmp_path / "tune.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "ranking"]
    notes = [row["note"] for row in rows[5:10]]
    assert notes == [
        "ranking: other results than the table's tiles",
        "RuntimeError: out of resources",
        "beyond a limit of kernels/aot.py",
        "",
        "takes too much",
    ]
    # All are timed three times, finalists five times more; the table's own is one of them, wherever
    # it stands.
    assert [row["samples"] for row in rows[5:10]] == ["0", "0", "8", "8", "0"] and rows[0][
        "samples"
    ] == "8"
    assert [row["chosen"] for row in rows[7:9]] == ["", "yes"] and rows[8]["median_ms"] == "3.0"
    assert rows[-1]["samples"] == "3"
