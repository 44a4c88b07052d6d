"""The comparison: one frozen replay for all, as many frames for each, no row made twice."""

import csv

import pytest
import torch
from test_check import refused
from test_drama import FakeGame, close, fake, tiny_settings

import drama
from tools import check, compare

TINY = dict(drama.PRESETS["debug"], learning_starts=32)


@pytest.fixture
def tiny(fake, tmp_path):
    """`laptop` is `debug`; the tables are kept in tmp_path."""
    fake.setitem(drama.PRESETS, "laptop", TINY)
    for name, value in dict(LAPTOP=TINY, FROZEN=80, HELD_OUT=60, FOLDER=tmp_path).items():
        fake.setattr(compare, name, value)
    return fake


def rows(folder):
    with open(folder / "compare-Breakout.csv") as file:
        return list(csv.DictReader(file))


def test_random_play_is_that_of_the_game(fake):
    """Episode n opens with the seed 2000 + n; what FakeGame shows of a step is what was kept."""
    replay = compare.random_play(tiny_settings(), 60, seed=2)
    spans = check.spans(replay)
    lengths = [FakeGame.episode_length(2000 + number) for number in range(len(spans))]
    assert [stop - first for first, stop in spans][:-1] == lengths[:-1] and replay.length == 60
    for number, (first, stop) in enumerate(spans):
        for t, step in enumerate(range(first, stop)):
            shown = replay["frame"][step, 0, 0, :2].tolist()
            assert shown == [(2000 + number) % 251, 10 * t]
            assert replay["reward"][step] == replay["action"][step]
            over = t + 1 == lengths[number] and number % 2 == 0
            assert replay["terminal"][step] == over
    assert len(set(replay["action"].tolist())) == 4


def test_a_variant_gets_as_many_frames_and_a_row_is_made_once(tiny, tmp_path):
    update, sizes = drama.update_world_model, []

    def updating(run, batch):
        sizes.append(len(batch.action))
        return update(run, batch)

    tiny.setattr(drama, "update_world_model", updating)
    asked = ["Breakout", "laptop", "16 windows", "--updates", "8", "--threads", "1"]
    asked += ["--precision", "float32"]
    assert compare.main([*asked, "--seeds", "1"]) == 0
    assert sizes == [4] * 8 + [16] * 2
    once = rows(tmp_path)
    assert [row["variant"] for row in once] == ["laptop", "16 windows"]
    assert {(row["seed"], row["updates"], row["precision"]) for row in once} == {
        ("0", "8", "float32")}
    for row in once:
        assert float(row["error, all pixels @1"]) > 0 and int(row["rewards that came @5"]) > 0
    assert once[0]["rewards that came @5"] == once[1]["rewards that came @5"]  # one held-out replay
    assert once[0]["KL, nats @1"] != once[1]["KL, nats @1"]
    assert compare.main([*asked, "--seeds", "2"]) == 0
    assert rows(tmp_path)[:2] == once and [row["seed"] for row in rows(tmp_path)] == list("0011")
    assert len(sizes) == 20


def test_settings_of_a_variant_reach_its_run_and_loss_weights_learn_by_the_updates(tiny):
    settings = []

    def trained(s, *args, **trial):
        settings.append((s.model_lr, s.seed, s.harmony_lr, s.steps, trial))
        return {}

    tiny.setattr(compare, "trained", trained)
    asked = ["rate 2e-4", "strong decay", "no resets", "--updates", "50", "--seeds", "1"]
    assert compare.main(["Breakout", *asked, "--precision", "float32"]) == 0
    common = dict(updates=50)
    assert settings == [
        (2e-4, 0, 0.2, 80, common | dict(name="rate 2e-4, seed 0")),
        (TINY["model_lr"], 0, 0.2, 80, common | dict(name="strong decay, seed 0", decay=1e-4)),
        (TINY["model_lr"], 0, 0.2, 80, common | dict(name="no resets, seed 0", resets=False))]


def test_trials_that_are_no_settings(tiny):
    """Without a rate only the decay changes weights; without resets no step opens an episode."""
    s = drama.Settings(**TINY | dict(steps=80, model_lr=0.0, harmony_lr=0.0))
    run, opened = drama.Run(s, torch.device("cpu")), []
    replay = compare.random_play(s, 80, seed=1)
    run.replay.append_steps(replay.steps(0, 80))
    update = drama.update_world_model
    tiny.setattr(drama, "update_world_model",
                 lambda run, batch: (opened.append(bool(batch.first.any())), update(run, batch)))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    compare.train(run, 2, "both", decay=0.25, resets=False)
    for name, p in run.model.named_parameters():
        layer = run.model.get_submodule(name.rpartition(".")[0])
        decays = name.endswith("weight") and isinstance(layer, (
            torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))
        close(p.detach(), before[name] * (0.75**2 if decays else 1))
    compare.train(run, 2, "neither")
    assert opened[:2] == [False, False] and any(opened[2:])


@pytest.mark.parametrize("argv, says", [
    (["Breakout", "laptop", "fast"], "'fast' is none of laptop, no balancing"),
    (["Breakout", "--updates", "0"], "--updates must be 1 or more"), (["Brakout"], "Breakout"),
    (["Breakout", "--seeds", "x"], "--seeds: x is not a whole number"), ([], "GAME")])
def test_a_wrong_comparison_is_refused(argv, says, tiny, tmp_path, capsys):
    tiny.setattr(compare, "random_play", lambda *_, **__: pytest.fail("played in vain"))
    refused(capsys, compare.main, argv, says)
    assert not list(tmp_path.iterdir())
