"""Many runs → one table: a row a setting, over its seeds, and what multi-cluster ranking adds to
each baseline.

Figures are in percent, of metrics.json of each run; names of modes and figures are those of
`evaluate`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from namr_dist import verified_json
from namr_dist.config import Config
from namr_dist.errors import InputError
from namr_dist.losses import registry
from namr_dist.results.redact import shareable
from namr_dist.results.tables import Row, ShownMode, columns, shown_modes
from namr_dist.run.folder import CONFIG, METRICS, Evaluation, RunFolder, runs_in
from namr_dist.run.state import RunReader
from namr_dist.train.checkpoints.resume import MAY_DIFFER

_RANKING, _WEIGHT = "loss.ranking.", "loss.ranking.weight"
_IMAGES = "train images"
_NOT_USED = "–"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure of one setting, over its seeds."""

    mean: float
    deviation: float | None
    """sample standard deviation; None for a single seed"""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs that differ in nothing but their seed."""

    values: dict[str, Any]
    """of the fields that differ between settings, by whole name"""
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    """their folders, in the order of the seeds"""
    each: dict[str, dict[str, tuple[float, ...]]]
    """mode → figure → its value of each seed; figures that not every run has are left out"""
    figures: dict[str, dict[str, Estimate]]


@dataclass(frozen=True, kw_only=True)
class Gain:
    """A figure with multi-cluster ranking, less the same without."""

    mean: float
    error: float | None
    """standard error; None where a single seed tells nothing of it"""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What multi-cluster ranking adds to the baseline with which a setting shares all other
    fields."""

    baseline: int
    ranked: int
    """indices in Comparison.settings"""
    paired: bool
    """the seeds are the same: the error is that of the differences seed by seed"""
    gains: dict[str, Gain]
    """of the sample mode"""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A run that cannot be compared with the others."""

    run: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side: a setting's seeds together, and what multi-cluster ranking adds to each
    baseline."""

    test: str
    """what all were measured on"""
    fields: tuple[str, ...]
    """configuration fields that differ"""
    modes: tuple[ShownMode, ...]
    """in the order of tables; not all need have figures"""
    settings: tuple[Setting, ...]
    differences: tuple[Difference, ...]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """A run with figures."""

    folder: Path
    seed: int
    identity: dict[str, Any]
    """every field that makes it another setting"""
    shown: dict[str, Any]
    """the same as it may be given away"""
    test: Mapping[str, Any]
    protocol: Mapping[str, Any]
    modes: tuple[ShownMode, ...]

    @property
    def setting(self) -> str:
        return json.dumps(self.identity)

    @property
    def test_hash(self) -> str:
        """of the test images"""
        return str(self.protocol["test hash"])


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Each folder that is a run's, and the runs in each that is none. Raises InputError where there
    are none."""
    runs = []
    for folder in folders:
        here = [folder] if RunFolder(folder).config.exists() else runs_in(folder)
        if not here:
            raise InputError(
                f"{folder} neither is a run nor holds one (no {CONFIG} in it or one folder below); give "
                "folders of runs"
            )
        runs += here
    return runs


def compare(runs: Sequence[Path], *, split: str | None = None) -> Comparison:
    """One row a setting, by what its trained networks reach on their test split, or on another.
    Runs without figures, of other test images or of a seed that is there
    already are left out and listed.

    Raises InputError if no run is left.
    """
    measured: list[_Measured] = []
    left_out: list[LeftOut] = []
    for folder in runs:
        try:
            measured.append(_read(folder, split))
        except InputError as error:
            left_out.append(LeftOut(run=str(folder), why=str(error)))
    if not measured:
        raise InputError(
            "no run to compare: " + "; ".join(f"{one.run}: {one.why}" for one in left_out)
        )
    # The images that most were measured on; of as many, the first.
    images = Counter(run.test_hash for run in measured).most_common(1)[0][0]
    protocol = next(run.protocol for run in measured if run.test_hash == images)
    groups: dict[str, dict[int, _Measured]] = defaultdict(dict)
    for run in measured:
        group = groups[run.setting] if run.test_hash == images else {}
        if run.test_hash != images:
            why = f"measured on other test images ({_test_of(run.protocol)}, {run.test_hash}); compare it apart"
        elif run.seed in group:
            why = f"same settings and seed as {group[run.seed].folder.name}"
        else:
            group[run.seed] = run
            continue
        left_out.append(LeftOut(run=str(run.folder), why=why))
    modes = _modes(run for group in groups.values() for run in group.values())
    fields = _differing([next(iter(group.values())) for group in groups.values()])
    settings = sorted(
        (_over_seeds(group, fields) for group in groups.values()),
        key=lambda one: _sort_key(one, fields),
    )
    return Comparison(
        test=f"{_test_of(protocol)}, {images}: {protocol.get('query', 'who queries whom is not said')}",
        fields=fields,
        modes=modes,
        settings=tuple(settings),
        differences=tuple(_differences(settings)),
        left_out=tuple(left_out),
    )


def _read(run: Path, split: str | None) -> _Measured:
    """A run's settings and figures. Raises InputError, without the run's name, where it has
    none."""
    folder = RunFolder(run)
    config = Config.load(folder.config)
    other = split if split != config.data.test_split else None
    path = Evaluation(folder=run, split=other).path(METRICS)
    if not path.exists():
        state = RunReader(run).look()
        raise InputError(
            f"not evaluated{f' on {other}' if other else ''}; do so by `namr evaluate`"
            if state.state in ("finished", "evaluated") or folder.metrics.exists()
            else f"not finished ({state.state}, step {state.step:,} of {state.steps:,}); compare it once it "
            "is trained and evaluated"
        )
    metrics = verified_json.loads(path.read_bytes(), path.name, "evaluate it again")
    try:
        test, protocol = metrics["test"], metrics["protocol"]
        if not isinstance(test["sample"], dict) or not isinstance(protocol["test hash"], str):
            raise TypeError
    except (TypeError, KeyError):
        raise InputError(
            f"{path.name} lacks figures, or the hash of the test images; evaluate it again"
        ) from None
    whole = json.loads(config.to_json())
    return _Measured(
        folder=run,
        seed=config.train.seed,
        identity=_identity(whole, protocol),
        shown=_identity(shareable(whole), protocol),
        test=test,
        protocol=protocol,
        modes=tuple(shown_modes(metrics)),
    )


def _test_of(protocol: Mapping[str, Any]) -> str:
    return (
        f"{protocol.get('data set', 'a set without a name')}, {protocol.get('test split', 'test')}"
    )


def _identity(config: dict[str, Any], protocol: Mapping[str, Any]) -> dict[str, Any]:
    """The fields on which a run's figures depend, its seed apart; "–" for those of a part that it
    does without."""
    fields = {
        name: value
        for name, value in _flat(config)
        if name not in MAY_DIFFER and name != "train.seed"
    }
    unused = [f"loss.{loss}." for loss in registry.NAMES if loss != fields["loss.metric"]]
    if not fields[_WEIGHT]:
        unused.append(_RANKING)
    if not fields["loss.memory.rows"]:
        unused.append("loss.memory.start_step")
    fields.update(
        {name: _NOT_USED for name in fields if name != _WEIGHT and name.startswith(tuple(unused))}
    )
    # Where the set lies may differ, what it holds not. At most so many images of a class are drawn
    # by the seed.
    return fields if fields["data.most_images"] else fields | {_IMAGES: protocol.get("train hash")}


def _flat(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in section.items()
        for pair in (
            _flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else [(prefix + name, value)]
        )
    ]


def _differing(runs: Sequence[_Measured]) -> tuple[str, ...]:
    """The fields that tell these runs apart, those of the ranking last: with and without it then
    stand together."""
    names = {name: None for run in runs for name in run.identity}
    differing = [
        name
        for name in names
        if len(
            {
                json.dumps(run.identity.get(name))
                for run in runs
                if run.identity.get(name) != _NOT_USED
            }
        )
        > 1
    ]
    without = [name for name in differing if name != _IMAGES]
    if len({json.dumps([run.identity.get(name) for name in without]) for run in runs}) == len(runs):
        differing = without  # other settings already say why the images differ
    return tuple(sorted(differing, key=lambda name: name.startswith(_RANKING)))


def _over_seeds(group: dict[int, _Measured], fields: Sequence[str]) -> Setting:
    seeds = tuple(sorted(group))
    runs = [group[seed] for seed in seeds]
    each: dict[str, dict[str, tuple[float, ...]]] = {}
    for mode in _modes(runs):
        figures = [run.test.get(mode.name) or {} for run in runs]
        names = columns([Row(name=mode.name, figures=one) for one in figures])
        each[mode.name] = {
            name: tuple(one[name] for one in figures)
            for name in names
            if all(_is_number(one.get(name)) for one in figures)
        }
    return Setting(
        values={name: runs[0].shown.get(name) for name in fields},
        seeds=seeds,
        runs=tuple(str(run.folder) for run in runs),
        each={mode: each[mode] for mode in each if each[mode]},
        figures={
            mode: {name: estimate(values) for name, values in each[mode].items()}
            for mode in each
            if each[mode]
        },
    )


def _modes(runs: Iterable[_Measured]) -> tuple[ShownMode, ...]:
    """Those of all runs, each once; of one name, the first."""
    by_name: dict[str, ShownMode] = {}
    for run in runs:
        for mode in run.modes:
            by_name.setdefault(mode.name, mode)
    return tuple(by_name.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _sort_key(setting: Setting, fields: Sequence[str]) -> list[tuple[int, float, str]]:
    """Sorts settings by field: numbers by size, before texts."""
    values = [setting.values[name] for name in fields]
    return [
        (0, float(value), "") if _is_number(value) else (1, 0.0, str(value)) for value in values
    ]


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and sample standard deviation."""
    return Estimate(
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else None,
    )


def _differences(settings: Sequence[Setting]) -> list[Difference]:
    def rest(setting: Setting) -> dict[str, Any]:
        return {
            name: value for name, value in setting.values.items() if not name.startswith(_RANKING)
        }

    return [
        _difference(settings, baseline, ranked)
        for baseline in range(len(settings))
        if settings[baseline].values.get(_WEIGHT) == 0
        for ranked in range(len(settings))
        if ranked != baseline and rest(settings[ranked]) == rest(settings[baseline])
    ]


def _difference(settings: Sequence[Setting], baseline: int, ranked: int) -> Difference:
    without, with_ranking = settings[baseline], settings[ranked]
    paired = without.seeds == with_ranking.seeds
    before, after = without.each.get("sample", {}), with_ranking.each.get("sample", {})
    return Difference(
        baseline=baseline,
        ranked=ranked,
        paired=paired,
        gains={
            name: gain(before[name], after[name], paired=paired) for name in before if name in after
        },
    )


def gain(before: Sequence[float], after: Sequence[float], *, paired: bool) -> Gain:
    """The difference of two means. Its standard error is that of the mean of the differences where
    both are paired, else the root of the sum of both means' squared errors."""
    mean = statistics.fmean(after) - statistics.fmean(before)
    if min(len(before), len(after)) < 2:
        return Gain(mean=mean, error=None)
    if paired:
        changes = [new - old for old, new in zip(before, after, strict=True)]
        return Gain(mean=mean, error=statistics.stdev(changes) / math.sqrt(len(changes)))
    return Gain(
        mean=mean,
        error=math.sqrt(sum(statistics.variance(each) / len(each) for each in (before, after))),
    )
