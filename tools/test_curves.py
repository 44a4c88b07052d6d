"""Curves: marks where the scores are, round numbers, nothing overwritten or left unsaid."""

import dataclasses
import json
import os
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from agent import Player
from test_check import refused
from test_drama import DAMAGED, close, contents, fake, finished, run_folder

import drama
from tools import check, compare, curves, page, table


BAD_SETTINGS = ["{", "null", "[]", "5", '"x"', '{"game": "Pong"}',
                '{"game": [], "preset": "laptop", "steps": 9, "seed": 0}',
                '{"game": "Pong", "preset": 3, "steps": 9, "seed": 0}',
                '{"game": "Pong", "preset": "laptop", "steps": "x", "seed": 0}']


def drawable(folder, game="Dot", rows=("100,0,100,", "200,10,100,", "400,20,200,"), **flags):
    folder.mkdir()
    settings = drama.Settings(**dict(drama.PRESETS["laptop"], preset="laptop", game=game) | flags)
    (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
    table = "\n".join(["step,score,length,human_normalised", *rows, ""])
    (folder / "episodes.csv").write_text(table)
    return str(folder)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(curves, "SMOOTH", 2)
    return tmp_path


def panels(path="curves.svg"):
    root = xml.etree.ElementTree.parse(path).getroot()
    return root, [group for group in root.iter() if group.tag.endswith("}g")]


def dots(panel):
    return [(e.get("cx"), e.get("cy")) for e in panel.iter() if e.tag.endswith("circle")]


def words(panel):
    return [e.text for e in panel.iter() if e.tag.endswith("text")]


def test_curves_are_drawn_where_the_scores_are(place, capsys):
    runs = [drawable(place / "a"),
            drawable(place / "b & <c>", "Breakout", ["50,30,50,100"], model_lr=0.5)]
    with open(place / "b & <c>" / "episodes.csv", "a") as table:
        table.write("60,3")  # half written
    for name, scores in (("000400", [10, 20]), ("000400-prior", [3, 3]),
                         ("000400-temperature-0.5", [5, 5])):
        report = json.dumps(dict(step=400, scores=scores))
        (place / "a" / f"evaluation-{name}.json").write_text(report)
    assert curves.main(runs) == 0
    _, (breakout, dot) = panels()
    # 400 steps are 430 pixels, from 70 on; 20 points are 230, from 260 up
    assert dots(dot)[-1] == ("500.0", "87.5")  # the evaluation: 15 on average
    assert dots(dot)[:-1] == [("177.5", "260.0"), ("285.0", "145.0"), ("500.0", "30.0")]
    line = [e.get("d") for e in dot.iter() if e.get("stroke-width") == "2"]
    assert line[0] == "M177.5 260.0L285.0 202.5L500.0 87.5"  # means of 0; 0, 10; 10, 20
    assert words(dot)[:2] == ["Dot", "steps"]
    assert words(dot)[-1] == "a, ○ at temperature 0.5"  # the folder's name, the run's temperature
    assert words(dot)[2:-1] == ["0", "100", "200", "300", "400", "0", "5", "10", "15", "20"]
    assert {"Breakout", "steps (4 frames each)", "random 1.7", "human 30.5", "published Drama 7",
            "b & <c>"} <= set(words(breakout))
    assert len(dots(breakout)) == 1
    assert "curves.svg" in capsys.readouterr().out


@pytest.mark.parametrize("low, high, expected", [
    (0, 18_079, [0, 5000, 10_000, 15_000, 20_000]), (0, 400, [0, 100, 200, 300, 400]),
    (-20.7, 14.6, [-30, -20, -10, 0, 10, 20]), (0.0, 0.9, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    (3, 3, [3, 3.2]), (0, 0, [0, 0.2]), (27_000, 27_001, [27_000, 27_000.2, 27_000.4, 27_000.6,
                                                       27_000.8, 27_001]),
    (0, 20, [0, 5, 10, 15, 20]), (0, 1_234_567, [0, 500_000, 1_000_000, 1_500_000])])
def test_ticks_are_round(low, high, expected):
    close(curves.ticks(low, high), np.array(expected, float), 1e-9)


@pytest.mark.parametrize("score", [2e31, -2e31])
def test_huge_scores_that_are_all_equal_have_ticks(score):
    first, *_, last = curves.ticks(score, score)
    assert first <= score + 1e17 and score < last  # but for rounding


def test_forty_runs_stay_in_the_panel_and_beside_the_plot(place):
    names = [f"{number:02d}-{'long' * 9}" for number in range(40)]
    assert curves.main([drawable(place / name) for name in names]) == 0
    root, (panel,) = panels()
    labels = [e for e in panel.iter() if e.tag.endswith("text") and e.text in names]
    assert len(labels) == 40 and all(float(e.get("x")) > curves.RIGHT for e in labels)
    assert all(0 < float(e.get("y")) < float(root.get("height")) for e in labels)
    assert len({e.get("y") for e in labels}) == 40
    furthest = max(float(e.get("x")) + 7 * len(e.text) for e in labels)
    assert furthest < float(root.get("width"))
    lines = {(e.get("stroke"), e.get("stroke-dasharray")) for e in panel.iter()
             if e.get("stroke-width") == "2"}
    assert len(lines) == 40  # each has a look of its own


def test_what_can_be_drawn_is_drawn_and_the_rest_named(place, capsys):
    drawable(place / "run-1"), drawable(place / "run-2"), drawable(place / "run-young", rows=[])
    (place / "run-list").mkdir()
    for damaged in BAD_SETTINGS:
        (place / "run-list" / "settings.json").write_text(damaged)
        refused(capsys, curves.main, ["run-list"], "run-list/settings.json is damaged")
    drawable(place / "run-bad", rows=["100,0,100,", "150,xx,50,1"])
    drawable(place / "run-hole", rows=["100,0,100,", "150,,50,1"])
    (place / "run-file").write_text("no folder")
    argv = ["run-*", "run-1", "nowhere"]  # as a shell that knows no patterns gives it; one twice
    assert curves.main(argv) == 0
    err = capsys.readouterr().err.splitlines()
    assert [line.split()[:3] for line in err] == [["left", "out:", "run-bad/episodes.csv"],
                                                  ["left", "out:", "run-hole/episodes.csv"],
                                                  ["left", "out:", "run-list/settings.json"],
                                                  ["left", "out:", "run-young"],
                                                  ["left", "out:", "there"]]
    assert words(panels()[1][0])[-2:] == ["run-1", "run-2"]
    before = contents(place)
    refused(capsys, curves.main, ["run-list", "run-young", "--out", "new.svg"],
            "run-list/settings.json is damaged.*run-young has not finished an episode")
    refused(capsys, curves.main, ["run-file"], "run-file is a file, and this wants the folder of")
    refused(capsys, curves.main, ["run-1", "--seed", "3"], "--seed")
    refused(capsys, curves.main, [], "RUN")
    assert contents(place) == before


def test_a_table_that_ends_in_zeros_is_named(place, capsys):
    """As a power cut may leave it."""
    drawable(place / "a", rows=["100,0,100,", "\0" * 200_000])
    refused(capsys, curves.main, ["a"], "a/episodes.csv is damaged")


@pytest.mark.parametrize("tool, argv, file", [
    (check, ["run", "--npz"], "state-000064.pt"), (compare, ["Dot", "--keep"], "replay-000.npz"),
    (page, ["run", "--film"], "settings.json"), (table, ["run", "--csv"], "episodes.csv"),
    (curves, ["run", "--out"], "metrics.csv")])
def test_no_tool_writes_over_a_file_that_is_not_its_own(tool, argv, file, run_folder, fake, capsys):
    fake.setattr(Player, "play", lambda *_: pytest.fail("played in vain"))
    fake.setattr(compare, "random_play", lambda *_: pytest.fail("played in vain"))
    fake.chdir(run_folder.parent)
    Path("run.npz").mkdir()
    before = contents(run_folder)
    for name in (f"run/{file}", "run.npz"):
        says = f"{name} is there( and was not written by this)?: {argv[-1]} FILE"
        refused(capsys, tool.main, [*argv, name], says)
    refused(capsys, tool.main, [*argv, f"run/{file}/a.npz"], f"{file} cannot be written to: ")
    fake.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(capsys, tool.main, [*argv, "new/a.npz"], f"new cannot be written to: {argv[-1]} FILE")
    assert contents(run_folder) == before


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_evaluation_is_named(damaged, place, capsys):
    drawable(place / "a")
    (place / "a" / "evaluation-000064.json").write_text(damaged)
    refused(capsys, curves.main, ["a"], "evaluation-000064.json is damaged")


def test_a_drawing_is_replaced_and_another_file_is_not(place, capsys):
    drawable(place / "a")
    assert curves.main(["a", "--out", "new/b.svg"]) == 0
    assert "in place of" not in capsys.readouterr().out
    assert curves.main(["a", "--out", "new/b.svg"]) == 0
    assert "new/b.svg, in place of" in capsys.readouterr().out
    (place / "mine.svg").write_text("<svg/>")
    refused(capsys, curves.main, ["a", "--out", "mine.svg"], "mine.svg .*not written by.*--out")
    assert (place / "mine.svg").read_text() == "<svg/>"


def clocked(folder, rows):
    (folder / "metrics.csv").write_text("\n".join([*rows, ""]))


def test_over_minutes_of_a_core(place, capsys):
    """Two minutes at step 100, four at 200, ten at 400; before the first row evenly from 0."""
    drawable(place / "a", rows=["50,0,50,", "200,10,150,", "300,20,100,"])
    clocked(place / "a", ["step,seconds,cpu_seconds", "100,1,120", "200,2,240", "400,3,600"])
    (place / "a" / "evaluation-000400.json").write_text(json.dumps(dict(step=400, scores=[5])))
    assert curves.main(["a", "--over", "minutes"]) == 0
    out = capsys.readouterr()
    assert not out.err
    panel = panels()[1][0]
    assert words(panel)[1:8] == ["minutes of one CPU core", "0", "2", "4", "6", "8", "10"]
    assert [x for x, _ in dots(panel)] == ["113.0", "242.0", "371.0", "500.0"]  # 1, 4, 7, 10


def test_minutes_of_a_table_that_an_older_version_began(place, capsys):
    drawable(place / "old"), drawable(place / "mixed"), drawable(place / "young")
    clocked(place / "old", ["step,seconds", "200,60", "400,120"])
    clocked(place / "mixed", ["step,seconds,cpu_seconds", "200,60,", "400,90,240"])
    clocked(place / "young", ["step,seconds,cpu_seconds"])
    assert curves.main(["old", "mixed", "young", "--over", "minutes"]) == 0
    err = capsys.readouterr().err
    assert "left out: young has not noted" in err and "of the clock" in err and "mixed" not in err
    xs = [float(x) for x, _ in dots(panels()[1][0])]  # up to 4 minutes: 430 pixels
    close(xs, 70 + 107.5 * np.array([0.5, 1, 2, 1, 2, 4]), 1e-3)
