"""A branch against runs that were never branched."""

import json

import numpy as np
import pytest
import torch
from test_check import refused
from test_drama import command, contents, fake, finished, interrupt_at, outcome  # noqa: F401
from test_drama import run_folder, runs, small_files, table, tiny_settings, whole  # noqa: F401

import drama
from tools import branch


@pytest.fixture
def stopped(fake, tmp_path):
    """A run that was stopped after 40 of 64 steps."""
    small_files(fake)
    interrupt_at(fake, 40)
    assert command(tmp_path / "old") == 130
    return tmp_path / "old"


def test_a_branch_with_nothing_changed_is_the_run_itself(stopped, whole, runs, tmp_path, capsys):
    before = contents(stopped)
    same = ["--precision", "auto", "--game", "ALE/Breakout-v5"]
    assert branch.main([str(stopped), str(tmp_path / "new"), *same]) == 0
    assert "at step 40, nothing changed" in capsys.readouterr().out
    assert contents(stopped) == before
    assert drama.main(["--run", str(tmp_path / "new")]) == 0
    assert outcome(runs[-1], tmp_path / "new") == outcome(*whole)


def test_a_branch_has_the_same_past_and_other_settings_from_there(stopped, runs, tmp_path, capsys):
    new, flags = tmp_path / "new", ["--entropy", "0.5", "--length", "6", "--no-harmony"]
    refused(capsys, branch.main, [stopped, new, *flags], "keeps --harmony of its run")
    assert not new.exists()
    assert branch.main([str(stopped), str(new), *flags[:4], "--steps", "56"]) == 0
    assert "--entropy 0.5 (was 0.003)" in capsys.readouterr().out
    about = json.loads((new / "branch.json").read_text())
    assert about["step"] == 40 and about["changed"] == dict(
        steps=[64, 56], length=[8, 6], entropy=[0.003, 0.5])
    assert drama.main(["--run", str(new)]) == 0
    assert runs[-1].agent.entropy == 0.5 and runs[-1].step == 56
    *past, _ = table(stopped, "metrics")
    assert past and table(new, "metrics")[: len(past)] == past
    assert runs[-1].player.half == 3 and runs[-1].player.age < 6


def test_a_branch_with_another_seed_begins_a_new_episode(stopped, runs, tmp_path, capsys):
    new = tmp_path / "new"
    assert branch.main([str(stopped), str(new), "--seed", "5"]) == 0
    assert drama.main(["--run", str(new)]) == 0
    assert "does not repeat itself" not in capsys.readouterr().out
    first, action = (runs[-1].replay[name].numpy() for name in ("first", "action"))
    kept = np.concatenate([np.load(path)["action"] for path in sorted(stopped.glob("replay-*"))])
    assert np.array_equal(action[: len(kept)], kept) and first[40]
    ended = [int(row["step"]) for row in table(new, "episodes")]
    assert 40 not in ended and [step for step in ended if step < 40] == [
        int(row["step"]) for row in table(stopped, "episodes")]


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_a_branch_refuses(run_folder, tmp_path, capsys):
    before, new = contents(run_folder), tmp_path / "new"
    for flags, says in (
            ([], "64 steps already"),
            (["--steps", "80", "--d-model", "64"], "keeps --d-model 32 of its run"),
            (["--steps", "80", "--game", "Pong"], "keeps --game Breakout of its run"),
            (["--steps", "80", "--threads", "2"], "leave out --threads: drama.py takes it"),
            (["--steps", "80", "--context", "4"], "--context means nothing with"),
            (["--steps", "80", "--batch", "99"], "--dreams 4 cannot be spread evenly"),
            (["--steps", "90000000"], "the replay of --steps 90000000 takes"),
            (["--steps", "80", "--nonsense"], "unknown flag")):
        refused(capsys, branch.main, [run_folder, new, *flags], says)
        assert not new.exists()
    with pytest.MonkeyPatch.context() as patch:  # Ctrl-C while the game is played to where it was
        patch.setattr(drama, "restore", interrupt)
        assert branch.main([str(run_folder), str(new), "--steps", "80"]) == 130
        assert not new.exists()
    refused(capsys, branch.main, [tmp_path / "none", new, "--steps", "80"], "no folder")
    refused(capsys, branch.main, [run_folder, run_folder, "--steps", "80"], "is there already")
    assert contents(run_folder) == before


OTHER = dict(channels=(4, 8), strides=(2, 2), kernel=(9,), backbone="gru", optimizer="laprop",
             sampling="uniform", dream_from="contexts")  # the other words are for the machine


def test_what_is_fixed_is_what_networks_and_optimisers_are_made_of():
    """And which game it is, and the preset's name, which tensors do not tell."""
    def made(**changes):
        s = tiny_settings(**dict(groups=16) | changes)
        nets = drama.build_networks(s, 4, torch.device("cpu"))
        return s.optimizer, [(name, value.shape) for net in nets
                             for name, value in net.state_dict().items()]

    fixed, plain = {"preset", "game", "game_args", "action_repeat"}, tiny_settings(groups=16)
    unchanged = made()
    for name, value in vars(plain).items():
        if not isinstance(value, (str, tuple)) or name in OTHER:
            other = OTHER.get(name, not value if isinstance(value, bool) else 2 * value or 1)
            fixed |= {name} if made(**{name: other}) != unchanged else set()
    assert {*branch.FIXED} == fixed
