"""What backbones cost: turns and medians, memory one can count, points in the right place."""

import csv
import os
import xml.etree.ElementTree

import pytest
import torch
from scan import BACKBONES
from test_check import refused

from tools import backbones
from tools.backbones import MEMORY, PLAY, PRODUCTS, TRAIN

CPU = torch.device("cpu")


def test_all_take_turns_and_the_warm_up_does_not_count(monkeypatch):
    """a takes 9 s, then 1, 3, 2; b 9, then 5, 5, 6: medians of 2,000 and 5,000 ms."""
    calls, now = [], [0.0]
    takes = dict(a=iter((9, 1, 3, 2)), b=iter((9, 5, 5, 6)))
    monkeypatch.setattr(backbones.time, "perf_counter", lambda: now[0])

    def run(name):
        calls.append(name)
        now[0] += next(takes[name])

    found = backbones.medians([lambda: run("a"), lambda: run("b")], 3, CPU)
    assert found == pytest.approx([2000, 5000]) and "".join(calls) == "abababab"


def test_peak_memory_counts_what_is_there_at_a_time():
    """A MiB is 2**18 numbers: two at once, one of them goes, then 2 more; in all 4, at most 3."""
    def run():
        kept, gone = torch.empty(2**18), torch.empty(2**18)
        del gone
        return kept, torch.empty(2**19)

    assert backbones.peak_mebibytes(run, CPU) == pytest.approx(3, abs=0.01)


def test_products_are_those_of_every_linear_map():
    """Forward 2 T m n FLOP, backward twice as many; a convolution is none of them."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Conv1d(4, 4, 3),
                                torch.nn.Sequential(torch.nn.Linear(16, 4, bias=False)))
    off = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flop:
        backbones.products(layer, 10, off)()
    assert flop.get_total_flops() == 3 * 2 * 10 * (8 * 16 + 16 * 4)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in dict(TOKENS=64, WIDTH=64, REPEATS=1, STEPS=2).items():
        monkeypatch.setattr(backbones, name, value)


def test_every_backbone_at_every_length(tiny, capsys):
    assert backbones.main(["--lengths", "32,8", "--threads", "1"]) == 0
    table = list(csv.DictReader(open("backbones.csv")))
    assert [(row["backbone"], row["length"], row["batch"]) for row in table] == [
        (name, str(length), str(64 // length)) for length in (8, 32) for name in BACKBONES]
    for row in table:
        assert all(float(row[figure]) > 0 for figure in (TRAIN, PRODUCTS, MEMORY, PLAY))
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name} ") == 4 for name in BACKBONES)
    words = [e.text for e in xml.etree.ElementTree.parse("backbones.svg").iter()]
    assert all(words.count(word) == 1 for word in (TRAIN, MEMORY, PLAY, *BACKBONES))
    assert backbones.main(["gru", "--lengths", "8", "--threads", "1", "--precision",
                           "bfloat16"]) == 0  # its own drawing may go
    assert [row["precision"] for row in csv.DictReader(open("backbones.csv"))] == ["bfloat16"]


def test_points_lie_at_their_logarithms(tmp_path):
    """From 64 to 16,384 steps are 8 doublings, 230 pixels; from 10 to 1,000 ms 260."""
    figures = {64: 10, 1024: 100, 16384: 1000}
    rows = [{"backbone": "gru", "length": length, TRAIN: ms, MEMORY: 1, PLAY: 1}
            for length, ms in figures.items()]
    backbones.draw(rows, tmp_path / "a.svg")
    circles = [e for e in xml.etree.ElementTree.parse(tmp_path / "a.svg").iter()
               if e.tag.endswith("circle")][:3]
    assert [(e.get("cx"), e.get("cy")) for e in circles] == [
        ("60.0", "300.0"), ("175.0", "170.0"), ("290.0", "40.0")]


def test_the_tables_by_hand(capsys):
    rows = [{"backbone": "gru", "length": length, TRAIN: train, PRODUCTS: 100, MEMORY: 20.04,
             PLAY: 0.5} for length, train in ((64, 150), (2048, 12345.6))]
    backbones.print_tables(rows)
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[-2:] for line in out if line.startswith("gru")] == [
        ["150", "12,346"], ["1.5", "123"], ["20", "20"], ["0.5", "0.5"]]
    assert out[1].split()[-2:] == ["64", "2,048"]


@pytest.mark.parametrize("argv, says", [
    (["lstm"], "'lstm' is none of mamba2"), (["--lengths", "0"], "divide the 64 tokens, and 0"),
    (["--lengths", "8,65"], "and 65 does not"), (["--lengths", "24"], "and 24 does not"),
    (["--lengths", "x"], "whole numbers such as"), (["--batch", "3"], "unknown flag"),
    (["--lengths", "8", "--out", "."], "not end in .svg"),
    (["--lengths", "8", "--out", "a.csv"], "--out a.csv does not end in .svg")])
def test_a_wrong_comparison_is_refused(argv, says, tiny, tmp_path, capsys):
    refused(capsys, backbones.main, argv, says)
    assert not list(tmp_path.iterdir())


def test_a_file_of_others_and_a_folder_that_takes_none_are_refused_before_measuring(
        tiny, monkeypatch, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("mine")
    monkeypatch.setattr(backbones, "measure", lambda *_: pytest.fail("measured in vain"))
    refused(capsys, backbones.main, ["--lengths", "8", "--out", "a.svg"], "a.csv is there and was")
    assert (tmp_path / "a.csv").read_text() == "mine"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(capsys, backbones.main, ["--lengths", "8", "--out", "new/b.svg"], "new cannot be writ")


def test_what_was_measured_is_shown_even_if_it_cannot_be_kept(tiny, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "backbones.svg")
    monkeypatch.setattr(backbones, "draw", full)
    assert backbones.main(["gru", "--lengths", "8", "--threads", "1"]) == 1
    out, err = capsys.readouterr()
    assert out.count("\ngru ") == 4 and err.endswith("No space left on device: backbones.svg\n")


def test_help_names_the_precision_that_is_taken(tiny, capsys):
    with pytest.raises(SystemExit):
        backbones.main(["--help"])
    assert "(float32)" in capsys.readouterr().out
    backbones.main(["gru", "--lengths", "8", "--threads", "1"])
    assert "cpu, float32, 1 threads" in capsys.readouterr().out
