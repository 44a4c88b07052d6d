"""What the emulator really does: measures the table of results/emulator.md anew.

    python -m tools.emulator                   the 26 games of the benchmark
    python -m tools.emulator Breakout Pong     these games

If stopped, it goes on where it was: a game that stands in results/emulator.csv, measured with these
versions, is not measured again. To have it measured again, delete its row.

It plays on ale-py's own interface, whose states can be kept and restored; class Emulator adds the
protocol of `drama.AtariGame`, bit for bit. Random numbers come only from the names of games: what
one machine measures, any other measures too. Steps are agent steps of four frames.
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # Ctrl-C while torch loads just ends the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import csv
import functools
import multiprocessing
import sys
import time
from bisect import bisect_left
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import ale_py
import drama  # before numpy: it sets up torch
import numpy as np
from buffer import Mistake, known_scores, write_file
from tools.compare import write_rows
from tools.curves import check_place
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parents[1] / "results" / "emulator.csv"
EPISODES = 64  # of random play
NO_OPS = 30  # an episode opens with 0 to 29 of them
CAP = 27_000  # steps of an episode
EVENTS = 12  # of each kind whose sealed steps are measured, in as many episodes
TRIALS = 16  # random plays that may help, beside every key held
BACK = 100  # steps before an event that are looked at
STATES = 128  # in which every action is tried
AFTER = 8  # steps in which it has to show
FILMS, FILM = 2, 150  # sequences of random actions played from every start, and their length
OPENING = 120  # steps of a beginning that are looked at


# ---------------------------------------------------------------- the emulator


class Emulator:
    """One copy of a game by the protocol of `drama.AtariGame`; its states can be kept and restored.

    But only once an episode has shown a frame: before, Amidar and Qbert would not go on alike.
    """

    def __init__(self, title: str):
        self.rom = ale_py.roms.get_rom_path(drama.AtariGame.names()[title])
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        self.ale = ale_py.ALEInterface()
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("random_seed", 0)
        self.ale.loadROM(self.rom)
        self.keys = self.ale.getMinimalActionSet()
        size = self.ale.getScreenDims()
        self.screens = np.zeros((2, *size, 3), np.uint8)  # the last two of a step
        self.rows, self.columns = (  # matrices (64, pixels) that average over 64 equal cells
            np.eye(n, dtype=np.float32).repeat(64, 0).reshape(64, n, n).mean(1) for n in size)

    def start(self, no_ops: int):
        """Open an episode. Without loading the ROM anew, some games leak into the next."""
        self.ale.loadROM(self.rom)
        self.ale.reset_game()
        for _ in range(no_ops):
            self.ale.act(ale_py.Action.NOOP)
        self.screens[0] = 0
        self.ale.getScreenRGB(self.screens[1])
        self.lives, self.time = self.ale.lives(), 0

    def step(self, action: int) -> tuple[int, bool, bool]:
        """Reward, terminal (a life was lost), done (game over, begun again, or the cap)."""
        reward, over = 0, False
        for frame in range(4):
            reward += self.ale.act(self.keys[action])
            if over := self.ale.game_over():
                break
            if frame > 1:
                self.ale.getScreenRGB(self.screens[frame - 2])
        before, self.lives, self.time = self.lives, self.ale.lives(), self.time + 1
        over = over or self.lives > before + 1 and self.time > 1
        return reward, over or self.lives < before, over or self.time == CAP

    def frame(self) -> np.ndarray:
        """What an agent sees, (64, 64, 3) uint8: the brighter of the last two screens, averaged."""
        screen = self.screens.max(0)
        rows = (self.rows @ screen.reshape(len(screen), -1)).reshape(64, -1, 3)
        return np.rint(self.columns @ rows).astype(np.uint8)

    def film(self, actions):
        """What every step of a play from here shows, hashed."""
        for action in actions:
            outcome = self.step(action)
            yield hash((self.frame().tobytes(), *outcome))

    def keep(self) -> tuple:
        return self.ale.cloneState(include_rng=True), self.lives, self.time

    def restore(self, kept: tuple):
        state, self.lives, self.time = kept
        self.ale.restoreState(state)


# ---------------------------------------------------------------- what is measured


def span(numbers) -> str:
    """Median and range: `11 (5 to 14)`."""
    return f"{np.median(numbers):g} ({min(numbers)} to {max(numbers)})" if numbers else "-"


def counted(values) -> str:
    """Values, each with how often it came: `-1 x 128, +1 x 3`."""
    return ", ".join(f"{value} x {count}" for value, count in Counter(values).most_common()) or "-"


def random_play(game: Emulator, rng) -> dict:
    """Scores of random play, and how lives move."""
    scores, lengths, lifetimes, first, moves, last = [], [], [], [], [], []
    for _ in range(EPISODES):
        game.start(rng.integers(NO_OPS))
        first.append(game.lives)
        score, born, done = 0, 0, False
        while not done:
            before = game.lives
            reward, terminal, done = game.step(rng.integers(len(game.keys)))
            score += reward
            if game.lives != before:
                moves.append(f"{game.lives - before:+d}")
            if terminal:
                lifetimes.append(game.time - born)
                born = game.time
        last.append(before)
        scores.append(score)
        lengths.append(game.time)
    return {"random play": round(np.mean(scores), 2),
            "standard error": round(np.std(scores, ddof=1) / EPISODES**0.5, 2),
            "steps": round(np.mean(lengths)), "lives": counted(first), "moves": counted(moves),
            "last life at": counted(last), "shortest life": min(lifetimes, default="-")}


def standing_still(game: Emulator, rng) -> dict:
    """At which step a player who does nothing is done."""
    game.start(rng.integers(NO_OPS))
    while not game.step(0)[2]:
        pass
    return {"standing still": game.time}


def some_play(game: Emulator, kept, steps: int, rng, good) -> bool:
    """Whether any play of so many steps is good: every key held, and some at random."""
    held = [[key] * steps for key in range(len(game.keys))]
    for actions in [*held, *rng.integers(len(game.keys), size=(TRIALS, steps))]:
        game.restore(kept)
        if good(game.step(action) for action in actions):
            return True
    return False


def sealed(game: Emulator, rng) -> dict:
    """For how many steps before a death or a reward it could no longer be helped.

    A play helps if the life goes on past that step, or if the step gives no such reward. Where none
    of the plays tried helps, another might: these are upper bounds.
    """

    def sealed_steps(good):  # by halving: what is sealed stays sealed
        return bisect_left(range(1, len(past) + 1), True,
                           key=lambda k: some_play(game, past[-k], k, rng, good))

    def lives_on(outcomes):
        return not any(terminal for _, terminal, _ in outcomes)

    def goes_without(outcomes):
        *_, (got, _, _) = outcomes
        return got < reward if reward > 0 else got > reward

    life, over, rewards = [], [], []
    for _ in range(EVENTS):
        game.start(rng.integers(1, NO_OPS))
        has_lives, past, rewarded, done = game.lives > 0, deque(maxlen=BACK), -BACK, False
        while not done:
            past.append(game.keep())
            reward, terminal, done = game.step(rng.integers(len(game.keys)))
            now = game.keep()
            if reward and len(rewards) < EVENTS and game.time >= rewarded + BACK:
                rewards.append(sealed_steps(goes_without))
                rewarded = game.time
            if terminal:
                deaths = over if done else life
                if has_lives and len(deaths) < EVENTS:
                    deaths.append(sealed_steps(lives_on))
                past.clear()
            game.restore(now)
    return {"lost life sealed": span(life), "game over sealed": span(over),
            "reward sealed": span(rewards)}


def choices(game: Emulator, rng) -> dict:
    """In how many states of random play no action matters, and which actions never differ.

    An action is taken for one step, then the player stands still; it matters if a frame, a reward
    or an end of the next AFTER steps differs. A state is taken every 32 steps or so.
    """
    films, done = [], True
    while len(films) < STATES:
        if done:
            game.start(rng.integers(1, NO_OPS))
        if rng.random() < 1 / 32:
            here, seen = game.keep(), []
            for key in range(len(game.keys)):
                game.restore(here)
                seen.append(tuple(game.film([key] + [0] * (AFTER - 1))))
            films.append(seen)
            game.restore(here)
        _, _, done = game.step(rng.integers(len(game.keys)))
    alike = {}
    for key, seen in zip(game.keys, zip(*films)):
        alike.setdefault(seen, []).append(key.name)
    idle = sum(len(set(seen)) == 1 for seen in films) / STATES
    return {"no action matters": f"{idle:.0%}", "actions": len(game.keys), "differ": len(alike),
            "never differ": ", ".join("=".join(keys) for keys in alike.values() if keys[1:]) or "-"}


def starts(game: Emulator, rng) -> dict:
    """First steps in which no key, however long held, changes a frame; how many starts differ."""
    dead, first, games = [], set(), []
    for no_ops in range(1, NO_OPS, 7):
        game.start(no_ops)
        here, steps = game.keep(), OPENING
        still = list(game.film([0] * OPENING))
        for key in range(1, len(game.keys)):
            game.restore(here)
            pairs = enumerate(zip(still, game.film([key] * steps)))
            steps = next((step for step, (one, other) in pairs if one != other), steps)
        dead.append(steps)
    for _ in range(FILMS):
        actions, films = rng.integers(len(game.keys), size=FILM), set()
        for no_ops in range(NO_OPS):
            game.start(no_ops)
            first.add(game.frame().tobytes())
            films.add(tuple(game.film(actions)))
        games.append(len(films))
    return {"dead beginning": span(dead), "first frames": len(first), "games": span(games)}


# ---------------------------------------------------------------- the table

PARTS = (random_play, standing_still, starts, choices, sealed)
VERSIONS = f"ale-py {ale_py.__version__}, numpy {np.__version__}"
TEXT = f"""# The emulator as it is

    python -m tools.emulator

Steps are agent steps of four frames; a frame is what an agent sees. Measured with %s.

%s
- Random play: mean score of {EPISODES} episodes, its standard error, their mean length in steps.
- Standing still: steps until a player who does nothing is done; {CAP:,} is the cap.
- Lives: at the start, how they move, before the end, each with how often; the shortest life.
- Dead beginning: steps in which no key, however long held, changes a frame; median and range of
  five starts. First frames, games: how many differ among the {NO_OPS} starts; a game is one of
  {FILMS} sequences of {FILM} random actions.
- No action matters: share of {STATES} states of random play in which the choice of one step changes
  no frame, reward or end of {AFTER} steps. Differ: how many actions do in any of these states; what
  rarely matters may be missed. (Pong's FIRE, pressed while the ball is hit, sends it off twice
  as fast: in 1 state of 100 it differs.)
- Sealed: for how many steps before it a lost life, a game over or a reward could no longer be
  helped, by any key held or by {TRIALS} random plays; median and range of up to {EVENTS}, of
  {BACK} steps looked at. More plays would find more help: these are upper bounds.
"""


def measure(title: str, part) -> dict:
    """One part of one game, in a process of its own."""
    begun, seed = time.process_time(), f"{title} {part.__name__}".encode()
    found = part(Emulator(title), np.random.default_rng([*seed]))
    return found | {f"CPU of {part.__name__}, s": round(time.process_time() - begun, 1)}


def write(path: Path, rows: dict[str, dict]):
    """The sheet and, beside it, the table for readers; each is written whole or not at all."""
    rows = [rows[title] for title in sorted(rows)]
    shown = [name for name in rows[0] if name != "versions" and not name.startswith("CPU")]
    table = [shown, ["---"] * len(shown)] + [[str(row[name]) for name in shown] for row in rows]
    text = TEXT % (" or ".join(sorted({row["versions"] for row in rows})),
                   "".join(f"| {' | '.join(line)} |\n" for line in table))
    write_rows(path, rows)
    write_file(path.with_suffix(".md"), text.encode())


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.emulator", description=__doc__.split("\n")[0],
                          allow_abbrev=False)
    parser.add_argument("games", metavar="GAME", nargs="*", help="the benchmark's 26, if left out")
    parser.add_argument("--jobs", metavar="INT", type=int, default=2, help="processes (2)")
    asked, path = parser.parse(argv), RESULTS
    titles = [drama.game_title(name) for name in asked["games"]] or list(known_scores())
    if others := set(titles) - drama.AtariGame.names().keys():
        raise Mistake(f"{min(others)} is not one of Atari's games.")
    if not 1 <= asked["jobs"] <= 32:
        raise Mistake(f"--jobs must be from 1 to 32, not {asked['jobs']}.")
    check_place(path, "", "game,versions,")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    rows = {row["game"]: row for row in csv.DictReader(lines)}
    found = {title: {} for title in titles if rows.get(title, {}).get("versions") != VERSIONS}
    with ProcessPoolExecutor(asked["jobs"], multiprocessing.get_context("spawn")) as pool:
        tasks = {pool.submit(measure, title, part): (title, part)
                 for title in found for part in PARTS}
        try:
            for task in tqdm(as_completed(tasks), total=len(tasks), unit="part"):
                title, part = tasks[task]
                found[title][part] = task.result()
                if len(found[title]) == len(PARTS):
                    rows[title] = {"game": title, "versions": VERSIONS}
                    for part in PARTS:
                        rows[title] |= found[title][part]
                    write(path, rows)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            print("\nstopped; the same command goes on", file=sys.stderr)
            raise
    print(f"{len(rows)} games in {path.with_suffix('.md')}")


main = functools.partial(drama.command_line, run_command, name="tools.emulator")

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
