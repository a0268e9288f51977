"""Which checkpoint of a run is taken, and the network that its parts make up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import namr_dist
from namr_dist.config import Config, DataConfig, ModelConfig
from namr_dist.errors import InputError
from namr_dist.model.network import EmbeddingNetwork
from namr_dist.run.folder import RunFolder
from namr_dist.train.checkpoints.chosen import network_at
from namr_dist.train.checkpoints.network import initial_network, save_network
from namr_dist.train.checkpoints.parts import Piece, finish, write_part
from namr_dist.train.checkpoints.state import named_state

CPU = torch.device("cpu")
CONFIG = Config(
    recipe="none",
    data=DataConfig(image_size=32),
    model=ModelConfig(backbone="conv4", width=8, structure_hidden=8, pretrained=False),
)


def network(step: int) -> EmbeddingNetwork:
    """Every tensor of it says the step."""
    made = initial_network(CONFIG, device=CPU, pretrained=False, centres=3)
    for _, value in named_state(made):
        value.detach().fill_(step)
    return made


def save_step(run: Path, step: int) -> Path:
    """A training state of two ranks that share each tensor, as ZeRO-3 writes it."""
    path = RunFolder(run).checkpoint(step)
    pieces: list[dict[str, Piece]] = [{}, {}]
    for name, value in named_state(network(step)):
        flat, shape = value.detach().reshape(-1), tuple(value.shape)
        half = (len(flat) + 1) // 2
        for rank, start in enumerate((0, half)):
            part = flat[start : start + half]
            if len(flat) < 2:
                part = flat.reshape(shape)
            if rank == 0 or len(flat) > 1:
                pieces[rank][f"model/network.{name}"] = Piece(values=part, start=start, shape=shape)
    pieces[1]["model/objective.metric_loss.beta"] = Piece(values=torch.ones(()), shape=())
    about = {
        "format": "namr-training/2",
        "version": "0",
        "versions": {"torch": "2"},
        "step": step,
        "ranks": 2,
        "zero_stage": 3,
        "data": "d",
        "config": json.loads(CONFIG.to_json()),
    }
    finish(path, about, [write_part(path, rank, part) for rank, part in enumerate(pieces)])
    return path


def step_of(made: EmbeddingNetwork) -> int:
    assert not made.training
    values = {float(value.detach().min()) for _, value in named_state(made)}
    values |= {float(value.detach().max()) for _, value in named_state(made)}
    (step,) = values
    return int(step)


def test_any_checkpoint_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="has no checkpoint yet; run the training's command"):
        network_at(tmp_path, CONFIG, None, device=CPU)
    for step in (2, 40):
        save_step(tmp_path, step)
    for name in ("step-2", "step-00000002", "2"):
        made, trained = network_at(tmp_path, CONFIG, name, device=CPU)
        assert step_of(made) == 2 and made.centres is not None and made.centres.fitted
    assert trained == {
        "checkpoint": "step-2",
        "steps": 2,
        "ranks": 2,
        "zero_stage": 3,
        "images_and_order": "d",
        "packages": {"torch": "2"},
    }
    assert not capsys.readouterr().err
    made, trained = network_at(tmp_path, CONFIG, None, device=CPU)
    assert step_of(made) == 40 and trained["steps"] == 40
    assert "has not finished: its checkpoint step-40 is taken" in capsys.readouterr().err
    with pytest.raises(
        InputError, match="has not finished; .* another checkpoint: step-2, step-40$"
    ):
        network_at(tmp_path, CONFIG, "final", device=CPU)
    save_network(RunFolder(tmp_path).final, network(50).state_dict(), CONFIG, trained={"steps": 50})
    for wanted in (None, "final"):
        made, trained = network_at(tmp_path, CONFIG, wanted, device=CPU)
        assert step_of(made) == 50 and trained == {"steps": 50, "checkpoint": "final"}
    for name in ("step-3", "newest", "-1", "step-2.5", ""):
        with pytest.raises(InputError, match="one of those it has: step-2, step-40, final$"):
            network_at(tmp_path, CONFIG, name, device=CPU)


def test_damage_and_other_networks_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (0, 7):
        save_step(tmp_path, step)
    part = RunFolder(tmp_path).checkpoint(7) / "rank-00001.safetensors"
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=r"step-00000007 is damaged \(rank-00001.*another"):
        network_at(tmp_path, CONFIG, "step-7", device=CPU)
    made, _ = network_at(tmp_path, CONFIG, None, device=CPU)
    assert step_of(made) == 0 and made.centres is not None and not made.centres.fitted
    said = capsys.readouterr().err
    assert "step-00000007 is damaged" in said and "checkpoint step-0 is taken" in said
    part.write_bytes(whole)
    wider = Config(recipe="none", data=CONFIG.data, model=ModelConfig(backbone="conv4", width=9))
    with pytest.raises(InputError, match=r"does not fit the run's config.json: .*\(3, 8\) there"):
        network_at(tmp_path, wider, "7", device=CPU)
    RunFolder(tmp_path).checkpoint(7).rename(RunFolder(tmp_path).checkpoint(9))
    with pytest.raises(InputError, match="holds step 7; give it that step's name"):
        network_at(tmp_path, CONFIG, "9", device=CPU)


def test_what_was_loaded_of_a_run_that_goes_on_stays_that(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    first = save_step(run.path, 2)
    run.config.write_text(CONFIG.to_json())
    model = namr_dist.load(run.path)
    assert (model.place, model.name, step_of(model.network)) == (first, "run/step-00000002", 2)
    later = save_step(run.path, 40)
    assert namr_dist.load(run.path).place == later
    again = namr_dist.load(model.place)
    assert again.digest == model.digest != namr_dist.load(later).digest
    save_network(run.final, network(41).state_dict(), CONFIG, trained={"steps": 41})
    assert namr_dist.load(run.path).place == run.path
