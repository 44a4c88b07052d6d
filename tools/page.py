"""Play inside a model, and see runs grow: a page for the browser, from this machine to itself.

    python -m tools.page results/agents/KungFuMaster.pt    play a game, leave it, steer the dream
    python -m tools.page runs/Krull-s0 runs/Krull-s1       the same, and how the runs get on
    python -m tools.page RUN --film dream.png              no page: film a dream beside its game

*Dream* shows the game, what the model keeps of each frame, and how it had guessed it. From any step
on the model may be left alone: then each frame is dreamt from the one before, and the game goes on
beside it with the same actions. A film of the run's newest steps stands in for a game that is not
installed. *Run* draws scores and metrics of runs while they train; it reads their files and changes
nothing. The browser's half is page.html, beside this.
"""

import argparse
import base64
import contextlib
import copy
import enum
import errno
import functools
import json
import os
import re
import secrets
import socketserver
import sys
import threading
import time
import traceback
import urllib.parse
import webbrowser
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import drama  # first: it sets up torch
import ale_py
import numpy as np
import torch
from agent import Player, sample
from buffer import MOMENTS, Folder, Mistake, kept_evaluation, known_scores, load_run
from buffer import newest_score, newest_steps, no_run, packed, step_of, write_png

from tools import curves

WINDOWS = 8  # sessions that are kept; a new one takes the place of the one longest unused
LONGEST = 10_000  # bytes of a request
EPISODE = 3  # number of the page's first episode: smaller ones are used elsewhere (test seeds)

# ---------------------------------------------------------------- actions by their meaning

DIRECTIONS = ("LEFT", "RIGHT", "UP", "DOWN", "FIRE")  # as keys: the arrows and the space bar


def action_names(s: drama.Settings, actions: int, game=None) -> list[str]:
    """What a game calls its actions, installed or not; their numbers if it does not say."""
    if s.game in (roms := drama.AtariGame.names()):
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        console = ale_py.ALEInterface()
        console.loadROM(ale_py.roms.get_rom_path(roms[s.game]))
        return [action.name for action in console.getMinimalActionSet()]
    env = game.envs[0].unwrapped if isinstance(game, drama.GymnasiumGame) else None
    names = getattr(env, "actions", ())
    names = [action.name for action in names] if isinstance(names, enum.EnumMeta) else []
    return names if len(names) == actions else [str(action) for action in range(actions)]


def meaning(name: str) -> set[str]:
    """UPRIGHTFIRE -> {UP, RIGHT, FIRE}; forward is up; what has no arrow stands for itself."""
    if name.isdecimal():  # nothing is known of it: the first ones take the arrows
        return {DIRECTIONS[int(name)]} if int(name) < len(DIRECTIONS) else {name}
    word = name.upper().replace("FORWARD", "UP")
    if word in ("NOOP", "NOTHING", "STAY"):
        return set()
    parts = re.fullmatch("(UP|DOWN)?(LEFT|RIGHT)?(FIRE)?", word)
    return {part for part in parts.groups() if part} if parts else {name}


def action_of(keys: list[str], names: list[str]) -> int | None:
    """The action with the most of the pressed arrows and the fewest others; None if in all of them
    the unwanted prevails. A number among the keys is the action itself."""
    numbers = [str(number) for number in range(len(names))]
    for key in keys:
        if key in numbers:
            return numbers.index(key)
    pressed = set(keys)
    for pair in ({"LEFT", "RIGHT"}, {"UP", "DOWN"}):
        pressed -= pair if pair <= pressed else set()
    fit = [2 * len(meaning(name) & pressed) - len(meaning(name) - pressed) for name in names]
    return fit.index(max(fit)) if max(fit) >= 0 else None


# ---------------------------------------------------------------- the worlds to begin in


class Game:
    """The game itself, one episode after the other."""

    recorded, length = None, 0  # whatever is done, it goes on

    def __init__(self, s: drama.Settings):
        self.s, self.game, self.at = s, drama.make_game(s), EPISODE - 1

    def start(self, at: int, before: int) -> int:
        """Begin a new episode -> 0: no steps lead there."""
        self.at += 1
        self.frame = self.game.reset(drama.episode_seeds(self.s.seed, self.at, "test"))
        self.first = True
        return 0

    def step(self, action: int) -> float:
        """-> what it earned. An episode that is over is followed by the next one."""
        self.frame, reward, _, done = self.game.step([action])
        self.first = False
        if done[0]:
            self.start(0, 0)
        return float(reward[0])


class Film:
    """The newest steps of a run, which know one future: that of the actions that were taken."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.columns, self.length = columns, len(columns["action"])

    def start(self, at: int, before: int) -> int:
        """Go `before` steps back from step `at`, or as many as its episode has -> how many."""
        opened = np.flatnonzero(self.columns["first"][: at + 1])
        earliest = int(max(0, at - before, *opened[-1:]))
        self.show(earliest, True)
        return at - earliest

    def show(self, at: int, first: bool):
        self.at, self.first = at, first
        self.frame = self.columns["frame"][at : at + 1]
        self.recorded = int(self.columns["action"][at])

    def step(self, action: int) -> float:
        """-> what the action that was taken here earned."""
        earned, after = float(self.columns["reward"][self.at]), (self.at + 1) % self.length
        self.show(after, after == 0 or bool(self.columns["first"][after]))
        return earned


# ---------------------------------------------------------------- a mind, and a window's session


class Mind(Player):
    """Remembers as a player does, but is told what to do; it sees latents, and cannot tell whether
    they come from a frame or from a dream."""

    reward = end = guess = None  # r^_t, e^_t, z^_{t+1}: foreseen at the last step

    def see(self, z: torch.Tensor, first: bool):
        """Latents z_t (1, K), and whether they open an episode -> policy (A,), value."""
        self.z, self.first = z, torch.tensor([first], device=z.device)
        self.d_past = torch.where(self.first[:, None], 0.0, self.d_past)
        self.policy = self.agent.policy(self.agent.features(z, self.d_past), self.temperature)[0]
        self.value = float(self.agent.value(z, self.d_past))

    def do(self, action: int):
        """Take a_t, and foresee what comes of it."""
        self.action = torch.tensor([action], device=self.z.device)
        self.act(self.z, self.first)
        model, d = self.model, self.d_past
        self.reward = float(model.two_hot.mean(model.reward_head(d)))
        self.end = float(model.end_head(d).sigmoid())
        self.guess = sample(model.prior(d))

    def decide(self, z, first, d_past, state):
        token = self.model.token(z, self.action)
        return z, self.action, *self.model.sequence.step(token, state, first)

    def twin(self):
        """One that remembers the same, and goes its own way."""
        twin = copy.copy(self)
        twin.history = self.history.copy()
        return twin


class Agent:
    """All that a run or an exported agent has for the page."""

    def __init__(self, path: Path, device: str = "auto"):
        self.s, self.player, state = drama.load_player(path, device)
        about, state, files = load_run(path)
        self.step, self.score = state["step"], newest_score(path, about, state)
        self.moments = newest_steps(state, files, MOMENTS)
        actions, game, self.no_game = len(self.player.agent.actor[-1].bias), None, ""
        try:
            game = drama.make_game(self.s)
        except Mistake as mistake:
            self.no_game = str(mistake)
        self.names = action_names(self.s, actions, game)
        self.worlds = ["game"] * (game is not None) + ["film"] * (len(self.moments["action"]) > 0)
        if not self.worlds:
            raise Mistake(f"{path} has no frames yet to dream from, and {self.no_game}")


class Session:
    """What one window of the browser plays and dreams. Its random numbers are its own: the same
    keys bring the same dream, whatever other windows do."""

    def __init__(self, agent: Agent, world: str):
        self.agent, self.model = agent, agent.player.model
        self.world = Game(agent.s) if world == "game" else Film(agent.moments)
        self.begin(0)

    @torch.no_grad()
    def begin(self, at: int):
        """A new episode of the game; or step `at` of the film, knowing what led to it."""
        player = self.agent.player
        self.dream, self.real = None, Mind(player.model, player.agent, 1, 2 * player.half,
                                           temperature=player.temperature)
        self.taken = self.earned = self.last_score = None
        self.steps, self.score, self.parted = 0, 0.0, False
        before = self.world.start(at, player.half)
        drama.reseed(self.agent.s.seed, 0, "test")
        self.look()
        for _ in range(before):
            self.step(None)
        self.score = 0.0

    def look(self):
        frame = torch.from_numpy(self.world.frame).to(self.real.d_past.device)
        self.real.see(self.model.encode(frame), self.world.first)

    def leave(self):
        """From here on the model dreams alone."""
        self.dream, self.alone, self.alive, self.parted = self.real.twin(), 0, 1.0, False

    @property
    def filmed(self) -> bool:
        """Whether the film gives the actions."""
        return self.world.recorded is not None and not self.dream

    @torch.no_grad()
    def step(self, action: int | None):
        """One step on, with this action or one of the agent's own; in a film, with the film's."""
        self.steps += 1
        drama.reseed(self.agent.s.seed, self.steps, "test")
        mind, recorded = self.dream or self.real, self.world.recorded
        if self.filmed:
            action = recorded
        elif action is None:
            action = int(sample(mind.policy))
        self.taken, self.earned = action, None
        if self.dream:
            mind.do(action)
            mind.see(mind.guess, False)
            self.alone, self.alive = self.alone + 1, self.alive * (1 - mind.end)
            self.parted |= recorded not in (None, action)
        if self.dream and self.parted:
            return
        self.real.do(action)
        self.earned = self.world.step(action)
        self.score += self.earned
        if self.world.first:
            self.last_score, self.score, self.parted = self.score, 0.0, True
        self.look()

    @torch.no_grad()
    def pictures(self) -> dict[str, np.ndarray | None]:
        """Frame, its reconstruction, and the dream or, in the world, the guess at this frame:
        (64, 64, 3) uint8."""

        def drawn(z):
            return (255 * self.model.decode(z)[0]).round().byte().permute(1, 2, 0).cpu().numpy()

        dream = self.dream.z if self.dream else self.real.guess
        return dict(game=self.world.frame[0], reconstruction=drawn(self.real.z),
                    dream=None if dream is None else drawn(dream))

    def moment(self) -> dict:
        """All that the page shows of this step."""
        mind = self.dream or self.real
        pictures = {name: picture is not None and base64.b64encode(picture.tobytes()).decode()
                    for name, picture in self.pictures().items()}
        return dict(
            pictures=pictures, action=self.taken, earned=self.earned, score=self.score,
            last_score=self.last_score, at=self.world.at, policy=mind.policy.tolist(),
            value=mind.value, reward=mind.reward, end=mind.end,
            alone=self.alone if self.dream else None, alive=self.alive if self.dream else None,
            parted=bool(self.dream and self.parted))


# ---------------------------------------------------------------- a run, from its files


def progress(folder: Path, column: str) -> dict:
    """A run's scores, a column of its metrics, and how long it still takes; None for no number."""
    game, steps, seed = map(curves.kept_settings(folder).get, ("game", "steps", "seed"))
    scores = curves.columns(folder / "episodes.csv", "step", "score")
    table = folder / "metrics.csv"
    rows = curves.columns(table, "step", column, "steps_per_second", empty="nan")
    header = table.read_text("utf-8").partition("\n")[0].split(",") if len(rows) else []
    logged, pace = rows[-1, [0, 2]] if len(rows) else (0, np.nan)
    saves = Folder(folder).manifests()[:1]
    step = max([int(logged), *map(step_of, saves)])
    tests = map(kept_evaluation, Folder(folder).numbered("evaluation", ".json"))
    return dict(
        game=game, steps=steps, seed=seed, step=step,
        left=(steps - step) / pace if pace > 0 else None,
        silent=time.time() - max(path.stat().st_mtime for path in (table, *saves)) if len(rows)
        else None,
        scores=scores[np.isfinite(scores).all(1)].tolist(),
        tests=[[each["step"], float(np.mean(each["scores"]))] for each in tests if each["scores"]],
        columns=header[1:], column=rows[np.isfinite(rows[:, 1]), :2].tolist(),
        known=known_scores().get(game, {}), picture=getattr(newest_dream(folder), "name", None))


def newest_dream(folder: Path) -> Path | None:
    return next(iter(Folder(folder).numbered("dream", ".png")), None)


# ---------------------------------------------------------------- what the browser asks

WISH = dict(do=str, session=str, run=int, world=str, at=int, keys=list | None)  # of Page.dream


class Refused(Exception):
    """A request that is not answered: HTTP code, and why."""


class Page:
    """Answers to the browser. Models and games are touched by one thread alone, in turn."""

    def __init__(self, paths: list[Path], device: str = "auto"):
        self.paths, self.sessions = paths, {}
        self.runs = {str(number): path for number, path in enumerate(filter(Path.is_dir, paths))}
        self.html = (Path(__file__).with_suffix(".html")).read_bytes()
        self.thread = ThreadPoolExecutor(1)
        self.agent = functools.lru_cache(2)(lambda path, save: Agent(path, device))

    def close(self):
        """End all that is played, while it still can be: ale-py complains of what is left."""
        self.thread.submit(self.sessions.clear).result()
        self.thread.shutdown()

    def get(self, path: str, query: dict) -> tuple[str, bytes]:
        """-> type of content, content."""
        if path == "/":
            return "text/html; charset=utf-8", self.html
        if path == "/about":
            return as_json([dict(name=path.stem if path.is_file() else path.resolve().name,
                                 run=path.is_dir()) for path in self.paths])
        if path == "/progress":
            return as_json([self.progress(path, query.get("column", ""))
                            for path in self.runs.values()])
        if path == "/picture" and query.get("run") in self.runs:
            if picture := newest_dream(self.runs[query["run"]]):
                return "image/png", picture.read_bytes()
        raise Refused(404, "there is no such thing here")

    def progress(self, path: Path, column: str) -> dict:
        try:
            return dict(progress(path, column), name=path.resolve().name)
        except (Mistake, OSError) as error:  # the others can still be shown
            return dict(name=path.resolve().name, error=str(error))

    def post(self, path: str, wish) -> tuple[str, bytes]:
        if path != "/dream":
            raise Refused(404, "there is no such thing here")
        if not (isinstance(wish, dict) and "do" in wish and wish.keys() <= WISH.keys() and all(
                isinstance(value, WISH[name]) for name, value in wish.items())):
            raise Refused(400, "this is not how the page asks")
        return as_json(self.thread.submit(self.dream, **wish).result())

    def dream(self, do: str, session: str = "", run: int = 0, world: str = "", at: int = 0,
              keys: list | None = None) -> dict:
        """What the Dream view asks for: `do` is open, step, leave, back or begin; `keys` are those
        pressed, or None where the agent acts."""
        if do == "open":
            return self.open(session, run, world)
        if session not in self.sessions:
            raise Refused(410, "this window's dream is over, as others were opened: reload it")
        here = self.sessions[session] = self.sessions.pop(session)  # now the last to be dropped
        if do == "step":
            action = None if keys is None else action_of([*map(str, keys)], here.agent.names)
            if keys is None or action is not None or here.filmed:
                here.step(action)
        elif do == "begin":
            here.begin(min(max(at, 0), max(here.world.length - 1, 0)))
        elif do == "leave":
            here.leave()
        elif do == "back":
            here.dream = None
        else:
            raise Refused(400, f"{do!r} is nothing that can be done")
        return here.moment()

    def open(self, session: str, run: int, world: str) -> dict:
        """A new session, in place of the window's last one."""
        if not 0 <= run < len(self.paths):
            raise Refused(400, f"there is no run {run}")
        path = self.paths[run]
        newest = "" if path.is_file() else next(map(str, Folder(path).manifests()), "")
        agent = self.agent(path, newest)
        if world not in ("", *agent.worlds):
            raise Refused(400, f"there is no {world!r} to begin in")
        self.sessions.pop(session, None)
        here, name = Session(agent, world or agent.worlds[0]), secrets.token_hex(8)
        self.sessions[name] = here
        if len(self.sessions) > WINDOWS:
            del self.sessions[next(iter(self.sessions))]
        return here.moment() | dict(
            session=name, names=agent.names, idle=action_of([], agent.names) is not None,
            worlds=agent.worlds, no_game=agent.no_game, length=here.world.length,
            game=agent.s.game, seed=agent.s.seed, steps=agent.step, evaluation=agent.score)


def as_json(content) -> tuple[str, bytes]:
    return "application/json", json.dumps(content, allow_nan=False).encode()


class Handler(BaseHTTPRequestHandler):
    """One connection of a browser. Only pages of this very server, under a local name, may ask: no
    other page in the browser can, not even one whose own name points to this address."""

    protocol_version, timeout = "HTTP/1.1", 60  # seconds that an idle connection is kept
    disable_nagle_algorithm = True  # or every answer waits 40 ms for the one before to be received
    RULES = {  # nothing is loaded from elsewhere, nothing kept, nothing shown within other pages
        "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
        "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'",
        "Cross-Origin-Resource-Policy": "same-origin", "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store"}

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.respond(lambda: self.server.page.get(path, dict(urllib.parse.parse_qsl(query))))

    def do_POST(self):
        self.respond(lambda: self.server.page.post(self.path, self.content()))

    def content(self):
        size = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,5}", size) or int(size) > LONGEST:
            raise Refused(413, "this is not how the page asks")
        try:
            return json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            raise Refused(400, "this is no JSON of the page's") from None

    def respond(self, answer):
        host, code = self.headers.get("Host", ""), 200
        try:
            if re.sub(r":\d+$", "", host) not in ("127.0.0.1", "localhost"):
                raise Refused(403, "this page is for this machine alone")
            if self.headers.get("Origin", f"http://{host}") != f"http://{host}":
                raise Refused(403, "another page may not ask")
            kind, body = answer()
        except Refused as refused:
            code, sentence = refused.args
        except (Mistake, OSError) as error:
            code, sentence = 400, str(error)
        except Exception as error:
            traceback.print_exc()
            code, sentence = 500, f"this went wrong: {error!r}"
        if code != 200:
            kind, body = as_json(dict(error=sentence))
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))),
                            *[("Connection", "close")] * (code != 200), *self.RULES.items()):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Requests are not logged."""


class Server(socketserver.ThreadingTCPServer):
    """One thread per connection; a browser that goes away in the middle is no error."""

    allow_reuse_address, daemon_threads = os.name == "posix", True

    def handle_error(self, request, address):
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, address)


def serve(page: Page, port: int, browser: bool):
    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise Mistake(f"port {port} cannot be had ({error.strerror}): --port 0 finds one "
                      "that is free.") from None
    with server:
        server.page, address = page, f"http://127.0.0.1:{server.server_address[1]}/"
        print(f"{address}  (Ctrl-C ends it)", flush=True)
        if browser:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
    page.close()


# ---------------------------------------------------------------- a film

UNSEEN, PLAYED, DREAMT, TIMES = 60, 15, 45, 2  # steps left out, in game, in dream; rounds of both


@torch.no_grad()
def film(agent: Agent, path: Path):
    """The agent in its game and, framed in red, in a dream that begins where the game is and goes
    on beside it with the same actions."""
    here, frames = Session(agent, agent.worlds[0]), []
    for _ in range(UNSEEN):
        here.step(None)
    for step in range(TIMES * (PLAYED + DREAMT)):
        if (at := step % (PLAYED + DREAMT)) == 0:
            here.dream = None
        elif at == PLAYED:
            here.leave()
        here.step(None)
        pictures, strip = here.pictures(), np.zeros((68, 136, 3), np.uint8)
        strip[1:-1, 69:-1] = (255, 0, 0) if here.dream else 0
        strip[2:-2, 2:66], strip[2:-2, 70:-2] = pictures["game"], pictures["dream"]
        strip &= 0xF8  # five bits a colour: the others are hard to see, and do not compress
        frames.append(packed(strip.repeat(4, 0).repeat(4, 1)))
    write_png(path, frames, per_second=15)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------------------------------- command line


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.page", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path,
                        help="folders of runs, or exported agents")
    parser.add_argument("--port", type=int, help="of 127.0.0.1; 0 finds a free one (8000)")
    parser.add_argument("--no-browser", action="store_true", help="open no browser")
    parser.add_argument("--film", metavar="FILE", type=Path,
                        help="write an animated PNG of a dream beside its game, and end")
    parser.add_settings(drama.own_preset(), ("device", "threads"))
    asked = parser.parse(argv)
    s = drama.Settings(**{name: asked[name] for name in ("device", "threads") if name in asked})
    drama.check(s)
    torch.set_num_threads(s.threads or 1)  # networks this small are fastest on one
    for path in asked["runs"]:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise Mistake(f"{path} is no agent that --export wrote.")
        if not path.is_file() and not any((path / name).exists()
                                          for name in ("settings.json", "lock")):
            raise no_run(path)
    if "film" in asked:
        drama.refuse({name: asked[name] for name in ("port", "no_browser") if name in asked},
                     "--film opens no page")
        if len(asked["runs"]) > 1:
            raise Mistake("--film takes one RUN.")
        curves.check_place(asked["film"], "--film FILE", "\x89PNG")
        return film(Agent(asked["runs"][0], s.device), asked["film"])
    if not 0 <= (port := asked.get("port", 8000)) < 2**16:
        raise Mistake(f"--port must be from 0 to {2**16 - 1}, not {port}.")
    serve(Page(asked["runs"], s.device), port, "no_browser" not in asked)


main = functools.partial(drama.command_line, run_command, name="tools.page")

if __name__ == "__main__":
    sys.exit(main())
