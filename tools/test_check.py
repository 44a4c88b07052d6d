"""The check's figures, held against numbers worked out by hand."""

import json
import math
import os
import re
import types

import numpy as np
import pytest
import torch
from agent import Player, Trajectory
from buffer import Replay
from test_drama import FakeGame, close, command, contents, fake, finished, png_chunks, run_folder
from test_drama import tiny_settings

import drama
from tools import check


def refused(capsys, main, argv, says):
    """One sentence on stderr, exit code 2."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and err.startswith("tools.") and not out
    assert re.search(says, err), err


def two(p):
    return torch.stack([p, 1 - p], -1).unsqueeze(-2)  # (..., 1, 2)


def kl_by_hand(p, q):
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


class Oracle:
    """A model that dreams what happens in `counted`: the frame is the sum of the actions so far."""

    def images(self, frame):
        return frame.flatten(end_dim=-4).movedim(-1, -3).float() / 255

    def posterior(self, image):
        return two(0.2 + image[:, 1, 0, 0] / 2)

    def prior(self, d):
        return two(0.4 + d[:, 0] / 100)

    def starts_from_contexts(self, batch):
        self.opened = batch.first
        return batch.frame[:, -1, 0, 0, 0].int()  # what the last frame of the context shows

    def imagine(self, start, horizon, policy):
        actions = [policy(t, None, None) for t in range(horizon)]
        z = [start + sum(actions[:t]) for t in range(horizon + 1)]
        d_past = torch.arange(horizon + 1.0)[:, None, None].expand(-1, len(start), 1)
        actions = torch.stack(actions)
        return Trajectory(torch.stack(z), d_past, actions, actions.float(), (actions == 9).float(),
                          torch.zeros_like(actions).bool())

    def decode(self, z):
        return (z / 255).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)


def player_of(model, half):
    return types.SimpleNamespace(model=model, half=half, d_past=torch.zeros(1, 1))


def counted(*episodes):
    """Episodes in which action a adds a to every pixel, earns a, and 9 ends a life."""
    replay = Replay(sum(map(len, episodes)))
    for actions in episodes:
        for t, a in enumerate(actions):
            frame = torch.full((64, 64, 3), sum(actions[:t]), dtype=torch.uint8)
            replay.add(frame=frame, action=a, reward=float(a), terminal=a == 9, first=t == 0)
    return replay


LONG, SHORT = [9, 0, 20] * 7 + [9], [0] * 4 + [30] * 6  # 22 steps and 10


def test_every_dream_is_set_beside_what_happened():
    model, replay = Oracle(), counted(LONG, SHORT)
    starts, left, dream = check.dream_beside(player_of(model, 3), replay)
    assert starts.tolist() == [3, 7, 11, 15, 19, 25, 29]  # every fourth, from half a window on
    assert left.tolist() == [19, 15, 11, 7, 3, 7, 3]  # up to 22 and to 32
    assert not model.opened[:, 1:].any()
    level = [sum(LONG[:t]) for t in range(22)] + [sum(SHORT[:t]) for t in range(10)]
    for k in (1, 5, 15):
        found = check.measure(model, replay, starts, left, dream, k)
        taken = [a for start, n in zip(starts, left) for a in (LONG + SHORT)[start:][: min(n, k)]]
        for name, come in dict(rewards=lambda a: a != 0, ends=lambda a: a == 9).items():
            assert found[f"{name} that came"] == sum(map(come, taken)) > 0
            assert found[f"{name} foreseen, %"] == found[f"foreseen {name} that came, %"] == 100
        close(found["mean reward"], sum(taken) / len(taken))
        close(found["mean dreamt reward"], sum(taken) / len(taken))
        close(found["ends, % of steps"], 100 * taken.count(9) / len(taken))
        close(found["dreamt ends, % of steps"], 100 * taken.count(9) / len(taken))
        # Of what comes after an episode's last action there is no frame to be held to
        seen = [start for start, n in zip(starts, left) if n > k]
        assert len(seen) == {1: 7, 5: 5, 15: 1}[k]
        assert found["error, all pixels"] < 1e-3
        still = [(level[start + k] - level[start]) ** 2 for start in seen]
        close(found["had nothing moved"], math.sqrt(sum(still) / len(still)), 1e-3)
        kl = [kl_by_hand(0.2 + level[start + k] / 510, 0.4 + k / 100) for start in seen]
        close(found["KL, nats"], sum(kl) / len(kl))
        moves = [(LONG + SHORT)[start + k - 1] > 16 for start in seen]
        assert found["moving pixels that move, %"] == 100 if any(moves) else True


def test_a_dream_that_stands_still_follows_no_moving_pixel():
    model, replay = Oracle(), counted([0, 0, 0] + [20] * 10)
    dream = model.imagine(torch.tensor([0]), 5, lambda t, z, d_past: torch.tensor([0]))
    found = check.measure(model, replay, np.array([3]), np.array([10]), dream, 2)
    assert found["moving pixels that move, %"] == 0 and found["rewards foreseen, %"] == 0
    assert math.isnan(found["foreseen rewards that came, %"])
    close(found["error, moving pixels"], 40.0, 1e-3)
    close(found["had they not moved"], 40.0, 1e-3)


def test_a_short_episode_is_dreamt_of_from_its_middle():
    """Half a window, 8 steps, reaches into the episode before and beyond the first of all."""
    model, replay = Oracle(), counted([1] * 5, [2] * 4, [3])
    starts, left, dream = check.dream_beside(player_of(model, 8), replay)
    assert starts.tolist() == [2, 7, 9] and left.tolist() == [3, 2, 1]
    opened = [[t in (0, 5, 9) or t < 0 for t in range(start - 8, start + 1)] for start in starts]
    assert model.opened.tolist() == opened
    found = check.measure(model, replay, starts, left, dream, 5)
    assert found["rewards that came"] == 6 and math.isnan(found["error, all pixels"])


def test_dreams_are_spread_evenly_if_there_are_too_many(monkeypatch):
    monkeypatch.setattr(check, "AT_MOST", 3)
    monkeypatch.setattr(check, "AT_ONCE", 2)
    starts, left, dream = check.dream_beside(player_of(Oracle(), 2), counted([1] * 30))
    assert starts.tolist() == [2, 14, 26] and left.tolist() == [28, 16, 4]
    assert dream.z[0].tolist() == [2, 14, 26]  # together what was dreamt two at a time


def test_what_the_reconstructions_leave_out_shows_by_its_size(monkeypatch):
    """A ball of 4 pixels that they lack, a block of 400 that they show at half its brightness."""
    monkeypatch.setattr(check, "AT_ONCE", 1)
    real, shown = torch.zeros(2, 6, 64, 64, 3, dtype=torch.uint8)
    for t in range(6):
        real[t, 9, 9] = t  # tells the frames apart, and does not count as moving
    real[1::2, 20:22, 30:32] = 200
    real[3:, 40:60, 40:60], shown[3:, 40:60, 40:60] = 100, 50
    shown[3:, 20:22, 30:32] = 80  # as it comes and goes they do not change: it is not shown
    replay = Replay(6)
    for t, frame in enumerate(real):
        replay.add(frame=frame.numpy(), action=0, reward=0.0, terminal=False, first=t == 0)
    model = Oracle()
    model.posterior = lambda x: torch.nn.functional.one_hot((255 * x[:, 0, 9, 9]).round().long(), 6)
    model.decode = lambda z: model.images(shown[z])
    found = check.change_shown(model, replay, torch.device("cpu"))
    # 0 -> 1, 1 -> 2, 3 -> 4, 4 -> 5: the ball alone; 2 -> 3: ball and block
    assert list(found) == [8, 64, 512, 4096] and found[8] == 0
    block = (400 * 50 * 100 + 4 * 80 * 200) / (400 * 100**2 + 4 * 200**2)
    close(found[512], 100 * block, 1e-4)
    assert math.isnan(found[64]) and math.isnan(found[4096])


class Deaf(Oracle):
    """Dreams the same sums plus a noise, but of actions of its own: 2 a step, whatever is done."""

    def imagine(self, start, horizon, policy):
        taken = torch.full_like(start, 2)
        return super().imagine(start + torch.randint(9, (len(start),)), horizon, lambda *_: taken)


def test_exchanged_actions_raise_the_error_of_a_model_that_heeds_them(monkeypatch):
    """The Oracle's dreams, 3 levels too bright, are 3 off; with another's actions they are off by
    the difference of what these add up to, too. The other begins half of all dreams away, and
    beyond the end it repeats its last action."""
    monkeypatch.setattr(check, "AT_ONCE", 3)  # their partners are not among those dreamt with
    monkeypatch.setattr(Oracle, "decode",
                        lambda self, z: ((z + 3) / 255).view(-1, 1, 1, 1).expand(-1, 3, 64, 64))
    actions = [1, 0, 2] * 3 + [4] * 8 + [0, 5] * 8
    model, replay = Oracle(), counted(actions)
    starts, table = check.judge(player_of(model, 1), replay)
    assert starts.tolist() == [1, 5, 9, 13, 17, 21, 25, 29]
    partner = dict(zip(starts, [17, 21, 25, 29, 1, 5, 9, 13]))
    for k in (1, 5, 15):
        seen = [at for at in starts if at + k < len(actions)]
        taken = actions + [actions[-1]] * 15
        off = [3 + sum(taken[partner[at]:][:k]) - sum(taken[at:][:k]) for at in seen]
        close(table[k]["action-shuffle ratio"], sum(x * x for x in off) / 9 / len(seen), 1e-3)
    assert table[15]["action-shuffle ratio"] > 2


def test_exchanged_actions_are_nothing_to_a_model_that_ignores_them():
    """Not even by chance: both dreams draw the same random numbers."""
    torch.manual_seed(5)
    _, table = check.judge(player_of(Deaf(), 3), counted([4, 0, 2, 1] * 6, [3, 0] * 9))
    assert [table[k]["action-shuffle ratio"] for k in (1, 5, 15)] == [1.0] * 3
    assert table[1]["error, all pixels"] > 1
    _, table = check.judge(player_of(Deaf(), 3), counted([4] * 6))  # a dream without others
    assert math.isnan(table[1]["action-shuffle ratio"])


class Four(Oracle):
    """Its samples of one start are 0, 1, 2 and 3 levels too bright; it reads 1 reward too much."""

    def starts_from_contexts(self, batch):
        self.seen = batch.frame[:, :, 0, 0, 0]
        return super().starts_from_contexts(batch) + torch.arange(len(batch.first)) % 4

    def imagine(self, *args):
        dream = super().imagine(*args)
        return dream._replace(reward=dream.reward + 1)


def test_open_loop_drift_by_hand():
    """60 steps have room for 7 starts of 50, 80 for 27, and 53 for none: 34, of which 32 are taken.
    The mean of 0, 1, 4 and 9 is 3.5, at every step."""
    episodes = [[1, 0, 9] * 20, [2] * 53, [3, 1] * 40]
    model, replay = Four(), counted(*episodes)
    errors, arrays = check.open_loop_drift(player_of(model, 3), replay)
    assert len(errors) == 50
    close(torch.tensor(errors), torch.full((50,), 3.5 / 255**2), 1e-4)
    assert {name: (array.shape, array.dtype.kind) for name, array in arrays.items()} == dict(
        real=((32, 50, 64, 64, 3), "u"), dream=((32, 4, 50, 64, 64, 3), "u"),
        rrew=((32, 50), "f"), drew=((32, 4, 50), "f"), rend=((32, 50), "f"),
        dend=((32, 4, 50), "f"))
    begun = [at * 34 // 32 for at in range(32)]
    begun = [at if at < 7 else at - 7 + 60 + 53 for at in begun]
    level = [sum(taken[:t]) for taken in episodes for t in range(len(taken))]
    taken = sum(episodes, [])
    for i, at in enumerate(begun):  # frames at .. at + 3 are seen; the action at + 3 leads on
        assert (model.seen[4 * i : 4 * i + 4] - torch.tensor(level[at : at + 4]) == 0).all()
        assert arrays["real"][i, :, 7, 9, 1].tolist() == level[at + 4 : at + 54]
        assert arrays["rrew"][i].tolist() == taken[at + 3 : at + 53]
        assert arrays["rend"][i].tolist() == [a == 9 for a in taken[at + 3 : at + 53]]
        for j in range(4):
            bright = [shown + j for shown in level[at + 4 : at + 54]]
            assert arrays["dream"][i, j, :, 9, 7, 2].tolist() == bright
            assert arrays["drew"][i, j].tolist() == [a + 1 for a in taken[at + 3 : at + 53]]
            assert (arrays["dend"][i, j] == arrays["rend"][i]).all()


def test_drift_of_a_dream_that_stands_still_and_of_an_oracle(monkeypatch, capsys):
    """2 a step: after k steps the still one is 2 k off. No 32 dreams of more than 6 fit in here."""
    replay = counted([2] * 25, [2] * 25)
    assert max(check.open_loop_drift(player_of(Oracle(), 3), replay)[0]) < 1e-12
    imagine = Oracle.imagine
    monkeypatch.setattr(Oracle, "imagine", lambda self, start, horizon, policy: imagine(
        self, start, horizon, lambda *_: torch.zeros_like(start)))
    errors, _ = check.open_loop_drift(player_of(Oracle(), 3), replay)
    close(torch.tensor(errors), torch.tensor([(2 * k / 255) ** 2 for k in range(1, 7)]), 1e-4)
    check.print_drift(errors, None)
    out = capsys.readouterr().out
    assert "32 dreams of 50 steps after 4 real frames: these take 6\n" in out
    assert re.search(r"steps after 4 real frames +1 +5 +6\n.* 6\.2e-05 +1\.5e-03 +2\.2e-03\n", out)


def test_drift_is_left_out_where_no_episode_has_room(capsys):
    """4 frames are seen and one is dreamt: 5 steps hold one start, so 31 episodes hold 31."""
    assert check.open_loop_drift(player_of(Oracle(), 3), counted(*[[1] * 5] * 31)) == ([], {})
    assert len(check.open_loop_drift(player_of(Oracle(), 3), counted(*[[1] * 5] * 32))[0]) == 1
    check.print_drift([], "x.npz")
    assert capsys.readouterr().out == (
        "\nno room in the episodes for 32 dreams of 50 steps after 4 real frames: "
        "open-loop drift is left out, and x.npz is not written\n")


def test_the_check_notes_what_player_and_critic_had_before_the_action(fake):
    """A player whose z_t is the frame's time and whose d is the number of its actions. It tosses a
    coin before each, the second time one of four faces."""
    player = types.SimpleNamespace(model=Oracle(), d_past=torch.zeros(5, 1), age=0, history=[])
    player.agent = types.SimpleNamespace(
        value=lambda z, d_past: z + 1000 * d_past[:, 0], features=lambda z, d_past: d_past,
        policy=lambda n: torch.where(n == 1, 0.25, torch.tensor([0.5, 0.5, 0, 0])))
    player.play = types.MethodType(Player.play, player)

    def act(frame, first):
        assert first.all() == (player.age == 0) and first.any() == first.all()
        player.history.append((frame[:, 0, 0, 1] / 10, None))
        player.d_past, player.age = player.d_past + 1, player.age + 1
        return torch.full((5,), player.age % 4)

    player.act = act
    s = tiny_settings()
    played = check.play(s, player)
    replay, spans = played.replay, check.spans(played.replay)
    lengths = [FakeGame.episode_length(seed) for seed in drama.episode_seeds(s.seed, 2, "test", 5)]
    assert [stop - first for first, stop in spans] == lengths and replay.length == sum(lengths)
    for first, stop in spans:
        for t, step in enumerate(range(first, stop)):
            assert replay["frame"][step, 0, 0, 1] == 10 * t  # the frame before the action
            assert replay["first"][step] == (t == 0)
            assert replay["action"][step] == replay["reward"][step] == (t + 1) % 4
            assert played.value[step] == 1001 * t and played.age[step] == t
            close(played.entropy[step], math.log(4 if t == 1 else 2))
            close(played.kl[step], kl_by_hand(0.2 + 10 * t / 510, 0.4 + t / 100))


def test_value_and_return_by_hand():
    """Discount 1/2; the second episode was cut off, and its return ends in the last value."""
    replay = counted([4, 9, 2], [8, 4])  # 9 is a lost life: what comes after does not count
    value = np.array([1.0, 2.0, 4.0, 3.0, 16.0])
    played = check.Played(replay, None, value, None, None)
    returns = [4 + 9 / 2, 9, 2 + 4 / 2, 8 + (4 + 16 / 2) / 2, 4 + 16 / 2]
    got = check.value_and_return(tiny_settings(gamma=0.5), played)
    close(got["mean_value"], 26 / 5), close(got["mean_return"], sum(returns) / 5)
    a, b = ([x - sum(xs) / 5 for x in xs] for xs in (value, returns))
    scale = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    close(got["value_correlation"], sum(x * y for x, y in zip(a, b)) / scale)


def test_kl_by_age_begins_where_the_state_is_rebuilt():
    """Half a window is 8 steps, so ages go by twos from 8 on."""
    age, kl = np.array([0, 7, 8, 9, 10, 15, 14]), np.array([90.0, 90.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    got = check.kl_by_age(check.Played(None, kl, None, age, None), 8)
    assert got == {"8 on": 1.5, "10 on": 3.0, "14 on": 5.0}


def refuse_nan(word):
    raise AssertionError(word)


def check_twice(folder, elsewhere, *more):
    """Check a run, into its folder and into another, there with more flags -> what was kept."""
    before, argv = contents(folder), [str(folder), "--out", str(elsewhere), *more]
    assert check.main(argv) == 0 and contents(folder) == before
    assert check.main([str(folder), "--threads", "1"]) == 0
    for path in elsewhere.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert list(png_chunks(folder / "model-check-000064.png"))
    text = (folder / "model-check-000064.json").read_text()
    kept = json.loads(text, parse_constant=refuse_nan)
    assert list(kept["dreams"]) == ["1", "5", "15"] and kept["step"] == 64 and kept["versions"]
    assert not any(name != name.strip() for row in kept["dreams"].values() for name in row)
    assert len(kept["scores"]) == len(kept["lengths"]) == 5
    return kept


def test_the_check_prints_a_table_keeps_it_and_draws_a_dream(run_folder, tmp_path, capsys):
    kept = check_twice(run_folder, tmp_path / "new" / "place")
    out = capsys.readouterr().out
    assert re.search(r"error, all pixels( +\d+\.\d\d){2} +-\n  had nothing moved", out)  # 13 steps
    assert "correlation" in out and "real reward a step" in out
    assert all(9 <= length <= 13 for length in kept["lengths"])
    assert kept["kl_by_age"] and all(kl >= 0 for kl in kept["kl_by_age"].values())


def test_a_gymnasium_game_is_checked_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "DRIFT", (1, 5))  # fewer frames to pack
    assert command(tmp_path / "run", "--game", "Dot") == 0
    kept = check_twice(tmp_path / "run", tmp_path / "elsewhere", "--npz", str(tmp_path / "it.npz"))
    arrays = np.load(tmp_path / "it.npz")
    assert arrays["dream"].shape == (32, 4, 5, 64, 64, 3)
    real, dream = arrays["real"][:, None] / 255.0, arrays["dream"] / 255.0
    error = ((real - dream) ** 2).mean((0, 1, 3, 4, 5))
    assert np.abs(error - kept["open_loop_drift"]).max() < 2e-3  # dreams are rounded to bytes
    assert all(row["action-shuffle ratio"] > 0 for row in kept["dreams"].values())
    assert kept["game"] == "Dot" and kept["lengths"] == [50] * 5
    assert kept["dreams"]["15"]["ends that came"] == 5 * 4  # from 36, 40, 44 and 48


def test_a_folder_that_takes_no_result_is_refused_before_playing(run_folder, fake, capsys):
    fake.setattr(Player, "play", lambda *_: pytest.fail("played in vain"))
    fake.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(capsys, check.main, [run_folder], "cannot be written to.*--out DIR")
    refused(capsys, check.main, [run_folder, "--npz", "it.npz"], "cannot be written to: --npz FILE")


def test_the_policy_is_checked_as_it_was_trained(run_folder, monkeypatch):
    players = [drama.load_player(run_folder)[1]]
    monkeypatch.setattr(check, "check", lambda s, player, *rest: players.append(player))
    check.main([str(run_folder)])
    assert [player.temperature for player in players] == [0.5, 1]


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    refused(capsys, check.main, [tmp_path], "holds no run")
    refused(capsys, check.main, [tmp_path / "missing"], "there is no folder .*missing")
    refused(capsys, check.main, [], "RUN")


@pytest.mark.parametrize("flags", ["--eval-episodes 3", "--act-on prior", "--seed 1", "--device x"])
def test_flags_that_the_check_does_not_take_are_refused(flags, run_folder, capsys):
    before = contents(run_folder)
    refused(capsys, check.main, [run_folder, *flags.split()], flags.split()[0])
    assert contents(run_folder) == before
