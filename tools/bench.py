"""Where the time of a run goes on this machine.

    python -m tools.bench                       the preset that this machine would take
    python -m tools.bench --preset paper --precision bfloat16 --threads 2

Every phase of the training loop is timed alone, beside a large matrix product, which shows what the
machine can do: median milliseconds; arithmetic, and its pace as a share of the product's; and how
many operators, parts included, torch's profiler sees started: what small batches and GPUs pay for.
"""

import argparse
import functools
import os
import sys
import time
from dataclasses import fields

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler writes on the terminal

import drama  # before torch: it sets that up
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

if os.name == "posix":
    import resource

REPEATS = 7
PRODUCT = 4096  # side of the matrices of the large product
NO_PART = (  # these play no part in how long it takes
    "save_minutes", "log_every", "eval_episodes", "temperature", "warmup_updates", "cooldown",
    "player_decay", "random_hold")


def wait(device: torch.device):
    """Return when the device has done all it was given."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def measure(device: torch.device, phase, *args) -> tuple:
    """Call a phase again and again -> seconds, FLOP and operators of a call; what it returned."""
    with FlopCounterMode(display=False) as flop:
        phase(*args)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        phase(*args)
    times = []
    for _ in range(REPEATS):
        wait(device)
        start = time.perf_counter()
        result = phase(*args)
        wait(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times)), flop.get_total_flops(), len(profiled.events()), result


def bench(s: drama.Settings, device: torch.device) -> tuple[dict, int]:
    """Seconds, FLOP and operators of every phase by its name; bytes of memory at the peak."""
    run, rng, table = drama.Run(s, device), np.random.default_rng(0), {}
    contexts = s.dream_from == "contexts"

    def note(name, phase, *args):
        *table[name], result = measure(device, phase, *args)
        return result

    def step():
        if run.game.step([0])[3][0]:
            run.begin_episode(0)

    def draw():
        batch = run.draw_windows(s.batch, s.length, rng)
        ratio = s.dreams / s.batch
        return batch, run.draw_windows(s.dreams, s.context, rng, ratio) if contexts else batch

    for column in run.replay.columns.values():  # a full replay: its content does not matter
        column.zero_()
    run.replay.length = s.steps
    matrix = torch.randn(PRODUCT, PRODUCT, device=device, dtype=getattr(torch, s.precision))
    note("large product", torch.mm, matrix, matrix)
    note("emulator", step)
    player = drama.make_player(s, run.playing_model, run.playing_agent)
    frame, first = torch.from_numpy(run.frame).to(device), torch.tensor([False], device=device)
    note("play", lambda: player.act(frame, first).item())
    batch, dream_after = note("replay sampling", draw)
    _, good = note("model update", drama.update_world_model, run, batch)
    note("agent update", drama.update_agent, run, dream_after, good)
    note("averages", lambda: [drama.average_weights(run, name) for name in ("model", "agent")])
    parts = zip(*(table[name] for name in
                  ("replay sampling", "model update", "agent update", "averages")))
    table["an update"] = [sum(part) for part in parts]
    return table, peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it counts them, else of the process, or 0 if nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    if os.name != "posix":
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(s: drama.Settings, device: torch.device, table: dict, memory: int):
    print(f"{s.preset} on {device}, {s.precision}, {torch.get_num_threads()} threads, a replay of "
          f"{s.steps:,} steps; medians of {REPEATS}\n{'phase':<16}{'ms':>10}{'GFLOP':>10}"
          f"{'GFLOP/s':>10}{'of product':>12}{'operators':>11}")
    seconds, flop, _ = table["large product"]
    for name, (each, work, operators) in table.items():
        print(f"{name:<16}{1e3 * each:>10.1f}{work / 1e9:>10.2f}{work / each / 1e9:>10.1f}"
              f"{work / each / (flop / seconds):>12.0%}{operators:>11,}")
    update, played = table["an update"][0], table["emulator"][0] + table["play"][0]
    updates = (s.steps - s.learning_starts) / s.train_every
    replayed = s.batch * s.length + s.dreams * s.context * (s.dream_from == "contexts")
    hours = (s.steps * played + updates * update) / 3600
    print(f"{replayed / update:,.0f} frames replayed and {s.dreams * s.horizon / update:,.0f} "
          f"dreamed a second; {s.steps:,} steps take {hours:.1f} hours"
          + (f"; peak memory {memory / 2**30:.2f} GiB" if memory else ""))


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.bench", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_settings(drama.own_preset(), [f.name for f in fields(drama.Settings)
                                             if f.name not in NO_PART])
    s, device, _ = drama.new_settings(parser.parse(argv))
    report(s, device, *bench(s, device))


main = functools.partial(drama.command_line, run_command, name="tools.bench")

if __name__ == "__main__":
    sys.exit(main())
