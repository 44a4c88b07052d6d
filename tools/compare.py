"""Settings of the world model, compared on one frozen replay.

    python -m tools.compare KungFuMaster --updates 2000
    python -m tools.compare Breakout "no event weights" laptop --seeds 3

Random play fills a replay of 10,000 steps to train on, and another of 2,000 steps that no model
ever sees. Every variant of the preset `laptop` trains a world model on the first alone, and is then
judged on the second by the figures of tools.check. A variant with larger batches gets as many
frames, not as many updates. Loss weights are learnt at the rate 10 / updates: at the preset's they
would stay near 1. A row of results/offline/compare-GAME.csv is one trained model; rows that are
there are not made again.
"""

import argparse
import csv
import io
import re
import sys
import time
from pathlib import Path

import drama  # first: it sets up torch
import numpy as np
import torch
from agent import Player
from buffer import Mistake, Replay, write_file
from tools.check import judge

HELD_OUT, FROZEN = 2000, 10_000  # steps
FOLDER = Path(__file__).resolve().parents[1] / "results" / "offline"
LAPTOP = drama.PRESETS["laptop"]
VARIANTS = {
    "laptop": {},
    "no balancing": dict(harmony=False),
    "no event weights": dict(event_weights=False),
    "rate 2e-4": dict(model_lr=2e-4),
    "rate 1e-3": dict(model_lr=1e-3),
    "16 windows": dict(batch=16, warmup_updates=50),
    "2 windows of 128": dict(batch=2, length=128),
    "kernels 5 5 5 5": dict(channels=(16, 32, 64, 128), strides=(2, 2, 2, 2), kernel=(5,)),
    "uniform sampling": dict(sampling="uniform"),
    "strong decay": dict(decay=1e-4),  # of Linear and convolution weights, a step: D4's form
    "no resets": dict(resets=False),
}


def random_play(s: drama.Settings, steps: int, seed: int) -> Replay:
    """Steps of random play, one episode after the other."""
    game, rng, replay = drama.make_game(s), np.random.default_rng(seed), Replay(steps)
    episode, first = 0, True
    while replay.length < steps:
        if first:
            frame = game.reset([1000 * seed + episode])
        action = rng.integers(game.actions, size=1)
        after, reward, terminal, done = game.step(action)
        replay.add(frame=frame[0], action=action[0], reward=reward[0], terminal=terminal[0],
                   first=first)
        frame, first, episode = after, done[0], episode + done[0]
    return replay


def train(run: drama.Run, updates: int, name: str, decay: float = 0.0, resets: bool = True):
    """Train the world model alone; `decay` and `resets` are two trials that are no settings."""
    rng, s = np.random.default_rng(run.settings.seed), run.settings
    torch.manual_seed(s.seed)
    weights = [layer.weight for layer in run.model.modules()
               if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    for update in drama.show_progress(desc=name, iterable=range(updates)):
        batch = run.draw(s.batch, s.length, rng)
        if not resets:
            batch = batch._replace(first=torch.zeros_like(batch.first))
        for group in run.model_optimizer.param_groups:
            group["lr"].fill_(group["rate"] * min(1, (update + 1) / s.warmup_updates))
        drama.update_world_model(run, batch)
        if decay:
            with torch.no_grad():
                torch._foreach_mul_(weights, 1 - decay)


def trained(s: drama.Settings, device, frozen: Replay, held_out: Replay, **trial) -> dict:
    """One variant, trained and judged -> its seconds and figures, as cells of a row."""
    run, start = drama.Run(s, device), time.monotonic()
    run.replay.append_steps(frozen.steps(0, FROZEN))
    train(run, **trial)
    row = dict(seconds=round(time.monotonic() - start))
    _, measured = judge(Player(run.model, run.agent, 1, LAPTOP["length"]), held_out)
    return row | {f"{name} @{k}": f"{figure:.5g}" for k, each in measured.items()
                  for name, figure in each.items()}


def compare(common: dict, variants: list[str], updates: int, seeds: int, path: Path):
    """Train and judge every variant with every seed, and write a row as soon as it is there."""
    table = list(csv.DictReader(path.open())) if path.exists() else []
    s, device, _ = drama.new_settings(common)
    frozen, held_out = random_play(s, FROZEN, seed=1), random_play(s, HELD_OUT, seed=2)
    for seed in range(seeds):
        for name in variants:
            key = dict(variant=name, seed=str(seed), updates=str(updates), precision=s.precision)
            if any(all(row[k] == v for k, v in key.items()) for row in table):
                continue
            flags, trial = dict(VARIANTS[name]), {}
            trial = {k: flags.pop(k) for k in ("decay", "resets") if k in flags}
            s, device, _ = drama.new_settings(common | dict(
                seed=seed, precision=s.precision, harmony_lr=10 / updates) | flags)
            frames = updates * LAPTOP["batch"] * LAPTOP["length"]
            table.append(key | trained(
                s, device, frozen, held_out, updates=frames // (s.batch * s.length),
                name=f"{name}, seed {seed}", **trial))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, dict.fromkeys(name for row in table for name in row))
            writer.writeheader()
            writer.writerows(table)
            write_file(path, text.getvalue().encode())


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.compare", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("game", metavar="GAME")
    parser.add_argument("variants", metavar="VARIANT", nargs="*", default=list(VARIANTS),
                        help=f"all, or some of {', '.join(VARIANTS)}")
    for name, default in dict(updates=2000, seeds=2).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="INT",
                            help=f"({default})")
    parser.add_settings("laptop", ("game_args", "device", "threads", "precision"))
    common = parser.parse(argv)
    variants, updates, seeds = (common.pop(name) for name in ("variants", "updates", "seeds"))
    if unknown := set(variants) - set(VARIANTS):
        raise Mistake(f"{min(unknown)!r} is none of {', '.join(VARIANTS)}.")
    for name, number in dict(updates=updates, seeds=seeds).items():
        if number < 1:
            raise Mistake(f"--{name} must be 1 or more.")
    name = re.sub(r"[^\w.-]+", "-", drama.game_title(common["game"]))
    compare(common | dict(preset="laptop", steps=FROZEN), variants, updates, seeds,
            FOLDER / f"compare-{name}.csv")


def main(argv: list[str] | None = None) -> int:
    return drama.command_line(run_command, argv, "tools.compare")


if __name__ == "__main__":
    sys.exit(main())
