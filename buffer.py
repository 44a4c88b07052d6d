"""All that is remembered: the steps of a run, which to learn from next, and the run on the disk.

The replay is append-only and as large as the run: nothing is ever overwritten, so a position is a
step's name for good and a window of `length` consecutive positions is consecutive in time (D17).

Which windows are drawn is Drama's *dynamic frequency-based sampling* (DFS; paper, section 2.4).
Two counters stand beside every position: how often a window that starts there has trained the
world model, and how often it has started a dream. Windows are drawn without replacement from

    to train the world model    p = softmax(-trained / tau)
    to dream from               p = softmax(min(0, trained - dreamed) / tau)

so the model catches up on what is new, and no window starts many more dreams than it has trained;
an agent that dreams on from the model's own batch needs only the first of these.
tau is in draws: a window drawn tau times more than another is e times less likely to come next.
`trained` and `dreamed` are compared in like units: a step draws more dreams than training windows,
so `dreamed` is divided by that ratio.

What follows the replay keeps a run from being lost, and may be skipped. A run's state is any
containers of tensors and numbers there; all it knows of games and networks is what older saves
called them and, at its end, known scores. Read next: agent.py, which learns from the batches.
"""

import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
import zlib
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves_with_path, tree_map

if os.name == "posix":
    import fcntl
else:
    import msvcrt

# ---------------------------------------------------------------- replay

SCHEMA = dict(  # name = shape of a step, dtype kept, dtype in a batch
    frame=((64, 64, 3), torch.uint8, torch.uint8),  # O_t
    action=((), torch.int32, torch.int64),  # a_t, taken on seeing O_t
    reward=((), torch.float32, torch.float32),  # r_t, what a_t earned
    terminal=((), torch.bool, torch.float32),  # e_t: a_t ended the life
    first=((), torch.bool, torch.bool),  # O_t opens an episode
)
# Windows of consecutive steps: a tensor (B, L, *shape) for every name in the schema
Batch = NamedTuple("Batch", [(name, Tensor) for name in SCHEMA])


def dfs(trained: np.ndarray, dreamed: np.ndarray | None, tau: float) -> np.ndarray:
    """Log-probability, up to a constant, of every window to be drawn next; to train on if
    `dreamed` is None, else to dream from (paper, section 2.4)."""
    return (-trained if dreamed is None else np.minimum(0, trained - dreamed)) / tau


def uniform(trained: np.ndarray, dreamed: np.ndarray | None, tau: float) -> np.ndarray:
    """The paper's ablation: every window alike."""
    return np.zeros(len(trained))


SAMPLERS = {"dfs": dfs, "uniform": uniform}  # to add one: a function like these, and its name


def gumbel_top_k(score: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k different indices, drawn one after the other from softmax(score).

    Adding Gumbel noise to the scores and keeping the largest does exactly that in one pass, with
    no normalisation and no loop. The noise is -ln of an exponential variable.
    """
    exponential = rng.standard_exponential(len(score), dtype=np.float32)  # now and then exactly 0
    noise = -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))
    return np.argpartition(-(score + noise), k - 1)[:k]


MPS_LIMIT = 2**31  # bytes: on MPS, torch 2.13 silently gathers rows beyond it as zeros


class Replay:
    """All steps of a run, in tensors on the host; only frames, the bulk, may be on a `device`."""

    COUNTERS = ("trained", "dreamed")

    def __init__(self, capacity: int, device="cpu", schema=SCHEMA):
        self.capacity, self.schema = capacity, schema
        self.length = 0  # steps held
        self.columns = {
            name: torch.empty((capacity, *shape), dtype=kept, device=device if shape else "cpu")
            for name, (shape, kept, _) in schema.items()}
        self.trained, self.dreamed = np.zeros(capacity, np.int32), np.zeros(capacity, np.int32)

    @staticmethod
    def bytes_needed(capacity: int) -> int:
        """Memory of the frames, in bytes; all else together is a thousandth of it."""
        return capacity * 64 * 64 * 3

    @staticmethod
    def place(capacity: int, device: torch.device, asked: torch.device | None) -> torch.device:
        """Where to keep the frames of a run on `device`: as `asked`, else there too if possible."""
        need, have = Replay.bytes_needed(capacity), math.inf  # if the system does not tell
        if device.type == "mps" and need > 0.9 * MPS_LIMIT:
            device = torch.device("cpu")
        where = asked or device
        if where.type == "mps":
            have = MPS_LIMIT
        elif where.type == "cuda":
            have = torch.cuda.mem_get_info()[0]
        elif hasattr(os, "sysconf"):
            have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if need > 0.9 * have:
            hint = ", or try --replay-device cpu" if where.type != "cpu" else ""
            raise Mistake(f"the replay of --steps {capacity} takes {need / 2**30:.1f} GiB, and "
                          f"{where} has {have / 2**30:.1f}: ask for fewer{hint}.")
        return where

    def __getitem__(self, name: str) -> Tensor:
        """A column of the steps held, such as replay["reward"]: (length, *shape)."""
        return self.columns[name][: self.length]

    def add(self, **step):
        """Append one step: a value for every name in the schema."""
        if self.length == self.capacity:
            raise IndexError(f"the replay is full: it was made for {self.length} steps")
        for name, column in self.columns.items():
            column[self.length] = torch.as_tensor(step[name])
        self.length += 1

    def draw_starts(self, count: int, length: int, sampler, tau: float, rng: np.random.Generator,
                    dreams_per_window: float | None = None) -> np.ndarray:
        """Draw and count `count` starts of windows of `length` steps: to train the model on or,
        given how many dreams are drawn for each training window, to dream from."""
        trained, dreamed = (c[: self.length - length + 1] for c in (self.trained, self.dreamed))
        if dreams_per_window is None:
            starts, counter = gumbel_top_k(sampler(trained, None, tau), count, rng), trained
        else:
            score = sampler(trained, dreamed / dreams_per_window, tau)
            starts, counter = gumbel_top_k(score, count, rng), dreamed
        counter[starts] += 1
        return starts

    def windows(self, starts: np.ndarray, length: int, device) -> Batch:
        """The windows of `length` steps that begin at `starts`, as tensors on `device`."""
        rows = torch.from_numpy(starts[:, None] + np.arange(length))  # (B, L)
        return Batch(*(
            column.index_select(0, rows.flatten().to(column.device)).unflatten(0, rows.shape)
            .to(device, self.schema[name][2]) for name, column in self.columns.items()))

    def steps(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of the steps from `start` up to `stop`: they never change, so save them once."""
        return {name: column[start:stop].cpu().numpy().copy()
                for name, column in self.columns.items()}

    def append_steps(self, arrays: dict[str, np.ndarray]):
        """Put back what `steps` returned, after the steps held so far; a column that is missing
        there is filled with zeros."""
        start, stop = self.length, self.length + len(arrays["action"])
        for name, column in self.columns.items():
            column[start:stop] = torch.from_numpy(arrays[name]) if name in arrays else 0
        self.length = stop

    def counters(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[: self.length].copy() for name in self.COUNTERS}

    def load_counters(self, arrays: dict[str, np.ndarray]):
        for name in self.COUNTERS:
            getattr(self, name)[: self.length] = arrays[name]


# ---------------------------------------------------------------- errors in one sentence


class Mistake(Exception):
    """Bad input: one sentence that says what was wrong and what to do. Exit code 2."""


class Stopped(Exception):
    """A run that cannot go on, and why. Exit code 1."""


@contextlib.contextmanager
def in_one_sentence(what: str):
    """Around others' code: silences warnings, turns errors into a Mistake with their place."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Mistake:
        raise
    except (Exception, SystemExit) as error:
        at, kind = traceback.extract_tb(error.__traceback__)[-1], type(error).__name__
        words = (str(error).strip() or "it gives no reason").splitlines()[0].rstrip(".")
        place = f"{Path(at.filename).name}, line {at.lineno}"
        raise Mistake(f"{what}: {words} ({kind} in {place}).") from error


# ---------------------------------------------------------------- what must not cost a run


class StopSignal:
    """Whether Ctrl-C, a kill or a closed window asked the loop to save and end; a second one ends
    it at once. The handler only sets a flag: it may run in the middle of anything, even a print.
    Signals that the parent of this process had ignored (nohup) stay ignored.
    """

    def __enter__(self):
        self.asked, self.before = False, {}  # signal -> its handler until now
        for kind in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, kind, None)
            if number and signal.getsignal(number) is not signal.SIG_IGN:
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = True
        for kind in self.before:
            signal.signal(kind, signal.SIG_DFL)

    def __exit__(self, *error):
        for kind, handler in self.before.items():
            signal.signal(kind, handler)


class Console:
    """A stream whose writing never fails: neither a closed terminal nor a full disk behind it may
    end a run. From the first error on, what is written is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # there is none if a parent closed it
        if hasattr(self.stream, "reconfigure"):  # names that it cannot encode end no run either
            self.stream.reconfigure(errors="backslashreplace", line_buffering=True)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *args):
        try:
            action(*args)
        except OSError:
            with contextlib.suppress(OSError, ValueError):  # so that Python's last flush works, too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def command_line(command, argv: list[str] | None = None, name: str = "drama.py") -> int:
    """command(words of the command line) -> exit code; errors are one sentence."""
    with (contextlib.redirect_stdout(Console(sys.stdout)),
          contextlib.redirect_stderr(Console(sys.stderr))):
        try:
            command(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            return 130
        except (Mistake, Stopped, OSError, MemoryError, RuntimeError) as error:
            text = reason(error)
            if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
                text = ("there is not enough memory: what was saved is kept; a new run with a "
                        "smaller --batch, --dreams or --d-model, or on another --device, may fit")
            elif isinstance(error, RuntimeError):
                raise
            print(f"{name}: {text}", file=sys.stderr)
            return 2 if isinstance(error, Mistake) else 1
        finally:
            sys.stdout.flush()  # here, where it cannot fail
    return 0


def reason(error: Exception) -> str:
    """An error without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror + (f": {error.filename}" if error.filename else "")


class Clock:
    """The seconds of a run, and its recent pace, by clocks that nobody can set."""

    def __init__(self, warm_up: int):
        """After `warm_up` steps the pace is forgotten: random play is faster than learning."""
        self.warm_up, self.last = warm_up, (time.monotonic(), time.process_time())
        self.recent = deque(maxlen=100)  # seconds of the last steps

    def tick(self, run) -> float:
        """A step is over: add its seconds to run.seconds and run.cpu_seconds -> steps a second."""
        before, self.last = self.last, (time.monotonic(), time.process_time())
        seconds, cpu_seconds = (now - then for now, then in zip(self.last, before))
        run.seconds, run.cpu_seconds = run.seconds + seconds, run.cpu_seconds + cpu_seconds
        if run.step == self.warm_up + 1:
            self.recent.clear()
        self.recent.append(seconds)
        count, total, longest = len(self.recent), sum(self.recent), max(self.recent)
        if count > 1 and longest > max(60, total - longest):  # the lid was closed
            count, total = count - 1, total - longest
        return count / max(total, 1e-9)


def sync(handle: int):
    """Return when an open file or folder is safe on the disk."""
    os.fsync(handle)
    if sys.platform == "darwin":  # where fsync stops at the drive's cache
        with contextlib.suppress(OSError):  # not every disk can do more
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)


def sync_folder(path: Path):
    """Return when the names in a folder are safe: a file is only as safe as its name."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            sync(handle)
        except OSError as error:  # network file systems that sync no folders say so like this
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def rename(source: Path, target: Path):
    """Put a file in the place of another, atomically."""
    for pause in (0.1, 0.3, 1.0, None):
        try:
            return os.replace(source, target)
        except PermissionError:  # on Windows, where others may be looking at the file
            if os.name == "posix" or pause is None:
                raise
            time.sleep(pause)


def write_file(path: Path, data: bytes):
    """Write all of it or nothing, and return when it is safe on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            sync(file.fileno())
        rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk needs the room
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync_folder(path.parent)


def make_folder(path: Path, remedy: str):
    """A place for results, made or refused before there are any."""
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise Mistake(f"{path} cannot be written to{remedy}.")


def write_json(path: Path, content):
    write_file(path, json.dumps(content, indent=1).encode())


def packed(frame: np.ndarray) -> tuple[int, int, bytes]:
    """A frame (height, width, 3) uint8 as a PNG keeps it: so, a film of 2,000 fits into memory."""
    height, width, _ = frame.shape
    rows = np.pad(frame.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with filter 0
    return height, width, zlib.compress(rows.tobytes())


def write_png(path: Path, frames: list[tuple[int, int, bytes]], per_second: int = 1):
    """Packed frames of one size -> a PNG, animated if there are several."""
    (height, width, _), parts, count = frames[0], [], iter(range(2 * len(frames)))

    def chunk(kind: bytes, form: str, *numbers, data: bytes = b""):
        body = kind + struct.pack(">" + form, *numbers) + data
        parts.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))

    chunk(b"IHDR", "2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    if len(frames) > 1:
        chunk(b"acTL", "2I", len(frames), 0)
    for i, (_, _, data) in enumerate(frames):
        if len(frames) > 1:
            chunk(b"fcTL", "5I2H2B", next(count), width, height, 0, 0, 1, per_second, 0, 0)
        if i == 0:
            chunk(b"IDAT", "", data=data)
        else:
            chunk(b"fdAT", "I", next(count), data=data)
    chunk(b"IEND", "")
    write_file(path, b"\x89PNG\r\n\x1a\n" + b"".join(parts))


# ---------------------------------------------------------------- a run on the disk

FORMAT = 2  # of a save; 1, from before settings were renamed, is still read
CHUNK = 1024  # steps in a replay file
BYTES_A_STEP = 1500  # on the disk: the worst of 26 games, and a picture at every save


RENAMED = dict(  # names of settings in older versions, as flags and in saves
    warmup="learning_starts", balance="harmony", balance_rate="harmony_lr", model_rate="model_lr",
    agent_rate="agent_lr", model_clip="model_max_grad_norm", agent_clip="agent_max_grad_norm",
    floor="policy_unimix")


def in_todays_words(settings: dict) -> dict:
    """Settings that an older version wrote down, as this one names them."""
    now = {RENAMED.get(name, name): value for name, value in settings.items()
           if name != "graphs"}  # tools.graphs does that now
    if isinstance(now.get("kernel"), int):
        now["kernel"] = [now["kernel"]]
    if "event_weights" in now:  # once a switch
        now["event_weight"] = 1.0 + now.pop("event_weights")
    return now


def in_todays_form(manifest: dict, state: dict):
    """A save of an older version as this one would have made it, in place."""
    learning = state["learning"]
    if manifest["format"] == 1:
        logs, model = state["logs"], learning["model"]
        state["scores"] = [float(row.split(",")[1]) for row in logs["episodes"].splitlines()[1:]]
        state["cpu_seconds"] = state["seconds"] * manifest["threads"]  # at most
        logs["metrics"] = logs["metrics"].replace("balance_", "harmony_")
        if "names" in state["sums"]:
            state["sums"]["names"] = [name.replace("balance_", "harmony_")
                                      for name in state["sums"]["names"]]
        for name in [name for name in model if name.startswith("balance.")]:
            model[name.replace("balance.", "harmony.")] = model.pop(name)
    for name in ("model", "agent"):  # those that learn also played then
        learning.setdefault(f"playing_{name}", learning[name])


@functools.cache
def versions() -> dict:
    """Versions of all that a result depends on; with the commit, if this is a checkout."""
    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        inside = git("rev-parse", "--show-prefix")  # a folder of another repository's checkout
        describe = "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
        commit = "" if inside else git(*describe)
    except (OSError, subprocess.SubprocessError):
        commit = ""
    packages = {name: version(name) for name in ("torch", "numpy", "gymnasium", "ale-py")}
    return dict(python=platform.python_version(), **packages, commit=commit or None)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def step_of(path: Path) -> int:
    """state-000500.pt -> 500"""
    return int(re.search("[0-9]+", path.name)[0])


def not_finite(values, name: str) -> list[str]:
    """Names of the numbers, in nested containers, that are NaN or infinite."""
    return [name + keystr(path) for path, value in tree_leaves_with_path(values)
            if isinstance(value, float) and not math.isfinite(value)
            or isinstance(value, Tensor) and not value.isfinite().all()]


def in_digits(value, comma: str = "") -> str:
    """A number, in full if it is whole, else to nine digits; nothing for None; a text as it is."""
    if isinstance(value, float):
        return f"{value + 0.0:{comma}.{'0f' if value.is_integer() else '9g'}}"
    return "" if value is None else str(value)


class Damaged(Exception):
    """A file of a save is missing, or is not as it was written."""


class Folder:
    """A run on the disk.

    replay-000.npz     1,024 steps, written once; replay-001.npz the next ...
    state-000500.pt    at step 500, all that changes: what the run gives, counters, newest steps
    save-000500.json   the manifest: what the run says of itself, and the SHA-256 of every file it
                       needs. Only once it appears is there a save
    settings.json, *.csv, pictures, evaluations     are for people

    The previous save is kept. Loading verifies everything before it uses anything.
    """

    def __init__(self, path: Path):
        self.path, self.lock, self.saved_step = path, None, 0
        self.chunks = {}  # replay files on the disk: name -> SHA-256
        self.tables = {}  # name -> all of NAME.csv as text
        self.written = {}  # name -> how much of that text this process has written

    def numbered(self, kind: str, suffix: str) -> list[Path]:
        """Files such as save-000500.json, newest first. Copies under other names are not ours."""
        name = re.compile(rf"{kind}-[0-9]{{6,}}{re.escape(suffix)}")
        found = [path for path in self.path.glob(f"{kind}-*") if name.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def manifests(self) -> list[Path]:
        return self.numbered("save", ".json")

    def open_for_writing(self, new: bool = False):
        """Make the folder if need be, and lock it: two processes would ruin each other's run."""
        if self.path.exists() and not self.path.is_dir():
            raise Mistake(f"{self.path} is a file: --run wants a folder.")
        if self.path.is_dir() and not self.manifests():
            others = sorted(p.name for p in self.path.iterdir()
                            if not re.fullmatch(r"lock|state-.*|.*\.tmp|\..*", p.name))
            if others:
                raise Mistake(f"{self.path} holds other things ({', '.join(others[:3])}) and no "
                              "save: give --run an empty or a new folder.")
        try:
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for path in missing:
                sync_folder(path.parent)
            self.lock = open(self.path / "lock", "a")
        except OSError as error:
            raise Mistake(f"{self.path} cannot be written to: {error.strerror}.") from None
        try:  # the system frees the lock when this process ends, however it ends
            if os.name == "posix":
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(self.lock.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            self.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK):
                raise Mistake(f"{self.path} is in use by another process: stop it first.") from None
            print(f"warning: {self.path} cannot be locked ({error.strerror}): start no second run "
                  "in it", file=sys.stderr)
        if new and self.manifests():
            raise Mistake(f"another process began a run in {self.path} meanwhile: type the same "
                          "command again to go on with it.")

    def close(self):
        """Give the lock back."""
        if self.lock:
            self.lock.close()

    def kept(self) -> str:
        """What there is to go back to, in a sentence."""
        return (f"The last good save is that of step {self.saved_step}: the same command goes on "
                "from there." if self.manifests() else "Nothing is saved yet.")

    def check_room(self, steps: int, weights: int, new: bool):
        """Refuse to begin what the disk may not hold to the end: `steps` more steps and, in each
        save, four numbers per weight (two the optimiser's, one an average) and the newest steps."""
        save = 16 * weights + Replay.bytes_needed(CHUNK)
        need = BYTES_A_STEP * steps + save * (3 if new else 1)
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        if steps and need > (free := shutil.disk_usage(there).free):
            raise Mistake(f"this run may take {need / 2**20:,.0f} MiB more in {self.path} and the "
                          f"disk has {free / 2**20:,.0f}: make room, or give another --run.")

    def append(self, name: str, row: dict):
        """Add a row to the table NAME.csv, whose columns are those of its first row."""
        text = self.tables.get(name) or ",".join(row) + "\n"
        header = text[: text.index("\n")].split(",")
        if new := [column for column in row if column not in header]:  # an older version's header
            lines, header = text.splitlines()[1:], header + new
            text = "\n".join([",".join(header), *(line + "," * len(new) for line in lines), ""])
            self.written.pop(name, None)
        text += ",".join(in_digits(row.get(column, "")) for column in header) + "\n"
        path, begun, self.tables[name] = self.path / f"{name}.csv", self.written.get(name, 0), text
        try:
            with open(path, "a" if begun else "w") as file:
                file.write(text[begun:])
            self.written[name] = len(text)
        except OSError as error:
            error.filename = str(path)  # a write that fails does not name it
            if os.name == "posix" or not isinstance(error, PermissionError):
                raise  # on Windows a spreadsheet may have it open: written with the next row

    def rewrite_tables(self):
        """Write tables as saved: rows newer than the save will come again."""
        for name, text in self.tables.items():
            write_file(self.path / f"{name}.csv", text.encode())
            self.written[name] = len(text)

    def save(self, step: int, state: dict, replay: Replay, settings: dict, **about):
        """Replay files, state, manifest, in this order; then drop what the last two do not need."""
        before = self.saved_step
        if broken := not_finite(state, "run"):
            raise Stopped(f"{', '.join(broken[:3])} is not finite: step {step} is not saved. "
                          f"{self.kept()}")
        for start in range(0, step - CHUNK + 1, CHUNK):
            name = f"replay-{start // CHUNK:03d}.npz"
            if name not in self.chunks:
                data = io.BytesIO()
                np.savez_compressed(data, **replay.steps(start, start + CHUNK))
                write_file(self.path / name, data.getvalue())
                self.chunks[name] = sha256(data.getvalue())
        newest = replay.steps(step // CHUNK * CHUNK, step)
        data = io.BytesIO()  # in memory first: on a full disk torch.save complains of positions
        torch.save(dict(state, newest=tree_map(torch.from_numpy, newest), logs=self.tables,
                        counters=tree_map(torch.from_numpy, replay.counters())), data)
        name = f"state-{step:06d}.pt"
        write_file(self.path / name, data.getvalue())
        files = self.chunks | {name: sha256(data.getvalue())}
        content = dict(format=FORMAT, step=step, files=files, settings=settings,
                       versions=versions(), **about)
        signed = dict(content=content, sha256=sha256(json.dumps(content).encode()))
        write_json(self.path / f"save-{step:06d}.json", signed)
        self.saved_step = step
        write_json(self.path / "settings.json", settings)
        kept = {f"{kind}-{number:06d}" for kind in ("save", "state") for number in (before, step)}
        half_written = self.numbered("state", ".pt.tmp") + self.numbered("save", ".json.tmp")
        for path in self.manifests() + self.numbered("state", ".pt") + half_written:
            if path.stem not in kept:
                with contextlib.suppress(PermissionError):  # Windows, while it is read: later
                    path.unlink()

    def load(self, with_replay: bool = True) -> tuple[dict, dict, dict]:
        """The newest save that is intact: manifest, state, replay files by name; all verified."""
        manifests = self.manifests()
        problems = [f"{path.name} has no manifest, as in a save under way or cut short"
                    for path in self.numbered("state", ".pt")
                    if manifests and step_of(path) > step_of(manifests[0])]
        for path in manifests:
            try:
                manifest = self.read_manifest(path)
                files = {name: self.read(name, digest) for name, digest in manifest["files"].items()
                         if with_replay or name.startswith("state")}
            except Damaged as problem:
                problems.append(str(problem))
                continue
            if problems:
                print(f"warning: {'; '.join(dict.fromkeys(problems))}: using the save before, step "
                      f"{manifest['step']}", file=sys.stderr)
            data = io.BytesIO(files.pop(f"state-{manifest['step']:06d}.pt"))
            state = torch.load(data, "cpu", weights_only=True)
            in_todays_form(manifest, state)
            return manifest, state, files
        if problems:
            raise Mistake(f"no intact save is left in {self.path}: "
                          f"{'; '.join(dict.fromkeys(problems))}: put the files back from a copy, "
                          "or start over in another folder.")
        raise no_run(self.path)

    def resume(self, manifest: dict, state: dict, files: dict[str, bytes], replay: Replay):
        """Fill an empty replay with what `load` returned, and go on from there."""
        for steps in steps_of(state, files):
            replay.append_steps(steps)
        replay.load_counters(tree_map(Tensor.numpy, state["counters"]))
        self.chunks = {name: manifest["files"][name] for name in files}
        self.tables, self.saved_step = {k: v for k, v in state["logs"].items() if v}, state["step"]

    def read(self, name: str, digest: str) -> bytes:
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if sha256(data) != digest:
            raise Damaged(f"{name} is damaged")
        return data

    def read_manifest(self, path: Path) -> dict:
        try:
            signed = json.loads(path.read_bytes())
            content = signed["content"]
            good = sha256(json.dumps(content).encode()) == signed["sha256"]
        except (ValueError, KeyError, TypeError, OSError):
            good = False
        if not good or content["step"] != step_of(path):
            raise Damaged(f"{path.name} is damaged")
        if content["format"] > FORMAT:
            raise Mistake(f"{path} was written by a newer version of this program: use that one.")
        return content


@contextlib.contextmanager
def intact(path: Path, remedy: str):
    """Around the reading of a file: refuse it, by name, if it is not as it was written."""
    try:
        yield
    except (ValueError, KeyError, TypeError, csv.Error):
        raise Mistake(f"{path} is damaged: {remedy}.") from None


def steps_of(state: dict, files: dict[str, bytes], count: int = sys.maxsize):
    """Columns of the steps that a save holds, file by file, the oldest first; without the oldest
    files, if `count` steps are enough."""
    for name in sorted(files, key=lambda name: (len(name), name))[-(count // CHUNK + 1) :]:
        with np.load(io.BytesIO(files[name]), allow_pickle=False) as steps:
            yield dict(steps)
    yield tree_map(Tensor.numpy, state["newest"])


def kept_evaluation(path: Path) -> dict:
    """An evaluation on the disk: its step, scores, and what else there is."""
    with intact(path, "delete it, and --eval makes a new one"):
        kept = dict(last_training_scores=[]) | json.loads(path.read_bytes())
        lists = kept["scores"], kept["last_training_scores"]
        if type(kept["step"]) is not int or not all(map(math.isfinite, sum(lists, []))):
            raise ValueError  # as adding up what is no list, or what holds no numbers, does
        return kept


def no_run(path: Path) -> Mistake:
    if path.is_file():
        return Mistake(f"{path} is a file, and this wants the folder of a run.")
    if not path.is_dir():
        return Mistake(f"there is no {'file' if path.suffix == '.pt' else 'folder'} {path}.")
    begun = (path / "lock").exists() and not Folder(path).manifests()
    return Mistake(f"{path} has saved nothing yet." if begun else f"{path} holds no run.")


def mean_and_error(scores) -> tuple[float, float | None]:
    """The mean of some scores, and its standard error, which a single score does not have."""
    error = float(np.std(scores) / (len(scores) - 1) ** 0.5) if len(scores) > 1 else None
    return float(np.mean(scores)), error


# ---------------------------------------------------------------- an agent in one file

MOMENTS = 512  # steps that an exported agent brings along: 34 seconds of Atari


def load_run(path: Path, with_replay: bool = True) -> tuple[dict, dict, dict]:
    """Manifest, state and replay files of a run, or of an agent that `export` wrote: the latter
    has in `learning` only the networks that play, and in `newest` all its steps."""
    if not path.is_file():
        return Folder(path).load(with_replay)
    with in_one_sentence(f"{path} is damaged, or no agent that --export wrote"):
        with zipfile.ZipFile(path) as archive:  # torch.load overlooks the checksums
            if damaged := archive.testzip():
                raise Mistake(f"{path} is damaged, in {damaged}: put it back from a copy.")
        agent = torch.load(path, "cpu", weights_only=True)
        if agent["format"] > FORMAT:
            raise Mistake(f"{path} was written by a newer version of this program: use that one.")
        with np.load(io.BytesIO(agent["moments"].numpy().tobytes()), allow_pickle=False) as steps:
            newest = {name: torch.from_numpy(column) for name, column in steps.items()}
        about = {name: agent[name] for name in ("settings", "versions", "score")}
        learning = {f"playing_{name}": part for name, part in agent["learning"].items()}
        state = {name: agent[name] for name in ("step", "scores")}
    return about, state | dict(learning=learning, newest=newest), {}


def newest_steps(state: dict, files: dict[str, bytes], count: int) -> dict:
    """Columns of the last `count` steps that `load_run` found, or of all that there are."""
    parts = list(steps_of(state, files, count))
    replay = Replay(sum(len(part["action"]) for part in parts))
    for part in parts:
        replay.append_steps(part)
    return replay.steps(max(0, replay.length - count), replay.length)


def newest_score(source: Path, about: dict, state: dict) -> dict | None:
    """Of what `load_run` found, the last evaluation's mean, its error, episodes and step."""
    for path in Folder(source).numbered("evaluation", ".json"):
        if step_of(path) <= state["step"]:  # later ones are of a save that was lost
            kept = kept_evaluation(path)
            mean, error = mean_and_error(kept["scores"])
            return dict(mean=mean, error=error, episodes=len(kept["scores"]), step=kept["step"])
    return about.get("score")  # an exported agent brings it along


def export(source: Path, target: Path) -> str:
    """Write what plays and dreams in a run as one file -> what it holds, in words.

    Matrices are kept in float16, which rounds by one part in 2,000 at most; all else as it is.
    """
    about, state, files = load_run(source)
    if target.suffix != ".pt":
        raise Mistake(f"{target} must end in .pt, as the files of agents do.")
    game = about["settings"]["game"]
    if target.exists() and (held := load_run(target)[0]["settings"]["game"]) != game:
        raise Mistake(f"{target} holds an agent of {held}: name another file.")
    make_folder(target.parent, ": name another place for the file")
    learning = {name: {key: value.half() if value.is_floating_point() and value.dim() > 1 else value
                       for key, value in state["learning"][f"playing_{name}"].items()}
                for name in ("model", "agent")}
    newest, score = newest_steps(state, files, MOMENTS), newest_score(source, about, state)
    np.savez_compressed(moments := io.BytesIO(), **newest)
    agent = dict(
        format=FORMAT, settings=about["settings"], versions=about.get("versions"), score=score,
        step=state["step"], scores=state["scores"], learning=learning,
        moments=torch.frombuffer(moments.getbuffer(), dtype=torch.uint8))
    torch.save(agent, data := io.BytesIO())  # in memory first, as above
    write_file(target, data.getvalue())
    earned = "no score yet"
    if score:
        digits, count = 1 if abs(score["mean"]) >= 100 else 3, score["episodes"]
        error = f" ± {score['error']:,.{digits}f}" if count > 1 else ""
        earned = (f"score {score['mean']:,.{digits}f}{error} in {count} episode{'s' * (count > 1)} "
                  f"at step {score['step']:,}")
    return (f"{game}, {state['step']:,} steps, {earned}, "
            f"{len(newest['action'])} frames, {len(data.getvalue()) / 1e6:.1f} MB")


# ---------------------------------------------------------------- scores


def results(name: str) -> dict[str, dict[str, str]]:
    """Game -> its row in a table of results/, if that is there."""
    path = Path(__file__).parent / "results" / name
    rows = csv.DictReader(path.read_text("utf-8").splitlines() if path.exists() else [])
    return {row.pop("game"): row for row in rows}


@functools.cache
def known_scores() -> dict[str, dict[str, float]]:
    """Game -> scores of random play, a human and published agents."""
    return {game: {name: float(cell) for name, cell in row.items()}
            for game, row in results("atari100k.csv").items()}


def random_play(game: str) -> tuple[float, float] | None:
    """Mean score and standard error of random play in this very game, where it was measured."""
    if row := results("emulator.csv").get(game):
        return float(row["random play"]), float(row["standard error"])


def human_normalised(game: str, score: float) -> float | None:
    """Percent of the way from random play to a human's; None where no such scores are known."""
    if known := known_scores().get(game):
        return 100 * (score - known["random"]) / (known["human"] - known["random"])
