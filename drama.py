"""Drama: an agent that learns an Atari game inside its own model of it, on a laptop.

    python drama.py --game Breakout             learn; the same line again goes on where it stopped
    python drama.py --eval runs/Breakout-s0     play 20 episodes and print the scores
    python drama.py --watch runs/Breakout-s0    film an episode

This file is all that runs: settings, game, the training loop, evaluation, pictures, saving and
the command line. What learns is in agent.py (the time index of every step t is drawn there),
the sequence layers in scan.py, the replay and its sampling in buffer.py. A reader in a hurry
wants Settings, Game and train; everything after the loop may be skipped.

All counts of steps are agent steps; one is four frames of the game.
"""

import argparse
import contextlib
import dataclasses
import difflib
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
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # read by torch when it is imported

import ale_py
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from tqdm import tqdm

from agent import ActorCritic, Player, WorldModel, make_optimizer
from buffer import Replay

if os.name == "posix":
    import fcntl
else:
    import msvcrt

# ---------------------------------------------------------------- settings


class Mistake(Exception):
    """Bad input: one sentence that says what was wrong and what to do. Exit code 2."""


class Stopped(Exception):
    """A run that cannot go on, and why. Exit code 1."""


def setting(default, help: str):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """Every hyper-parameter, as a flag. The defaults are the preset `paper`."""

    # The run
    preset: str = setting("paper", "named settings to start from: paper, best, laptop or debug")
    game: str = setting("Breakout", "game, in any usual spelling")
    seed: int = setting(0, "seed of the game, of the first actions and of all else")
    steps: int = setting(100_000, "length of the run, agent steps (Atari 100k)")
    device: str = setting("auto", "cuda, mps, cpu or auto")
    threads: int = setting(0, "CPU threads; 0 leaves it to torch")
    precision: str = setting("auto", "float32, bfloat16, or auto: bfloat16 where it is fast")
    replay_device: str = setting("auto", "where frames are kept: auto is the training device")
    save_minutes: float = setting(5.0, "minutes between saves")
    log_every: int = setting(100, "updates between rows of metrics.csv")
    eval_episodes: int = setting(20, "episodes of an evaluation, side by side")
    # Pace (paper, algorithm 1; published code)
    warmup: int = setting(1032, "random steps before the first update")
    train_every: int = setting(1, "steps between updates")
    # Sampling (paper, section 2.4; published code)
    sampling: str = setting("dfs", "dfs: dynamic frequency-based; uniform: the paper's ablation")
    tau: float = setting(10.0, "temperature of dfs, draws; less where fewer are drawn a step")
    batch: int = setting(16, "windows of a world-model update")
    length: int = setting(128, "steps of such a window")
    # World model (paper, tables of appendix; published code)
    channels: tuple = setting((16, 32, 48, 64, 64), "filters of the encoder's convolutions")
    strides: tuple = setting((1, 2, 2, 2, 2), "their strides")
    kernel: int = setting(5, "their kernel, pixels")
    groups: int = setting(32, "categoricals of the latent")
    classes: int = setting(32, "classes of each")
    backbone: str = setting("mamba2", "sequence layers: mamba2 or mamba")
    layers: int = setting(2, "sequence layers")
    d_model: int = setting(512, "width of the sequence model")
    d_state: int = setting(16, "size of its state, a channel")
    head_dim: int = setting(64, "channels of a mamba2 head")
    dropout: float = setting(0.1, "dropout of the sequence model, probability")
    head_hidden: int = setting(256, "hidden width of the reward and termination heads")
    unimix: float = setting(0.01, "uniform share of every latent distribution")
    free_nats: float = setting(1.0, "KL a step that costs nothing, nats (paper, equation 7)")
    representation_scale: float = setting(0.1, "weight of L_rep (paper, equation 6)")
    balance: bool = setting(False, "learn the weights of the model's losses (HarmonyDream)")
    event_weights: bool = setting(False, "halve the image loss of still pixels when few move")
    # Dreams (paper, section 2.3)
    dream_from: str = setting("contexts", "contexts: windows of their own; batch: the model's batch")
    dreams: int = setting(1024, "dreams an update")
    context: int = setting(8, "frames of a context; for dreams from contexts only")
    horizon: int = setting(16, "steps of a dream")
    # Actor and critic (paper, section 2.3; published code)
    actor_hidden: int = setting(256, "hidden width of the actor")
    critic_hidden: int = setting(512, "hidden width of the critic")
    agent_layers: int = setting(3, "hidden layers of either")
    gamma: float = setting(0.985, "discount, a step")
    lambda_: float = setting(0.95, "lambda of the return")
    entropy: float = setting(3e-4, "weight of the entropy bonus")
    floor: float = setting(0.0, "uniform share of the policy, everywhere")
    slow_decay: float = setting(0.98, "decay of the critic's slow copy, an update")
    range_decay: float = setting(0.99, "decay of the return range, an update")
    # Optimisers (paper, appendix; published code)
    optimizer: str = setting("laprop", "laprop or adam")
    model_rate: float = setting(4e-5, "learning rate of the world model")
    agent_rate: float = setting(4e-5, "learning rate of actor and critic")
    balance_rate: float = setting(1e-4, "learning rate of the loss weights: about 10 / updates")
    warmup_updates: int = setting(1000, "updates over which the rates rise from 0")
    eps: float = setting(1e-20, "epsilon of the optimiser")
    model_clip: float = setting(1000.0, "largest gradient norm of the world model")
    agent_clip: float = setting(100.0, "largest gradient norm of the agent")


BETTER = dict(balance=True, event_weights=True, floor=0.01, entropy=1e-3, dream_from="batch")
PRESETS = {
    "paper": {},
    "best": dict(BETTER),
    "laptop": dict(
        BETTER, d_model=256, channels=(16, 32, 64, 128), strides=(2, 2, 2, 2), batch=16, length=64,
        dreams=256, horizon=15, train_every=4, tau=2.5, optimizer="adam", model_rate=4e-4,
        agent_rate=2e-4, balance_rate=4e-4, eps=1e-8, warmup_updates=200),
    "debug": dict(
        BETTER, steps=192, warmup=64, train_every=8, batch=4, length=16, channels=(4, 8, 8, 8),
        strides=(2, 2, 2, 2), groups=4, classes=4, d_model=32, head_dim=16, head_hidden=16,
        dreams=16, horizon=4, actor_hidden=16, critic_hidden=16, agent_layers=1, tau=2.5,
        optimizer="adam", model_rate=1e-3, agent_rate=1e-3, eps=1e-8, warmup_updates=4,
        log_every=1, eval_episodes=2, precision="float32"),
}  # fmt: skip
FREE = ("steps", "device", "threads", "replay_device", "save_minutes", "eval_episodes")  # may change
CHOICES = {
    "preset": tuple(PRESETS), "device": ("auto", "cuda", "mps", "cpu"),
    "precision": ("auto", "float32", "bfloat16"), "sampling": ("dfs", "uniform"),
    "replay_device": ("auto", "cuda", "mps", "cpu"), "backbone": ("mamba2", "mamba"),
    "dream_from": ("contexts", "batch"), "optimizer": ("laprop", "adam"),
}  # fmt: skip


def flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def check(s: Settings):
    """Refuse settings that cannot work."""
    for name, choices in CHOICES.items():
        if getattr(s, name) not in choices:
            raise Mistake(f"{flag(name)} is one of {', '.join(choices)}, not {getattr(s, name)}.")
    may_be_zero = {"seed", "threads", "dropout", "unimix", "free_nats", "representation_scale",
                   "gamma", "lambda_", "entropy", "floor", "slow_decay", "range_decay"}  # fmt: skip
    for field in dataclasses.fields(s):
        value = getattr(s, field.name)
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, str):
                continue
            if not math.isfinite(number) or number < 0 or number == 0 and not (
                field.name in may_be_zero or isinstance(number, bool)):  # fmt: skip
                least = "0 or more" if field.name in may_be_zero else "above 0"
                raise Mistake(f"{flag(field.name)} must be {least}, not {number}.")
    for name in ("dropout", "unimix", "gamma", "lambda_", "floor", "slow_decay", "range_decay"):
        if getattr(s, name) > 1:
            raise Mistake(f"{flag(name)} is a share from 0 to 1, not {getattr(s, name)}.")
    if s.steps <= s.warmup:
        raise Mistake(f"--steps {s.steps} leaves nothing to learn after the {s.warmup} random steps "
                      f"of --warmup: give more than {s.warmup}.")  # fmt: skip
    windows = {"--batch": (s.batch, s.length)}
    if s.dream_from == "contexts":
        windows["--dreams"] = s.dreams, s.context
    elif s.batch * s.length % s.dreams or s.length % (s.batch * s.length // s.dreams):
        raise Mistake(f"--dreams {s.dreams} cannot be spread evenly over --batch {s.batch} windows "
                      f"of --length {s.length}: each window must be cut into equal pieces.")  # fmt: skip
    for name, (count, length) in windows.items():
        if count > s.warmup - length + 1:
            raise Mistake(f"{name} {count} asks for more windows of {length} steps than the replay "
                          f"holds after --warmup {s.warmup} steps: "
                          f"use {max(0, s.warmup - length + 1)} at most.")  # fmt: skip
    if len(s.channels) != len(s.strides) or 64 % math.prod(s.strides):
        raise Mistake("--channels and --strides need one entry a convolution, and the product of "
                      "the strides must divide 64.")  # fmt: skip
    if s.kernel % 2 == 0 and 1 in s.strides:
        raise Mistake(f"--kernel {s.kernel} cannot keep the size at a stride of 1: use an odd one.")
    if s.backbone == "mamba2" and 2 * s.d_model % s.head_dim:
        raise Mistake(f"--head-dim {s.head_dim} does not divide twice --d-model {s.d_model}.")
    if s.dream_from == "contexts" and s.context < 2:
        raise Mistake("--context needs 2 frames or more: one to dream from and one before it.")


# ---------------------------------------------------------------- the game


def game_id(name: str) -> str:
    """The ROM's name for any usual spelling: MsPacman, ms_pacman, ALE/MsPacman-v5 -> ms_pacman."""

    def plain(text):
        return re.sub("[^a-z0-9]", "", text.lower())

    known = {plain(rom): rom for rom in ale_py.roms.get_all_rom_ids()}
    wanted = plain(re.sub(r"^ALE/|(Deterministic|NoFrameskip)?-v\d+$", "", name))
    if wanted not in known:
        near = [game_title(known[key]) for key in difflib.get_close_matches(wanted, known, 3, 0.5)]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise Mistake(f"there is no game {name!r}: {hint}--list-games lists them all.")
    return known[wanted]


def game_title(rom: str) -> str:
    """ms_pacman -> MsPacman, the spelling of the score tables."""
    return "".join(word.capitalize() for word in rom.split("_"))


class Game:
    """`copies` of an Atari game side by side; the only place that knows Atari.

    A frame pools the last two of the four that an action is held for, reduced to 64 x 64 in
    colour. Up to 30 no-ops open an episode, or the game would be one fixed film. No sticky
    actions, no clipped rewards. Losing a life is terminal, for learning, but ends no episode.
    """

    def __init__(self, name: str, copies: int = 1, height: int = 64, width: int = 64):
        self.env = AtariVectorEnv(
            game_id(name), copies, img_height=height, img_width=width, grayscale=False,
            stack_num=1, frameskip=4, maxpool=True, noop_max=30, episodic_life=False,
            life_loss_info=False, reward_clipping=False, use_fire_reset=False,
            repeat_action_probability=0.0, full_action_space=False,
            max_num_frames_per_episode=108_000)  # fmt: skip
        self.actions = int(self.env.single_action_space.n)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Start every copy afresh, by its seed -> frames (copies, height, width, 3) uint8."""
        frames, info = self.env.reset(seed=np.asarray(seeds, np.int64))
        self.lives = info["lives"]
        return frames[:, 0]

    def step(self, actions: np.ndarray):
        """Actions (copies,) -> frames, rewards, terminal (a life was lost), done (game over).

        Call `reset` when done: it is the reset frame that opens the next episode (D5).
        """
        actions = np.asarray(actions, np.int64)
        if actions.min() < 0 or actions.max() >= self.actions:
            raise ValueError(f"actions are 0 to {self.actions - 1}, not {actions}")
        frames, reward, terminated, truncated, info = self.env.step(actions)
        terminal = terminated | (info["lives"] < self.lives)  # every step (D13); gains mean nothing
        self.lives = info["lives"]
        return frames[:, 0], reward, terminal, terminated | truncated


# ---------------------------------------------------------------- building a run


PURPOSES = ("build", "reset", "play", "windows", "model", "contexts", "dream", "picture", "test")


def randomness(seed: int, step: int, purpose: str) -> np.random.Generator:
    """Seed torch for this purpose at this step, and return numpy's generator for it.

    Nothing else is random. So there is no generator to save, a resumed run draws what it would
    have drawn, and evaluating in between disturbs nothing.
    """
    rng = np.random.default_rng((seed, step, PURPOSES.index(purpose)))
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def episode_seeds(seed: int, episode: int, purpose: str, copies: int = 1) -> np.ndarray:
    """Seeds for the game, never negative (it takes those for none)."""
    return np.random.default_rng((seed, episode, PURPOSES.index(purpose))).integers(2**31, size=copies)


def pick_device(wanted: str) -> tuple[torch.device, str]:
    """The device to train on, and the reason in words."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    cpu_build = ""
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        cpu_build = ("; there is an NVIDIA GPU, but this build of torch is for the CPU alone: "
                     "the README says how to install the other")  # fmt: skip
    if wanted != "auto":
        if not there[wanted]:
            have = ", ".join(name for name, is_there in there.items() if is_there)
            raise Mistake(f"--device {wanted} is not there{cpu_build}. This machine has: {have}.")
        return torch.device(wanted), "as asked"
    best = next(name for name, is_there in there.items() if is_there)
    return torch.device(best), "the fastest there is" + cpu_build


def fast_precision(device: torch.device) -> str:
    """bfloat16 where the hardware multiplies in it, else float32. It changes bits: it is saved."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def memory_of(device: torch.device) -> int:
    """Bytes that the device has to offer; where that cannot be asked, as if without limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return sys.maxsize


def build_networks(s: Settings, actions: int, device) -> tuple[WorldModel, ActorCritic]:
    randomness(s.seed, 0, "build")
    model = WorldModel(
        actions, channels=list(s.channels), strides=list(s.strides), kernel=s.kernel,
        groups=s.groups, classes=s.classes, d_model=s.d_model, layers=s.layers,
        backbone=s.backbone, d_state=s.d_state, head_dim=s.head_dim, dropout=s.dropout,
        head_hidden=s.head_hidden, unimix=s.unimix, free_nats=s.free_nats,
        representation_scale=s.representation_scale, balance=s.balance,
        event_weights=s.event_weights)  # fmt: skip
    agent = ActorCritic(
        actions, groups=s.groups, classes=s.classes, d_model=s.d_model,
        actor_hidden=s.actor_hidden, critic_hidden=s.critic_hidden, layers=s.agent_layers,
        gamma=s.gamma, lambda_=s.lambda_, entropy=s.entropy, floor=s.floor,
        slow_decay=s.slow_decay, range_decay=s.range_decay)  # fmt: skip
    return model.to(device).eval(), agent.to(device).eval()


def player_context(s: Settings) -> int:
    """Oldest state that training has seen: a window, or the contexts' two lengths (T4)."""
    return s.length if s.dream_from == "batch" else 2 * s.context


class Run:
    """Everything a run consists of; what is saved, restored and trained."""

    def __init__(self, s: Settings, device: torch.device):
        self.settings, self.device = s, device
        self.game = Game(s.game)
        self.model, self.agent = build_networks(s, self.game.actions, device)
        weights = [p for name, p in self.model.named_parameters() if not name.startswith("balance")]
        groups = [dict(params=weights, rate=s.model_rate)]
        if s.balance:
            groups += [dict(params=list(self.model.balance.parameters()), rate=s.balance_rate)]
        eps = max(s.eps, 1e-15) if device.type == "mps" else s.eps  # MPS flushes denormals
        self.model_optimizer = make_optimizer(s.optimizer, groups, eps)
        learning = [p for p in self.agent.parameters() if p.requires_grad]
        groups = [dict(params=learning, rate=s.agent_rate)]
        self.agent_optimizer = make_optimizer(s.optimizer, groups, eps)
        self.replay = self.make_replay()
        self.player = None  # plays once the warm-up is over
        self.step = self.episode = self.updates = self.skipped = self.skipped_in_a_row = 0
        self.seconds, self.score, self.episode_length = 0.0, 0.0, 0
        self.sums, self.counted = {}, 0  # metrics since the last row
        self.logs = {"metrics": "", "episodes": ""}  # the text of both tables
        self.frame = self.game.reset(episode_seeds(s.seed, 0, "reset"))

    def make_replay(self) -> Replay:
        s = self.settings
        where = self.device if s.replay_device == "auto" else pick_device(s.replay_device)[0]
        need, have = Replay.bytes_needed(s.steps), memory_of(where)
        if need > 0.9 * have:
            raise Mistake(f"the replay of --steps {s.steps} takes {need / 2**30:.1f} GiB and {where} "
                          f"has {have / 2**30:.1f}: ask for fewer steps, or try --replay-device cpu.")  # fmt: skip
        return Replay(s.steps, device=where)

    def autocast(self):
        """Matrix products in bfloat16 where settled so; scans and losses stay in float32."""
        half = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def make_player(self) -> Player:
        return Player(self.model, self.agent, 1, player_context(self.settings))


# ---------------------------------------------------------------- training


def optimise(module, optimizer, loss, clip: float, progress: float):
    """One step down the gradient -> (its norm before clipping, whether it was finite and taken).

    `progress` scales the rates during warm-up. The learnt loss weights, a group of their own,
    are left out of the norm.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    finite = bool(torch.isfinite(loss.detach() + norm))  # the one wait for the device
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * progress
        optimizer.step()
    return norm, finite


@contextlib.contextmanager
def undone_unless(module):
    """Yields a function that puts the module's running statistics back as they were on entry."""
    before = [buffer.clone() for buffer in module.buffers()]

    def undo():
        for buffer, old in zip(module.buffers(), before):
            buffer.copy_(old)

    yield undo


def train(run: Run, folder: "Folder"):
    """Drama's training loop (paper, algorithm 1), from run.step to the end."""
    s, device = run.settings, run.device
    tau = s.tau if s.sampling == "dfs" else math.inf
    clock, last_save = time.monotonic(), time.monotonic()
    bar = progress_bar(run)
    while run.step < s.steps:
        step = run.step

        # 1. Play one step, and keep it
        rng = randomness(s.seed, step, "play")
        first = run.episode_length == 0
        if step < s.warmup:
            action = int(rng.integers(run.game.actions))
        else:
            run.player = run.player or run.make_player()
            frame = torch.from_numpy(run.frame).to(device)
            action = int(run.player.act(frame, torch.tensor([first], device=device)))
        frame, reward, terminal, done = run.game.step([action])
        run.replay.add(run.frame[0], action, reward[0], terminal[0], first)
        run.frame = frame
        run.score += float(reward[0])
        run.episode_length += 1
        if done[0]:
            log_episode(run, folder)
            run.episode += 1
            run.score, run.episode_length = 0.0, 0
            run.frame = run.game.reset(episode_seeds(s.seed, run.episode, "reset"))

        if step >= s.warmup and (step - s.warmup) % s.train_every == 0:
            progress = min(1.0, (run.updates + 1) / s.warmup_updates)

            # 2. Learn the world, from windows of the replay
            rng = randomness(s.seed, step, "windows")
            starts = run.replay.training_windows(s.batch, s.length, tau, rng)
            batch = run.replay.windows(starts, s.length, device)
            randomness(s.seed, step, "model")
            run.model.train()
            with undone_unless(run.model) as undo:
                with run.autocast():
                    loss, metrics, z = run.model.loss(batch)
                norm, learnt = optimise(run.model, run.model_optimizer, loss, s.model_clip, progress)
                if not learnt:
                    undo()
            run.model.eval()
            metrics["model_norm"] = norm

            # 3. Learn in the dream
            rng = randomness(s.seed, step, "contexts")
            with torch.no_grad(), run.autocast():
                if s.dream_from == "contexts":
                    ratio = s.dreams / s.batch
                    starts = run.replay.dreaming_windows(s.dreams, s.context, tau, rng, ratio)
                    start = run.model.starts_from_contexts(run.replay.windows(starts, s.context, device))
                else:
                    start = run.model.starts_from_batch(batch, z, s.dreams)
                randomness(s.seed, step, "dream")
                dream = run.model.imagine(start, s.horizon, lambda t, z, d: run.agent.act(z, d))
            with undone_unless(run.agent) as undo:
                with run.autocast():
                    loss, more = run.agent.loss(dream)
                norm, improved = optimise(run.agent, run.agent_optimizer, loss, s.agent_clip, progress)
                if improved:
                    run.agent.update_slow_critic()
                else:
                    undo()
            metrics |= more | {"agent_norm": norm}
            count_update(run, folder, metrics, learnt and improved)

        # 4. Log and save
        run.step += 1
        bar.update()
        if step + 1 == s.warmup:
            bar.close()
            bar = progress_bar(run)
        now = time.monotonic()
        run.seconds, clock = run.seconds + now - clock, now
        if run.counted == s.log_every:
            log_metrics(run, folder, bar)
        over = run.step == s.steps
        if over or folder.stop_asked or now - last_save > 60 * s.save_minutes:
            folder.save(run)
            last_save = time.monotonic()
            if folder.stop_asked and not over:
                bar.close()
                print(f"\nstopped and saved at step {run.step}: the same command goes on from there")
                raise SystemExit(130)
    bar.close()


MAX_SKIPPED = 10


def count_update(run: Run, folder: "Folder", metrics: dict, finite: bool):
    """Add an update's metrics to the sums for the next row; stop if ten in a row went wrong."""
    run.updates += 1
    if finite:
        run.skipped_in_a_row = 0
        values = torch.stack([value.float() for value in metrics.values()])
        run.sums = run.sums or dict(names=list(metrics), values=torch.zeros_like(values))
        run.sums["values"] += values
        run.counted += 1
        return
    run.skipped += 1
    run.skipped_in_a_row += 1
    broken = [name for name, value in metrics.items() if not math.isfinite(float(value))]
    tqdm.write(f"step {run.step}: update skipped, not finite: {', '.join(broken)}")
    if run.skipped_in_a_row == MAX_SKIPPED:
        raise Stopped(f"{MAX_SKIPPED} updates in a row were not finite ({', '.join(broken)}); "
                           f"the last good save is step {folder.saved_step}.")  # fmt: skip


def progress_bar(run: Run) -> tqdm:
    """Two bars, one after the other: random play would make the time left look too short."""
    s = run.settings
    learning = run.step >= s.warmup
    return tqdm(total=s.steps if learning else s.warmup, initial=run.step, unit="step", smoothing=0,
                desc="learning" if learning else "random play", dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30)  # fmt: skip


def log_metrics(run: Run, folder: "Folder", bar: tqdm):
    """A row of metrics.csv: means over the updates since the last row; times stand last."""
    s = run.settings
    means = dict(zip(run.sums["names"], (run.sums["values"] / run.counted).tolist()))
    rate = bar.format_dict["n"] - bar.initial
    rate = rate / max(bar.format_dict["elapsed"], 1e-9)
    replayed = s.batch * s.length + (s.dreams * s.context if s.dream_from == "contexts" else 0)
    frames = rate / s.train_every * (replayed + s.dreams * s.horizon)
    row = dict(step=run.step, updates=run.updates, skipped=run.skipped, **means)
    row |= dict(steps_per_second=rate, frames_per_second=frames, seconds=run.seconds)
    folder.append(run, "metrics", row)
    bar.set_postfix_str(f"model {means['model_loss']:.1f} return {means['dream_return']:.2f} "
                        f"entropy {means['entropy']:.2f}", refresh=False)  # fmt: skip
    run.sums, run.counted = {}, 0


def log_episode(run: Run, folder: "Folder"):
    normalised = human_normalised(run.settings.game, run.score)
    row = dict(step=run.step + 1, score=run.score, length=run.episode_length,
               human_normalised="" if normalised is None else normalised)  # fmt: skip
    folder.append(run, "episodes", row)
    tqdm.write(f"step {run.step + 1}: score {run.score:g} in {run.episode_length} steps")


# ---------------------------------------------------------------- evaluation


# game: random, human, Drama XS as published (with dfs), the same with uniform sampling
SCORES = {
    row.split()[0]: tuple(float(score) for score in row.split()[1:])
    for row in """
    Alien 228 7128 820 696
    Amidar 6 1720 131 154
    Assault 222 742 539 511
    Asterix 210 8503 1632 1045
    BankHeist 14 753 137 52
    BattleZone 2360 37188 10860 10900
    Boxing 0 12 78 49
    Breakout 2 30 7 11
    ChopperCommand 811 7388 1642 1083
    CrazyClimber 10780 35829 83931 77140
    DemonAttack 152 1971 201 151
    Freeway 0 30 15 15
    Frostbite 65 4335 785 975
    Gopher 258 2412 2757 2289
    Hero 1027 30826 7946 7564
    Jamesbond 29 303 372 363
    Kangaroo 52 3035 1384 620
    Krull 1598 2666 9693 7553
    KungFuMaster 258 22736 23920 24030
    MsPacman 307 6952 2270 2508
    Pong -21 15 15 3
    PrivateEye 25 69571 90 76
    Qbert 164 13455 796 939
    RoadRunner 12 7845 14020 9328
    Seaquest 68 42055 497 384
    UpNDown 533 11693 7387 5756
    """.strip().splitlines()
}


def human_normalised(game: str, score: float) -> float | None:
    """Percent of the way from random play to a human's; None for games without such a score."""
    scores = SCORES.get(game_title(game_id(game)))
    return scores and 100 * (score - scores[0]) / (scores[1] - scores[0])


def evaluate(s: Settings, player: Player, device) -> list[float]:
    """Final scores: full episodes side by side, one each, sampled actions, raw game scores.

    Every episode that was started is counted: taking the first to finish would favour short
    ones (D9). Ctrl-C ends it early, with the episodes finished so far.
    """
    copies = s.eval_episodes
    game = Game(s.game, copies)
    frame = game.reset(episode_seeds(s.seed, 0, "test", copies))
    first, score, over = torch.ones(copies, dtype=torch.bool, device=device), np.zeros(copies), np.zeros(copies, bool)
    with tqdm(desc="evaluation", unit="step", dynamic_ncols=True) as bar:
        try:
            while not over.all():
                randomness(s.seed, bar.n, "test")
                actions = player.act(torch.from_numpy(frame).to(device), first).cpu().numpy()
                frame, reward, _, done = game.step(actions)
                score += np.where(over, 0, reward)
                over |= done
                first = torch.zeros_like(first)
                bar.update()
                bar.set_postfix_str(f"{over.sum()} of {copies} over, mean so far {score.mean():.1f}")
        except KeyboardInterrupt:
            print(f"\nended early: {over.sum()} of {copies} episodes were over; only they count")
    return score[over].tolist()


def report(run_settings: Settings, scores: list[float], step: int, act_on: str, last5: list[float]):
    """The table that closes a run, and that --eval prints."""
    s, title = run_settings, game_title(game_id(run_settings.game))
    table = [("game", title), ("steps trained", step), ("actor sees", f"{act_on} latent"),
             ("episodes", f"{len(scores)}, all counted, sampled actions")]  # fmt: skip
    if scores:
        table += [("final score", f"{np.mean(scores):.1f} +- {np.std(scores):.1f} (spread of episodes)")]
        table += [("lowest, highest", f"{min(scores):g}, {max(scores):g}")]
    if last5:
        table += [("paper's protocol", f"{np.mean(last5):.1f}, mean of the last {len(last5)} training episodes")]
    if title in SCORES:
        random, human, paper, _ = SCORES[title]
        if scores:
            table += [("human-normalised", f"{human_normalised(s.game, np.mean(scores)):.1f} %")]
        table += [("published Drama", f"{paper:g} ({human_normalised(s.game, paper):.1f} %)")]
        table += [("random, human", f"{random:g}, {human:g}")]
    width = max(len(name) for name, _ in table)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in table))


def watch(s: Settings, player: Player, device, path: Path, limit: int = 2000):
    """Film an episode in full size: the same game, seed and actions in a second, larger Game."""
    small, large = Game(s.game), Game(s.game, height=210, width=160)
    seeds = episode_seeds(s.seed, 1, "test")
    frame, first, score, film = small.reset(seeds), torch.tensor([True], device=device), 0.0, []
    film.append(large.reset(seeds)[0])
    for step in tqdm(range(limit), desc="playing", unit="step", dynamic_ncols=True):
        randomness(s.seed, step, "test")
        action = player.act(torch.from_numpy(frame).to(device), first).cpu().numpy()
        frame, reward, _, done = small.step(action)
        film.append(large.step(action)[0][0])
        score, first = score + float(reward[0]), torch.zeros_like(first)
        if done[0]:
            break
    write_png(path, film, per_second=15)
    end = "the whole episode" if done[0] else f"the first {limit} steps"
    print(f"score {score:g} over {end}: {path} (an animated PNG: open it in a browser)")


# ---------------------------------------------------------------- pictures


def write_png(path: Path, frames: list[np.ndarray], per_second: int = 1):
    """Frames (height, width, 3) uint8 -> a PNG; more than one makes it animated."""
    height, width, _ = frames[0].shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    out = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0))]
    if len(frames) > 1:
        out.append(chunk(b"acTL", struct.pack(">2I", len(frames), 0)))
    number = 0
    for i, frame in enumerate(frames):
        rows = np.pad(frame.reshape(height, -1), ((0, 0), (1, 0)))  # filter 0 before each row
        data = zlib.compress(rows.tobytes(), 6)
        if len(frames) > 1:
            control = struct.pack(">5I2H2B", number, width, height, 0, 0, 1, per_second, 0, 0)
            out.append(chunk(b"fcTL", control))
            number += 1
        if i == 0:
            out.append(chunk(b"IDAT", data))
        else:
            out.append(chunk(b"fdAT", struct.pack(">I", number) + data))
            number += 1
    write_file(path, b"".join(out + [chunk(b"IEND", b"")]))


# 5 x 7 letters, a byte a column, the top row in the lowest bit
LETTERS = dict(A="7e1111117e", C="3e41414122", D="7f4141221c", E="7f49494941", L="7f40404040",
               M="7f020c027f", N="7f0408107f", O="3e4141413e", R="7f09192946", S="4649494931",
               T="01017f0101", U="3f4040403f")  # fmt: skip


def label(text: str, height: int) -> np.ndarray:
    """White capitals on black, (height, width, 3) uint8."""
    columns = np.frombuffer(bytes.fromhex("00".join(LETTERS[c] for c in text)), np.uint8)
    bits = (columns[None] >> np.arange(7)[:, None]) & 1  # (7, width)
    image = np.zeros((height, 100), np.uint8)
    top = (height - 7) // 2
    image[top : top + 7, 4 : 4 + bits.shape[1]] = 255 * bits
    return np.repeat(image[..., None], 3, -1)


CONTEXT, COLUMNS = 5, 16


@torch.no_grad()
def dream_picture(run: Run) -> np.ndarray:
    """Real frames, their reconstructions, and an open-loop dream of the same actions."""
    s, model = run.settings, run.model
    rng = randomness(s.seed, run.step, "picture")
    starts = rng.integers(run.replay.length - COLUMNS + 1, size=1)
    batch = run.replay.windows(starts, COLUMNS, run.device)
    past = type(batch)(*(part[:, :CONTEXT] for part in batch))
    posterior = model.posterior(model.images(batch.frame))
    rebuilt = model.decode(posterior.argmax(-1))
    start = model.starts_from_contexts(past)
    dream = model.imagine(start, COLUMNS - CONTEXT, lambda t, z, d: batch.action[:, CONTEXT - 1 + t])
    dreamt = torch.cat([rebuilt[:CONTEXT], model.decode(dream.z[1:, 0])])

    def row(text, images):
        frames = (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        frames = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)))
        if text == "DREAMT":  # a red line where it leaves the real frames behind
            frames[CONTEXT, :, 0] = 255, 0, 0
        return np.concatenate([label(text, frames.shape[1]), *frames], 1)

    rows = dict(REAL=model.images(batch.frame), RECONSTRUCTED=rebuilt, DREAMT=dreamt)
    picture = np.concatenate([row(text, images) for text, images in rows.items()])
    return picture.repeat(2, 0).repeat(2, 1)


# ---------------------------------------------------------------- saving and resuming

FORMAT = 1
CHUNK = 1024  # steps in a replay file, which is written once


def write_file(path: Path, data: bytes):
    """Write all of it or nothing, and be sure that it is on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "darwin":  # fsync alone stops at the drive's cache
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
    os.replace(temporary, path)
    if os.name == "posix":  # the new name, too
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Damaged(Exception):
    """A file of a save is missing or not as it was written."""


class Folder:
    """A run on the disk.

    replay-000.npz ...    1,024 steps each, written once
    state-000123.pt       all that changes: networks, optimisers, counters, player, newest steps
    save-000123.json      the manifest: its appearance is what makes the save valid. It holds the
                          settings and the SHA-256 of every file that the save needs
    settings.json, metrics.csv, episodes.csv, dream-000123.png, evaluation-*.json   for people

    The save before is kept. Loading verifies everything before it uses anything.
    """

    def __init__(self, path: Path):
        self.path = path
        self.stop_asked = False
        self.saved_step = 0
        self.chunks = {}  # name -> SHA-256 of the replay files on disk

    def manifests(self) -> list[Path]:
        """Newest first."""
        return sorted(self.path.glob("save-*.json"), reverse=True)

    def holds_a_run(self) -> bool:
        return bool(self.manifests())

    def open_for_writing(self):
        """Make the folder, and lock it: two processes would ruin each other's run."""
        if self.path.exists() and not self.path.is_dir():
            raise Mistake(f"{self.path} is a file: --run wants a folder.")
        if self.path.is_dir() and not self.holds_a_run():
            others = [p.name for p in self.path.iterdir() if p.name != "lock" and p.suffix != ".tmp"]
            if others:
                raise Mistake(f"{self.path} holds other things ({', '.join(sorted(others)[:3])}) and "
                              "no run: give an empty or a new folder.")  # fmt: skip
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.path / "lock", "w")
        except OSError as error:
            raise Mistake(f"cannot write to {self.path}: {error.strerror}.") from None
        try:
            lock_file(self.lock)
        except OSError:
            raise Mistake(f"{self.path} is in use by another process: wait for it, or stop it.") from None

    def append(self, run: Run, name: str, row: dict):
        """Add a row to metrics.csv or episodes.csv, and to its text in the run."""
        if not run.logs[name]:
            run.logs[name] = ",".join(row) + "\n"
            (self.path / f"{name}.csv").write_text(run.logs[name])
        cells = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values())
        line = ",".join(cells) + "\n"
        run.logs[name] += line
        with open(self.path / f"{name}.csv", "a") as file:
            file.write(line)

    def save(self, run: Run):
        """Chunks, state, manifest, in this order; then drop what is older than the save before."""
        replay, step = run.replay, run.step
        for start in range(0, step - CHUNK + 1, CHUNK):
            name = f"replay-{start // CHUNK:03d}.npz"
            if name not in self.chunks:
                data = io.BytesIO()
                np.savez_compressed(data, **replay.steps(start, start + CHUNK))
                write_file(self.path / name, data.getvalue())
                self.chunks[name] = sha256(data.getvalue())
        data = io.BytesIO()
        torch.save(state_of(run), data)  # in memory first: on a full disk torch.save blames itself
        name = f"state-{step:06d}.pt"
        write_file(self.path / name, data.getvalue())
        content = dict(
            format=FORMAT, step=step, files=self.chunks | {name: sha256(data.getvalue())},
            settings=dataclasses.asdict(run.settings), threads=torch.get_num_threads(),
            device=str(run.device), python=platform.python_version(), torch=torch.__version__,
            numpy=np.__version__, ale_py=ale_py.__version__)  # fmt: skip
        text = json.dumps(content)
        signed = json.dumps(dict(content=content, sha256=sha256(text.encode())), indent=1)
        before = self.saved_step
        write_file(self.path / f"save-{step:06d}.json", signed.encode())
        self.saved_step = step
        settings = json.dumps(dataclasses.asdict(run.settings), indent=1)
        write_file(self.path / "settings.json", settings.encode())
        if step >= COLUMNS:
            write_png(self.path / f"dream-{step:06d}.png", [dream_picture(run)])
        keep = {f"{kind}-{kept:06d}" for kind in ("save", "state") for kept in (before, step)}
        for path in self.manifests() + list(self.path.glob("state-*.pt")):
            if path.stem not in keep:
                path.unlink()

    def newest(self, with_replay: bool = True) -> tuple[dict, dict, dict]:
        """The newest whole save: manifest, state, and the replay's files by name, verified."""
        problems = []
        for path in self.manifests():
            try:
                manifest = self.read_manifest(path)
                data = {}
                for name, digest in manifest["files"].items():
                    if with_replay or not name.startswith("replay"):
                        data[name] = self.read(name, digest)
                state_name = next(name for name in data if name.startswith("state"))
                state = torch.load(io.BytesIO(data.pop(state_name)), "cpu", weights_only=True)
            except Damaged as problem:
                problems.append(str(problem))
                continue
            if problems:
                print(f"warning: {'; '.join(problems)}. Using the save before, of step {manifest['step']}.")
            return manifest, state, data
        if problems:
            raise Mistake(f"no whole save is left in {self.path}: {'; '.join(problems)}.")
        raise Mistake(f"{self.path} holds no run.")

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
            whole = sha256(json.dumps(content).encode()) == signed["sha256"]
        except (ValueError, KeyError, TypeError, OSError):
            whole = False
        if not whole:
            raise Damaged(f"{path.name} is damaged")
        if content["format"] > FORMAT:
            raise Mistake(f"{path} was written by a newer version of this program: use that one.")
        return content


def lock_file(file):
    """Lock an open file until this process ends, however it ends; OSError if another holds it."""
    if os.name == "posix":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


SAVED = ("step", "episode", "updates", "skipped", "skipped_in_a_row", "seconds", "score",
         "episode_length", "sums", "counted", "logs")  # fmt: skip
LEARNING = ("model", "agent", "model_optimizer", "agent_optimizer")


def tensors(arrays: dict[str, np.ndarray]) -> dict:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def state_of(run: Run) -> dict:
    """All that a save holds beside the full replay files."""
    newest = run.step // CHUNK * CHUNK
    return dict(
        {name: getattr(run, name) for name in SAVED},
        learning={name: getattr(run, name).state_dict() for name in LEARNING},
        player=run.player and run.player.state_dict(),
        newest=tensors(run.replay.steps(newest, run.step)),
        counters=tensors(run.replay.counters()))  # fmt: skip


def restore(run: Run, state: dict, chunks: dict[str, bytes]):
    """Put a verified save into a new run; the game is played again to where it was."""
    for name in sorted(chunks):
        with np.load(io.BytesIO(chunks[name]), allow_pickle=False) as arrays:
            run.replay.append_steps(dict(arrays))
    run.replay.append_steps({name: part.numpy() for name, part in state["newest"].items()})
    run.replay.load_counters({name: part.numpy() for name, part in state["counters"].items()})
    for name in SAVED:
        setattr(run, name, state[name])
    if run.sums:
        run.sums["values"] = run.sums["values"].to(run.device)
    for name in LEARNING:
        getattr(run, name).load_state_dict(state["learning"][name])
    if state["player"]:
        run.player = run.make_player()
        run.player.load_state_dict(state["player"])

    # The emulator cannot be saved; its seed and the actions of the episode lead back to its state
    run.frame = run.game.reset(episode_seeds(run.settings.seed, run.episode, "reset"))
    for step in range(run.step - run.episode_length, run.step):
        if not np.array_equal(run.frame[0], run.replay.frame[step].cpu().numpy()):
            raise Stopped(f"the game did not repeat itself at step {step}: was the run made with "
                               "another version of ale-py?")  # fmt: skip
        run.frame, *_ = run.game.step(run.replay.action[step : step + 1])


def load_player(path, device: str = "cpu", games: int = 1, act_on: str = "posterior"):
    """Settings, player and step of the newest save in a run folder: all one needs to play."""
    folder = Folder(Path(path))
    manifest, state, _ = folder.newest(with_replay=False)
    s = settings_from(manifest)
    device, _ = pick_device(device)
    model, agent = build_networks(s, Game(s.game).actions, device)
    model.load_state_dict(state["learning"]["model"])
    agent.load_state_dict(state["learning"]["agent"])
    return s, Player(model, agent, games, player_context(s), act_on), state


# ---------------------------------------------------------------- command line


def settings_from(manifest: dict) -> Settings:
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["settings"].items()}
    return Settings(**values)


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage that would bury it."""

    def error(self, message: str):
        raise Mistake(message[0].lower() + message[1:] + ". See --help.")


def parse(field: dataclasses.Field):
    """How the text after a flag becomes a setting."""

    def whole(text):
        if not re.fullmatch(r"[+-]?\d[\d_]*", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number such as {field.default}")
        return int(text)

    def number(text):
        try:
            return float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number such as {field.default}") from None

    def several(text):
        return tuple(whole(part) for part in text.split(","))

    return {int: whole, float: number, tuple: several}.get(type(field.default), str)


def make_parser() -> Parser:
    parser = Parser(prog="drama.py", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                    argument_default=argparse.SUPPRESS)  # fmt: skip
    parser.add_argument("--run", metavar="DIR", help="run folder (runs/GAME-sSEED)")
    parser.add_argument("--eval", metavar="RUN", help="play full episodes with a run's agent")
    parser.add_argument("--watch", metavar="RUN", help="film an episode of a run's agent")
    parser.add_argument("--act-on", choices=("posterior", "prior"), help="with --eval: what the actor "
                        "sees, the frame or (as published) a guess at it")  # fmt: skip
    parser.add_argument("--list-games", action="store_true", help="list the games and leave")
    group = parser.add_argument_group("settings (the values shown are those of the preset paper)")
    for field in dataclasses.fields(Settings):
        text = f"{field.metadata['help']} ({field.default})".replace("%", "%%")
        if isinstance(field.default, bool):
            group.add_argument(flag(field.name), dest=field.name, help=text, action=argparse.BooleanOptionalAction)
        else:
            group.add_argument(flag(field.name), dest=field.name, type=parse(field), metavar="X", help=text)
    return parser


def parse_arguments(argv: list[str]) -> dict:
    """The flags given, and no others, by name."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(word, known, 1, 0.5)
        hint = f": did you mean {near[0]}" if near and word.startswith("-") else ""
        what = "flag" if word.startswith("-") else "word"
        raise Mistake(f"unknown {what} {word!r}{hint}? See --help." if hint else f"unknown {what} {word!r}. See --help.")
    return vars(given)


def new_settings(flags: dict) -> tuple[Settings, torch.device, str]:
    """Preset, then flags; what was left to the machine is settled and stays settled."""
    device, why = pick_device(flags.get("device", "auto"))
    preset = flags.get("preset", "paper" if device.type == "cuda" else "laptop")
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1, 0.3)
        hint = f": did you mean {near[0]}?" if near else "."
        raise Mistake(f"--preset is one of {', '.join(PRESETS)}, not {preset!r}{hint}")
    s = Settings(**(dict(PRESETS[preset], preset=preset) | flags))
    if s.dream_from == "batch" and "context" in flags:
        raise Mistake("--context belongs to --dream-from contexts: dreams from the batch have none.")
    check(s)
    s = dataclasses.replace(s, game=game_title(game_id(s.game)))
    if s.precision == "auto":
        s = dataclasses.replace(s, precision=fast_precision(device))
    return s, device, why


def resumed_settings(flags: dict, manifest: dict, path: Path) -> Settings:
    """The run's own settings; a flag must agree with them, but for a few that may change."""
    s = settings_from(manifest)
    if "game" in flags:
        flags["game"] = game_title(game_id(flags["game"]))
    for name, value in flags.items():
        if name not in FREE and value != getattr(s, name):
            raise Mistake(f"{path} holds a run with {flag(name)} {getattr(s, name)}, not {value}: leave the "
                          "flag out to go on with it, or give another folder with --run.")  # fmt: skip
    if flags.get("steps", s.steps) < s.steps:
        raise Mistake(f"{path} holds a run of {s.steps} steps: --steps can only grow.")
    s = dataclasses.replace(s, **{name: flags[name] for name in FREE if name in flags})
    if "threads" not in flags:  # the number of threads changes the last bits of sums
        s = dataclasses.replace(s, threads=manifest["threads"])
    check(s)
    return s


def introduce(run: Run, why: str, path: Path):
    """The first lines: where this runs, what it is, and what it needs."""
    s = run.settings

    def size(module):
        return f"{sum(p.numel() for p in module.parameters()):,}"

    parts = ", ".join(f"{name} {size(part)}" for name, part in run.model.named_children()
                      if name not in ("two_hot", "balance"))  # fmt: skip
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.processor() or platform.machine()
    print(f"device     {run.device} ({name}), {why}; {s.precision}, {torch.get_num_threads()} CPU threads")
    print(f"preset     {s.preset}; game {s.game}, seed {s.seed}, {s.steps:,} steps; run folder {path}")
    print(f"model      {size(run.model)} parameters: {parts}")
    print(f"agent      actor {size(run.agent.actor)}, critic {size(run.agent.critic)}")
    print(f"replay     {Replay.bytes_needed(s.steps) / 2**20:,.0f} MiB on {run.replay.frame.device}")
    if run.step:
        print(f"resuming   at step {run.step:,}, episode {run.episode + 1}")


def train_command(flags: dict):
    title = game_title(game_id(flags.get("game", "Breakout")))
    seed = flags.get("seed", 0)
    folder = Folder(Path(flags.pop("run", None) or f"runs/{title}-s{seed}"))
    resuming = folder.path.is_dir() and folder.holds_a_run()
    if resuming:
        manifest, state, chunks = folder.newest()
        s = resumed_settings(flags, manifest, folder.path)
        device, why = pick_device(s.device)
    else:
        s, device, why = new_settings(flags)
    if s.threads:
        torch.set_num_threads(s.threads)
    folder.open_for_writing()
    run = Run(s, device)
    if resuming:
        restore(run, state, chunks)
        folder.chunks = {name: manifest["files"][name] for name in chunks}
        folder.saved_step = run.step
        for name, text in run.logs.items():
            write_file(folder.path / f"{name}.csv", text.encode())
    else:
        folder.save(run)
    introduce(run, why, folder.path)
    with asked_to_stop(folder):
        train(run, folder)
    evaluation = folder.path / f"evaluation-{run.step:06d}.json"
    if not evaluation.exists():
        player = Player(run.model, run.agent, s.eval_episodes, player_context(s))
        evaluate_and_report(s, player, state_of(run), device, evaluation)


def evaluate_and_report(s: Settings, player: Player, state: dict, device, path: Path):
    scores = evaluate(s, player, device)
    last5 = [float(row.split(",")[1]) for row in state["logs"]["episodes"].splitlines()[1:][-5:]]
    report(s, scores, state["step"], player.act_on, last5)
    result = dict(game=s.game, preset=s.preset, seed=s.seed, step=state["step"], act_on=player.act_on,
                  asked=s.eval_episodes, scores=scores, last_training_scores=last5)  # fmt: skip
    write_file(path, json.dumps(result, indent=1).encode())


def run_command(flags: dict, kind: str):
    """--eval and --watch."""
    folder = Path(flags.pop(kind))
    act_on = flags.pop("act_on", "posterior")
    extra = set(flags) - {"device", "threads", "eval_episodes"}
    if extra:
        raise Mistake(f"--{kind} takes its settings from the run: leave out {flag(min(extra))}.")
    if flags.get("threads"):
        torch.set_num_threads(flags["threads"])
    device, _ = pick_device(flags.get("device", "cpu"))
    games = flags.get("eval_episodes", Settings.eval_episodes) if kind == "eval" else 1
    s, player, state = load_player(folder, device.type, games, act_on)
    if kind == "watch":
        return watch(s, player, device, folder / "watch.png")
    s = dataclasses.replace(s, eval_episodes=games)
    suffix = "" if act_on == "posterior" else "-prior"
    evaluate_and_report(s, player, state, device, folder / f"evaluation-{state['step']:06d}{suffix}.json")


@contextlib.contextmanager
def asked_to_stop(folder: Folder):
    """The first Ctrl-C (or kill) asks the loop to save and end; a second ends at once."""

    def ask(number, frame):
        folder.stop_asked = True
        print("\nstopping after this step; once more to stop without saving", file=sys.stderr)
        for kind in (signal.SIGINT, signal.SIGTERM):
            signal.signal(kind, signal.SIG_DFL)

    before = {kind: signal.signal(kind, ask) for kind in (signal.SIGINT, signal.SIGTERM)}
    yield
    for kind, handler in before.items():
        signal.signal(kind, handler)


def main(argv: list[str] | None = None) -> int:
    try:
        flags = parse_arguments(sys.argv[1:] if argv is None else argv)
        if flags.pop("list_games", False):
            print("\n".join(game_title(rom) for rom in sorted(ale_py.roms.get_all_rom_ids())))
        elif "eval" in flags:
            run_command(flags, "eval")
        elif "watch" in flags:
            run_command(flags, "watch")
        elif "act_on" in flags:
            raise Mistake("--act-on belongs to --eval RUN.")
        else:
            train_command(flags)
    except Mistake as mistake:
        print(f"drama.py: {mistake}", file=sys.stderr)
        return 2
    except (OSError, Stopped) as error:
        print(f"drama.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
