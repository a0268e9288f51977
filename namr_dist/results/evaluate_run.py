"""A trained run and a set of images → embeddings, figures, report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from namr_dist import named_code, verified_json
from namr_dist.atomic import check_target, make_target_folder, write_atomic
from namr_dist.config import Config, DataConfig
from namr_dist.data.location import open_shards
from namr_dist.data.read.select import training_images
from namr_dist.data.read.stream import ImageSource, ShardImages
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.parallel.host import HostGroup
from namr_dist.parallel.meeting import Meeting
from namr_dist.parallel.ranks import Rank, end, only_rank, start_group
from namr_dist.provenance import provenance
from namr_dist.results.page import write_report
from namr_dist.results.record import run_config, trained_config
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample
from namr_dist.retrieval.metrics import longest_list
from namr_dist.retrieval.modes import Mode, with_own
from namr_dist.retrieval.over_ranks import Searcher
from namr_dist.retrieval.reidentification import reidentify
from namr_dist.retrieval.roles import Division, divide
from namr_dist.retrieval.search import search_backend
from namr_dist.run.folder import (
    CLASSES,
    EMBEDDINGS,
    FINAL,
    METRICS,
    REPORT,
    Evaluation,
    RunFolder,
    step_name,
    step_named,
)
from namr_dist.run.log import number_of, read_log, time_of
from namr_dist.structure.centres import Centres
from namr_dist.text import say
from namr_dist.train.checkpoints.chosen import network_at
from namr_dist.train.checkpoints.network import initial_network
from namr_dist.train.checkpoints.resume import hash_images
from namr_dist.train.checkpoints.verified_file import write_tensors
from namr_dist.train.embed import embed, test_transform

_BATCH = 128
_RAW_PIXELS = 32
_TIMEOUT = timedelta(hours=2)
"""Ranks wait so long for each other: the first may be at k-means alone."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is measured, on what: checked, and the same on all ranks but for the devices."""

    run: Path
    config: Config
    """with the split and the cut-offs of this evaluation"""
    trained: tuple[EmbeddingNetwork, dict[str, Any]] | None
    """on the first rank, which chooses the checkpoint"""
    before: EmbeddingNetwork
    """as it was before training"""
    manifest: Manifest
    index: SplitIndex
    sides: Division
    modes: tuple[str, ...]
    own_modes: list[Mode]
    folder: Path
    """that the files go to"""
    other_split: str | None
    """as in Evaluation"""
    also: tuple[str, ...]
    groups_N: np.ndarray | None
    """as in `evaluate`"""


def evaluate_run(
    run: Path,
    *,
    shards: str | None = None,
    split: str | None = None,
    checkpoint: str | None = None,
    recall_at: tuple[int, ...] = (),
    modes: Sequence[str] = (),
    also: Sequence[str] = (),
    without_own_group: bool = False,
    out: Path | None = None,
    rank: Rank | None = None,
) -> dict:
    """Measure a run on its test split; write RUN/metrics.json, RUN/classes.json (the figures of
    each class) and RUN/embeddings.safetensors; return the figures.

    shards: where the set is now; None: where it was trained from. split: another test split or
    subset, whose files are named metrics-SPLIT.json and embeddings-SPLIT.safetensors. checkpoint:
    as in `network_at`; the files of a training state are named metrics-step-100.json and so on.
    recall_at: the k of R@k; none: the configuration's.
    modes: module:NAME of retrieval modes of a user's own (named_code.allow them first), measured
        with the others.
    also: further metrics, and without_own_group: items of the query's class and group are left out
        of its results, both as in `evaluate`.
    out: folder that the files go to instead of the run's; it is made if its parent is there.
    rank: one of several that all call this: each embeds its share of the images and searches its
        share of the gallery, and the figures are those of one process. The first writes, and its
        figures are whole; on others NMI and AMI, and what is no figure, are missing. None: alone.

    Beside the trained network stand raw pixels (32 × 32), the network before training and the
    frozen backbone's pooled features. If the split has roles, queries search the gallery, else all
    search all others.
    Raises InputError if the run has no such checkpoint, its data are not as they were, the split
    has no query or nothing to search, or it or `modes` name code that is not allowed or does not
    serve. Of several ranks, one that meets an error says so, and all end with its exit code.
    """
    rank = rank or only_rank()
    meeting = Meeting(rank, until="evaluation ended")
    with meeting.all_or_none():
        longest_list(also)
        work = _prepare(run, rank, shards, split, checkpoint, recall_at, tuple(modes), out)
        groups_N = _groups(work) if without_own_group else None
        work = replace(work, also=tuple(also), groups_N=groups_N)
    try:
        with meeting.all_or_none(), meeting.watched():
            start_group(rank, _TIMEOUT)
            return _measure(work, rank, HostGroup(_TIMEOUT))
    except SystemExit as refused:
        # Ranks that are gone cannot take part in the end of their group.
        end(int(refused.code or 0))


def _prepare(
    run: Path,
    rank: Rank,
    shards: str | None,
    split: str | None,
    checkpoint: str | None,
    recall_at: tuple[int, ...],
    modes: tuple[str, ...],
    out: Path | None,
) -> _Work:
    config = run_config(run, shards)
    own_modes = [named_code.load(name, use="--mode") for name in modes]
    with_own(own_modes)  # before images are embedded
    other_split = split if split and split != config.data.test_split else None
    config = replace(
        config,
        data=replace(config.data, test_split=split or config.data.test_split),
        evaluation=replace(config.evaluation, recall_at=recall_at or config.evaluation.recall_at),
    )
    config.check()
    if out is not None and rank.first:
        make_target_folder("--out", out)
    trained = network_at(run, config, checkpoint, device=rank.device) if rank.first else None
    manifest = open_shards(config.data.path, config.data.remote)
    split = config.data.test_split
    index = manifest.index(split)
    if shared := len(
        np.intersect1d(manifest.index(*config.data.train_splits).label_N, index.label_N)
    ):
        raise InputError(
            f"{shared} classes of {split!r} in {manifest.folder} are of the splits that were trained on; "
            "name another"
        )
    sides = divide(index.role_N, len(index), f"split {split!r} of {manifest.folder}")
    if rank.local_rank == 0:
        verify_shards(manifest, [split])
    return _Work(
        run=run,
        config=config,
        trained=trained,
        before=initial_network(config, device=rank.device, pretrained=True).eval(),
        manifest=manifest,
        index=index,
        sides=sides,
        modes=modes,
        own_modes=own_modes,
        folder=out or run,
        other_split=other_split,
        also=(),
        groups_N=None,
    )


def _groups(work: _Work) -> np.ndarray:
    """(N,) of the split's images. Raises InputError for a set without any."""
    groups_N, label_N = work.index.group_N, work.index.label_N
    classes_and_groups = len(np.unique(np.stack([label_N, groups_N]), axis=1).T)
    if classes_and_groups == len(np.unique(label_N)):
        raise InputError(
            f"no class of split {work.config.data.test_split!r} of {work.manifest.folder} has images of several "
            "groups; build the set with groups (a table's column `group`), or leave out --without-own-group"
        )
    return groups_N


def _measure(work: _Work, rank: Rank, host: HostGroup) -> dict:
    """Embed, search and, on the first rank, write."""
    config, index, own_modes = work.config, work.index, work.own_modes
    # A run that trains meanwhile may have a newer checkpoint when another rank looks.
    chosen = host.from_first(work.trained[1]["checkpoint"] if work.trained else None)
    network, trained = work.trained or network_at(work.run, config, chosen, device=rank.device)
    centres = network.centres
    for mode in own_modes if centres is not None else []:
        if mode.uses_s:
            raise InputError(
                f"mode {mode.name} uses weights s, but the structure embedding of {work.run} is made from "
                "centres; train with --set.structure.form weights"
            )

    def forward(batch_bHW3: Tensor) -> tuple[Tensor, ...]:
        features_bF = work.before.features(batch_bHW3)
        return (
            *network(batch_bHW3),
            work.before.sample_head(features_bF),
            features_bF,
            _raw_pixels(batch_bHW3),
        )

    # All at once: each image is read and decoded a single time.
    images = ShardImages(work.manifest, index, test_transform(config))
    z_ND, s_ND, start_ND, features_NF, pixels_NP = _embedded(forward, images, config, rank)
    labels_N, roles_N, ks = index.label_N, index.role_N, config.evaluation.recall_at
    seed, draws = config.train.seed, config.evaluation.reidentification_draws
    distance, searcher = config.distance, Searcher(host)
    # What is searched by: weights, or the sample embedding with one number for each image, once the
    # centres have a place.
    weights_ND = s_ND if centres is None else None
    fitted = centres is not None and (chosen == FINAL or centres.fitted)
    bonus_N = centres.bonus(s_ND[:, -1]) if centres is not None and fitted else None
    reidentified = (
        reidentify(
            z_ND,
            weights_ND,
            labels_N,
            draws=draws,
            seed=seed,
            bonus_N=bonus_N,
            distance=distance,
            modes=own_modes,
            searcher=searcher,
        )
        if draws
        else None
    )
    measured = evaluate(
        z_ND,
        weights_ND,
        labels_N,
        delta=config.model.delta,
        ks=ks,
        seed=seed,
        bonus_N=bonus_N,
        distance=distance,
        roles_N=roles_N,
        clustering=rank.first,
        modes=own_modes,
        also=work.also,
        groups_N=work.groups_N,
        searcher=searcher,
    )
    by_class = measured.pop("test_classes")
    if centres is not None and fitted:
        measured["test_counts"]["beyond_rho_max"] = centres.clamped(s_ND[:, -1])
    common: dict[str, Any] = {
        "ks": ks,
        "roles_N": roles_N,
        "also": work.also,
        "groups_N": work.groups_N,
        "searcher": searcher,
    }
    metrics = {
        **measured,
        **({"reidentification": reidentified} if reidentified else {}),
        "baselines": {
            "raw pixels": evaluate_sample(pixels_NP, labels_N, **common),
            "untrained model": evaluate_sample(start_ND, labels_N, distance=distance, **common),
            "frozen backbone": evaluate_sample(features_NF, labels_N, distance="cosine", **common),
        },
    }
    if not rank.first:
        return metrics
    metrics["train"] = _training_figures(work.run, trained)
    metrics["protocol"] = {
        **_protocol(work, network, trained, reidentified, ranks=rank.world_size),
        **({"own modes": ", ".join(work.modes)} if work.modes else {}),
    }
    step = None if chosen == FINAL else trained["steps"]
    files = Evaluation(folder=work.folder, split=work.other_split, step=step)
    tensors = {"z": torch.from_numpy(z_ND), "s": torch.from_numpy(s_ND), **_facts(index)}
    write_tensors(files.path(EMBEDDINGS), tensors, {})
    write_atomic(files.path(CLASSES), verified_json.dumps(by_class))
    write_atomic(files.path(METRICS), verified_json.dumps(metrics, indent=2))
    return metrics


def evaluation_of(
    run: Path, *, split: str | None = None, checkpoint: str | None = None, out: Path | None = None
) -> Evaluation:
    """The evaluation of a run that its report shows: of the trained network or, of a run that has
    none and is not evaluated otherwise, of the newest checkpoint that was, after a line on stderr.

    Arguments as in `evaluate_run`; an `out` that holds none is not looked at. Raises InputError for
    what names no checkpoint, and for a run without figures that has not finished.
    """
    config, files = trained_config(run), RunFolder(run)
    split = split if split != config.data.test_split else None
    step = None if checkpoint in (None, FINAL) else step_named(str(checkpoint))
    if step is None and checkpoint not in (None, FINAL):
        raise InputError(
            f"--checkpoint is {checkpoint}; give {FINAL}, or the step of a checkpoint that was evaluated"
        )
    folders = [out, run] if out is not None and out.is_dir() else [run]
    for folder in folders:
        found = Evaluation(folder=folder, split=split, step=step)
        if found.path(METRICS).exists():
            return found
    if checkpoint is not None or files.final.exists():
        return Evaluation(folder=run, split=split, step=step)
    for folder in folders:
        if steps := RunFolder(folder).evaluated_steps(split):
            say(
                f"WARNING: {run} has not finished: the figures of {step_name(steps[-1])} are shown",
                file=sys.stderr,
            )
            return Evaluation(folder=folder, split=split, step=steps[-1])
    raise InputError(
        f"{run} has not finished, and none of its checkpoints has figures"
        f"{f' of {split}' if split else ''}; evaluate it first: that takes the newest checkpoint"
    )


def report_run(
    run: Path,
    *,
    shards: str | None = None,
    evaluation: Evaluation | None = None,
    out: Path | None = None,
) -> Path:
    """Write RUN/report.html from what training and evaluation left; return its path.

    evaluation: by `evaluation_of`; None: that of the run without further words. out: the page, or
    the folder that it goes to, instead of the run's.
    """
    config = run_config(run, shards)
    evaluation = evaluation or evaluation_of(run)
    manifest = open_shards(config.data.path, config.data.remote)
    index = manifest.index(evaluation.split or config.data.test_split)
    images = ShardImages(manifest, index, test_transform(config))
    classes = [manifest.class_by_label[int(label)] for label in index.label_N]
    split = config.data.validation_split
    known = split in (*manifest.splits, *manifest.subsets)
    validated = manifest.index(split).label_N.tolist() if split and known else ()
    if out is not None and not out.is_dir():
        check_target("--out", out)
        page = out
    else:
        page = replace(evaluation, folder=out or run).path(REPORT)
    return write_report(
        run,
        images.jpeg,
        [entry.name for entry in classes],
        [entry.category for entry in classes],
        evaluation=evaluation,
        page=page,
        validation_classes=len(set(validated)),
    )


def _embedded(
    forward: Callable[[Tensor], tuple[Tensor, ...]], images: ImageSource, config: Config, rank: Rank
) -> tuple[np.ndarray, ...]:
    return embed(
        forward,
        images,
        rank=rank,
        batch_size=_BATCH,
        workers=config.data.workers,
        timeout_s=60 * config.data.batch_minutes,
    )


def _facts(index: SplitIndex) -> dict[str, Tensor]:
    """What is known of the images, to be stored with their embeddings; roles only where there are
    any."""
    facts = {"labels": torch.from_numpy(index.label_N)}
    return facts | {"roles": torch.from_numpy(index.role_N)} if index.role_N.any() else facts


def _describe(reidentified: dict) -> str:
    return (
        f"one random image of each of {reidentified['gallery']:,} classes is the gallery, the "
        f"{reidentified['queries']:,} others search it, whatever their roles; mean and standard deviation of "
        f"{reidentified['draws']} draws, seed {reidentified['seed']}"
    )


def _structure(fitted: dict[str, Any] | None) -> str:
    if not fitted:
        return "a weight for each dimension"
    made = "learnt with" if fitted["learnt"] else "of"
    return (
        f"{fitted['centres']} centres {made} the training embeddings, k = {fitted['nearest']}, "
        f"γ = {fitted['gamma']:g} from {fitted['chosen on']}"
    )


def _structure_so_far(centres: Centres | None) -> str:
    if centres is None:
        return _structure(None)
    if not centres.fitted:
        return f"{len(centres.centres_MD)} centres that had no place yet: not searched by"
    return (
        f"{len(centres.centres_MD)} centres as last fitted before, k = {centres.nearest}, "
        f"γ = {float(centres.gamma):g}"
    )


def _raw_pixels(images_bHW3: Tensor) -> Tensor:
    small = nn.functional.interpolate(
        images_bHW3.permute(0, 3, 1, 2).float(), (_RAW_PIXELS, _RAW_PIXELS), mode="area"
    )
    return small.flatten(1)


def _training_figures(run: Path, trained: dict) -> dict:
    """Wall time and speed of training until the checkpoint, from its log; None for what it does not
    say."""
    log = read_log(RunFolder(run).log)
    log.warn()
    entries = [
        entry
        for entry in log.entries
        if trained.get("checkpoint", FINAL) == FINAL
        or (step := number_of(entry, "step")) is None
        or step <= trained["steps"]
    ]
    times_s = [time_s for entry in entries if (time_s := time_of(entry)) is not None]
    speeds = [speed for entry in entries if (speed := number_of(entry, "img_per_s")) is not None]
    return {
        "steps": trained["steps"],
        "seconds": times_s[-1] if times_s else None,
        "img_per_s": float(np.median(speeds)) if speeds else None,
    }


def _filters(data: DataConfig) -> str:
    """What of the training splits was left out, in words."""
    words = [
        f"super-classes {', '.join(data.categories)}" if data.categories else "",
        f"those in {data.class_list.name}" if data.class_list else "",
        f"with {data.least_images} images or more" if data.least_images > 1 else "",
        f"at most {data.most_images} images each" if data.most_images else "",
    ]
    return "".join(f"; {word}" for word in words if word)


def _of_training(work: _Work, network: EmbeddingNetwork, trained: dict) -> dict[str, str]:
    """What the checkpoint says of the training it came from."""
    if trained["checkpoint"] == FINAL:
        return {
            "train images": f"{trained['images']} of {trained['classes']} classes",
            "train hash": trained["images_hash"],
            "structure": _structure(trained.get("structure")),
            "checkpoint": "the last; its number of steps was fixed in the recipe",
            "trained on": f"{trained['machine']}; {trained['ranks']} rank(s), ZeRO {trained['zero_stage']}, "
            f"{trained['precision']}",
            "trained with": f"{trained['versions']}, commit {trained['commit']}",
        }
    config, manifest = work.config, work.manifest
    index = training_images(manifest, config.data, seed=config.train.seed)
    # A training state says only which images, and in which order.
    here = hash_images(manifest, index) == trained["images_and_order"]
    classes = len(np.unique(index.label_N))
    return {
        "train images": f"{len(index)} of {classes} classes"
        if here
        else "others than the set has now",
        "train hash": manifest.hash_of(index) if here else "not known",
        "structure": _structure_so_far(network.centres),
        "checkpoint": f"{trained['checkpoint']}, after {trained['steps']:,} of {config.optim.steps:,} steps",
        "trained on": f"{trained['ranks']} rank(s), ZeRO {trained['zero_stage']}",
        "trained with": ", ".join(f"{name} {there}" for name, there in trained["packages"].items()),
    }


def _protocol(
    work: _Work,
    network: EmbeddingNetwork,
    trained: dict,
    reidentified: dict | None,
    *,
    ranks: int,
) -> dict:
    config, manifest, sides = work.config, work.manifest, work.sides
    data, model, loss = config.data, config.model, config.loss
    of_training = _of_training(work, network, trained)
    backend, here = search_backend(), provenance()
    return {
        "data set": manifest.name,
        "source": manifest.description,
        "train splits": ", ".join(data.train_splits),
        "train images": of_training["train images"] + _filters(data),
        "train hash": of_training["train hash"],
        "test split": data.test_split,
        "test hash": manifest.split_hash(data.test_split),
        "query": str(sides),
        **({"re-identification": _describe(reidentified)} if reidentified else {}),
        "test transform": f"middle square, {data.test_crop:g} of the shorter side, to {config.test_size} px, bicubic",
        "backbone": model.backbone + (" (pre-trained)" if model.pretrained else " (from scratch)"),
        "batch norm": model.batchnorm,
        "width": model.width,
        "metric loss": loss.metric,
        "ranking": f"λ = {loss.ranking.weight:g}, M = {loss.ranking.clusters}"
        + (", on unit vectors" if loss.ranking.geometry == "unit" else "")
        + (f", rising over {loss.ranking.rise_passes:g} passes" if loss.ranking.rise_passes else "")
        if loss.ranking.weight
        else "none",
        "structure": of_training["structure"],
        "batch": f"{data.classes_per_batch} classes × {data.images_per_class} images",
        "sampling": f"{data.sampling}, shuffled by {data.shuffle}"
        + (f", {data.views} views of an image" if data.views > 1 else "")
        + (", across groups" if data.across_groups else ""),
        "seed": config.train.seed,
        "steps": trained["steps"],
        "checkpoint": of_training["checkpoint"],
        "trained on": of_training["trained on"],
        "trained with": of_training["trained with"],
        "evaluated on": f"{here['machine']}; fp32" + (f"; {ranks} ranks" if ranks > 1 else ""),
        "evaluated with": f"{here['versions']}, commit {here['commit']}",
        "distance": f"{config.distance}; raw pixels Euclidean, the frozen backbone cosine",
        "search": f"{backend.name} ({backend.reason})",
    }
