"""kernels/aot.py and kernels/gpu/tune.py: everything is compiled, and what is beyond a limit is
told. No GPU needed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("triton")

COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def python(*arguments: str, env: dict[str, str] = COMPILED) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "namr_dist.kernels.aot", *arguments)


@pytest.fixture
def script(forked_python: Callable) -> Callable[[str], subprocess.CompletedProcess[str]]:
    imports = "from namr_dist.kernels import aot\nfrom namr_dist.kernels.gpu import configs, tune\n"
    return lambda text: forked_python(imports + text)


def test_every_primitive_has_a_case(script: Callable) -> None:
    done = script("""
from namr_dist.kernels import gpu
assert {name.split(",")[0] for name in aot.CASES} == set(gpu.__all__)
kinds = {row.kind for row in configs.TABLE}
assert kinds == {kind for case in aot.CASES.values() for kind in case.tunes} == set(tune.KINDS)
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_within_the_limits_of_hopper():
    done = aot("--arch", "90", "--dtype", "bfloat16", "float32", "--width", "128", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) > 30
    assert all(outcome["spill"] == 0 and outcome["registers"] > 0 for outcome in outcomes)
    products = [outcome for outcome in outcomes if outcome["wanted"] != "-"]
    assert {outcome["matrix"] for outcome in products} == {"wgmma"}
    assert {outcome["dtype"] for outcome in products} == {"bfloat16", "float32"}


@pytest.mark.slow
@pytest.mark.whole
@pytest.mark.timeout(3600)
def test_the_whole_matrix():
    done = aot()
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_no_case_launches_is_named(script: Callable):
    done = script(
        "for case in ('proxy_sums', 'pair_gradient'): del aot.CASES[case]\n"
        "raise SystemExit(aot.main(['--arch', '90', '--dtype', 'bfloat16', '--width', '128',"
        " '--kernel', '_weighted_norms']))"
    )
    assert done.returncode == 1
    assert "proxy_anchor._proxy_sums is launched by no case" in done.stderr
    assert "pairs._pair_sums is launched by no case" in done.stderr
    assert done.stderr.count("launched by no case") == 2


def test_absurd_tiles_fail_by_name_and_limit(script: Callable):
    done = script(
        "configs.TABLE = (configs.Row('scan', 80, 16, configs.ANY, configs.Config(128, 256, 128, 4, 4)),"
        " *(row for row in configs.TABLE if row[0] != 'scan' or row[2] != 16))\n"
        "raise SystemExit(aot.main(['--arch', '90', '--dtype', 'bfloat16', '--width', '128',"
        " '--kernel', '_row_moments']))"
    )
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "FAULT" in line]
    assert "distances._row_moments" in line
    assert "limit 232448" in line
    assert "limit 0" in line


def test_tiles_too_small_for_the_matrix_instruction_fail(script: Callable):
    done = script(
        "configs.TABLE = (configs.Row('scan', 80, 16, configs.ANY, configs.Config(16, 64, 64, 4, 2)),"
        " *(row for row in configs.TABLE if row[0] != 'scan' or row[2] != 16))\n"
        "raise SystemExit(aot.main(['--arch', '90', '--dtype', 'bfloat16', '--width', '128',"
        " '--kernel', '_row_moments']))"
    )
    assert done.returncode == 1, done.stderr
    assert "FAULT: matrix instruction mma.sync, wanted wgmma" in done.stdout


def test_refuses_the_interpreter_and_unknown_names(script: Callable):
    done = script(
        "import os; os.environ['TRITON_INTERPRET'] = '1'\n"
        "raise SystemExit(aot.main(['--arch', '90']))"
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
    assert script("raise SystemExit(aot.main(['--arch', '75']))").returncode == 2
    done = script(
        "raise SystemExit(aot.main(['--arch', '90', '--dtype', 'float16', '--width', '128',"
        " '--kernel', 'nonsense']))"
    )
    assert done.returncode == 2


def test_arguments_are_specialised_as_at_run_time(script: Callable):
    done = script("""
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
class Pointer:
    def __init__(self, tensor): self.dtype, self.offset = tensor.dtype, tensor.storage_offset() * tensor.dtype.itemsize
    def data_ptr(self): return 4096 + self.offset
backend = make_backend(GPUTarget('cuda', 90, 32))
seen = 0
for variant in aot.variants([90], ['bfloat16', 'float32'], [100, 512]):
    kernel, given = variant.launch.kernel, variant.launch.arguments
    given = {n: Pointer(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**given)
    _, types, constants, attributes = kernel._pack_args(backend, {}, bound, specialization, options)
    attributes = {position: value for position, value in attributes.items() if value}
    assert (types, attributes) == aot.specialised(variant.launch)[::2], variant.name
    ours = {kernel.arg_names.index(name): value for name, value in aot.specialised(variant.launch)[1].items()}
    assert {position: value for (position,), value in constants.items()} == ours, variant.name
    seen += 1
print(seen)
""")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 40


def test_the_table_has_a_row_for_every_kernel_and_chip(script: Callable):
    done = script("""
import torch
for arch in (70, 80, 86, 89, 90, 100, 103, 120, 130):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in tune.KINDS:
            if kind == 'gather2' and configs.widest_gather(2, dtype) == 0:
                continue
            size = configs.config(kind, arch, 512, dtype)
            assert size.block_m * size.block_n >= 1024
assert configs.config('scan', 103, 64, torch.float16) == configs.config('scan', 100, 64, torch.float16)
assert configs.config('scan', 70, 64, torch.float16) == configs.config('scan', 80, 64, torch.float16)
try: configs.config('nonsense', 90, 64, torch.float16)
except KeyError: print('refused')
""")
    assert done.stdout == "refused\n", done.stderr


def test_tuning_without_a_gpu_and_its_rows(script: Callable):
    env = COMPILED | {"CUDA_VISIBLE_DEVICES": ""}
    done = python("-m", "namr_dist.kernels.gpu.tune", env=env)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr
    done = script("""
import inspect
text = inspect.getsource(configs)
for row in configs.TABLE:
    assert tune.row_text(row) in text, row
row = configs.Row('scan', 90, 16, 128, configs.Config(64, 64, 32, 4, 2))
assert eval(tune.row_text(row).strip().rstrip(','), vars(configs)) == row
sizes = list(tune.candidates(16))
assert len(sizes) == len(set(sizes)) > 20
before = configs.TABLE
with tune.trial(row):
    import torch
    assert configs.config('scan', 90, 128, torch.float16) == row.config
assert configs.TABLE is before
assert tune.fits(row, 'row_moments', 'bfloat16')
assert not tune.fits(row._replace(config=configs.Config(128, 128, 64, 4, 8)), 'row_moments', 'bfloat16')
""")
    assert done.returncode == 0, done.stderr
