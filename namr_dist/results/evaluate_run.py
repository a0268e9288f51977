"""A trained run and a set of images → embeddings, figures, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from namr_dist import named_code, verified_json
from namr_dist.atomic import write_atomic
from namr_dist.config import Config, DataConfig
from namr_dist.data.location import open_shards
from namr_dist.data.read.stream import ImageSource, ShardImages
from namr_dist.data.shardset.manifest import Manifest, SplitIndex
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.errors import InputError
from namr_dist.parallel.ranks import Rank, only_rank
from namr_dist.provenance import provenance
from namr_dist.results.page import write_report
from namr_dist.results.record import run_config
from namr_dist.retrieval.evaluate import evaluate, evaluate_sample
from namr_dist.retrieval.modes import with_own
from namr_dist.retrieval.reidentification import reidentify
from namr_dist.retrieval.roles import Division, divide
from namr_dist.retrieval.search import search_backend
from namr_dist.run.folder import CLASSES, EMBEDDINGS, METRICS, RunFolder, of_split
from namr_dist.run.log import number_of, read_log, time_of
from namr_dist.train.checkpoints.network import initial_network, load_network
from namr_dist.train.checkpoints.verified_file import write_tensors
from namr_dist.train.embed import embed, test_transform

_BATCH = 128
_RAW_PIXELS = 32


def evaluate_run(
    run: Path,
    *,
    shards: str | None = None,
    split: str | None = None,
    recall_at: tuple[int, ...] = (),
    modes: Sequence[str] = (),
) -> dict:
    """Measure a run on its test split; write RUN/metrics.json, RUN/classes.json (the figures of
    each class) and RUN/embeddings.safetensors; return the figures.

    shards: where the set is now; None: where it was trained from. split: another test split or
    subset, whose files are named metrics-SPLIT.json and embeddings-SPLIT.safetensors. recall_at:
    the k of R@k; none: the configuration's.
    modes: module:NAME of retrieval modes of a user's own (named_code.allow them first), measured
        beside the others.

    Beside the trained network stand raw pixels (32 × 32), the network before training and the
    frozen backbone's pooled features. If the split has roles, queries search the gallery, else all
    search all others.
    Raises InputError if the run is not finished, its data are not as they were, the split has no
    query or nothing to search, or it or `modes` name code that is not allowed or does not serve.
    """
    config = run_config(run, shards)
    own_modes = [named_code.load(name, use="--mode") for name in modes]
    with_own(own_modes)  # before images are embedded
    names = [METRICS, EMBEDDINGS, CLASSES]
    if split and split != config.data.test_split:
        names = [of_split(name, split) for name in names]
    config = replace(
        config,
        data=replace(config.data, test_split=split or config.data.test_split),
        evaluation=replace(config.evaluation, recall_at=recall_at or config.evaluation.recall_at),
    )
    config.check()
    rank = only_rank()
    network, trained = load_network(RunFolder(run).final, config, device=rank.device)
    for mode in own_modes if network.centres is not None else []:
        if mode.uses_s:
            raise InputError(
                f"mode {mode.name} uses weights s, but the structure embedding of {run} is made from "
                "centres; train with --set.structure.form weights"
            )
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
    verify_shards(manifest, [split])
    images = ShardImages(manifest, index, test_transform(config))
    before = initial_network(config, device=rank.device, pretrained=True).eval()

    def forward(batch_bHW3: Tensor) -> tuple[Tensor, ...]:
        features_bF = before.features(batch_bHW3)
        return (
            *network(batch_bHW3),
            before.sample_head(features_bF),
            features_bF,
            _raw_pixels(batch_bHW3),
        )

    # All at once: each image is read and decoded a single time.
    z_ND, s_ND, start_ND, features_NF, pixels_NP = _embedded(forward, images, config, rank)
    labels_N, roles_N, ks = index.label_N, index.role_N, config.evaluation.recall_at
    seed, draws = config.train.seed, config.evaluation.reidentification_draws
    distance, centres = config.distance, network.centres
    # What is searched by: weights, or the sample embedding with one number for each image.
    weights_ND = s_ND if centres is None else None
    bonus_N = None if centres is None else centres.bonus(s_ND[:, -1])
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
        modes=own_modes,
    )
    by_class = measured.pop("test_classes")
    if centres is not None:
        measured["test_counts"]["beyond_rho_max"] = centres.clamped(s_ND[:, -1])
    metrics = {
        **measured,
        **({"reidentification": reidentified} if reidentified else {}),
        "baselines": {
            "raw pixels": evaluate_sample(pixels_NP, labels_N, ks=ks, roles_N=roles_N),
            "untrained model": evaluate_sample(
                start_ND, labels_N, ks=ks, distance=distance, roles_N=roles_N
            ),
            "frozen backbone": evaluate_sample(
                features_NF, labels_N, ks=ks, distance="cosine", roles_N=roles_N
            ),
        },
        "train": _training_figures(run, trained),
        "protocol": {
            **_protocol(config, manifest, trained, sides, reidentified),
            **({"own modes": ", ".join(modes)} if modes else {}),
        },
    }
    tensors = {"z": torch.from_numpy(z_ND), "s": torch.from_numpy(s_ND), **_facts(index)}
    metrics_name, embeddings_name, classes_name = names
    write_tensors(run / embeddings_name, tensors, {})
    write_atomic(run / classes_name, verified_json.dumps(by_class))
    write_atomic(run / metrics_name, verified_json.dumps(metrics, indent=2))
    return metrics


def report_run(run: Path, *, shards: str | None = None) -> Path:
    """Write RUN/report.html from what training and evaluation left; return its path."""
    config = run_config(run, shards)
    manifest = open_shards(config.data.path, config.data.remote)
    index = manifest.index(config.data.test_split)
    images = ShardImages(manifest, index, test_transform(config))
    classes = [manifest.class_by_label[int(label)] for label in index.label_N]
    return write_report(
        run, images.jpeg, [entry.name for entry in classes], [entry.category for entry in classes]
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
    """What is known of the images, to lie beside their embeddings; roles only where there are
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


def _raw_pixels(images_bHW3: Tensor) -> Tensor:
    small = nn.functional.interpolate(
        images_bHW3.permute(0, 3, 1, 2).float(), (_RAW_PIXELS, _RAW_PIXELS), mode="area"
    )
    return small.flatten(1)


def _training_figures(run: Path, trained: dict) -> dict:
    """Wall time and speed of training, from its log; None for what it does not say."""
    log = read_log(RunFolder(run).log)
    log.warn()
    times_s = [time_s for entry in log.entries if (time_s := time_of(entry)) is not None]
    speeds = [
        speed for entry in log.entries if (speed := number_of(entry, "img_per_s")) is not None
    ]
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


def _protocol(
    config: Config, manifest: Manifest, trained: dict, sides: Division, reidentified: dict | None
) -> dict:
    data, model, loss = config.data, config.model, config.loss
    backend, here = search_backend(), provenance()
    return {
        "data set": manifest.name,
        "source": manifest.description,
        "train splits": ", ".join(data.train_splits),
        "train images": f"{trained['images']} of {trained['classes']} classes" + _filters(data),
        "train hash": trained["images_hash"],
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
        "structure": _structure(trained.get("structure")),
        "batch": f"{data.classes_per_batch} classes × {data.images_per_class} images",
        "sampling": f"{data.sampling}, shuffled by {data.shuffle}"
        + (f", {data.views} views of an image" if data.views > 1 else "")
        + (", across groups" if data.across_groups else ""),
        "seed": config.train.seed,
        "steps": trained["steps"],
        "checkpoint": "the last; its number of steps was fixed in the recipe",
        "trained on": f"{trained['machine']}; {trained['ranks']} rank(s), ZeRO {trained['zero_stage']}, "
        f"{trained['precision']}",
        "trained with": f"{trained['versions']}, commit {trained['commit']}",
        "evaluated on": f"{here['machine']}; fp32",
        "evaluated with": f"{here['versions']}, commit {here['commit']}",
        "distance": f"{config.distance}; raw pixels Euclidean, the frozen backbone cosine",
        "search": f"{backend.name} ({backend.reason})",
    }
