"""What a job makes of the way its steps end: the scripts and Slurm are real, the steps a few lines
of shell."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Job, Lab
from conftest import REPOSITORY, launch

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

TRAIN = REPOSITORY / "slurm" / "train_sop.sh"
SCRIPTS = sorted((REPOSITORY / "slurm").glob("train_*.sh"))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("slurm")) as lab:
        yield lab


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A line for each task of a step: job, step, node."""
    return tmp_path / "started"


def submit(lab: Lab, started: Path, *options: str, steps: str = "") -> Job:
    """A job whose steps, instead of what they are, do what `steps` says: shell that sees the step's
    name as $step."""
    inside = started.with_name("inside")
    inside.write_text(
        "#!/bin/bash\n"
        "case $* in *preflight*) step=preflight ;; *launchers.evaluate*) step=evaluate ;; "
        "*torchrun*) step=train ;; *) step=$2 ;; esac\n"
        f'echo "${{SLURM_ARRAY_TASK_ID-job}} $step $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" >>{started}\n'
        f"{steps}\n"
    )
    inside.chmod(0o755)
    return lab.submit(
        "--cpus-per-task=1",
        *options,
        TRAIN,
        NAMR_CONTAINER=str(inside),
        NAMR_RUN_DIR=str(started.with_name("run")),
        NAMR_MAX_RESTARTS="1",
    )


def steps_of(started: Path) -> Counter[str]:
    """How often each step of each job has run, on any node."""
    return Counter(" ".join(line.split()[:2]) for line in started.read_text().splitlines())


def test_a_preflight_that_does_not_even_start_is_the_end(lab: Lab, started: Path) -> None:
    job = submit(lab, started, steps="exit 127")
    job.ends("FAILED", code=127)
    assert job.fields()["Restarts"] == "0" and "preflight ended with code 127" in job.log()
    assert steps_of(started) == {"job preflight": 2}


def test_a_job_that_only_crashes_gives_up(lab: Lab, started: Path) -> None:
    """As for trouble that time may mend: one more start is made, as asked, and no third."""
    job = submit(lab, started, steps="if [[ $step == train ]]; then exit 74; fi")
    job.ends("FAILED", code=74)
    assert job.fields()["Restarts"] == "1"
    assert "training ended with code 74, and 1 more starts brought no new checkpoint" in job.log()
    assert steps_of(started) == {"job preflight": 4, "job train": 4}


def test_jobs_of_an_array_start_again_each_by_itself(lab: Lab, started: Path) -> None:
    """Job 0 ends well at once. Later 1 and 2 crash, once each: neither 0 nor each other is started
    again for that."""
    array = submit(
        lab,
        started,
        "--nodes=1",
        "--array=0-2",
        steps=(
            f"if [[ $step == train && $SLURM_ARRAY_TASK_ID != 0 ]]; then sleep $((3 * SLURM_ARRAY_TASK_ID)); "
            f'[[ $(grep -c "^$SLURM_ARRAY_TASK_ID train" {started}) == 2 ]] || exit 9; fi'
        ),
    )
    jobs = [Job(lab, f"{array.number}_{task}") for task in range(3)]
    for job in jobs:
        job.ends("COMPLETED")
    assert [job.fields()["Restarts"] for job in jobs] == ["0", "1", "1"]
    assert steps_of(started) == {
        f"{task} {step}": 2 if task and step in ("preflight", "train") else 1
        for task in range(3)
        for step in ("preflight", "train", "evaluate", "report")
    }


@pytest.mark.parametrize(
    ("option", "gpus"), [("--gres=gpu:1", 1), ("--gpus=4", 2), ("--gpus-per-node=2", 2)]
)
def test_however_gpus_are_asked_for_each_step_has_all_of_its_node(
    lab: Lab, started: Path, option: str, gpus: int
) -> None:
    job = submit(lab, started, option)
    job.ends("COMPLETED")
    seen = [line.split(maxsplit=3) for line in started.read_text().splitlines()]
    assert {len(line[3].split(",")) for line in seen} == {gpus}
    assert steps_of(started) == {
        "job preflight": 2,
        "job train": 2,
        "job evaluate": 2,
        "job report": 1,
    }
    assert f"{gpus} ranks a node" in job.log()


def test_variables_that_sbatch_was_told_to_leave_out_are_not_needed(
    lab: Lab, started: Path
) -> None:
    run = started.with_name("run")
    inside = started.with_name("inside")
    submitted = submit(
        lab, started, f"--export=NAMR_HOME={REPOSITORY},NAMR_CONTAINER={inside},NAMR_RUN_DIR={run}"
    )
    submitted.ends("COMPLETED")
    assert steps_of(started)["job train"] == 2


def test_a_time_limit_that_leaves_no_time_is_told(lab: Lab, started: Path) -> None:
    """--signal asks for 300 s, --time gives 120; Slurm looks from time to time."""
    job = submit(lab, started, "--time=2", steps="if [[ $step == preflight ]]; then sleep 60; fi")
    job.ends("FAILED", code=2)
    assert "no time left to train; raise --time, or lower --signal" in job.log()
    assert steps_of(started) == {"job preflight": 2} and job.fields()["Restarts"] == "0"


def test_code_that_a_job_names_is_named_to_all_its_steps() -> None:
    """As module:NAME, in either form of an option; a backbone of timm is none."""
    done = launch(
        "bash",
        "-c",
        'source slurm/env.sh; allowed_code "$@"',
        "env.sh",
        "--set.optim.steps",
        "9",
        "--set.loss.metric",
        "my.losses:Loss",
        "--set.model.backbone=nets:Small",
        "--set.loss.options",
        '{"a": "b:c"}',
        "--set.model.backbone",
        "timm:resnet50",
        cwd=REPOSITORY,
        env={"NAMR_HOME": str(REPOSITORY), "SLURM_JOB_ID": "1"},
    )
    assert done.stdout.split() == [
        "--allow-code",
        "my.losses:Loss",
        "--allow-code",
        "nets:Small",
    ], done.stderr


def test_all_scripts_find_what_they_share_by_the_same_lines() -> None:
    ways = {
        re.search(r"^# Slurm runs a copy.*^source [^\n]*", path.read_text(), re.M | re.S)[0]  # type: ignore[index]
        for path in SCRIPTS
    }
    assert len(SCRIPTS) == 5 and len(ways) == 1


def refused(script: Path, cwd: Path, **environment: str) -> str:
    """The one line with which a script refuses, started as Slurm starts a job: as a copy."""
    copy = shutil.copy(script, cwd / "slurm_script")
    path = "/usr/bin:/bin"  # without namr
    done = launch("bash", copy, cwd=cwd, env={"PATH": path, **environment})
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and not done.stdout
    return line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_outside_a_job_or_far_from_its_folder_says_what_to_do(
    script: Path, tmp_path: Path
) -> None:
    assert "submit it: sbatch" in refused(script, tmp_path)
    line = refused(script, tmp_path, SLURM_JOB_ID="1", SLURM_SUBMIT_DIR=str(tmp_path))
    assert f"no slurm/env.sh in {tmp_path}" in line and "NAMR_HOME" in line


def test_a_job_without_its_environment_says_what_to_do(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(tmp_path / "home")}
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "home" / "slurm")
    line = refused(TRAIN, tmp_path, **job)
    assert f"no .venv/bin/namr in {tmp_path / 'home'}" in line and "make setup" in line
    line = refused(TRAIN, tmp_path, **job, NAMR_ENV=str(tmp_path / "missing.sh"))
    assert f"NAMR_ENV is {tmp_path / 'missing.sh'}" in line and "unset" in line
    (tmp_path / "fails.sh").write_text("return 3\n")
    line = refused(TRAIN, tmp_path, **job, NAMR_ENV=str(tmp_path / "fails.sh"))
    assert "ended with code 3" in line


def test_each_node_compiles_into_a_folder_of_its_own_disk(tmp_path: Path) -> None:
    """One that is this user's alone: another's could hold anybody's code."""

    def cache(**environment: str) -> str:
        task = REPOSITORY / "slurm" / "task.sh"
        done = launch("bash", task, "printenv", "TRITON_CACHE_DIR", env=environment)
        return done.stdout.strip()

    own = tmp_path / f"namr-triton-{os.getuid()}"
    assert cache(TMPDIR=str(tmp_path)) == cache(TMPDIR=str(tmp_path)) == str(own)
    assert own.stat().st_mode & 0o777 == 0o700
    assert cache(TMPDIR=str(tmp_path), TRITON_CACHE_DIR="/chosen") == "/chosen"
    assert Path(cache(TMPDIR=str(tmp_path / "missing"))).is_relative_to("/tmp")
    own.chmod(0o777)
    other = Path(cache(TMPDIR=str(tmp_path)))
    assert other != own and other.stat().st_mode & 0o777 == 0o700
