"""Settings compared at equal cost: as many seconds of one core for each, on one frozen replay.

    python -m tools.compare KungFuMaster laptop "laptop --batch 1 --model-steps 1 --dreams 64"
    python -m tools.compare Breakout laptop "best --batch 4 --dreams 64" --replay runs/Breakout-s0

A variant is a preset and flags of drama.py. All learn from the same 10,000 steps, of random play or
the last of a run: first the world model, for so many seconds of CPU time, then for as many an agent
in that model, which learns no further. They take turns, so that whatever else the machine does hits
all alike. No model learns from the last fifth of the steps: there it is judged by the figures of
tools.check, in dreams that follow 32 real frames. Finally the agent plays five episodes, of 2,000
steps at most.

A row of results/offline/compare-GAME.csv is one variant with one seed. Rows that are there are not
made again, even if the code has changed: the table names their commits. A comparison that is
stopped loses the rows of the seed it was at. Loss weights learn at the variant's --harmony-lr, at
which so few updates leave them near 1.
"""

import argparse
import csv
import functools
import io
import math
import re
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import drama  # first: it sets up torch
import numpy as np
import torch
from agent import Player
from buffer import SCHEMA, Mistake, Replay, in_one_sentence, intact, load_run, newest_steps
from buffer import sha256, versions, write_file
from tools.check import EPISODES, change_shown, judge, play, value_and_return
from tools.curves import check_place

STEPS = 10_000
TURN = 3  # core-seconds
COST = dict(seconds=120, seeds=2)
DREAMT, OLDEST = (1, 5, 15, 30), 64  # steps into a dream; twice the real frames before it
FOLDER = Path(__file__).resolve().parents[1] / "results" / "offline"
GAME = ("game", "game_args", "action_repeat")
NO_PART = (*GAME, "preset", "seed", "steps", "device", "threads", "replay_device", "save_minutes",
           "log_every", "eval_episodes", "temperature", "cooldown", "learning_starts",
           "random_hold", "train_every")  # these play no part in what is learnt here
FLAGS = [f.name for f in fields(drama.Settings) if f.name not in NO_PART]

# ---------------------------------------------------------------- the frozen replay


def random_play(s: drama.Settings, steps: int) -> Replay:
    """Steps of random play, one episode after the other."""
    game, rng, replay = drama.make_game(s), np.random.default_rng(0), Replay(steps)
    episode, first = 0, True
    for _ in drama.show_progress(desc="random play", iterable=range(steps)):
        if first:
            frame = game.reset([episode])
        action = rng.integers(game.actions, size=1)
        after, reward, terminal, done = game.step(action)
        replay.add(frame=frame[0], action=action[0], reward=reward[0], terminal=terminal[0],
                   first=first)
        frame, first, episode = after, done[0], episode + done[0]
    return replay


def settings_text(s: drama.Settings, names) -> str:
    return " ".join(drama.as_flag(name, getattr(s, name)) for name in names)


def recorded(path: Path, s: drama.Settings) -> dict[str, np.ndarray]:
    """The last steps of a run of this game, or those in a file that --keep wrote."""
    if path.is_file():
        with in_one_sentence(f"{path} is no file of --keep"), np.load(path) as file:
            played, steps = file["game"].item(), {name: file[name] for name in SCHEMA}
    else:
        manifest, state, files = load_run(path)
        played = settings_text(drama.settings_of(manifest), GAME)
        steps = newest_steps(state, files, STEPS)
    if played != settings_text(s, GAME):
        raise Mistake(f"{path} was played with {played}, not {settings_text(s, GAME)}.")
    if 0.7 * len(steps["action"]) < s.learning_starts:
        raise Mistake(f"{path} holds {len(steps['action'])} steps: too few to learn from.")
    return steps


def split(steps: dict[str, np.ndarray]) -> list[Replay]:
    """Steps to learn from, and the last fifth to judge by: from the nearest beginning of an episode
    on or, if there is none within a tenth of all steps, from the middle of one."""
    length, parts = len(steps["action"]), []
    wanted = length - length // 5
    near = [at for at in np.flatnonzero(steps["first"]) if abs(at - wanted) <= length // 10]
    cut = min(near, key=lambda at: abs(at - wanted), default=wanted)
    for part in (slice(0, cut), slice(cut, length)):
        parts.append(Replay(part.stop - part.start))
        parts[-1].append_steps({name: column[part] for name, column in steps.items()})
        parts[-1]["first"][0] = True  # nothing is known of what came before
    return parts


# ---------------------------------------------------------------- learning at equal cost


def learn_world(run: drama.Run) -> int:
    """Learn the world as drama.train does -> frames replayed."""
    s = run.settings
    batch = run.draw_windows(s.batch, s.length, drama.reseed(s.seed, run.updates, "windows"))
    drama.reseed(s.seed, run.updates, "model")
    drama.update_world_model(run, batch)
    drama.average_weights(run, "model")
    return s.batch * s.length


def learn_in_dream(run: drama.Run) -> int:
    """Learn in the dream as drama.train does -> frames dreamt."""
    s, rng = run.settings, drama.reseed(run.settings.seed, run.updates, "contexts")
    if s.dream_from == "contexts":
        batch = run.draw_windows(s.dreams, s.context, rng, s.dreams / s.batch)
    else:
        batch = run.draw_windows(s.batch, s.length, rng)
    drama.reseed(s.seed, run.updates, "dream")
    drama.update_agent(run, batch, torch.tensor(True))
    drama.average_weights(run, "agent")
    return s.dreams * s.horizon


def take_turns(trials: list[tuple[drama.Run, dict]], part: str, learn, seconds: int):
    """Let every run learn for `seconds` of CPU time, and to the end of its last update; note in its
    row what it took."""
    for run, row in trials:
        run.updates, run.cpu_seconds, row[f"{part} frames"] = 0, 0.0, 0
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} core-seconds, {remaining} left"
    with drama.show_progress(desc=part, total=seconds * len(trials), bar_format=layout) as bar:
        while behind := [trial for trial in trials if trial[0].cpu_seconds < seconds]:
            for run, row in behind:
                until = min(seconds, run.cpu_seconds + TURN)
                while run.cpu_seconds < until:
                    begun = time.process_time()
                    drama.set_rates(run)
                    row[f"{part} frames"] += learn(run)
                    run.updates += 1
                    run.cpu_seconds += time.process_time() - begun
            bar.update(sum(min(run.cpu_seconds, seconds) for run, _ in trials) - bar.n)
    for run, row in trials:
        row |= {f"{part} updates": run.updates, f"{part} seconds": round(run.cpu_seconds, 1)}


def figures(run: drama.Run, held_out: Replay) -> dict[str, str]:
    """What the model foresees, and how the agent plays, as cells of a row."""
    s = run.settings
    _, table = judge(Player(run.playing_model, run.playing_agent, 1, OLDEST), held_out, DREAMT)
    found = {f"{name} @{k}": figure for k, row in table.items() for name, figure in row.items()}
    found |= {f"change shown, %, up to {n} pixels": figure
              for n, figure in change_shown(run.playing_model, held_out, run.device).items()}
    played = play(s, drama.make_player(s, run.playing_model, run.playing_agent, EPISODES))
    score = float(played.replay["reward"].sum()) / EPISODES
    found |= dict(score=score, entropy=played.entropy.mean(), **value_and_return(s, played))
    return {name: f"{figure:.6g}" for name, figure in found.items()}


# ---------------------------------------------------------------- rows, and a table of them

ABOUT = ("variant", "replay", "seed", "seconds", "settings", "steps", "commit")  # no figures


def this_commit() -> str:
    """Seven digits, and `-dirty` if the checkout was changed; nothing outside a checkout."""
    commit = versions()["commit"] or ""
    return commit[:7] + commit[40:]


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with intact(path, "delete the row, or the file"):
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
        if any(None in [*row, *row.values()] for row in rows):  # more cells than names, or fewer
            raise ValueError
        return rows


def write_rows(path: Path, rows: list[dict]):
    text = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode())


def compare(variants: dict[str, drama.Settings], name: str, steps: dict[str, np.ndarray],
            seconds: int, seeds: int, path: Path) -> dict[str, list[dict]]:
    """Make the rows that are missing, on the replay of this name -> variant: one row per seed."""
    (frozen, held_out), found = split(steps), {variant: [] for variant in variants}
    digest = sha256(b"".join(steps[column].tobytes() for column in SCHEMA))[:8]
    commit = this_commit()
    for seed in range(seeds):
        trials = []
        for variant, s in variants.items():
            settings = settings_text(s, [flag for flag in FLAGS
                                         if getattr(s, flag) != getattr(drama.Settings, flag)])
            key = dict(settings=settings, steps=digest, seed=str(seed), seconds=str(seconds))
            row = next((row for row in read_rows(path) if key.items() <= row.items()), None)
            if not row:
                row = dict(variant=variant, replay=name, **key, commit=commit)
                run = drama.Run(replace(s, seed=seed, steps=frozen.length), torch.device("cpu"))
                run.replay.columns, run.replay.length = frozen.columns, frozen.length
                trials.append((run, row))
            found[variant].append(row)
        for part, learn in [("model", learn_world), ("agent", learn_in_dream)] * bool(trials):
            take_turns(trials, part, learn, seconds)
        for run, row in trials:
            row |= figures(run, held_out)
            write_rows(path, [*read_rows(path), row])
    return found


def print_table(found: dict[str, list[dict]]):
    """Means and deviations of all figures over seeds, variants side by side. A star marks what is
    further from the first variant than noise is in 19 of 20 cases: by Student's t (Cornish and
    Fisher's series), with the mean variance of all variants."""
    first, *_ = found.values()
    seeds, heads = len(first), [f"[{number}]" for number in range(1, len(found) + 1)]
    for head, (variant, rows) in zip(heads, found.items()):
        print(f"{head}  {variant}  ({', '.join(sorted({row['commit'] for row in rows}))})")
    print("\n" + " " * 34 + "".join(f"{head + '  ':>22}" for head in heads))
    for name in [name for name in first[0] if name not in ABOUT]:
        cells = np.array([[float(row.get(name) or "nan") for row in rows]
                          for rows in found.values()])  # (variants, seeds)
        if np.isnan(cells).all():
            continue
        mean, deviation = cells.mean(1), cells.std(1, ddof=1)
        known, digits = deviation[~np.isnan(deviation)], 0 if (abs(cells) >= 1000).any() else 3
        n = max(1, len(known)) * (seeds - 1)
        t = 1.96 + 2.37 / n + 2.82 / n**2 + 2.56 / n**3
        noise = t * math.sqrt(2 / seeds * np.square(known).sum() / max(1, len(known)))
        texts = (f"{m:,.{digits}f} ± {d:,.{digits}f} {' *'[int(abs(m - mean[0]) > noise)]}"
                 for m, d in zip(mean, deviation))
        print(f"{name:<34}" + "".join(f"{text.replace('nan ± nan', '-'):>22}" for text in texts))
    print(f"\nmean ± deviation over {seeds} seeds; * more than noise away from [1]")


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.compare", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("game", metavar="GAME", type=drama.game_title)
    parser.add_argument("variants", metavar="VARIANT", nargs="*", default=["laptop"],
                        help="a preset and, in the same quotes, flags (laptop)")
    for name, default in COST.items():
        parser.add_argument(f"--{name}", type=int, metavar="INT", help=f"({default})")
    parser.add_argument("--replay", metavar="RUN|FILE", help="steps of a run, or what --keep wrote")
    parser.add_argument("--keep", metavar="FILE.npz", help="write the steps to a file, and end")
    parser.add_settings("laptop", (*GAME[1:], "precision"))
    common = parser.parse(argv) | dict(preset="laptop", device="cpu", threads=1)
    texts, source, keep = (common.pop(name, None) for name in ("variants", "replay", "keep"))
    if keep and (texts != ["laptop"] or common.keys() & COST):
        raise Mistake("--keep only writes the steps of the replay: leave out variants and "
                      f"{' and '.join(map(drama.flag, COST))}.")
    if keep and not keep.endswith(".npz"):
        raise Mistake(f"--keep {keep}: name a file that ends in .npz.")
    seconds, seeds = (common.pop(name, default) for name, default in COST.items())
    if seconds < 1 or seeds < 2:
        raise Mistake("--seconds must be 1 or more, --seeds 2 or more: one knows of no noise.")
    s, *_ = drama.new_settings(common)
    common["precision"], variants = s.precision, {}
    for text in texts:
        preset, *words = text.split() or [""]
        if preset not in drama.PRESETS:
            raise Mistake(f"a variant begins with {', '.join(drama.PRESETS)}; {text!r} does not.")
        parser = drama.Parser(prog="a variant", allow_abbrev=False)
        parser.add_settings(preset, FLAGS)
        flags = common | dict(preset=preset) | parser.parse(words)
        variants[" ".join([preset, *words])], *_ = drama.new_settings(flags)
    path = FOLDER / "compare-{}.csv".format(re.sub(r"[^\w.-]+", "-", s.game))
    if keep:
        check_place(Path(keep), "--keep FILE.npz")
    else:
        check_place(path, "", "variant,")
    steps = recorded(Path(source), s) if source else random_play(s, STEPS).steps(0, STEPS)
    if keep:
        np.savez_compressed(packed := io.BytesIO(), game=settings_text(s, GAME), **steps)
        write_file(Path(keep), packed.getvalue())
        return print(f"{keep}: {len(steps['action']):,} steps of {s.game}")
    name = Path(source).resolve().stem if source else "random play"
    print_table(compare(variants, name, steps, seconds, seeds, path))


main = functools.partial(drama.command_line, run_command, name="tools.compare")

if __name__ == "__main__":
    sys.exit(main())
