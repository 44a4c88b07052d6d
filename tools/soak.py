"""What a run survives, tried at length: the real command line with the real game, killed again and
again, half of the times during a save, and then bits of its files flipped.

    python -m tools.soak --kills 300            some 20 minutes on two cores

Every run must end bit for bit like one that was never stopped; every flipped bit must lead to the
previous save or to a refusal, either of which names the file. Exit code 0 if so, else 1.
"""

import concurrent.futures
import contextlib
import io
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import drama  # first: it sets up torch
import numpy as np
import torch
from buffer import Folder, Mistake, step_of
from torch.utils._pytree import keystr, tree_leaves_with_path

STEPS = 240
RUN = (f"--preset debug --game Breakout --device cpu --threads 1 --steps {STEPS} --batch 2 --tau 1 "
       "--learning-starts 24 --length 8 --dreams 4 --train-every 4 --log-every 2 "
       "--eval-episodes 1 --save-minutes 0.002").split()
SMALL_FILES = "import sys, buffer, drama; buffer.CHUNK = 16; sys.exit(drama.main())"  # 15, not none
TIMES = ("steps_per_second", "frames_per_second", "seconds", "cpu_seconds")


def start(folder: Path) -> subprocess.Popen:
    """The command line as a process of its own."""
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen([sys.executable, "-c", SMALL_FILES, *RUN, "--run", str(folder)],
                                cwd=Path(drama.__file__).parent, stdout=log, stderr=log)


def newest_step(folder: Path) -> int:
    return max(map(step_of, Folder(folder).manifests()), default=-1)


def within_a_save(folder: Path) -> bool:
    """Whether files show that a save was begun and not ended."""
    manifests, step = Folder(folder).manifests(), newest_step(folder)
    states = [step_of(path) for path in folder.glob("state-*.pt")]
    pictured = step < drama.PICTURE_STEPS or (folder / f"dream-{step:06d}.png").exists()
    return (any(folder.glob("*.tmp")) or max(states) > step or not pictured
            or len(states) > 2 or len(manifests) > 2)


def untimed(table: str) -> list:
    """A table's cells, without the columns that tell the time."""
    header, *rows = (line.split(",") for line in table.splitlines())
    return [[cell for name, cell in zip(header, row, strict=True) if name not in TIMES]
            for row in [header, *rows]]


def left_behind(folder: Path) -> list:
    """All that two equal runs have in common: state, replay, tables and evaluation."""
    _, state, files = Folder(folder).load()
    state |= dict.fromkeys(TIMES)
    state["logs"] = {name: untimed(table) for name, table in state["logs"].items()}
    arrays = {name: dict(np.load(io.BytesIO(data))) for name, data in files.items()}
    evaluation = (folder / f"evaluation-{STEPS:06d}.json").read_text()

    def plain(value):
        if isinstance(value, torch.Tensor):
            value = value.numpy()
        return (value.dtype, value.shape, value.tobytes()) if hasattr(value, "dtype") else value

    return [(keystr(path), plain(value)) for path, value in
            tree_leaves_with_path([state, arrays, evaluation])]


def kill_once(folder: Path, inside: bool, rng) -> bool:
    """Let the run make a step or more and kill it -> whether it was killed before its end."""
    before, run = newest_step(folder), start(folder)
    while run.poll() is None and newest_step(folder) <= before:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.2))
    while run.poll() is None and inside != (
            any(folder.glob("*.tmp")) if inside else within_a_save(folder)):
        time.sleep(0.0002)
    run.kill()
    return run.wait() == -signal.SIGKILL


def kill_again_and_again(place: Path, kills: int, expected: list) -> tuple[int, int, int]:
    """One run after the other -> kills inside a save, runs, and runs that ended otherwise."""
    rng, folder = np.random.default_rng(kills), place / "run-0"
    done = inside = runs = wrong = 0
    while done < kills or folder.exists():
        if done == kills:
            assert start(folder).wait() == 0
        elif kill_once(folder, inside <= done / 2, rng):
            done, inside = done + 1, inside + within_a_save(folder)
            print(".", end="", flush=True)
            continue
        log = folder.with_suffix(".log").read_text()
        wrong += "damaged" in log or "Traceback" in log or left_behind(folder) != expected
        runs, folder = runs + 1, place / f"run-{runs + 1}"
    return inside, runs, wrong


def kill_in_two_runs(place: Path, kills: int, expected: list) -> int:
    """Two runs at a time -> how many runs ended otherwise, or 1 if too few kills met a save."""
    shares = {"one": kills // 2, "two": kills - kills // 2}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for name in shares:
            (place / name).mkdir()
        tries = [pool.submit(kill_again_and_again, place / name, share, expected)
                 for name, share in shares.items()]
        counts = [each.result() for each in tries]
    inside, runs, wrong = map(sum, zip(*counts))
    print(f"\n{'fault':<34}{'times':>6}  outcome")
    print(f"{'kill -9 inside a save':<34}{inside:>6}  {runs} runs in all: like the one never")
    print(f"{'kill -9 elsewhere':<34}{kills - inside:>6}  stopped, {runs - wrong} of them end")
    return wrong or int(inside < kills // 2 - 1)


def flip_bits(folder: Path, rng) -> int:
    """100 bits in each kind of file of a run -> how many of them nobody noticed."""

    def used():  # the manifest of the save that is used: it holds the SHA-256 of all else
        manifest, _, files = Folder(folder).load()
        assert len(files) == len(manifest["files"]) - 1
        return manifest

    newest, (_, before) = used(), Folder(folder).manifests()
    files = {"state": f"state-{STEPS:06d}.pt", "manifest": f"save-{STEPS:06d}.json",
             "replay file of one save": "replay-014.npz", "replay file of both": "replay-000.npz"}
    silent = 0
    for kind, name in files.items():
        data, named, refused, same = (folder / name).read_bytes(), 0, 0, 0
        for flip in rng.integers(8 * len(data), size=100):
            at, bit = divmod(int(flip), 8)
            (folder / name).write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    same += used() == newest
                    named += (name in said.getvalue()
                              and f"step {step_of(before)}" in said.getvalue())
                except Mistake as mistake:
                    refused += name in str(mistake)
        (folder / name).write_bytes(data)
        silent += 100 - named - refused - (same if kind == "manifest" else 0)
        print(f"{'bit flip in ' + kind:<34}{100:>6}  {named} the save before, named; {refused} "
              f"refused, named" + f"; {same} of no meaning (spaces, 1e-5 or 1E-5)" * (same > 0))
    return silent


def soak(kills: int) -> int:
    place, begun = Path(tempfile.mkdtemp()), time.monotonic()
    assert start(place / "unbroken").wait() == 0
    wrong = kill_in_two_runs(place, kills, left_behind(place / "unbroken"))
    silent = flip_bits(place / "unbroken", np.random.default_rng(0))
    good = not wrong and not silent
    print(f"soak: {kills} kills, 400 bit flips, {silent} of them silent; "
          f"{(time.monotonic() - begun) / 60:.0f} minutes: {'good' if good else 'BAD'}")
    shutil.rmtree(place) if good else print(place)
    return 0 if good else 1


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.soak", allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=300, metavar="INT", help="(300)")
    if (kills := parser.parse(argv)["kills"]) < 1:
        raise drama.Mistake("--kills must be 1 or more.")
    raise SystemExit(soak(kills))


if __name__ == "__main__":
    sys.exit(drama.command_line(run_command, name="tools.soak"))
