"""Rank discovery from the environment."""

from __future__ import annotations

import os

import pytest

from namr_dist.errors import InputError
from namr_dist.parallel.hostlist import expand_hosts
from namr_dist.parallel.ranks import discover, gpu_index, only_rank, read_launch

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = dict(zip(VARIABLES, ("3", "4", "1", "10.0.0.1", "29500"), strict=True)) | {
    "TORCHELASTIC_RUN_ID": "none"
}
# As Slurm 22.05 sets them on two nodes: the last of four tasks; the shell of a batch job of four
# tasks; that of salloc; and that of salloc with LaunchParameters=use_interactive_step.
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[08-09]",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "1",
    "SLURM_STEPID": "1",
    "SLURM_STEP_NODELIST": "node[08-09]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[08-09]",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
SALLOC = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NODELIST": "node[08-09]",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_TASKS_PER_NODE": "2(x2)",
}
INTERACTIVE = BATCH | {
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NODELIST": "node08",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
}
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
    "MASTER_ADDR": "10.0.0.1",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")  # so that whatever discover() sets is undone afterwards
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "world_size", "local_rank", "address", "port"),
    [
        (TORCHRUN, "torchrun", 3, 4, 1, "10.0.0.1", 29500),
        (
            without(TORCHRUN, "TORCHELASTIC_RUN_ID") | {"CROSS_RANK": "1"},
            "deepspeed",
            3,
            4,
            1,
            "10.0.0.1",
            29500,
        ),
        (without(TORCHRUN, "TORCHELASTIC_RUN_ID"), "environment", 3, 4, 1, "10.0.0.1", 29500),
        (SRUN, "srun", 3, 4, 1, "node08", 20_000 + 16 * 77 + 1),
        (
            SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "400"},
            "srun",
            3,
            4,
            1,
            "10.0.0.1",
            400,
        ),
        (SRUN | {"WORLD_SIZE": "4"}, "srun", 3, 4, 1, "node08", 20_000 + 16 * 77 + 1),
        (OPEN_MPI, "mpirun", 2, 4, 0, "10.0.0.1", 29500),
        (MPICH | {"MASTER_PORT": "400"}, "mpirun", 2, 4, 0, "10.0.0.1", 400),
        # mpirun starts its daemons by srun and torchrun may be started by either: the nearest
        # launcher counts.
        (SRUN | OPEN_MPI, "mpirun", 2, 4, 0, "10.0.0.1", 29500),
        (SRUN | OPEN_MPI | TORCHRUN, "torchrun", 3, 4, 1, "10.0.0.1", 29500),
        # srun --mpi=pmi2
        (
            SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"},
            "srun",
            3,
            4,
            1,
            "node08",
            20_000 + 16 * 77 + 1,
        ),
    ],
)
def test_launchers(
    environ: dict[str, str],
    launcher: str,
    rank: int,
    world_size: int,
    local_rank: int,
    address: str,
    port: int,
) -> None:
    launch = read_launch(environ)
    assert (
        launch.launcher,
        launch.rank,
        launch.world_size,
        launch.local_rank,
        launch.master_addr,
        launch.master_port,
    ) == (launcher, rank, world_size, local_rank, address, port)


@pytest.mark.parametrize(
    "environ", [{}, BATCH, SALLOC, INTERACTIVE], ids=["none", "sbatch", "salloc", "interactive"]
)
def test_alone(environ: dict[str, str]) -> None:
    launch = read_launch(environ)
    assert (launch.rank, launch.world_size, launch.local_rank, launch.master_addr) == (
        0,
        1,
        0,
        "127.0.0.1",
    )


def test_jobs_and_steps_have_ports_of_their_own() -> None:
    steps = [
        SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(70, 90)
        for step in range(16)
    ]
    ports = {read_launch(step).master_port for step in steps}
    assert len(ports) == len(steps) and all(20_000 <= port < 30_000 for port in ports)
    assert read_launch(SRUN | {"SLURM_JOB_ID": "99999999"}).master_port < 30_000


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        (
            {"RANK": "1"},
            "RANK is 1, but the launcher set no WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with",
        ),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but the launcher set no RANK; start with"),
        (
            TORCHRUN | {"RANK": "7"},
            "RANK is 7, but WORLD_SIZE is 4, and ranks count from 0; start with",
        ),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4, but WORLD_SIZE is 4"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1', not a whole number from 0; start with"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not a whole number"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; set it to a free port"),
        (
            without(SRUN, "SLURM_LOCALID"),
            "SLURM_PROCID is 3, but the launcher set no SLURM_LOCALID; start all ranks with",
        ),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID is 4, but SLURM_STEP_NUM_TASKS is 4"),
        (
            SRUN | {"WORLD_SIZE": "16"},
            "WORLD_SIZE is 16, but SLURM_STEP_NUM_TASKS is 4; start one task a rank",
        ),
        (SRUN | {"SLURM_STEP_NODELIST": "node[8"}, r"'node\[8' is no list of hosts"),
        (
            without(OPEN_MPI, "MASTER_ADDR"),
            "OMPI_COMM_WORLD_SIZE is 4 and OMPI_COMM_WORLD_LOCAL_SIZE is 2, so there are "
            "several machines, but MASTER_ADDR is not set; pass",
        ),
        (
            without(MPICH, "MPI_LOCALNRANKS"),
            "PMI_RANK is 2, but the launcher set no MPI_LOCALNRANKS; start all ranks",
        ),
        ({"PMI_RANK": "2"}, "PMI_RANK is 2, but the launcher set no MPI_LOCALRANKID; start with"),
    ],
)
def test_nonsense(environ: dict[str, str], named: str) -> None:
    with pytest.raises(InputError, match=named):
        read_launch(environ)


def test_one_machine_needs_no_address() -> None:
    for environ, size in ((OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"), (MPICH, "MPI_LOCALNRANKS")):
        assert read_launch(without(environ, "MASTER_ADDR") | {size: "4"}).master_addr == "127.0.0.1"


def test_libraries_find_the_five_variables(environment: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        environment.setenv(name, value)
    environment.setenv("SLURM_LOCALID", "0")  # the first GPU, where there is any
    rank = discover()
    assert (rank.rank, rank.world_size, rank.local_rank, rank.first, rank.launcher) == (
        3,
        4,
        0,
        False,
        "srun",
    )
    assert [os.environ[name] for name in VARIABLES] == [
        "3",
        "4",
        "0",
        "node08",
        str(20_000 + 16 * 77 + 1),
    ]
    assert (only_rank().rank, only_rank().world_size) == (0, 1)


def test_nobody_launched(environment: pytest.MonkeyPatch) -> None:
    rank = discover()
    assert (rank.rank, rank.world_size, rank.first, rank.launcher) == (0, 1, True, "none")
    assert os.environ["WORLD_SIZE"] == "1" and int(os.environ["MASTER_PORT"]) > 0


def test_each_rank_has_its_gpu() -> None:
    assert [gpu_index(local, visible=4, on_node=0) for local in range(4)] == [0, 1, 2, 3]
    # srun --gpus-per-task: four on the machine, and each task sees one.
    assert [gpu_index(local, visible=1, on_node=4) for local in range(4)] == [0, 0, 0, 0]
    for visible, on_node in ((1, 0), (1, 1), (2, 2)):
        with pytest.raises(
            InputError, match=f"LOCAL_RANK is 2, but this machine shows {visible} GPUs"
        ):
            gpu_index(2, visible=visible, on_node=on_node)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("node[1-2,7],other", ["node1", "node2", "node7", "other"]),
        ("n[008-010]", ["n008", "n009", "n010"]),
        ("n[9-11]-ib0,n[3]", ["n9-ib0", "n10-ib0", "n11-ib0", "n3"]),
        ("rack[1-2]node[1,3]", ["rack1node1", "rack1node3", "rack2node1", "rack2node3"]),
        ("10.0.0.1,gpu-a.example.org", ["10.0.0.1", "gpu-a.example.org"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize(
    "text",
    ["", ",", "a,", "node[1-2", "node1]", "node[]", "node[2-1]", "node[a-b]", "node[1-]", "a b"],
)
def test_no_host_lists(text: str) -> None:
    with pytest.raises(InputError, match="list of hosts"):
        expand_hosts(text)
