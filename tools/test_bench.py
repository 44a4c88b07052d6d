"""The benchmark: every phase is there, and counts are those that one can work out."""

import re

import pytest
import torch
from test_check import refused
from test_drama import FakeGame, fake, play_fake, tiny_settings

from tools import bench


def test_a_known_phase_is_counted(monkeypatch):
    """(4, 8) times (8, 16): 4 * 8 * 16 multiplications and as many additions."""
    monkeypatch.setattr(bench, "REPEATS", 3)
    calls = []

    def phase(a, b):
        calls.append(a)
        return a.mm(b).relu()

    seconds, flop, operators, result = bench.measure(
        torch.device("cpu"), phase, torch.ones(4, 8), torch.ones(8, 16))
    assert flop == 2 * 4 * 8 * 16 and result.shape == (4, 16) and len(calls) == 5
    assert seconds > 0 and 3 <= operators <= 12  # mm, relu, clamp_min, and what they are made of


@pytest.mark.parametrize("flags", [[], ["--dream-from", "contexts", "--game", "Dot"]])
def test_every_phase_is_timed(flags, capsys, monkeypatch):
    monkeypatch.setattr(bench, "PRODUCT", 64)
    monkeypatch.setattr(bench, "REPEATS", 2)
    assert bench.main(["--preset", "debug", "--steps", "80", "--threads", "1", *flags]) == 0
    out = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()[2:-1]}
    assert list(rows) == ["large product", "emulator", "play", "replay sampling", "model update",
                          "agent update", "averages", "an update"]
    count = {name: int(cells[-1].replace(",", "")) for name, cells in rows.items()}
    parts = ("replay sampling", "model update", "agent update", "averages")
    assert count["an update"] == sum(count[part] for part in parts) > 2000
    assert count["model update"] > count["play"] > count["replay sampling"] > 0
    assert "hours" in out and "peak memory" in out


def test_the_report_by_hand(capsys):
    """36,000 steps of a tenth of a second, and 18,000 of half an update of a second."""
    s = tiny_settings(steps=36_000, learning_starts=18_000, train_every=2, batch=2, length=8,
                      dreams=4, horizon=5)
    table = {"large product": [0.1, 10**9, 1], "emulator": [0.04, 0, 0], "play": [0.06, 0, 5],
             "an update": [1.0, 10**9, 12_345]}
    bench.report(s, torch.device("cpu"), table, 3 * 2**29)
    out = capsys.readouterr().out
    assert re.search(r"an update +1000\.0 +1\.00 +1\.0 +10% +12,345\n", out)
    assert "16 frames replayed and 20 dreamed a second; 36,000 steps take 3.5 hours" in out
    assert out.rstrip().endswith("peak memory 1.50 GiB")


def test_an_episode_that_is_over_begins_again(fake, monkeypatch):
    class Short(FakeGame):
        episode_length, opened = staticmethod(lambda seed: 2), 0

        def reset(self, seeds):
            Short.opened += 1
            return super().reset(seeds)

        def step(self, actions):
            assert self.time < 2
            return super().step(actions)

    play_fake(fake, Short)
    monkeypatch.setattr(bench, "PRODUCT", 64)
    bench.bench(tiny_settings(), torch.device("cpu"))
    assert Short.opened == 1 + (2 + bench.REPEATS) // 2


def helped(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--help"])
    return capsys.readouterr().out


def test_flags_of_the_benchmark(capsys):
    for flag in ("--log-every", "--random-hold"):
        refused(capsys, bench.main, [flag, "7"], f"unknown flag '{flag}'")
    refused(capsys, bench.main, ["--steps", "10"], "--learning-starts")
    refused(capsys, bench.main, ["Breakout"], "Breakout")
    assert "--horizon" in helped(capsys) and "--save-minutes" not in helped(capsys)
