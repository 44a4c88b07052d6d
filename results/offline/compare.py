"""Settings of the world model, compared on one frozen replay.

    python results/offline/compare.py KungFuMaster --updates 2000

Random play fills a replay of 10,000 steps to train on, and another of 2,000 steps that no model
ever sees. Every variant of the preset `laptop` trains a world model on the first alone, and is then
judged on the second by the figures of `--model-check`: dreams of 1, 5 and 15 steps, after 32 real
frames, beside what happened. A variant with larger batches gets as many frames, not as many
updates. Loss weights are learnt at the rate 10 / updates: at the preset's they would stay near 1.
A row of compare-GAME.csv is one trained model; rows that are there are not made again.
"""

import argparse
import csv
import io
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import drama  # first: it sets up torch
import numpy as np
import torch
from tqdm import tqdm

HELD_OUT, FROZEN = 2000, 10_000
VARIANTS = {
    "laptop": {},
    "no balancing": dict(balance=False),
    "no event weights": dict(event_weights=False),
    "rate 2e-4": dict(model_rate=2e-4),
    "rate 1e-3": dict(model_rate=1e-3),
    "16 windows": dict(batch=16, warmup_updates=50),
    "2 windows of 128": dict(batch=2, length=128),
    "kernels 5 5 5 5": dict(channels=(16, 32, 64, 128), strides=(2, 2, 2, 2), kernel=(5,)),
    "uniform sampling": dict(sampling="uniform"),
    "strong decay": dict(decay=1e-4),  # of Linear and convolution weights, a step: D4's form
    "no resets": dict(resets=False),
}


def random_play(game: str, steps: int, seed: int):
    """-> a replay of `steps` steps, and its episodes as `drama.Played` wants them."""
    emulator, rng, opened = drama.Game(game), np.random.default_rng(seed), []
    replay, first, episode = drama.Replay(steps), True, 0
    frame = emulator.reset([1000 * seed])
    while replay.length < steps:
        action = rng.integers(emulator.actions, size=1)
        after, reward, terminal, done = emulator.step(action)
        opened += [replay.length] * bool(first)
        replay.add(frame[0], action[0], reward[0], terminal[0], first)
        frame, first, episode = after, done[0], episode + done[0]
        if first:
            frame = emulator.reset([1000 * seed + episode])
    return replay, list(zip(opened, [start - 1 for start in opened[1:]] + [steps - 1]))


def train(run: drama.Run, updates: int, decay: float, resets: bool, name: str):
    rng, s = np.random.default_rng(run.settings.seed), run.settings
    torch.manual_seed(s.seed)
    weights = [layer.weight for layer in run.model.modules()
               if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    for update in tqdm(range(updates), desc=name, mininterval=10):
        batch = drama.draw_windows(run, rng)
        if not resets:
            batch = batch._replace(first=torch.zeros_like(batch.first))
        drama.learn_world(run, batch, min(1.0, (update + 1) / s.warmup_updates))
        if decay:
            with torch.no_grad():
                torch._foreach_mul_(weights, 1 - decay)


def judge(run: drama.Run, held_out, spans) -> dict:
    player = drama.Player(run.model, run.agent, 1, drama.PRESETS["laptop"]["length"])
    torch.manual_seed(0)
    played = drama.Played(held_out, spans, None, None, None)
    starts, dream = drama.dream_beside(player, played, run.device)
    row = {}
    for k in drama.DREAMT:
        figures = drama.figures(run.model, held_out, starts, dream, k, run.device)
        row |= {f"{figure.strip()} @{k}": value for figure, value in figures.items()}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("game")
    parser.add_argument("variants", nargs="*", help="of " + ", ".join(VARIANTS))
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    asked = parser.parse_args()
    asked.game = drama.Game.named(asked.game)
    if unknown := set(asked.variants) - set(VARIANTS):
        raise drama.Mistake(f"{min(unknown)!r} is none of {', '.join(VARIANTS)}.")
    for name in ("updates", "seeds", "threads"):
        if getattr(asked, name) < 1:
            raise drama.Mistake(f"--{name} must be 1 or more.")
    torch.set_num_threads(asked.threads)
    drama.keep_freed_memory()
    path = Path(__file__).parent / f"compare-{asked.game}.csv"
    table = list(csv.DictReader(path.open())) if path.exists() else []
    frozen, _ = random_play(asked.game, FROZEN, seed=1)
    held_out, spans = random_play(asked.game, HELD_OUT, seed=2)
    for seed in range(asked.seeds):
        for name in asked.variants or VARIANTS:
            key = dict(variant=name, seed=str(seed), updates=str(asked.updates),
                       precision=asked.precision)
            if any(all(row[k] == v for k, v in key.items()) for row in table):
                continue
            flags, extra = dict(VARIANTS[name]), dict(decay=0.0, resets=True)
            extra = {k: flags.pop(k, default) for k, default in extra.items()}
            s, device, _ = drama.new_settings(dict(
                preset="laptop", game=asked.game, seed=seed, steps=FROZEN,
                balance_rate=10 / asked.updates, precision=asked.precision) | flags)
            run, clock = drama.Run(s, device), time.monotonic()
            run.replay.append_steps(frozen.steps(0, FROZEN))
            frames = asked.updates * drama.PRESETS["laptop"]["batch"] * drama.PRESETS["laptop"]["length"]
            train(run, frames // (s.batch * s.length), name=f"{name}, seed {seed}", **extra)
            row = key | dict(seconds=round(time.monotonic() - clock))
            row |= {name: f"{value:.5g}" for name, value in judge(run, held_out, spans).items()}
            table.append(row)
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, dict.fromkeys(name for row in table for name in row))
            writer.writeheader()
            writer.writerows(table)
            drama.write_file(path, text.getvalue().encode())


if __name__ == "__main__":
    try:
        main()
    except drama.Mistake as mistake:
        print(f"compare.py: {mistake}", file=sys.stderr)
        sys.exit(2)
