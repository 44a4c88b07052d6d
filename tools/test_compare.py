"""The comparison: one frozen replay and as much time for all, no row made twice."""

import csv
import itertools
import re
import types

import numpy as np
import pytest
import torch
from buffer import Mistake
from test_check import refused
from test_drama import FakeGame, close, contents, digest, fake, finished, run_folder
from test_drama import tiny_settings

import drama
from tools import check, compare

TINY = dict(drama.PRESETS["debug"], learning_starts=32)


@pytest.fixture
def tiny(fake, tmp_path):
    """`laptop` is `debug`, rows are kept in tmp_path, and every update takes a second."""
    fake.setitem(drama.PRESETS, "laptop", TINY)
    clock = types.SimpleNamespace(process_time=itertools.count().__next__)
    for name, value in dict(STEPS=80, FOLDER=tmp_path, time=clock).items():
        fake.setattr(compare, name, value)
    return fake


def rows(folder):
    with open(folder / "compare-Breakout.csv") as file:
        return list(csv.DictReader(file))


def steps_of(lengths):
    """Episodes of these lengths, whose actions count up."""
    n = sum(lengths)
    first = np.isin(np.arange(n), np.cumsum([0, *lengths]))
    return dict(frame=np.zeros((n, 64, 64, 3), np.uint8), action=np.arange(n, dtype=np.int32),
                reward=np.zeros(n, np.float32), terminal=np.zeros(n, bool), first=first)


def test_random_play_is_that_of_the_game(fake):
    """Episode n opens with the seed n; what FakeGame shows of a step is what was kept."""
    replay = compare.random_play(tiny_settings(), 60)
    spans = check.spans(replay)
    lengths = [FakeGame.episode_length(number) for number in range(len(spans))]
    assert [stop - first for first, stop in spans][:-1] == lengths[:-1] and replay.length == 60
    for number, (first, stop) in enumerate(spans):
        for t, step in enumerate(range(first, stop)):
            assert replay["frame"][step, 0, 0, :2].tolist() == [number, 10 * t]
            assert replay["reward"][step] == replay["action"][step]
            over = t + 1 == lengths[number] and number % 2 == 0
            assert replay["terminal"][step] == over
    assert len(set(replay["action"].tolist())) == 4


@pytest.mark.parametrize("lengths, cut", [
    ([75, 10, 15], 75), ([78, 10, 12], 78), ([70, 18, 12], 88), ([100], 80), ([69, 31], 80)])
def test_the_last_fifth_is_held_out_by_episodes_where_it_can_be(lengths, cut):
    """Of 100 steps: from the beginning of an episode that is nearest to step 80, not 10 away."""
    steps = steps_of(lengths)
    steps["first"][0] = False  # as where the last steps of a run begin
    frozen, held_out = compare.split(steps)
    assert frozen["action"].tolist() == list(range(cut))
    assert held_out["action"].tolist() == list(range(cut, 100))
    for replay in (frozen, held_out):
        opened = {0, *(np.cumsum(lengths) - int(replay["action"][0])).tolist()}
        assert np.flatnonzero(replay["first"]).tolist() == sorted(
            at for at in opened if 0 <= at < replay.length)


def test_turns_at_equal_time_and_rates_that_rise_by_updates(monkeypatch):
    """Updates of 1 and of 2 seconds, in turns of 3, to 7: the last one is made to its end."""
    now, order, trials = [0], [], []
    monkeypatch.setattr(compare, "time", types.SimpleNamespace(process_time=lambda: now[0]))
    for cost, name in ((1, "A"), (2, "B")):
        group = [dict(rate=0.5, lr=torch.zeros(()))]
        trials.append((types.SimpleNamespace(
            name=name, cost=cost, step=0, settings=tiny_settings(warmup_updates=4),
            model_optimizer=types.SimpleNamespace(param_groups=group),
            agent_optimizer=types.SimpleNamespace(param_groups=[])), {}))

    def learn(run):
        order.append(run.name)
        close(run.model_optimizer.param_groups[0]["lr"], 0.125 * min(4, order.count(run.name)))
        now[0] += run.cost
        return 10

    compare.take_turns(trials, "model", learn, 7)
    assert "".join(order) == "AAABBAAABBA"
    assert [row for _, row in trials] == [
        {"model frames": 70, "model updates": 7, "model seconds": 7},
        {"model frames": 40, "model updates": 4, "model seconds": 8}]


def test_variants_learn_the_world_and_then_to_play_in_it_and_a_row_is_made_once(tiny, tmp_path):
    """Three updates of each kind. One of the model changes no agent, one of the agent no model,
    and both learn from the frozen steps alone."""
    log, actions = [], set(compare.random_play(tiny_settings(), 80)["action"].tolist())

    def watched(name, learnt, kept):
        update = getattr(drama, name)

        def updating(run, batch, *more):
            before = [digest(getattr(run, part).state_dict()) for part in (learnt, kept)]
            result = update(run, batch, *more)
            after = [digest(getattr(run, part).state_dict()) for part in (learnt, kept)]
            assert before[0] != after[0] and before[1] == after[1] and run.replay.length < 80
            log.append((learnt, run.settings.seed, tuple(batch.action.shape)))
            return result

        tiny.setattr(drama, name, updating)

    watched("update_world_model", "model", "agent")
    watched("update_agent", "agent", "model")
    few = "laptop --batch 2 --dreams 8 --dream-from contexts --context 3 --replay-critic 0"
    asked = ["Breakout", "laptop", few, "--precision", "float32", "--seconds", "3"]
    assert compare.main(asked) == 0
    for seed in (0, 1):
        assert [entry[::2] for entry in log if entry[1] == seed] == [
            ("model", (4, 16))] * 3 + [("model", (2, 16))] * 3 + [
            ("agent", (4, 16))] * 3 + [("agent", (8, 3))] * 3
    once = rows(tmp_path)
    assert [(row["variant"], row["seed"]) for row in once] == [
        ("laptop", "0"), (few, "0"), ("laptop", "1"), (few, "1")]
    for row in once:
        frames, dreams = (4 * 16, 16) if row["variant"] == "laptop" else (2 * 16, 8)
        assert [row[f"{part} {what}"] for part in ("model", "agent")
                for what in ("seconds", "updates", "frames")] == [
            "3.0", "3", str(3 * frames), "3.0", "3", str(3 * 4 * dreams)]
        assert float(row["error, all pixels @1"]) > 0 and int(row["rewards that came @15"]) > 0
        assert 0 < float(row["entropy"]) < 1.3863 and float(row["mean_return"]) > 0
        assert row["rewards that came @5"] == once[0]["rewards that came @5"]
    assert len({row["KL, nats @1"] for row in once}) == 4
    assert compare.main([*asked[:2], *asked[3:], "--seeds", "3"]) == 0
    assert rows(tmp_path)[:4] == once and len(rows(tmp_path)) == 5 and len(log) == 30
    assert compare.main(["breakout", "laptop --batch 4", *asked[3:]]) == 0  # by other names
    assert len(log) == 30


def test_what_is_stopped_goes_on(tiny, tmp_path):
    """Ctrl-C while the last of four rows is made."""
    calls = itertools.count(1)

    def figures(run, held_out):
        if (call := next(calls)) == 4:
            raise KeyboardInterrupt
        return dict(score=str(call))

    tiny.setattr(compare, "figures", figures)
    asked = ["Breakout", "laptop", "laptop --dreams 8", "--seconds", "1"]
    assert compare.main(asked) == 130 and len(rows(tmp_path)) == 3
    assert compare.main(asked) == 0
    assert [row["score"] for row in rows(tmp_path)] == ["1", "2", "3", "5"]


def test_a_run_and_a_file_of_it_are_one_replay(run_folder, tiny, tmp_path, capsys):
    """The last 60 of 64 steps of a run of FakeGame; it stays as it is."""
    tiny.setattr(compare, "STEPS", 60)
    tiny.setattr(compare, "figures", lambda run, held_out: dict(score=held_out.length))
    before, s = contents(run_folder), drama.Settings(**TINY)
    steps = compare.recorded(run_folder, s)
    assert len(steps["action"]) == 60 and (steps["reward"] == steps["action"]).all()
    seeds = [drama.episode_seeds(0, number, "reset")[0] for number in range(9)]
    shown = [(seed % 251, 10 * t) for seed in seeds for t in range(FakeGame.episode_length(seed))]
    assert [tuple(frame) for frame in steps["frame"][:, 0, 0, :2].tolist()] == shown[4:64]
    asked = ["Breakout", "--seconds", "1", "--replay"]
    keep = ["--replay", str(run_folder), "--keep", str(tmp_path / "it.npz")]
    assert compare.main(["Breakout", *keep]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'it.npz'}: 60 steps of Breakout\n"
    assert contents(run_folder) == before and not list(tmp_path.glob("*.csv"))
    assert compare.main([*asked, str(run_folder)]) == 0
    made = rows(tmp_path)
    assert [(row["replay"], row["seed"]) for row in made] == [("run", "0"), ("run", "1")]
    tiny.setattr(drama, "Run", lambda *_: pytest.fail("made again"))
    assert compare.main([*asked, str(tmp_path / "it.npz")]) == 0 and rows(tmp_path) == made


@pytest.mark.parametrize("damaged", [b"a,b\n1,2\n3\n", b"a,b\n1,2,3\n", b"a,b\n1,\xff\n"])
def test_a_table_that_was_cut_is_named(damaged, tmp_path):
    (tmp_path / "a.csv").write_bytes(damaged)
    with pytest.raises(Mistake, match="a.csv is damaged: delete the row, or the file"):
        compare.read_rows(tmp_path / "a.csv")


def test_the_table_by_hand(capsys):
    """The mean of the variances 2, 0.02 and 2 is 1.34; Student's t with 3 degrees of freedom 3.182;
    means of two seeds differ by noise up to 3.182 x sqrt(1.34 x 2 / 2) = 3.68. Without the second
    variant these are 2, 2 degrees, 4.303 and 6.09."""
    def of(near, far, some):
        return [dict(variant="x", seed=seed, commit=f"c{seed}", near=near[seed], far=far[seed],
                     some=some[seed], nowhere="nan") for seed in (0, 1)]

    compare.print_table({
        "laptop": of([1, 3], [1, 3], [1000, 1002]),
        "best": of([3.9, 4.1], [5.6, 5.8], ["nan", 1]),
        "best --batch 2": of([2, 4], [-2.6, -0.6], [1006.2, 1008.2])})
    legend, table = capsys.readouterr().out.split("\n\n")[:2]
    assert legend.splitlines() == [
        "[1]  laptop  (c0, c1)", "[2]  best  (c0, c1)", "[3]  best --batch 2  (c0, c1)"]
    assert [re.split("  +", line.strip()) for line in table.splitlines()] == [
        ["[1]", "[2]", "[3]"],
        ["near", "2.000 ± 1.414", "4.000 ± 0.141", "3.000 ± 1.414"],
        ["far", "2.000 ± 1.414", "5.700 ± 0.141 *", "-1.600 ± 1.414"],
        ["some", "1,001 ± 1", "-", "1,007 ± 1 *"]]


@pytest.mark.parametrize("argv, says", [
    (["Breakout", "fast"], "begins with paper, best, laptop, debug; 'fast' does not"),
    (["Breakout", ""], "nothing stands after Breakout"), (["Breakout", " "], "begins with paper"),
    (["Breakout", "laptop --random-hold 4"], "unknown flag '--random-hold'"),
    *((["Breakout", *more, "--keep", "a.npz"], "--keep only writes the steps of the replay")
      for more in (["best"], ["--seconds", "9"], ["--seeds", "3"])),
    (["Breakout", "laptop --bach 2"], "unknown flag '--bach': did you mean --batch"),
    (["Breakout", "laptop --seed 2"], "unknown flag '--seed'"),
    (["Breakout", "laptop --cooldown 0.2"], "unknown flag '--cooldown'"),
    (["Breakout", "laptop", "best --batch 0"], "--batch must be from 1"),
    (["Breakout", "--seconds", "0"], "--seconds must be 1 or more"),
    (["Breakout", "--seeds", "1"], "--seeds 2 or more"), (["Brakout"], "Breakout"),
    (["Breakout", "--seeds", "x"], "--seeds: x is not a whole number"), ([], "GAME"),
    (["Breakout", "--seeds", "1", "laptop"], "--seeds 2 or more"),  # a variant after a flag
    (["Breakout", "--keep", "notes.txt"], "--keep notes.txt: name a file that ends in .npz")])
def test_a_wrong_comparison_is_refused(argv, says, tiny, tmp_path, capsys):
    tiny.setattr(compare, "random_play", lambda *_: pytest.fail("played in vain"))
    refused(capsys, compare.main, argv, says)
    assert not list(tmp_path.iterdir())


def test_a_wrong_replay_is_refused(run_folder, tiny, tmp_path, capsys):
    def refuse(game, path, says):
        refused(capsys, compare.main, [game, "--replay", path], says)

    refuse("Pong", run_folder, "was played with --game Breakout.* not --game Pong")
    refuse("Breakout", tmp_path / "missing", "there is no folder")
    (tmp_path / "it.npz").write_bytes(b"PK")
    refuse("Breakout", tmp_path / "it.npz", "it.npz is no file of --keep")
    tiny.setitem(TINY, "learning_starts", 60)
    refuse("Breakout", run_folder, "64 steps: too few")
