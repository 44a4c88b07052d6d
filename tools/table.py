"""The table of a paper: scores of many runs beside the published ones.

    python -m tools.table runs                     run folders, or folders that hold some
    python -m tools.table runs --csv scores.csv    also as rows for pandas
    python -m tools.table runs --json scores       also in formats that others read, in a folder

A run counts at its newest evaluation, by its own settings; without one, at its last save or row of
its tables. Runs of unequal steps or settings are not averaged: they are rows of their own, named
by the settings in which they differ from most runs of their preset. Published scores:
results/atari100k.csv.
"""

import csv
import functools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import drama  # first: it sets up torch
import numpy as np
from buffer import Folder, Mistake, human_normalised, intact, kept_evaluation, known_scores, step_of
from tools.curves import check_place, columns, kept_settings

PUBLISHED = known_scores()  # game -> {"random": ..., "human": ..., agent: ...}
AGENTS = list(PUBLISHED["Alien"])[2:]
DRAMA = ["Drama_XS_DFS", "Drama_XS_uniform"]  # stand beside ours, the others in a table below
PROTOCOLS = {"evaluation": "evaluation", "training": "last five in training"}
AGGREGATES = ["mean", "median", "IQM", "optimality gap"]
# Runs that are averaged may differ in these: which run it is, and where and how it was run
MAY_DIFFER = {"game", "seed", "preset", "device", "threads", "replay_device",
              "save_minutes", "log_every", "eval_episodes", "game_args"}  # args are in Run.game

# ---------------------------------------------------------------- reading


class Run(NamedTuple):
    folder: Path
    settings: dict
    game: str
    seed: int
    step: int
    scores: dict  # protocol -> scores of its episodes
    curve: list  # (step, score) of every training episode


def read_run(folder: Path) -> Run:
    s = kept_settings(folder)
    episodes = columns(folder / "episodes.csv", "step", "score")
    curve = [(int(step), score) for step, score in episodes.tolist()]
    found = Folder(folder).numbered("evaluation", ".json")
    test, *before = [*map(kept_evaluation, found)] or [dict(
        step=max([int(columns(folder / f"{name}.csv", "step").max(initial=0))
                  for name in ("metrics", "episodes")]
                 + [*map(step_of, Folder(folder).manifests())]),
        scores=[], last_training_scores=[score for _, score in curve[-5:]])]
    scores = {"evaluation": test["scores"], "training": test["last_training_scores"]}
    scores = {name: np.array(values, float) for name, values in scores.items() if values}
    game = f"{s['game']} {s['game_args']}".strip()
    ends = [old["step"] for old in before if s["cooldown"] and old.get("steps") == old["step"]]
    if not s["cooldown"] or test.get("steps", s["steps"]) == test["step"]:
        s["steps"] = "as many"  # else its rates were not those of a run that ended there
    origin, s["branched"] = folder / "branch.json", "never"
    if origin.exists():
        with intact(origin, "leave the run out"):
            s["branched"] = f"at {json.loads(origin.read_bytes())['step']}"
    if ends:  # nor were they if they had fallen before
        s["steps"] = f"{s['steps']}, after {', '.join(map(str, sorted(ends)))}"
    return Run(folder, s, game, s["seed"], test["step"], scores, curve)


def name_settings(runs: list[Run]) -> tuple[list[str], list[str]]:
    """A name for each run's settings, and lines that explain the names."""
    values = defaultdict(Counter)  # how many runs of a preset have each value of a setting
    settings = sorted(set().union(*(run.settings for run in runs)) - MAY_DIFFER)
    for run in runs:
        for name in settings:
            values[run.settings["preset"], name][str(run.settings.get(name, "absent"))] += 1
    usual = {key: counter.most_common(1)[0][0] for key, counter in values.items()}
    names, variants = [], {}
    for run in runs:
        preset = run.settings["preset"]
        odd = [f"{name} {value}" for name in settings
               if (value := str(run.settings.get(name, "absent"))) != usual[preset, name]]
        if len(odd) > 2:  # too long for a cell
            odd = [variants.setdefault(", ".join(odd), f"variant {len(variants) + 1}")]
        names.append(", ".join([preset, *odd]))
    legend = [f"{name}: {odd}." for odd, name in variants.items()]
    for preset in sorted({preset for preset, _ in usual}):
        if told := [f"{name} {usual[preset, name]}" for name in settings
                    if len(values[preset, name]) > 1]:
            legend.append(f"{preset}, where nothing else is said: {', '.join(told)}.")
    return names, legend


def gather(folders: list[Path]) -> tuple[dict, list[str]]:
    """{(settings, step, protocols): {game: runs}}, sorted, and lines that explain the names."""
    runs, groups = [], defaultdict(lambda: defaultdict(list))
    for folder in folders:
        runs += (found := [read_run(file.parent) for file in sorted(folder.rglob("settings.json"))])
        if not found:
            raise Mistake(f"{folder} holds no run." if folder.is_dir() else
                          f"there is no folder {folder}.")
    for run in (run for run in runs if not run.scores):
        print(f"left out, as no episode is over: {run.folder}", file=sys.stderr)
    if not (runs := [run for run in runs if run.scores]):
        raise Mistake("none of these runs has finished an episode.")
    names, legend = name_settings(runs)
    for name, run in zip(names, runs):
        group = groups[name, run.step, tuple(run.scores)][run.game]
        if twins := [other.folder for other in group if other.seed == run.seed]:
            raise Mistake(f"{twins[0]} and {run.folder} are one run, or copies: leave one out.")
        group.append(run)
    return dict(sorted(groups.items())), legend


# ---------------------------------------------------------------- statistics


def seed_means(runs: list[Run], protocol: str) -> np.ndarray:
    return np.array([run.scores[protocol].mean() for run in runs])


def standard_error(runs: list[Run], protocol: str) -> float:
    """Over seeds; with a single seed, over its episodes."""
    values = seed_means(runs, protocol) if len(runs) > 1 else runs[0].scores[protocol]
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan


def interquartile_mean(scores: list[np.ndarray]) -> np.ndarray:
    """Mean of the middle half of all scores, (..., seeds) of each game, like scipy's trim_mean. A
    game with fewer seeds weighs as much as the others: its scores count several times."""
    most = math.lcm(*(game.shape[-1] for game in scores))
    times = np.concatenate([np.full(game.shape[-1], most // game.shape[-1]) for game in scores])
    pooled, quarter = np.concatenate(scores, -1), times.sum() // 4
    order = pooled.argsort(-1)
    kept = np.diff(times[order].cumsum(-1).clip(quarter, times.sum() - quarter),
                   prepend=quarter)
    return (np.take_along_axis(pooled, order, -1) * kept).sum(-1) / kept.sum(-1)


def aggregate(scores: list[np.ndarray]) -> np.ndarray:
    """The four AGGREGATES (..., 4) of human-normalised scores, percent, (..., seeds) of each game;
    the optimality gap is what they lack of 100 %."""
    means = np.stack([game.mean(-1) for game in scores], -1)
    gaps = np.stack([np.maximum(100 - game, 0).mean(-1) for game in scores], -1)
    return np.stack([means.mean(-1), np.median(means, -1), interquartile_mean(scores),
                     gaps.mean(-1)], -1)


def interval(scores: list[np.ndarray], draws: int = 10_000) -> np.ndarray:
    """95 % intervals of AGGREGATES, (2, 4), by a bootstrap that draws seeds within each game."""
    rng = np.random.default_rng(0)
    drawn = [game[rng.integers(len(game), size=(draws, len(game)))] for game in scores]
    return np.percentile(aggregate(drawn), (2.5, 97.5), axis=0)


# ---------------------------------------------------------------- writing


def markdown(head: list[str], rows: list[list[str]]) -> str:
    columns = []
    for name, *cells in zip(head, *rows):
        width, left = max(map(len, (name, *cells))), name in ("game", "settings", "agent")
        rule = "-" * width if left else "-" * (width - 1) + ":"
        columns.append([f"{text:{'<' if left else '>'}{width}}" for text in (name, rule, *cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns)) + "\n"


def cell(game: str, score: float, error: float = math.nan, mark: str = "") -> str:
    digits, percent = 1 if abs(score) < 100 else 0, human_normalised(game, score)
    return (f"{score:,.{digits}f}" + ("" if math.isnan(error) else f" ± {error:,.{digits}f}{mark}")
            + ("" if percent is None else f" ({round(percent)} %)"))


def score_tables(groups: dict) -> str:
    rows = []
    for (name, step, protocols), games in groups.items():
        for game, runs in games.items():
            episodes = sum(len(run.scores.get("evaluation", ())) for run in runs)
            ours = [cell(game, seed_means(runs, protocol).mean(), standard_error(runs, protocol),
                         "*" * (len(runs) == 1)) if protocol in protocols else "-"
                    for protocol in PROTOCOLS]
            known = PUBLISHED.get(game)
            rows.append([game, name, f"{step:,}", str(len(runs)), str(episodes), *ours, *(
                [f"{known['random']:,}", f"{known['human']:,}"]
                + [cell(game, known[agent]) for agent in DRAMA] if known else "----")])
    others = [agent for agent in AGENTS if agent not in DRAMA]
    head = ["game", "settings", "steps", "seeds", "episodes", *PROTOCOLS.values(), "random",
            "human", *DRAMA]
    published = [[game, *(cell(game, PUBLISHED[game][agent]) for agent in others)]
                 for game in sorted({row[0] for row in rows} & PUBLISHED.keys())]
    return (markdown(head, sorted(rows, key=lambda row: row[0])) + "\n"
            + markdown(["game", *others], published))


def aggregate_cells(scores: list[np.ndarray]) -> list[str]:
    cells = [f"{round(value)} %" for value in aggregate(scores)]
    if min(map(len, scores)) == 1:  # such a game would add nothing to the interval
        return cells
    return [f"{text} [{round(low)}, {round(high)}]"
            for text, low, high in zip(cells, *interval(scores))]


def aggregate_tables(groups: dict) -> str:
    """For every set of games, our runs of just these and the published agents over the same."""
    sets, parts = defaultdict(list), []
    for (name, step, protocols), games in groups.items():
        known = tuple(sorted(games.keys() & PUBLISHED.keys()))
        for protocol in protocols if known else ():
            scores = [human_normalised(game, seed_means(games[game], protocol)) for game in known]
            sets[known].append([f"{name}: {PROTOCOLS[protocol]}", f"{step:,}",
                                *aggregate_cells(scores)])
    for games, rows in sorted(sets.items(), key=lambda item: -len(item[0])):
        for agent in AGENTS:
            scores = [human_normalised(game, np.array([PUBLISHED[game][agent]])) for game in games]
            rows.append([agent, "100,000", *aggregate_cells(scores)])
        over = ", ".join(games) if len(games) < len(PUBLISHED) else f"all {len(games)} games"
        parts.append(f"Human-normalised, over {over}:\n\n"
                     + markdown(["agent", "steps", *AGGREGATES], rows))
    return "\n".join(parts)


def write_csv(path: Path, groups: dict):
    """A row for each protocol of each run, and for each published score of the same games."""
    rows = [(name, run.game, run.seed, step, protocol, len(run.scores[protocol]),
             run.scores[protocol].mean(), standard_error([run], protocol), run.folder)
            for (name, step, protocols), games in groups.items()
            for run in sum(games.values(), []) for protocol in protocols]
    rows += [(agent, game, "", 100_000, "published", "", score, "", "atari100k.csv")
             for game in sorted({row[1] for row in rows} & PUBLISHED.keys())
             for agent, score in PUBLISHED[game].items()]
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(("agent", "game", "seed", "steps", "protocol", "episodes", "score",
                        "standard_error", "source", "human_normalised"))
        table.writerows((*row, human_normalised(row[1], row[6])) for row in rows)


def write_json(folder: Path, groups: dict):
    """scores-*.json, game -> one mean a seed; curves.json, all training episodes over frames."""
    curves, scores = [], defaultdict(lambda: defaultdict(list))  # file -> game -> one mean a seed
    for (name, step, protocols), games in groups.items():
        for protocol in protocols:
            words = re.findall(r"[\w.]+", f"scores {name} {step} {protocol}")
            for game, runs in games.items():
                scores["-".join(words)][game] += seed_means(runs, protocol).tolist()
        for run in sum(games.values(), []):
            task, frames = run.game, run.settings["action_repeat"]
            if task in drama.AtariGame.names():
                task, frames = "atari_" + re.sub("(?<!^)(?=[A-Z])", "_", task).lower(), 4
            curves.append(dict(task=task, method=f"drama {name}", seed=str(run.seed),
                               xs=[frames * step for step, _ in run.curve],
                               ys=[score for _, score in run.curve]))
    files = {f"{file}.json": json.dumps(games, indent=1) for file, games in scores.items()}
    files["curves.json"] = json.dumps(curves)
    for name, content in files.items():
        check_place(folder / name, "--json FOLDER", content[:4])
    for name, content in files.items():
        (folder / name).write_text(content, "utf-8")
    if older := sorted({path.name for path in folder.glob("scores-*.json")} - {*files}):
        print(f"older scores stay in {folder}: {', '.join(older)}", file=sys.stderr)


NOTES = """\
± standard error over seeds; *: of one seed, over its episodes, which says nothing of other seeds.
(%): human-normalised, 0 % is random play, 100 % a human. [95 %]: stratified bootstrap over seeds,
if each game has two. Published agents, after 100,000 steps: one number a game, so no interval."""


def run_command(argv: list[str]):
    parser = drama.Parser("python -m tools.table", description=__doc__.split("\n")[0],
                          allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="run, or folder of runs")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write rows for pandas")
    parser.add_argument("--json", metavar="FOLDER", type=Path, help="write final scores and curves")
    asked = parser.parse(argv)
    groups, legend = gather(asked["runs"])
    if asked["csv"]:
        check_place(asked["csv"], "--csv FILE", "agent,game,seed,")
    if asked["json"]:
        write_json(asked["json"], groups)
    if asked["csv"]:
        write_csv(asked["csv"], groups)
    print(score_tables(groups), aggregate_tables(groups), NOTES, *legend, sep="\n")


main = functools.partial(drama.command_line, run_command, name="tools.table")

if __name__ == "__main__":
    sys.exit(main())
