"""How long each backbone remembers: a grid world, foreseen from the actions alone.

    python -m tools.memory                              every backbone, and a table
    python -m tools.memory mamba2 mamba --seeds 1

The long-sequence task of the paper (its table 2): a 5 x 5 grid with walls, a goal and an agent who
sees little of it, as tokens, 26 a frame; a sequence model that foresees frames from the actions;
the share of wrong tokens, in sequences of 208 and 1,664. Its code was not released, so the rest is
a guess: 6 walls, a goal and a start, drawn for every sequence; actions drawn evenly, stopped by
walls and edges; a view of 3 x 3 cells, all else dark; a frame is its 25 cells and the action taken
there. The model learns to predict the next token, and is judged by the last 4 frames, which it
makes up token by token, each from those that it made up before. To know what comes into view it
must remember what it saw there, up to 63 frames ago.

All train on the same fresh sequences, with as many tokens at either length. A row of
results/memory.csv is one trained model; rows that are there are not made again.
"""

import argparse
import functools
import itertools
import sys
import time
from pathlib import Path

import drama  # first: it sets up torch
import numpy as np
import torch
import torch.nn.functional as F
from buffer import Mistake
from scan import BACKBONES, SequenceModel
from tools.compare import read_rows, this_commit, write_rows
from tools.curves import check_place
from torch import nn

SIDE, CELLS, FRAME, WALLS = 5, 25, 26, 6
DARK, FLOOR, WALL, GOAL, AGENT = KINDS = range(5)  # tokens of a cell; those of actions follow
TOKENS = len(KINDS) + 4
LENGTHS, FORESEEN = (208, 1664), 4  # tokens of a sequence, 8 and 64 frames; frames
BATCH, TESTS = 3328, 256  # tokens of an update; sequences to be foreseen
WIDTH, RATE, WARMUP = 64, 5e-3, 50
PATH = Path(__file__).resolve().parents[1] / "results" / "memory.csv"
PAPER = dict(mamba2=(15.6, 14.2), mamba=(13.9, 14.0), gru=(21.3, 34.7), transformer=(24.7, ""))
FIGURES = WRONG, BACK = "wrong, %", "wrong of cells that come back, %"

row, column = np.divmod(np.arange(CELLS), SIDE)
NEAR = np.maximum(abs(row - row[:, None]), abs(column - column[:, None])) <= 1  # what is in view
BESIDE = np.stack([(row + down).clip(0, SIDE - 1) * SIDE + (column + right).clip(0, SIDE - 1)
                   for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1))], 1)  # (cells, actions)


# ---- The world -----------------------------------------------------------------------------------


def walk(worlds, place, actions) -> torch.Tensor:
    """worlds (B, 25) of FLOOR, WALL and GOAL; place (B), a cell; actions (B, frames) up, right,
    down, left -> tokens (B, frames, 26): what is seen, and the action taken there."""
    each, frames = np.arange(len(worlds)), []
    for action in actions.T:
        cells = np.where(NEAR[place], worlds, DARK)
        cells[each, place] = AGENT
        frames.append(np.column_stack([cells, len(KINDS) + action]))
        there = BESIDE[place, action]
        place = np.where(worlds[each, there] == WALL, place, there)
    return torch.from_numpy(np.stack(frames, 1))


def sequences(rng, count: int, frames: int) -> torch.Tensor:
    """Tokens of so many worlds, each with a walk through it."""
    drawn = rng.permuted(np.tile(np.arange(CELLS), (count, 1)), axis=1)
    worlds = np.full((count, CELLS), FLOOR)
    np.put_along_axis(worlds, drawn[:, :WALLS], WALL, 1)
    np.put_along_axis(worlds, drawn[:, WALLS, None], GOAL, 1)
    return walk(worlds, drawn[:, WALLS + 1], rng.integers(4, size=(count, frames)))


# ---- The model -----------------------------------------------------------------------------------


class NextToken(nn.Module):
    """A sequence model that sees each token with its place in the frame, and predicts the next."""

    def __init__(self, backbone: str, length: int):
        super().__init__()
        self.sequence = SequenceModel(TOKENS + FRAME, WIDTH, backbone=backbone, length=length,
                                      d_state=32, head_dim=16, dropout=0.0)
        self.head = nn.Linear(WIDTH, len(KINDS))

    def inputs(self, tokens, first=0):
        """tokens (B, L), the first of them at place `first` of its frame -> (B, L, TOKENS + 26)"""
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device) % FRAME
        return torch.cat([F.one_hot(tokens, TOKENS),
                          F.one_hot(places, FRAME).expand(*tokens.shape, -1)], -1).float()

    def loss(self, tokens):
        """tokens (B, frames, 26) -> nats per cell of every frame but the first."""
        d, _ = self.sequence(self.inputs(tokens.flatten(1)))  # (B, L, WIDTH)
        guess = self.head(d[:, CELLS:-1].unflatten(1, (-1, FRAME))[:, :, :CELLS])
        return F.cross_entropy(guess.flatten(0, 2), tokens[:, 1:, :CELLS].flatten())

    @torch.no_grad()
    def foresee(self, tokens):
        """tokens (B, frames, 26) -> the cells of the last frames (B, FORESEEN, 25), of which it is
        shown the actions alone: each follows from those foreseen before."""
        seen, hidden = tokens[:, :-FORESEEN], tokens[:, -FORESEEN:]
        d, state = self.sequence(self.inputs(seen.flatten(1)))
        d, cells = d[:, -1], []
        for action in hidden[:, :, CELLS].unbind(1):
            for place in range(FRAME):
                if place < CELLS:
                    cells.append(token := self.head(d).argmax(-1))
                else:
                    token = action
                d, state = self.sequence.step(self.inputs(token[:, None], place)[:, 0], state)
        return torch.stack(cells, 1).view(*hidden.shape[:2], CELLS)


def errors(guess, tokens) -> dict[str, float]:
    """guess (B, FORESEEN, 25) of the last cells of tokens (B, frames, 26) -> wrong tokens, %: of
    all, and of the cells that come back into view, which were seen before the guesses began."""
    cells = tokens[:, :, :CELLS]
    view, wrong = cells != DARK, guess != cells[:, -FORESEEN:]
    known = view[:, :-FORESEEN].any(1, keepdim=True)
    back = known & view[:, -FORESEEN:] & ~view[:, -FORESEEN - 1:-1]
    return {WRONG: 100 * wrong.float().mean().item(), BACK: 100 * wrong[back].float().mean().item()}


def references(tokens) -> dict[str, dict]:
    """The errors of one who has no model, no memory, or a perfect memory."""
    seen, hidden = tokens[:, :-FORESEEN, :CELLS], tokens[:, -FORESEEN:, :CELLS]
    blank = torch.where((hidden == DARK) | (hidden == AGENT), hidden, FLOOR)
    known = (seen != DARK).any(1, keepdim=True)
    return {"the last frame again": errors(seen[:, -1:].expand_as(hidden), tokens),
            "place known, all taken for floor": errors(blank, tokens),
            "place known, all remembered": errors(torch.where(known, hidden, blank), tokens)}


# ---- The comparison ------------------------------------------------------------------------------


def test_sequences(length: int) -> torch.Tensor:
    return sequences(np.random.default_rng(0), TESTS, length // FRAME)


def trained(backbone: str, seed: int, length: int, updates: int, device) -> dict:
    """One model, trained and judged -> its size, time and errors, as cells of a row."""
    torch.manual_seed(seed)
    rng, start = np.random.default_rng([seed, 1]), time.process_time()
    model = NextToken(backbone, length).to(device)
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for update in drama.show_progress(desc=f"{backbone}, {length} tokens, seed {seed}",
                                      iterable=range(updates)):
        for group in optimizer.param_groups:  # up, level, and down in the second half
            group["lr"] = RATE * min(1, (update + 1) / WARMUP, 2 - 2 * update / updates)
        loss = model.loss(sequences(rng, BATCH // length, length // FRAME).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    row = dict(parameters=sum(p.numel() for p in model.parameters()),
               cpu_seconds=round(time.process_time() - start))
    tokens = test_sequences(length).to(device)
    figures = errors(model.eval().foresee(tokens), tokens)
    return row | {name: f"{figure:.4g}" for name, figure in figures.items()}


def compare(backbones: list[str], updates: int, seeds: int, device):
    """Train and judge every backbone with every seed, and write a row as soon as it is there."""
    commit = this_commit()
    for seed, backbone, length in itertools.product(range(seeds), backbones, LENGTHS):
        key = dict(backbone=backbone, seed=seed, length=length, updates=updates)
        if not rows_of(**key):
            row = key | trained(**key, device=device) | dict(commit=commit)
            write_rows(PATH, [*read_rows(PATH), row])  # others may have written meanwhile


def rows_of(**key) -> list[dict[str, str]]:
    key = {name: str(value) for name, value in key.items()}
    return [row for row in read_rows(PATH) if key.items() <= row.items()]


def mean(backbone: str, length: int, updates: int) -> dict[str, float]:
    """Mean errors of the models there are, NaN if there is none, and how many seeds they had."""
    found = rows_of(backbone=backbone, length=length, updates=updates)
    figures = found or [dict.fromkeys(FIGURES, "nan")]
    return dict(seeds=len(found)) | {
        name: float(np.mean([float(row[name]) for row in figures])) for name in FIGURES}


def report(updates: int):
    """One table, with the paper's figures and what can be guessed without a model."""
    columns = [references(test_sequences(length)) | {
        backbone: mean(backbone, length, updates) for backbone in BACKBONES} for length in LENGTHS]
    print(f"Wrong tokens of the last {FORESEEN} frames, %, after {updates:,} updates: of all, and "
          f"of the cells that come back\ninto view. The paper's world is not public: the top of "
          "tools/memory.py says what was guessed.\n\n" + f"{'tokens':<34}"
          + "".join(f"{length:>8,}    back   paper   seeds" for length in LENGTHS))
    for name in columns[0]:
        cells = []
        for column, paper in zip(columns, PAPER.get(name, ("", ""))):
            figures = [f"{column[name][figure]:.1f}" for figure in FIGURES]
            cells += [*figures, paper, column[name].get("seeds", "")]
        print(f"{name:<34}" + "".join(f"{cell:>8}" for cell in cells).replace("nan", "  -"))


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.memory", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("backbones", metavar="BACKBONE", nargs="*", default=list(BACKBONES),
                        help=f"all, or some of {', '.join(BACKBONES)}")
    for name, default in dict(updates=400, seeds=2).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="INT",
                            help=f"({default})")
    parser.add_settings("debug", ("device", "threads"))
    common = parser.parse(argv)
    backbones, updates, seeds = (common.pop(name) for name in ("backbones", "updates", "seeds"))
    if unknown := set(backbones) - set(BACKBONES):
        raise Mistake(f"{min(unknown)!r} is none of {', '.join(BACKBONES)}.")
    for name, number in dict(updates=updates, seeds=seeds).items():
        if number < 1:
            raise Mistake(f"--{name} must be 1 or more.")
    _, device, _ = drama.new_settings(dict(preset="debug") | common)
    check_place(PATH, "", "backbone,seed,")
    compare(backbones, updates, seeds, device)
    report(updates)


main = functools.partial(drama.command_line, run_command, name="tools.memory")

if __name__ == "__main__":
    sys.exit(main())
