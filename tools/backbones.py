"""What each sequence layer costs as sequences grow: time, memory, and a step of play.

    python -m tools.backbones                             all of them, a table and a picture
    python -m tools.backbones mamba2 gru --precision bfloat16 --threads 1

A layer takes the same number of tokens at every length, as one batch, forward and backward; so what
grows with the length is its own doing. Beside it stand the products of its matrices with all tokens
at once, which it cannot do without. Layers take turns, so that whatever else the machine does hits
all alike. A step of play is that of one sequence of this length, again and again, as in a game. All
times are medians. Memory is the most allocated at any time, on top of weights and inputs.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler writes on the terminal

import drama  # before torch: it sets that up
import numpy as np
import torch
from agent import keep_freed_memory
from buffer import Mistake
from scan import BACKBONES, SequenceModel
from tools.bench import wait
from tools.compare import write_rows
from tools.curves import COLOURS, OURS, check_place, text, write_picture
from torch.profiler import ProfilerActivity, profile

LENGTHS, TOKENS, WIDTH = (64, 256, 1024, 2048, 4096, 16384), 16384, 512
REPEATS, STEPS = 3, 300  # of a training step, of a step of play
FIGURES = TRAIN, PRODUCTS, MEMORY, PLAY = ("forward and backward, ms", "products alone, ms",
                                           "peak memory, MiB", "a step of play, ms")
TOP, BOTTOM, SIDE, APART = 40, 300, 230, 300  # of a panel in the picture, pixels


# ---- What is measured ----------------------------------------------------------------------------


def training_step(layer, u, gy, autocast):
    def run():
        with autocast():
            y, _ = layer(u)
        y.backward(gy.to(y.dtype))
    return run


def products(layer, tokens: int, autocast):
    """All linear maps of the layer, each of so many tokens, forward and backward."""
    maps = [part for part in layer.modules() if isinstance(part, torch.nn.Linear)]
    device = maps[0].weight.device
    inputs = [torch.randn(tokens, part.in_features, device=device, requires_grad=True)
              for part in maps]

    def run():
        for part, x in zip(maps, inputs):
            with autocast():
                y = torch.nn.functional.linear(x, part.weight)
            y.backward(torch.ones_like(y))
    return run


def step_of_play(layer, length: int, autocast):
    device = next(layer.parameters()).device
    u = torch.randn(1, length, WIDTH, device=device)
    with torch.no_grad(), autocast():
        _, state = layer(u)

    def run():
        with torch.no_grad(), autocast():
            layer.step(u[:, 0], state)
    return run


def medians(runs: list, repeats: int, device: torch.device) -> list[float]:
    """Median milliseconds of each run; they take turns, after one round to warm up."""
    times = np.empty((1 + repeats, len(runs)))
    for row in times:
        for number, run in enumerate(runs):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            row[number] = 1e3 * (time.perf_counter() - start)
    return np.median(times[1:], axis=0).tolist()


def peak_mebibytes(run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if device.type == "mps":  # which counts no peaks, but its driver's pool only grows
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        run()
        return (torch.mps.driver_allocated_memory() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in record.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes)) / 2**20


def measure(backbones: list[str], lengths: list[int], s: drama.Settings, device) -> list[dict]:
    """A row for every backbone and length: the figures, and how they came about."""
    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=s.precision == "bfloat16")

    keep_freed_memory()  # as in a run
    rows, rounds = [], drama.show_progress(iterable=lengths)
    for length in rounds:
        rounds.set_description(f"{length:,} steps")
        torch.manual_seed(0)
        u = torch.randn(TOKENS // length, length, WIDTH, device=device, requires_grad=True)
        gy, runs = torch.randn_like(u), []
        for name in backbones:
            model = SequenceModel(1, WIDTH, layers=1, backbone=name, length=length)
            layer = model.layers[0].mixer.to(device)
            runs.append((training_step(layer, u, gy, autocast), products(layer, TOKENS, autocast),
                         step_of_play(layer, length, autocast)))
        train, alone, play = zip(*runs)
        times = np.reshape(medians([*train, *alone], REPEATS, device), (2, -1))
        play = [milliseconds for step in play for milliseconds in medians([step], STEPS, device)]
        for name, run, *each in zip(backbones, train, *times, play):
            memory = peak_mebibytes(run, device)
            figures = dict(zip((TRAIN, PRODUCTS, PLAY, MEMORY), (*each, memory)))
            rows.append(dict(backbone=name, length=length, batch=TOKENS // length)
                        | {figure: f"{figures[figure]:.5g}" for figure in FIGURES}
                        | dict(width=WIDTH, precision=s.precision, device=device.type,
                               threads=torch.get_num_threads()))
    return rows


# ---- What is shown -------------------------------------------------------------------------------


def print_tables(rows: list[dict]):
    """A table per figure, backbones down, lengths across; and a layer's time over its products'."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    ratio = "forward and backward, times its products"
    cells = {(row["backbone"], row["length"]): row
             | {ratio: float(row[TRAIN]) / float(row[PRODUCTS])} for row in rows}
    for figure in (TRAIN, ratio, MEMORY, PLAY):
        print(f"\n{figure:<42}" + "".join(f"{length:>9,}" for length in lengths))
        for name in dict.fromkeys(row["backbone"] for row in rows):
            figures = [float(cells[name, length][figure]) for length in lengths]
            print(f"{name:<42}" + "".join(f"{x:>9,.0f}" if x >= 100 else f"{x:>9.3g}"
                                          for x in figures))


def panel(rows: list[dict], figure: str, left: int) -> list[str]:
    """One figure over the length, both on logarithmic scales; one line per backbone."""
    log = {name: [(np.log2(row["length"]), np.log10(float(row[figure]) or 1e-3))
                  for row in rows if row["backbone"] == name]
           for name in dict.fromkeys(row["backbone"] for row in rows)}
    x, y = np.concatenate(list(log.values())).T
    low, high = np.floor(y.min()), np.ceil(y.max())

    def place(x_at, y_at):
        return (left + SIDE * (x_at - x.min()) / (np.ptp(x) or 1),
                BOTTOM - (BOTTOM - TOP) * (y_at - low) / (high - low or 1))

    parts = [text(left, TOP - 14, figure, font_weight="bold"),
             text(left + SIDE / 2, BOTTOM + 34, "steps of a sequence", text_anchor="middle"),
             f'<path d="M{left} {TOP}V{BOTTOM}H{left + SIDE}" fill="none" stroke="black"/>']
    last = -np.inf
    for at in sorted(set(x)):
        if place(at, low)[0] > last + 40:  # or the numbers would touch
            last = place(at, low)[0]
            parts.append(text(last, BOTTOM + 16, f"{2**at:,.0f}", text_anchor="middle"))
    for round_number in np.outer(10 ** np.arange(low, high + 1), (1, 2, 5)).flatten():
        if (at := np.log10(round_number)) <= high:
            across = place(x.min(), at)[1]
            parts += [f'<path d="M{left} {across:.1f}h{SIDE}" stroke="lightgrey"/>',
                      text(left - 6, across + 4, f"{round_number:,.10g}", text_anchor="end")]
    for colour, way in zip(COLOURS, log.values()):
        points = ["{:.1f} {:.1f}".format(*place(*at)) for at in way]
        parts.append(f'<path d="M{"L".join(points)}" fill="none" stroke="{colour}" '
                     'stroke-width="2"/>')
        parts += ['<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*point.split(), colour)
                  for point in points]
    return parts


def draw(rows: list[dict], path: Path):
    """Three panels side by side, and what the colours mean, as SVG."""
    names, shown = list(dict.fromkeys(row["backbone"] for row in rows)), (TRAIN, MEMORY, PLAY)
    parts = [part for number, figure in enumerate(shown)
             for part in panel(rows, figure, 60 + APART * number)]
    for number, (name, colour) in enumerate(zip(names, COLOURS)):
        x, y = 60 + APART * len(shown) - 40, TOP + 18 * number
        parts += [f'<path d="M{x} {y}h20" stroke="{colour}" stroke-width="2"/>',
                  text(x + 26, y + 4, name)]
    write_picture(path, parts, APART * len(shown) + 150, BOTTOM + 50)


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.backbones", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("backbones", metavar="BACKBONE", nargs="*", default=list(BACKBONES),
                        help=f"all, or some of {', '.join(BACKBONES)}")
    parser.add_argument("--lengths", type=drama.whole_numbers, metavar="N,N,...", default=LENGTHS,
                        help=f"steps of a sequence ({','.join(map(str, LENGTHS))})")
    parser.add_argument("--out", metavar="FILE", default="backbones.svg",
                        help="picture; the table goes beside it, as .csv (backbones.svg)")
    parser.add_settings("debug", ("device", "threads", "precision"))
    flags = parser.parse(argv)
    names, lengths, out = (flags.pop(name) for name in ("backbones", "lengths", "out"))
    if unknown := set(names) - set(BACKBONES):
        raise Mistake(f"{min(unknown)!r} is none of {', '.join(BACKBONES)}.")
    for length in lengths:
        if length < 1 or TOKENS % length:
            raise Mistake(f"--lengths must divide the {TOKENS:,} tokens, and {length} does not.")
    if not out.endswith(".svg"):
        raise Mistake(f"--out {out} does not end in .svg.")
    path, table = Path(out), Path(out).with_suffix(".csv")
    check_place(table, "--out FILE.svg", "backbone,length,batch,")
    check_place(path, "--out FILE.svg", OURS)
    s, device, _ = drama.new_settings(dict(preset="debug") | flags)
    rows = measure(list(dict.fromkeys(names)), sorted(set(lengths)), s, device)
    print(f"{device}, {s.precision}, {torch.get_num_threads()} threads, width {WIDTH}, {TOKENS:,} "
          f"tokens at every length; medians of {REPEATS}, of {STEPS} steps of play")
    print_tables(rows)
    draw(rows, path)
    write_rows(table, rows)
    print(f"\n{path} and {table.name}")


main = functools.partial(drama.command_line, run_command, name="tools.backbones")

if __name__ == "__main__":
    sys.exit(main())
