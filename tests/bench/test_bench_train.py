"""`namr bench train`: its figures against the logs of the runs it made, and each of its parts
against a definition."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import resource
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from namr_dist.bench import large_set
from namr_dist.bench import training as bench_train
from namr_dist.bench.trace import Summary, summarise
from namr_dist.bench.training import Measured, Work, random_weights
from namr_dist.bench.training_losses import eager_form, embeddings, objective_form, time_losses
from namr_dist.bench.training_run import INTERVALS, Length, read_figures
from namr_dist.bench.training_show import show, to_csv
from namr_dist.cli.main import main
from namr_dist.config import Config, ModelConfig
from namr_dist.data.shardset.manifest import Manifest
from namr_dist.data.shardset.shards import verify_shards
from namr_dist.kernels.bench.measure import run_pass
from namr_dist.model.backbones import build_backbone
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.recipes.homeware import homeware
from namr_dist.train.objective import TrainingModule
from namr_dist.train.phases import STEP_PHASES, take_peak_bytes
from namr_dist.train.profile import STEPS, profiled

CPU = torch.device("cpu")


@dataclass
class Bench:
    """One command, and what its runs left while they were there."""

    folder: Path
    printed: dict = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    logs: list[list[dict]] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)


@pytest.fixture(scope="module")
def bench(shard_set: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Two batch sizes, the larger in two pieces, and a trace."""
    record = Bench(folder=tmp_path_factory.mktemp("bench"))
    words = [
        "bench",
        "train",
        "homeware",
        "--shards",
        shard_set.folder,
        "--batch",
        16,
        32,
        "--steps",
        5,
        "--csv",
        record.folder / "figures.csv",
        "--trace",
        record.folder / "trace.json.gz",
        "--json",
        "--set.data.image_size",
        32,
        "--set.data.workers",
        1,
        "--set.model.width",
        16,
        "--set.model.structure_hidden",
        16,
    ]
    measure = bench_train.measure

    def watched(work: Work) -> Iterator[Measured | Summary]:
        """The same; each run's folder is looked into before it goes."""
        for one in measure(work):
            if isinstance(one, Measured):
                (run,) = record.folder.glob(f"namr-bench-*/{one.batch}-{one.precision}")
                record.measured.append(one)
                record.logs.append(
                    [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                )
                record.configs.append(Config.load(run / "config.json"))
            yield one

    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_train, "measure", watched)
        patch.setattr(tempfile, "tempdir", str(record.folder))
        patch.setattr("builtins.print", lambda *words: printed.extend(words))
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert main([str(word) for word in words]) == 0
    record.printed = json.loads("".join(printed))
    return record


def test_figures_are_the_medians_of_the_log_behind_the_warm_up(bench: Bench) -> None:
    assert [one.batch for one in bench.measured] == [16, 32]
    for one, log in zip(bench.measured, bench.logs, strict=True):
        # One worker makes four batches ahead, and one is on its way: five steps do not count.
        assert [line["step"] for line in log if "loss" in line] == list(range(1, 11))
        counted = [line for line in log if "img_per_s" in line and line["step"] > 5]
        assert [line["step"] for line in counted] == [6, 7, 8, 9, 10]
        assert one.figures
        assert one.figures.img_per_s.median == np.median([line["img_per_s"] for line in counted])
        assert one.figures.peak_mib == max(line["peak_mib"] for line in counted) > 100
        for name in STEP_PHASES:
            assert one.figures.phases_ms[name].median == pytest.approx(
                1e3 * np.median([line[f"{name}_s"] for line in counted])
            )
        idle_s, all_s = (
            sum(line["data_s"] for line in counted),
            sum(one.batch / line["img_per_s"] for line in counted),
        )
        assert one.figures.idle_share == pytest.approx(idle_s / all_s)
        assert one.figures.device_img_per_s == pytest.approx(5 * one.batch / (all_s - idle_s))


def test_images_a_second_times_seconds_are_the_images(bench: Bench) -> None:
    for one, log in zip(bench.measured, bench.logs, strict=True):
        speed = [line for line in log if "img_per_s" in line]
        for before, line in zip(speed, speed[1:], strict=False):
            elapsed_s, phases_s = (
                line["time_s"] - before["time_s"],
                sum(line[f"{name}_s"] for name in STEP_PHASES),
            )
            step_s = one.batch / line["img_per_s"]
            # The log's clock goes on between two lines, and the phases leave out what is between
            # them.
            assert phases_s - 0.01 <= step_s <= elapsed_s + 0.01


def test_the_larger_batch_goes_through_in_pieces(bench: Bench) -> None:
    for config, batch in zip(bench.configs, (16, 32), strict=True):
        assert config.data.classes_per_batch == batch // 4 and config.train.micro_batch == 16
        assert config.data.validation_split is None and config.optim.steps == 10


def test_csv_and_json_are_the_same_rows(bench: Bench) -> None:
    with open(bench.folder / "figures.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    rows = bench.printed["rows"]
    assert [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ] == lines
    first = rows[0]
    assert (first["recipe"], first["backbone"], first["image_size"], first["D"]) == (
        "homeware",
        "efficientnet_lite0",
        32,
        16,
    )
    assert (first["precision"], first["batch"], first["micro_batch"], first["workers"]) == (
        "fp32",
        16,
        16,
        1,
    )
    assert (
        first["device"]
        and first["commit"]
        and first["torch"] == torch.__version__
        and first["cores"] >= 1
    )
    assert first["workers_img_per_s"] > 0 and first["mfu"] is None and first["note"] == ""
    # The step as a whole, and not the phase of that name.
    figures = bench.measured[0].figures
    assert figures and first["step_ms"] == pytest.approx(16e3 / first["img_per_s"], rel=1e-3)
    assert first["optimizer_ms"] == figures.phases_ms["step"].median
    rest_ms = first["step_ms"] - first["loss_ms"]
    assert first["loss_share"] == pytest.approx(first["loss_ms"] / first["step_ms"])
    assert first["eager_loss_share"] == pytest.approx(
        first["eager_loss_ms"] / (rest_ms + first["eager_loss_ms"])
    )


def test_the_trace_holds_a_few_steps_and_is_summed_up(bench: Bench) -> None:
    trace = json.loads(gzip.decompress((bench.folder / "trace.json.gz").read_bytes()))
    steps = {
        event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep#")
    }
    # The first five do not count, and the fifth is the profiler's own warm-up.
    assert steps == {"ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8"}
    said = bench.printed["trace"]
    assert said["steps"] == STEPS and not said["on_device"] and 0 < said["busy_share"] <= 1
    # Each of EfficientNet-Lite0's 49 convolutions, once a step and direction (the stem's images
    # need no gradient).
    calls = {one["name"]: one["calls"] for one in said["top"]}
    forward = [count for name, count in calls.items() if name.endswith("convolution")]
    assert forward and max(forward) == 49 * STEPS


def test_a_run_that_did_not_finish_is_a_row_without_figures(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = dataclasses.replace(bench.measured[1], figures=None)
    to_csv([bench.measured[0], failed], tmp_path / "figures.csv")
    with open(tmp_path / "figures.csv", newline="") as file:
        whole, empty = csv.DictReader(file)
    assert (
        whole["img_per_s"]
        and not empty["img_per_s"]
        and not empty["idle_share"]
        and empty["eager_loss_ms"]
    )
    assert empty["note"] == "the run did not finish"
    show([bench.measured[0], failed], None)
    said = " ".join(capsys.readouterr().out.split())
    assert "batch 32, fp32: the run did not finish" in said


@pytest.mark.parametrize(
    ("steps", "in_flight", "interval", "warm_up"),
    [(5, 1, 1, 1), (5, 5, 1, 5), (40, 5, 8, 8), (40, 16, 8, 16), (40, 17, 8, 24)],
)
def test_the_warm_up_is_whole_intervals_and_takes_in_what_was_made_ahead(
    steps: int, in_flight: int, interval: int, warm_up: int
) -> None:
    length = Length.of(steps, in_flight=in_flight)
    assert (length.interval, length.warm_up, length.steps) == (interval, warm_up, warm_up + steps)
    assert length.steps % length.interval == 0 and steps == INTERVALS * length.interval


def test_known_figures_of_a_known_log(tmp_path: Path) -> None:
    lines = [
        {
            "step": step,
            "img_per_s": 10.0 * step,
            "data_s": 0.1,
            "peak_mib": 7.0 - step,
            "mfu": 0.1 * step,
            **{f"{name}_s": 0.2 for name in STEP_PHASES if name != "data"},
        }
        for step in range(1, 7)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = read_figures(tmp_path, Length(interval=1, warm_up=1), batch=60)
    assert (
        figures.img_per_s.median,
        figures.img_per_s.p20,
        figures.img_per_s.p80,
    ) == pytest.approx((40, 28, 52))
    assert (
        figures.step_ms.median == 1500
        and figures.peak_mib == 5
        and figures.mfu == pytest.approx(0.4)
    )
    assert figures.phases_ms["data"].median == 100 and figures.phases_ms["loss"].median == 200
    all_s = 60 / 20 + 60 / 30 + 60 / 40 + 60 / 50 + 60 / 60
    assert figures.idle_share == pytest.approx(0.5 / all_s)
    assert figures.device_img_per_s == pytest.approx(300 / (all_s - 0.5))


def write_trace(path: Path, *events: tuple[str, str, float, float, int]) -> Path:
    """Category, name, begin and duration in microseconds, thread."""
    path.write_text(
        json.dumps(
            {
                "traceEvents": [
                    {
                        "ph": "X",
                        "cat": cat,
                        "name": name,
                        "ts": begin,
                        "dur": long,
                        "pid": 0,
                        "tid": thread,
                    }
                    for cat, name, begin, long, thread in events
                ]
                + [{"ph": "M", "name": "process_name", "pid": 0}]
            }
        )
    )
    return path


def test_a_gpu_is_busy_where_kernels_of_any_stream_run(tmp_path: Path) -> None:
    summary = summarise(
        write_trace(
            tmp_path / "trace.json",
            ("user_annotation", "ProfilerStep#4", 0, 5000, 1),
            ("cpu_op", "aten::mm", 0, 900, 1),
            ("kernel", "gemm", 1000, 2000, 7),
            ("kernel", "gemm", 4000, 1000, 7),
            ("gpu_memcpy", "copy", 2000, 1500, 8),
        )
    )
    assert summary.on_device and summary.steps == 1 and summary.span_ms == 4
    assert summary.busy_share == pytest.approx((2500 + 1000) / 4000)
    assert [(one.name, one.calls, one.ms) for one in summary.top] == [
        ("gemm", 2, 3.0),
        ("copy", 1, 1.5),
    ]
    assert summary.top[0].share == pytest.approx(2 / 3)


def test_an_operator_is_booked_without_those_that_it_calls(tmp_path: Path) -> None:
    summary = summarise(
        write_trace(
            tmp_path / "trace.json",
            ("cpu_op", "outer", 0, 1000, 1),
            ("cpu_op", "inner", 100, 300, 1),
            ("cpu_op", "innermost", 200, 100, 1),
            ("cpu_op", "inner", 500, 200, 1),
            ("cpu_op", "inner", 300, 400, 2),
        )
    )
    assert not summary.on_device
    assert {one.name: (one.calls, one.ms) for one in summary.top} == {
        "outer": (1, pytest.approx(0.5)),
        "inner": (3, pytest.approx(0.8)),
        "innermost": (1, pytest.approx(0.1)),
    }
    assert summary.busy_share == 1


def test_both_forms_of_the_loss_agree() -> None:
    config = dataclasses.replace(homeware(), model=ModelConfig(width=24))
    batch, gradients, values = embeddings(config, rows=40, device=CPU), [], []
    for form in (objective_form(config, rows=40, device=CPU), eager_form(config)):
        for leaf in batch.leaves:
            leaf.grad = None
        run_pass(form, batch)
        values.append(form(batch.labels_B, *batch.leaves).item())
        gradients.append([leaf.grad for leaf in batch.leaves])
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    for ours, eager in zip(*gradients, strict=True):
        assert ours is not None and eager is not None
        assert float((ours - eager).norm() / eager.norm()) < 1e-4


def test_what_has_no_eager_form_is_timed_without() -> None:
    config = homeware()
    for changed, why in (
        (
            dataclasses.replace(config, loss=dataclasses.replace(config.loss, metric="margin")),
            "margin",
        ),
        (
            dataclasses.replace(config, data=dataclasses.replace(config.data, images_per_class=3)),
            "4 images",
        ),
    ):
        times = time_losses(
            dataclasses.replace(changed, model=ModelConfig(width=8)), rows=12, device=CPU
        )
        assert times.eager is None and why in times.note and times.ours.median > 0


def test_a_large_set_has_the_proportions_of_stanford_online_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_set, "_DISTINCT", 8)  # making pictures is what takes time
    large_set.make_large_set(tmp_path, images=1100)
    manifest = Manifest.load(tmp_path)
    index = manifest.index("train")
    assert len(index) == 1100 and verify_shards(manifest, ["train", "test"]) == 1102
    counts = Counter(index.label_N.tolist())
    assert len(counts) == round(1100 * 11_318 / 59_551) == 209 and set(counts.values()) == {5, 6}
    assert [len(shard.keys) for shard in manifest.shards_of("test")] == [2]
    assert len(manifest.shards_of("train")) == 2


def test_random_weights_go_into_a_backbone_and_leave_no_product_with_zeros(tmp_path: Path) -> None:
    config = dataclasses.replace(homeware(), model=ModelConfig(backbone="timm:resnet10t"))
    state = random_weights(config)
    scales = [value for name, value in state.items() if name.endswith(("bn2.weight", "bn1.weight"))]
    assert scales and all(value.all() for value in scales)
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    built = build_backbone(
        "timm:resnet10t",
        batchnorm="frozen",
        pretrained=False,
        weights=tmp_path / "weights.safetensors",
        image_size=64,
    )
    assert torch.equal(built.layers.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--batch", "16", "30"],
            "--batch 30 is no multiple of data.images_per_class (4) with two classes or more; give "
            "28",
        ),
        (
            ["--batch", "4"],
            "--batch 4 is no multiple of data.images_per_class (4) with two classes or more; give 8",
        ),
        (["--steps", "3"], "--steps is 3; set it to a multiple of 5"),
        (["--images", "0"], "--images is 0; set it to at least 1"),
        (
            ["--csv", "nowhere/figures.csv"],
            "--csv nowhere/figures.csv is not a file in a folder that exists; give one",
        ),
        (
            ["--trace", "nowhere/trace.json"],
            "--trace nowhere/trace.json is not a file in a folder that exists",
        ),
        (
            ["--shards", "nowhere", "--images", "5"],
            "--images is 5, which goes with a set that is made",
        ),
        (["--shards", "nowhere"], "no shard set at nowhere"),
        (
            ["--set.train.profile", "trace.json"],
            "--set.train.profile is the benchmark's own; give --trace instead",
        ),
        (
            ["--set.optim.steps", "9"],
            "--set.optim.steps is the benchmark's own; give --steps instead",
        ),
        (["no_such_recipe"], "unknown recipe 'no_such_recipe'"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "train", *words]) == 2
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == 1


def test_a_batch_of_more_classes_than_there_are_is_one_line(
    shard_set: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "train", "--shards", str(shard_set.folder), "--batch", "16", "64"]) == 2
    told = capsys.readouterr().err
    assert "--batch 64 needs 16 classes, the training images are of 12; give at most 48" in told
    assert told.count("\n") == 1


def test_the_peak_of_a_process_is_at_least_what_it_holds() -> None:
    held_bytes = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak_bytes = take_peak_bytes(CPU)
    # The system counts pages of each thread apart, and adds them up now and then.
    assert (
        0.9 * held_bytes
        < peak_bytes
        < 1.1 * 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_peak_of_a_gpu_is_of_the_time_since_the_last_call() -> None:
    device = torch.device("cuda", 0)
    held_bytes = torch.cuda.memory_allocated(device)
    block = torch.ones(64 << 20, dtype=torch.uint8, device=device)
    del block
    assert take_peak_bytes(device) >= held_bytes + (64 << 20)
    assert take_peak_bytes(device) < held_bytes + (64 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_trace_on_a_gpu_holds_its_kernels(tmp_path: Path) -> None:
    network = EmbeddingNetwork(
        ModelConfig(
            backbone="conv4", batchnorm="train", pretrained=False, width=16, structure_hidden=16
        ),
        image_size=32,
    )
    module = TrainingModule(network, homeware().loss, classes=4, images_per_class=4).cuda()
    images = torch.randint(0, 255, (16, 32, 32, 3), dtype=torch.uint8, device="cuda")
    labels = torch.arange(16, device="cuda") // 4
    with profiled(tmp_path / "trace.json", after=1) as begin_step:
        for _ in range(1 + STEPS):
            begin_step()
            module(images, labels).total.backward()
    summary = summarise(tmp_path / "trace.json")
    assert (
        summary.on_device and summary.steps == STEPS and 0 < summary.busy_share <= 1 and summary.top
    )
