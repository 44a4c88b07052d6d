"""The memory's instrument: a world that one can walk through by hand, and errors one can count."""

import math
import re

import numpy as np
import pytest
import torch
from scan import BACKBONES
from test_check import refused

from tools import memory
from tools.memory import BACK, WRONG

# One world, with the agent at its start: . floor, # wall, G goal.
WORLD = """A . # . .
           . . . . #
           # . . . .
           . . . . .
           . . . . G"""
UP, RIGHT, DOWN, LEFT = range(4)


def cells(picture):
    """A picture, ? for what is dark -> its 25 tokens."""
    return ["?.#GA".index(cell) for cell in picture.split()]


def walked(*actions):
    worlds = np.array([cells(WORLD.replace("A", "."))])
    return memory.walk(worlds, np.array([0]), np.array([actions]))


def test_a_walk_by_hand():
    """Up and left there is an edge, at the top right a wall: both stop. What is seen is 3 x 3."""
    tokens = walked(UP, RIGHT, RIGHT, DOWN, LEFT, LEFT)
    corner, top, below, side = (cells(picture) for picture in (
        """A . ? ? ?
           . . ? ? ?
           ? ? ? ? ?
           ? ? ? ? ?
           ? ? ? ? ?""",
        """. A # ? ?
           . . . ? ?
           ? ? ? ? ?
           ? ? ? ? ?
           ? ? ? ? ?""",
        """. . # ? ?
           . A . ? ?
           # . . ? ?
           ? ? ? ? ?
           ? ? ? ? ?""",
        """. . ? ? ?
           A . ? ? ?
           # . ? ? ?
           ? ? ? ? ?
           ? ? ? ? ?"""))
    assert tokens[0, :, :25].tolist() == [corner, corner, top, top, below, side]
    assert tokens[0, :, 25].tolist() == [5, 6, 6, 7, 8, 8] and tokens.shape == (1, 6, 26)


def test_every_edge_stops_and_the_goal_lies_under_the_agent():
    """The way round: down the left side is shut by a wall, so through the middle to the goal."""
    way = [LEFT, DOWN, DOWN, RIGHT, *[DOWN] * 4, *[RIGHT] * 4, UP, DOWN]
    tokens = walked(*way)[0, :, :25]
    places = [list(frame).index(4) for frame in tokens.tolist()]
    assert places == [0, 0, 5, 5, 6, 11, 16, 21, 21, 22, 23, 24, 24, 19]
    assert 3 in tokens[10] and 3 not in tokens[11] and tokens[13, 24] == 3


def test_sequences_are_drawn_by_their_seed():
    """Six walls, one goal, and an agent on the floor: where a walk has seen the whole world."""
    a, b, c = (memory.sequences(np.random.default_rng(seed), 40, 64) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.shape == (40, 64, 26) and [64 * 26, 8 * 26] == [1664, 208]
    assert a[:, :, :25].max() == 4 and set(a[:, :, 25].flatten().tolist()) == {5, 6, 7, 8}
    assert ((a == 4).sum(-1) == 1).all()
    best = torch.where(a == 4, 0, a)[:, :, :25].amax(1)  # the agent hides what it stands on
    whole = (best > 0).all(1)
    assert whole.sum() > 5
    assert ((best[whole] == 2).sum(1) == 6).all() and ((best[whole] == 3).sum(1) == 1).all()
    assert len(set(map(tuple, best.tolist()))) == 40


@pytest.fixture
def two_of_four(monkeypatch):
    """Down and up again, with nothing around: in view are rows 0 and 1, 0 to 2, 0 and 1, 0 to 2.
    The last two frames are to be foreseen."""
    monkeypatch.setattr(memory, "FORESEEN", 2)
    tokens = walked(DOWN, UP, DOWN, UP)
    assert [(frame != 0).sum().item() for frame in tokens[0, :, :25]] == [4, 6, 4, 6]
    return tokens


def test_errors_by_hand(two_of_four):
    """Of 50 tokens; two cells, (2, 0) and (2, 1), come back in the last frame."""
    tokens = two_of_four
    right = tokens[:, 2:, :25].clone()
    assert memory.errors(right, tokens) == {WRONG: 0, BACK: 0}
    forgotten = right.clone()
    forgotten[0, 1, 10] = 1  # the wall below, taken for floor
    assert memory.errors(forgotten, tokens) == pytest.approx({WRONG: 2, BACK: 50})
    lost = right.clone()
    lost[0, 0, 20:] = 1  # five dark cells, taken for floor
    assert memory.errors(lost, tokens) == pytest.approx({WRONG: 10, BACK: 0})
    new = walked(UP, UP, DOWN, UP)  # here (2, 0) and (2, 1) come into view for the first time
    wrong = memory.errors(torch.zeros_like(right), new)
    assert wrong[WRONG] == pytest.approx(100 * (4 + 6) / 50) and math.isnan(wrong[BACK])


def test_references_by_hand(two_of_four):
    """The frame at (1, 0) again is wrong in 4 cells of that at (0, 0). One wall is no floor."""
    assert memory.references(two_of_four) == {
        "the last frame again": pytest.approx({WRONG: 8, BACK: 0}),
        "place known, all taken for floor": pytest.approx({WRONG: 2, BACK: 50}),
        "place known, all remembered": pytest.approx({WRONG: 0, BACK: 0})}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_foreseen_follows_from_the_actions_alone(backbone, monkeypatch):
    """It is fed what it is shown, then its own guesses and the real actions, and nothing else; step
    by step it guesses what the whole sequence says that is made of these."""
    monkeypatch.setattr(memory, "FORESEEN", 2)
    torch.manual_seed(0)
    model, fed = memory.NextToken(backbone, 104).eval(), []
    torch.nn.init.normal_(model.head.weight)  # or it might name one kind everywhere
    inputs = model.inputs
    monkeypatch.setattr(model, "inputs", lambda tokens, *first: (
        fed.append(tokens), inputs(tokens, *first))[1])
    tokens = memory.sequences(np.random.default_rng(0), 3, 4)
    guess = model.foresee(tokens)
    assert guess.shape == (3, 2, 25) and len(guess.unique()) > 1
    made = tokens.clone()
    made[:, 2:, :25] = guess
    assert torch.equal(torch.cat(fed, 1), made.flatten(1))
    with torch.no_grad():
        d, _ = model.sequence(inputs(made.flatten(1)))
    said = model.head(d[:, 51:-1]).argmax(-1)  # from the action of the second frame on
    assert torch.equal(said.view(3, 2, 26)[:, :, :25], guess)


def test_the_loss_is_that_of_the_frames_after_the_first(two_of_four):
    """A head that always says the same: minus log of the softmax, averaged over three frames."""
    model = memory.NextToken("mamba2", 104)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(logits)
    tokens = two_of_four
    nats = [-math.log(math.exp(logits[kind]) / sum(map(math.exp, logits)))
            for kind in tokens[0, 1:, :25].flatten().tolist()]
    assert model.loss(tokens).item() == pytest.approx(sum(nats) / 75, rel=1e-5)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    for name, value in dict(WIDTH=32, BATCH=416, TESTS=8, FORESEEN=2, LENGTHS=(78, 104),
                            PATH=tmp_path / "memory.csv").items():
        monkeypatch.setattr(memory, name, value)
    return monkeypatch


def test_it_learns_a_walk_by_heart(tiny):
    """If every sequence is the same, it foresees the end from the beginning."""
    tiny.setattr(memory, "sequences", lambda *_: walked(DOWN, RIGHT, UP, LEFT))
    before, after = (memory.trained("mamba2", 0, 104, updates, torch.device("cpu"))
                     for updates in (1, 60))
    assert float(before[WRONG]) > 20 and float(after[WRONG]) == 0


def test_a_row_is_made_once_and_the_table_holds_the_means(tiny, capsys):
    asked = ["mamba2", "--updates", "2", "--threads", "1"]
    memory.PATH.write_text("backbone,seed,note\nlstm,0,of another\n")  # which stays
    assert memory.main([*asked, "--seeds", "1"]) == 0
    note, *once = memory.read_rows(memory.PATH)
    assert note["note"] == "of another"
    assert [(row["backbone"], row["seed"], row["length"]) for row in once] == [
        ("mamba2", "0", "78"), ("mamba2", "0", "104")]
    made = memory.trained("mamba2", 0, 104, 2, torch.device("cpu"))
    assert made[WRONG] == once[1][WRONG] and made["parameters"] == int(once[1]["parameters"])
    tiny.setattr(memory, "trained", lambda **key: {WRONG: "30", BACK: "7"})
    once[0][WRONG], once[0][BACK] = "20", "5"
    memory.write_rows(memory.PATH, once)
    capsys.readouterr()
    assert memory.main(asked) == 0
    twice = memory.read_rows(memory.PATH)
    assert twice[:2] == once and [row["seed"] for row in twice] == list("0011")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("mamba2"))
    assert line.split()[1:5] == ["25.0", "6.0", "15.6", "2"]  # so many seeds
    assert line.split()[7:] == ["14.2", "2"]
    assert re.fullmatch("([0-9a-f]{7}(-dirty)?)?", twice[2]["commit"])


@pytest.mark.parametrize("argv, says", [
    (["mamba2", "lstm"], "'lstm' is none of mamba"), (["--updates", "0"], "--updates must be 1"),
    (["--seeds", "x"], "--seeds: x is not a whole number"), (["--batch", "3"], "unknown flag")])
def test_a_wrong_comparison_is_refused(argv, says, tiny, capsys):
    refused(capsys, memory.main, argv, says)
    assert not memory.PATH.exists()
