"""`namr preflight`: one process a node, all at once, before ranks start there.

Each node checks itself and tells the first, which compares them, prints one table and gives all the
same exit code. Shares of the limit say when each part ends, whatever hangs; see also deadline.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from namr_dist import named_code
from namr_dist.cluster import checks
from namr_dist.cluster.deadline import (
    EXIT_CODE,
    MORE_TIME,
    Deadline,
    TooLateError,
    node_name,
    within,
)
from namr_dist.cluster.rendezvous import FirstNodeGoneError, Rendezvous
from namr_dist.cluster.report import Report, compare, in_words_of_the_job, show
from namr_dist.config import Config
from namr_dist.data.remote.address import shown
from namr_dist.errors import InputError, ReportedError
from namr_dist.parallel.hostlist import expand_hosts
from namr_dist.parallel.ranks import Launch, read_launch
from namr_dist.retrieval.search import search_backend
from namr_dist.text import say
from namr_dist.train.dry_run import dry_run

_CHECKED, _REPORTED, _EXCHANGED, _TOLD = 0.5, 0.7, 0.85, 0.95
_HUNG = "is that file system hung?"
_REMOVAL_S = 1.0


class _Terminated(BaseException):
    """SIGTERM came."""


@dataclass(frozen=True, kw_only=True)
class _Check:
    fact: str | None
    """Field of Report that takes what is found; None: nothing to keep."""
    doing: str
    hint: str
    """What it may mean if this does not end."""
    find: Callable[[], Any]


def preflight(
    config: Config | InputError, run: Path, *, ranks_per_node: int | None, deadline: Deadline
) -> int:
    """Check all nodes for a run of `config` in the folder `run`, and print what was found.

    config: an InputError if the settings could not be read here.  ranks_per_node: None: one a GPU,
    or one. Returns the exit code: 0, 2 if ranks would fail, or 143 after SIGTERM, which it handles,
    and for which it needs the main thread. Raises InputError, on one node, if the nodes do not
    meet.
    """
    launch = read_launch(os.environ)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        node = _Node(config, run, ranks_per_node, launch, deadline)
        try:
            return node.lead() if launch.rank == 0 else node.follow()
        finally:
            node.remove_probe()
    except _Terminated:
        return 128 + signal.SIGTERM
    except (FirstNodeGoneError, dist.DistError) as error:
        # The first node speaks for all. Where it does not, one more is enough.
        if launch.rank == 1:
            reason = (
                str(error)
                if isinstance(error, FirstNodeGoneError)
                else "the connection to the first node broke; see what it says"
            )
            raise InputError(f"preflight: {node_name()}: {reason}") from None
        return EXIT_CODE


def _terminate(number: int, frame: object) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # a second one shall not stop what the first began
    raise _Terminated


class _Node:
    """This process among the nodes."""

    def __init__(
        self,
        config: Config | InputError,
        run: Path,
        ranks_per_node: int | None,
        launch: Launch,
        deadline: Deadline,
    ) -> None:
        self._config = _for_checks(config) if isinstance(config, Config) else config
        self._run = run
        self._ranks_per_node = ranks_per_node
        self._launch = launch
        self._deadline = deadline
        self._rendezvous = Rendezvous(launch, deadline)
        self._rendezvous.publish(f"name/{launch.rank}", node_name())
        self._report = Report()
        self._probe: Path | None = None

    def lead(self) -> int:
        """The first node: gather, compare, show, and tell all."""
        size = self._launch.world_size
        self._check(self._checks())
        reports = {0: self._report, **self._gather("report", share=_REPORTED)}
        silent = set(range(size)) - reports.keys()
        backend = _backend(reports) if size > 1 and not silent else ""
        self._rendezvous.publish("backend", backend)
        if backend:
            self._exchange(backend)
            reports |= {0: self._report, **self._gather("exchanged", share=_TOLD)}
        names = _names(
            [self._rendezvous.read(f"name/{rank}", share=0) for rank in range(size)], os.environ
        )
        problems = compare(reports, names, ranks_per_node=self._ranks_per_node)
        problems += [f"{names[rank]}: {self._why_silent(rank)}" for rank in sorted(silent)]
        problems = [in_words_of_the_job(problem, os.environ) for problem in problems]
        show(reports, names)
        for problem in problems:
            say(f"namr: error: preflight: {problem}", file=sys.stderr)
        if not problems:
            say(
                f"preflight: {size} node{'s' * (size > 1)} in {self._deadline.passed_s:.0f} s",
                file=sys.stderr,
            )
        code = EXIT_CODE if problems else 0
        self._rendezvous.publish("code", str(code))
        self._rendezvous.leave(size - 1 - len(silent))
        return code

    def follow(self) -> int:
        """Any other node: check, tell the first, and end as it says."""
        rank = self._launch.rank
        if self._check(self._checks()) and self._report.free_bytes is not None:
            self._see_probe()
        self._rendezvous.publish(f"report/{rank}", json.dumps(asdict(self._report)))
        self._wait_for_first()
        backend = self._rendezvous.read("backend", share=_TOLD)
        if backend:
            self._exchange(backend)
            self._rendezvous.publish(f"exchanged/{rank}", json.dumps(asdict(self._report)))
            self._wait_for_first()
        code = self._rendezvous.read("code", share=1.0)
        if code is None:
            raise FirstNodeGoneError("the first node gives no verdict; see what it says")
        self._rendezvous.leave(0)
        return int(code)

    def _wait_for_first(self) -> None:
        self._rendezvous.begin("waiting for the first node: see what it says")

    def _gather(self, kind: str, *, share: float) -> dict[int, Report]:
        keys = {f"{kind}/{rank}": rank for rank in range(1, self._launch.world_size)}
        return {
            keys[key]: Report.from_json(text)
            for key, text in self._rendezvous.gather(list(keys), share=share).items()
        }

    def _why_silent(self, rank: int) -> str:
        doing = self._rendezvous.read(f"doing/{rank}", share=0)
        if doing is None:
            return (
                f"did not report; look there whether {sys.executable} starts, and reaches "
                f"{self._rendezvous.address} {MORE_TIME}"
            )
        return f"has not answered for {self._deadline.passed_s:.0f} s, still {doing} {MORE_TIME}"

    def _check(self, plan: list[_Check]) -> bool:
        """Fill the report; one check that hangs is this node's last. Whether all have ended."""
        problems = self._report.problems
        for check in plan:
            self._rendezvous.begin(f"{check.doing}: {check.hint}")
            try:
                fact = within(self._deadline.left_s(_CHECKED), check.find)
                if check.fact is not None:
                    setattr(self._report, check.fact, fact)
            except TooLateError:
                problems.append(
                    f"{check.doing} has not ended after {self._deadline.passed_s:.0f} s: {check.hint} "
                    + MORE_TIME
                )
                return False
            except ReportedError as error:
                # The configuration as a whole may meet the same mistake.
                if str(error) not in problems:
                    problems.append(str(error))
            except Exception as error:  # whatever it is, ranks would meet it too
                problems.append(
                    f"{check.doing} failed ({type(error).__name__}: {error}); see what is wrong there"
                )
        return True

    def _checks(self) -> list[_Check]:
        config, launch, environ = self._config, self._launch, os.environ
        if launch.local_rank > 0:
            self._report.problems.append(
                f"process {launch.rank} shares its machine with another; start one a node, as "
                "srun --ntasks-per-node=1 does"
            )
            return []
        plan = [
            _Check(
                fact="free_bytes",
                doing=f"writing to run folder {self._run}",
                hint=_HUNG,
                find=self._write_probe,
            ),
            _Check(fact="versions", doing="reading versions", hint=_HUNG, find=checks.versions),
            _Check(
                fact="gpus",
                doing="opening GPUs",
                hint="does nvidia-smi answer there?",
                find=lambda: checks.gpus(environ, self._ranks_per_node),
            ),
            _Check(
                fact=None,
                doing="looking for compilers",
                hint=_HUNG,
                # On CPUs nothing is compiled; None: GPUs are there, and one of them was refused.
                find=lambda: checks.compilers(environ) if self._report.gpus != [] else None,
            ),
            _Check(
                fact="search", doing="loading faiss", hint=_HUNG, find=lambda: search_backend().name
            ),
        ]
        if isinstance(config, InputError):  # which is not all that may be wrong here
            self._report.problems.append(str(config))
            return plan
        data = config.data
        plan += [
            _Check(
                fact="shards",
                doing=f"checking shards ({shown(data.path or 'homeware')})",
                hint=_HUNG,
                find=lambda: asdict(checks.shards(data)),
            ),
            _Check(
                fact="weights",
                doing=f"getting weights of {config.model.backbone}",
                hint="compute nodes often have no internet: run namr preflight once where there is, with the same "
                "cache, or set model.weights to a file",
                find=lambda: checks.weights(config, self._run),
            ),
        ]
        if code := config.code_names():
            plan.append(
                _Check(
                    fact=None,
                    doing=f"importing {', '.join(code.values())}",
                    hint=_HUNG,
                    find=lambda: [named_code.load(name, use=use) for use, name in code.items()],
                )
            )
        if launch.rank == 0:
            plan.append(
                _Check(
                    fact=None,
                    doing="checking the configuration for all ranks",
                    hint=_HUNG,
                    find=lambda: self._dry_run(config),
                )
            )
        return plan

    def _write_probe(self) -> int:
        self._probe = probe = checks.probe_path(self._run)
        checks.write_probe(probe)
        if self._launch.rank == 0:
            self._rendezvous.publish("probe", str(probe))  # it stays until the others have looked
        else:
            probe.unlink()
        return checks.free_bytes(probe.parent)

    def remove_probe(self) -> None:
        """The file that this node wrote, if it is still there."""
        if self._probe is not None:
            with suppress(TooLateError, OSError):  # where it hangs or fails, the check has said so
                within(_REMOVAL_S, partial(self._probe.unlink, missing_ok=True))

    def _see_probe(self) -> None:
        self._rendezvous.begin("waiting for a file from the first node: see what it says")
        probe = self._rendezvous.read("probe", share=_CHECKED)
        if probe is not None:
            self._check(
                [
                    _Check(
                        fact=None,
                        doing=f"looking for {probe}",
                        hint=_HUNG,
                        find=lambda: checks.see_probe(Path(probe)),
                    )
                ]
            )

    def _dry_run(self, config: Config) -> list[str]:
        ranks = self._launch.world_size * (
            self._ranks_per_node or len(self._report.gpus or []) or 1
        )
        return dry_run(
            config, self._run, ranks=ranks, overwrite=False, resume=True, words=[config.recipe]
        )

    def _exchange(self, backend: str) -> None:
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        remedy = f"check the firewall between the nodes, and set {variable} to the network interface that joins them"
        seconds = self._deadline.left_s(_EXCHANGED)
        self._rendezvous.begin(f"adding numbers over all nodes ({backend}): {remedy}")
        # Over a connection of its own: a call that hangs would keep this one.
        store, rank = self._rendezvous.another_connection(), self._launch.rank
        try:
            self._report.mib_per_s = within(
                seconds,
                lambda: checks.all_reduce(
                    store, rank=rank, size=self._launch.world_size, backend=backend, seconds=seconds
                ),
            )
        except InputError as error:
            self._report.problems.append(str(error))
        except TooLateError:
            self._report.problems.append(
                f"a sum over all nodes by {backend} has not ended after {seconds:.0f} s; "
                f"{remedy} {MORE_TIME}"
            )
        except Exception as error:
            self._report.problems.append(
                f"a sum over all nodes by {backend} failed ({checks.first_line(error)}); " + remedy
            )


def _for_checks(config: Config) -> Config:
    """No hashes, which take as long as reading all shards, and fewer tries at what does not
    answer."""
    data = config.data
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            data,
            verify=False,
            remote=dataclasses.replace(data.remote, retries=min(1, data.remote.retries)),
        ),
    )


def _backend(reports: Mapping[int, Report]) -> str:
    """What training's ranks would speak; empty where nodes would not agree."""
    gpus = [report.gpus for report in reports.values()]
    if None in gpus or any(gpus) and not all(gpus):
        return ""
    return "nccl" if any(gpus) else "gloo"


def _names(said: Sequence[str | None], environ: Mapping[str, str]) -> list[str]:
    """A name for each node, also for those that never came; names that occur twice with their
    number."""
    try:
        listed = expand_hosts(environ.get("SLURM_STEP_NODELIST", ""))
    except InputError:
        listed = ()
    names = [
        name or (listed[rank] if len(listed) == len(said) else f"node {rank}")
        for rank, name in enumerate(said)
    ]
    return [
        name if names.count(name) == 1 else f"{name} ({rank})" for rank, name in enumerate(names)
    ]
