"""tools/emulator.py against ale-py's vector environment and games worked by hand."""

import csv
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from ale_py import Action
from ale_py.vector_env import AtariVectorEnv

from drama import AtariGame
from tools import emulator
from tools.emulator import Emulator

# ---------------------------------------------------------------- the real emulator


@pytest.mark.parametrize("title", ["Assault", "Breakout"])
def test_an_episode_is_that_of_the_vector_environment(title):
    env = AtariVectorEnv(
        AtariGame.names()[title], 1, img_height=64, img_width=64, grayscale=False, stack_num=1,
        reward_clipping=False, use_fire_reset=False)
    game, rng = Emulator(title), np.random.default_rng(1)
    (frame,), info = env.reset(seed=5)
    game.start(info["episode_frame_number"][0])
    deaths, done, frames = 0, False, 0
    while not done:
        assert np.array_equal(game.frame(), frame[0]) and game.lives == info["lives"][0]
        action, before = rng.integers(len(game.keys)), game.lives
        reward, terminal, done = game.step(action)
        (frame,), (rewarded,), (over,), (cut,), info = env.step(np.array([action]))
        assert (reward, done) == (rewarded, over or cut)
        assert terminal == (over or info["lives"][0] < before)
        deaths, frames = deaths + terminal, frames + 1
    assert deaths == {"Assault": 4, "Breakout": 5}[title] and frames > 100


@pytest.mark.parametrize("title", ["Amidar", "Qbert"])
def test_a_restored_state_goes_on_as_it_did(title):
    game, rng = Emulator(title), np.random.default_rng(2)
    game.start(1)
    for _ in range(8):
        here, actions = game.keep(), rng.integers(len(game.keys), size=(2, 12))
        as_it_was = list(game.film(actions[0]))
        list(game.film(actions[1]))
        game.restore(here)
        assert list(game.film(actions[0])) == as_it_was
        list(game.film(actions[1]))


# ---------------------------------------------------------------- games worked by hand


class Toy(Emulator):
    """Three lives, in rounds of 20 steps. UP in step 2 earns 5 in step 5; a life is lost in step
    19 but for UP in step 12. In steps 0, 4, 8 ... UP moves a dot. FIRE does nothing.
    """

    keys = [Action.NOOP, Action.FIRE, Action.UP]

    def __init__(self, title=""):
        pass

    def start(self, no_ops):
        self.no_ops, self.time, self.lives, self.dot = no_ops, 0, 3, 0

    def step(self, key):
        step, up = self.time % 20, key == 2
        if step == 0:
            self.earned = self.saved = False
        self.earned |= up and step == 2
        self.saved |= up and step == 12
        self.dot += up and step % 4 == 0
        self.time += 1
        lost = step == 19 and not self.saved
        self.lives -= lost
        return 5 * (self.earned and step == 5), lost, self.lives == 0

    def frame(self):
        return np.array([self.no_ops % 3, self.dot])

    def keep(self):
        return dict(vars(self))

    def restore(self, kept):
        vars(self).update(kept)


class Sleepy(Toy):
    """No key does anything before step 40, no-ops counted."""

    def step(self, key):
        return super().step(key if self.time + self.no_ops >= 40 else 0)


class Scripted:
    """A random number generator that does not: 1, 2, 3 ... no-ops, then no key."""

    def __init__(self):
        self.no_ops = 0

    def integers(self, high):
        if high < emulator.NO_OPS:
            return 0
        self.no_ops += 1
        return self.no_ops


def test_sealed_steps_are_those_since_the_last_chance():
    found = emulator.sealed(Toy(), np.random.default_rng(0))
    assert found == {"lost life sealed": "7 (7 to 7)", "game over sealed": "7 (7 to 7)",
                     "reward sealed": "3 (3 to 3)"}  # steps 13 to 19, and 3 to 5


def test_an_action_matters_if_anything_differs_soon_after():
    found = emulator.choices(Toy(), np.random.default_rng(0))
    assert found["actions"] == 3 and found["differ"] == 2 and found["never differ"] == "NOOP=FIRE"
    assert 54 <= int(found["no action matters"].rstrip("%")) <= 86  # 70: not in 0, 4 ... and 2


def test_beginnings_and_the_games_that_no_ops_make():
    found = emulator.starts(Sleepy(), np.random.default_rng(0))
    # The dot first moves in step 40, 32, 28, 20, 12 after 1, 8, 15, 22, 29 no-ops
    assert found["dead beginning"] == "28 (12 to 40)" and found["first frames"] == 3
    assert emulator.starts(Toy(), np.random.default_rng(0))["games"] == "3 (3 to 3)"


def test_random_play_is_counted_by_hand(monkeypatch):
    def step(game, key):
        reward, terminal, done = Toy.step(game, key)
        game.lives += game.time == 41  # a life gained in the third round
        return reward + game.no_ops * (game.time == 1), terminal, done

    monkeypatch.setattr(emulator, "EPISODES", 4)
    game = type("Paying", (Toy,), dict(step=step))()
    assert emulator.random_play(game, Scripted()) == {  # scores of 1, 2, 3, 4
        "random play": 2.5, "standard error": 0.65, "steps": 80, "lives": "3 x 4",
        "moves": "-1 x 16, +1 x 4", "last life at": "1 x 4", "shortest life": 20}
    assert emulator.standing_still(game, Scripted()) == {"standing still": 80}


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command on Toy, without processes: runs it, -> parts measured; `fail` names one."""

    def measure(name, game, rng):
        measured.append(name)
        if name == command.fail:
            raise KeyboardInterrupt
        return {name: len(measured)}

    def run(*argv):
        measured.clear()
        return emulator.main([*argv, "--jobs", "1"]), list(measured)

    def part(name):
        one = partial(measure, name)
        one.__name__ = name
        return one

    measured = []
    command = run
    command.fail, command.path = None, tmp_path / "emulator.csv"
    monkeypatch.setattr(emulator, "RESULTS", command.path)
    monkeypatch.setattr(emulator, "PARTS", [part("one"), part("two")])
    monkeypatch.setattr(emulator, "Emulator", Toy)
    monkeypatch.setattr(emulator, "ProcessPoolExecutor", lambda jobs, _: ThreadPoolExecutor(jobs))
    return run


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return {row["game"]: row for row in csv.DictReader(file)}


def test_a_measured_game_is_not_measured_again(command):
    assert command("pong", "ALE/Breakout-v5") == (0, ["one", "two", "one", "two"])
    table = command.path.with_suffix(".md").read_text("utf-8")
    assert "| Breakout | 3 | 4 |\n| Pong | 1 | 2 |\n" in table and emulator.VERSIONS in table
    assert command("Pong", "Boxing") == (0, ["one", "two"])
    assert list(rows(command.path)) == ["Boxing", "Breakout", "Pong"]
    assert rows(command.path)["Pong"]["two"] == "2"


def test_a_game_measured_with_other_versions_is_measured_again(command):
    command("Pong")
    command.path.write_text(command.path.read_text("utf-8").replace("ale-py", "older"), "utf-8")
    assert command("Pong") == (0, ["one", "two"])
    assert rows(command.path)["Pong"]["versions"] == emulator.VERSIONS


def test_stopping_loses_the_game_in_hand_only(command, capsys):
    command("Pong")
    command.fail = "two"
    assert command("Pong", "Boxing")[0] == 130 and list(rows(command.path)) == ["Pong"]
    assert "the same command goes on" in capsys.readouterr().err
    command.fail = None
    assert command("Pong", "Boxing") == (0, ["one", "two"])


@pytest.mark.parametrize("argv, says", [
    (["Braekout"], "did you mean Breakout"), (["Pong", "--jobs", "0"], "--jobs"),
    (["Dot"], "Dot is not one of Atari's games"), (["Pong", "--job", "1"], "did you mean --jobs")])
def test_wrong_input_is_refused(argv, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(emulator, "RESULTS", tmp_path / "emulator.csv")
    assert emulator.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.emulator: ") and says in line and not list(tmp_path.iterdir())
