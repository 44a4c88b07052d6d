"""Replay: every step of the run, and which of them to learn from next.

The replay is append-only and as large as the run: nothing is ever overwritten, so a position is a
step's name for good and a window of `length` consecutive positions is consecutive in time (D17).

Which windows are drawn is Drama's *dynamic frequency-based sampling* (DFS; paper, section 2.4).
Two counters stand beside every position: how often a window that starts there has trained the
world model, and how often it has started a dream. Windows are drawn without replacement from

    to train the world model    p = softmax(-trained / tau)
    to dream from               p = softmax(min(0, trained - dreamed) / tau)

so the model catches up on what is new, and the actor dreams where the model has been trained; an
agent that dreams on from the model's own batch needs the first alone.
tau is in draws: a window drawn tau times more than another is e times less likely to come next;
tau = infinity is uniform sampling. `trained` and `dreamed` are compared in like units: a step
draws more dreams than training windows, so `dreamed` counts in shares of that ratio.

Read next: agent.py, which learns from the batches, and drama.py, which fills and draws.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def training_score(trained, tau):
    """Log-probability, up to a constant, of a window to train on (paper, section 2.4)."""
    return -trained / tau


def dreaming_score(trained, dreamed, tau):
    """Log-probability, up to a constant, of a window to dream from (paper, section 2.4)."""
    return np.minimum(0, trained - dreamed) / tau


def draw(score: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` different indices, drawn one after the other from softmax(score).

    Adding Gumbel noise to the scores and keeping the largest is exactly that, and takes one
    pass: no normalisation, no loop. The noise is -ln of an exponential variable.
    """
    exponential = rng.standard_exponential(len(score), dtype=np.float32)  # now and then exactly 0
    noise = -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))
    return np.argpartition(-(score + noise), count - 1)[:count]


class Batch(NamedTuple):
    """Windows of consecutive steps; row t holds a frame and what was done and earned there."""

    frame: Tensor  # (B, L, size, size, 3) uint8: O_t
    action: Tensor  # (B, L) int64: a_t, taken on seeing O_t
    reward: Tensor  # (B, L) float32: r_t, what a_t earned
    terminal: Tensor  # (B, L) float32: 1 where a_t ended the life
    first: Tensor  # (B, L) bool: O_t opens an episode


class Replay:
    """All steps of a run: frames in one uint8 tensor on `device`, the rest in numpy on the host."""

    def __init__(self, capacity: int, size: int = 64, device="cpu"):
        self.frame = torch.empty((capacity, size, size, 3), dtype=torch.uint8, device=device)
        self.action = np.zeros(capacity, np.int32)
        self.reward = np.zeros(capacity, np.float32)
        self.terminal = np.zeros(capacity, bool)
        self.first = np.zeros(capacity, bool)
        self.trained = np.zeros(capacity, np.int32)
        self.dreamed = np.zeros(capacity, np.int32)
        self.length = 0  # steps held

    @staticmethod
    def bytes_needed(capacity: int, size: int = 64) -> int:
        """Memory of the frames, in bytes; all else together is a thousandth of it."""
        return capacity * size * size * 3

    def add(self, frame: np.ndarray, action: int, reward: float, terminal: bool, first: bool):
        """Append one step: a frame (size, size, 3) and what came of the action taken on it."""
        if self.length == len(self.action):
            raise IndexError(f"the replay is full: it was made for {self.length} steps")
        step = self.length
        self.frame[step] = torch.from_numpy(frame)
        self.action[step], self.reward[step] = action, reward
        self.terminal[step], self.first[step] = terminal, first
        self.length = step + 1

    def training_windows(self, count: int, length: int, tau: float, rng) -> np.ndarray:
        """Draw and count `count` starts of windows for the world model."""
        trained = self.trained[: self.length - length + 1]
        starts = draw(training_score(trained, tau), count, rng)
        self.trained[starts] += 1
        return starts

    def dreaming_windows(self, count: int, length: int, tau: float, rng, ratio: float):
        """Draw and count `count` starts of contexts; `ratio` is contexts per training window."""
        trained = self.trained[: self.length - length + 1]
        dreamed = self.dreamed[: self.length - length + 1]
        starts = draw(dreaming_score(trained, dreamed / ratio, tau), count, rng)
        self.dreamed[starts] += 1
        return starts

    def windows(self, starts: np.ndarray, length: int, device) -> Batch:
        """The windows of `length` steps that begin at `starts`, as tensors on `device`."""
        rows = starts[:, None] + np.arange(length)  # (B, L)
        index = torch.from_numpy(rows.reshape(-1)).to(self.frame.device)
        frame = self.frame.index_select(0, index).view(*rows.shape, *self.frame.shape[1:])

        def tensor(values, dtype):
            return torch.from_numpy(values[rows].astype(dtype)).to(device)

        return Batch(
            frame=frame.to(device),
            action=tensor(self.action, np.int64),
            reward=tensor(self.reward, np.float32),
            terminal=tensor(self.terminal, np.float32),
            first=tensor(self.first, bool),
        )

    # Saving: a step never changes once written, so steps are saved once; counters every time.

    STEP = ("action", "reward", "terminal", "first")
    COUNTER = ("trained", "dreamed")

    def steps(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Copies of the steps from `start` up to `stop`, for a file."""
        arrays = {name: getattr(self, name)[start:stop].copy() for name in self.STEP}
        return arrays | {"frame": self.frame[start:stop].cpu().numpy().copy()}

    def append_steps(self, arrays: dict[str, np.ndarray]):
        """Put back what `steps` returned, after the steps held so far."""
        start, stop = self.length, self.length + len(arrays["action"])
        for name in self.STEP:
            getattr(self, name)[start:stop] = arrays[name]
        self.frame[start:stop] = torch.from_numpy(arrays["frame"])
        self.length = stop

    def counters(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[: self.length].copy() for name in self.COUNTER}

    def load_counters(self, arrays: dict[str, np.ndarray]):
        for name in self.COUNTER:
            getattr(self, name)[: self.length] = arrays[name]
