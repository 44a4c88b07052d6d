"""Training scores of runs as curves, a panel a game.

    python -m tools.curves runs/*                         draws curves.svg
    python -m tools.curves RUN RUN --over minutes --out DIR/FILE.svg

Every training episode is a dot, their running mean over five a line, every evaluation a ring; what
random play, a human and the published agent score are dashed lines. Over minutes of one CPU core
(a run's threads added up), agents are compared by what a laptop pays for them.
"""

import csv
import functools
import glob
import html
import itertools
import json
import math
import os
import sys
from pathlib import Path

import drama  # first: it sets up torch
import numpy as np
from buffer import Folder, Mistake, in_todays_words, intact, kept_evaluation, known_scores
from buffer import make_folder, no_run, write_file

SMOOTH = 5  # training episodes that a point of a line averages, as in the paper's protocol
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
OURS = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="12" '
DEFAULTS = json.loads(json.dumps(vars(drama.Settings())))  # with lists for tuples
LEFT, RIGHT, TOP, BOTTOM, LEGEND = 70, 500, 30, 260, 670  # of a panel, pixels


def columns(path: Path, *names: str, empty: str = "") -> np.ndarray:
    """Columns of a table (rows, names); a cell that is empty or missing reads `empty`, which is no
    number unless you give one; a last row that is still being written is left out."""
    if not path.exists():
        return np.empty((0, len(names)))
    with intact(path, "the run writes it anew when it goes on"):
        text = path.read_text("utf-8")
        rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
        cells = [[float(row.get(name) or empty) for name in names] for row in rows]
        return np.array(cells).reshape(-1, len(names))


def kept_settings(folder: Path) -> dict:
    """The settings of a run in today's words; what an older version lacked is as it was then."""
    if not (path := folder / "settings.json").exists():
        raise no_run(folder)
    with intact(path, "the run writes it anew when it goes on"):
        settings = DEFAULTS | dict(game=None, preset=None)  # these two it must name
        settings |= in_todays_words(dict(json.loads(path.read_bytes())))
        for name, value in DEFAULTS.items():
            kinds = (int, float) if isinstance(value, float) else type(value)
            if not isinstance(settings[name], kinds):
                raise TypeError
        return settings


def learning_curve(folder: Path) -> tuple[str, str, np.ndarray, np.ndarray]:
    """A run's game and name, its training scores and its evaluations: rows of (step, score)."""
    settings = kept_settings(folder)
    game = f"{settings['game']} {settings['game_args']}".strip()
    rings = f", ○ at temperature {settings['temperature']:g}"
    points = columns(folder / "episodes.csv", "step", "score")
    if not len(points):
        raise Mistake(f"{folder} has not finished an episode yet.")
    kept = map(kept_evaluation, Folder(folder).numbered("evaluation", ".json"))
    tests = np.array([[each["step"], np.mean(each["scores"])] for each in kept]).reshape(-1, 2)
    return game, folder.resolve().name + rings * bool(len(tests)), points, tests


def minutes(folder: Path) -> tuple[np.ndarray, bool]:
    """A run's steps and its minutes of one CPU core, (rows, 2), from 0 on, and whether these are
    CPU time: older versions noted only the time of the clock."""
    table = columns(folder / "metrics.csv", "step", "cpu_seconds", "seconds", empty="nan")
    table /= (1, 60, 60)
    cpu = bool(np.isfinite(table[:, 1]).any())
    table = table[:, [0, 1 if cpu else 2]]
    if not (known := np.isfinite(table[:, 1])).any():
        raise Mistake(f"{folder} has not noted yet how long it takes.")
    return np.concatenate([np.zeros((1, 2)), table[known]]), cpu


def ticks(low: float, high: float) -> np.ndarray:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from `low` or less to `high` or more."""
    apart = (high - low or max(1, 1e-6 * abs(high))) / 5
    power = 10.0 ** math.floor(math.log10(apart))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * apart)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return step * np.arange(first, max(last, first + 1) + 1)


def text(x: float, y: float, words: str, **style) -> str:
    style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{html.escape(words)}</text>'


def panel(game: str, runs: list, unit: str) -> str:
    """One game's `runs`: name, training scores and evaluations of each."""
    known = known_scores().get(game, {})
    known = {name: known[column] for name, column in (
        ("random", "random"), ("human", "human"), ("published Drama", "Drama_XS_DFS"))
        if column in known}
    marks = np.concatenate([part for run in runs for part in run[1:]])
    scores = [*marks[:, 1], *known.values()]
    across, up = ticks(0, marks[:, 0].max()), ticks(min(scores), max(scores))

    def place(x, score):
        return (LEFT + (RIGHT - LEFT) * x / across[-1],
                BOTTOM - (BOTTOM - TOP) * (score - up[0]) / (up[-1] - up[0]))

    parts = [text(LEFT, TOP - 12, game, font_weight="bold"),
             text((LEFT + RIGHT) / 2, BOTTOM + 32, unit, text_anchor="middle"),
             f'<path d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}" fill="none" stroke="black"/>']
    parts += [text(place(x, 0)[0], BOTTOM + 16, f"{x:,.10g}", text_anchor="middle") for x in across]
    parts += [text(LEFT - 6, place(0, y)[1] + 4, f"{y:,.10g}", text_anchor="end") for y in up]
    lowest = math.inf
    for name, score in sorted(known.items(), key=lambda item: item[1]):
        y = place(0, score)[1]
        lowest = min(y + 4, lowest - 14)  # or the words would overlap
        parts += [f'<path d="M{LEFT} {y:.1f}H{RIGHT}" stroke="grey" stroke-dasharray="4 4"/>',
                  text(RIGHT + 6, lowest, f"{name} {score:,.10g}", fill="grey")]
    for number, (name, points, tests) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        dashes = 6 * (number // len(COLOURS))  # when the colours come again
        line = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        mean = [points[max(0, i + 1 - SMOOTH) : i + 1, 1].mean() for i in range(len(points))]
        way = "L".join("{:.1f} {:.1f}".format(*place(*at)) for at in zip(points[:, 0], mean))
        parts.append(f'<path d="M{way}" {line}/>')
        for rows, style in ((points, f'r="2" fill="{colour}" opacity="0.4"'),
                            (tests, f'r="5" fill="none" stroke="{colour}"')):
            parts += ['<circle cx="{:.1f}" cy="{:.1f}" {}/>'.format(*place(*row), style)
                      for row in rows]
        y = TOP + 16 * number
        parts += [f'<path d="M{LEGEND} {y}H{LEGEND + 20}" {line}/>',
                  text(LEGEND + 26, y + 4, name)]
    return "".join(parts)


def draw(panels: dict[str, list], over: str, path: Path):
    """All panels, one below the other, as SVG."""
    parts, height, longest = [], 0, 0
    for game, runs in sorted(panels.items()):
        frames = " (4 frames each)" if game in drama.AtariGame.names() else ""
        unit = f"steps{frames}" if over == "steps" else "minutes of one CPU core"
        parts.append(f'<g transform="translate(0 {height})">{panel(game, runs, unit)}</g>')
        height += max(BOTTOM + 50, TOP + 16 * len(runs))
        longest = max(longest, *(len(name) for name, *_ in runs))
    write_picture(path, parts, LEGEND + 40 + 7 * longest, height)


def write_picture(path: Path, parts: list[str], width: int, height: int):
    size = f'width="{width}" height="{height}"'
    parts = f'{OURS}{size}><rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"
    write_file(path, "".join(parts).encode("utf-8", "replace"))


def check_place(path: Path, flag: str, ours: str = ""):
    """Before the work: may its result be written there? Only over one that begins like `ours`."""
    remedy = f": {flag} names another place" if flag else ", and the result goes there"
    if path.exists() and not (ours and path.is_file()
                              and path.read_bytes().startswith(ours.encode("latin-1"))):
        raise Mistake(f"{path} is there{' and was not written by this' * bool(ours)}{remedy}.")
    make_folder(path.parent, remedy)


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.curves", description=__doc__.split("\n")[0],
                          allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or patterns of them")
    parser.add_argument("--out", metavar="FILE", default="curves.svg", help="(curves.svg)")
    parser.add_argument("--over", choices=("steps", "minutes"), default="steps",
                        help="what the x axis counts (steps)")
    asked = parser.parse(argv)
    path, panels, unfit, clocked = Path(asked["out"]), {}, [], []
    check_place(path, "--out FILE", OURS)
    there = path.exists()
    found = [[name] if Path(name).exists() else sorted(filter(os.path.isdir, glob.glob(name)))
             or [name] for name in asked["runs"]]  # not every shell knows what * means
    for folder in dict.fromkeys(map(Path, itertools.chain(*found))):
        try:
            game, *run = learning_curve(folder)
            if asked["over"] == "minutes":
                clock, cpu = minutes(folder)
                clocked += [] if cpu else [str(folder)]
                for marks in run[1:]:
                    marks[:, 0] = np.interp(marks[:, 0], *clock.T)
            panels.setdefault(game, []).append(run)
        except Mistake as mistake:
            unfit.append(str(mistake).rstrip("."))
    if not panels:
        raise Mistake("; ".join(unfit) + ".")
    for reason in unfit:
        print(f"left out: {reason}", file=sys.stderr)
    if clocked:
        print("minutes of the clock, as an older version noted no CPU time: " + ", ".join(clocked),
              file=sys.stderr)
    draw(panels, asked["over"], path)
    count = sum(map(len, panels.values()))
    print(f"training scores of {count} run{'s' * (count > 1)}: {path}"
          + ", in place of the last drawing" * there)


main = functools.partial(drama.command_line, run_command, name="tools.curves")

if __name__ == "__main__":
    sys.exit(main())
