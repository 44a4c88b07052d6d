"""Drama: an agent that learns an Atari game inside its own model of it, on a laptop.

    python drama.py --game Breakout             learn; the same line again goes on where it stopped
    python drama.py --eval runs/Breakout-s0     play 20 episodes and print the scores
    python drama.py --watch runs/Breakout-s0    film an episode
    python drama.py --model-check runs/Breakout-s0      compare its dreams with the game

This file is all that runs: settings, game, the training loop, evaluation, pictures, saving and
the command line. What learns is in agent.py (the time index of every step t is drawn there),
the sequence layers in scan.py, the replay and its sampling in buffer.py. A reader in a hurry
wants Settings, Game and train; everything after the loop may be skipped.

All counts of steps are agent steps; one is four frames of the game.
"""

import argparse
import contextlib
import ctypes
import difflib
import functools
import hashlib
import html
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
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

# Read by torch when it is imported. Threads that wait for each other spin for a moment only: left
# to spin, they double or triple an update as soon as another program wants a core.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
if __name__ == "__main__":  # Ctrl-C while torch is being loaded just ends
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import ale_py
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from torch import Tensor
from torch.utils._pytree import keystr, tree_leaves, tree_leaves_with_path, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from agent import ActorCritic, Dream, Lived, Player, WorldModel, kl_divergence, lambda_return
from agent import make_optimizer
from buffer import Batch, Replay

if os.name == "posix":
    import fcntl
    import resource
else:
    import msvcrt

# ---------------------------------------------------------------- settings


class Mistake(Exception):
    """Bad input: one sentence that says what was wrong and what to do. Exit code 2."""


class Stopped(Exception):
    """A run that cannot go on, and why. Exit code 1."""


def setting(default, help: str, low=None, high=10**6, choices=()):
    """A field with its help and its bounds; whole numbers are 1 or more, others 0 or more."""
    low = (1 if isinstance(default, (int, tuple)) else 0) if low is None else low
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


DEVICES = ("auto", "cuda", "mps", "cpu")


@dataclass(frozen=True)
class Settings:
    """Every hyper-parameter, as a flag. The defaults are the preset `paper`.

    Sources: paper (its tables and section numbers); code: the published code where the paper is
    silent or its scores came from another value; H: HarmonyDream; V3: DreamerV3; ours.
    """

    # The run
    preset: str = setting("paper", "settings to start from; if left out, laptop without CUDA",
                          choices=("paper", "best", "laptop", "debug"))
    game: str = setting("Breakout", "game, in any usual spelling")
    seed: int = setting(0, "seed of the game, of the first actions and of all else", low=0,
                        high=10**18)
    steps: int = setting(100_000, "length of the run, agent steps of 4 frames (Atari 100k)",
                         high=10**12)
    device: str = setting("auto", "where to learn", choices=DEVICES)
    threads: int = setting(0, "CPU threads; 0 leaves it to torch", low=0, high=1024)
    precision: str = setting("auto", "of large products; auto: bfloat16 where that is faster",
                             choices=("auto", "float32", "bfloat16"))
    graphs: bool = setting(False, "on CUDA, launch each phase as one graph; no GPU has tried it")
    replay_device: str = setting("auto", "where frames are kept; auto: as device", choices=DEVICES)
    save_minutes: float = setting(5.0, "minutes between saves")
    log_every: int = setting(100, "updates between rows of metrics.csv")
    eval_episodes: int = setting(20, "episodes of an evaluation, side by side", high=1000)
    warmup: int = setting(1032, "random steps before the first update (paper)")
    train_every: int = setting(1, "steps between updates (paper)")
    # Sampling
    sampling: str = setting("dfs", "by frequency, or its ablation (paper, 2.4)",
                            choices=("dfs", "uniform"))
    tau: float = setting(10.0, "temperature of dfs, draws (code): 10 at 16 draws a step", low=0.01)
    batch: int = setting(16, "windows of a world-model update (paper)")
    length: int = setting(128, "steps of such a window (paper)", low=2)
    # World model
    channels: tuple = setting((16, 32, 48, 64, 64), "filters of the encoder's convolutions (code)")
    strides: tuple = setting((1, 2, 2, 2, 2), "their strides, pixels (code)")
    kernel: tuple = setting((5,), "their kernels, pixels; one number stands for all (code)")
    groups: int = setting(32, "categoricals of the latent (paper)")
    classes: int = setting(32, "classes of each (paper)", low=2)
    backbone: str = setting("mamba2", "sequence layers (paper)", choices=("mamba2", "mamba"))
    layers: int = setting(2, "sequence layers (paper)")
    d_model: int = setting(512, "width of the sequence model (paper)")
    d_state: int = setting(16, "its state, numbers a channel (paper)")
    head_dim: int = setting(64, "channels of a mamba2 head (code; paper: 128)")
    dropout: float = setting(0.1, "dropout of the sequence model, a share (paper)", high=0.99)
    head_hidden: int = setting(256, "hidden width of the reward and termination heads (code)")
    unimix: float = setting(0.01, "uniform share of every latent (paper)", low=1e-6, high=1)
    free_nats: float = setting(1.0, "KL of a step that costs nothing, nats (paper, eq. 7)")
    representation_scale: float = setting(0.1, "weight of L_rep (paper, eq. 6)")
    balance: bool = setting(False, "learn the weights of the model's losses (H)")
    event_weights: bool = setting(False, "halve the image loss of still pixels if few move (ours)")
    # Dreams
    dream_from: str = setting("contexts", "dreams begin after windows of their own (paper), or in "
                              "the model's batch (ours)", choices=("contexts", "batch"))
    dreams: int = setting(1024, "dreams an update (paper)")
    context: int = setting(8, "frames of a context, for --dream-from contexts (paper)", low=2)
    horizon: int = setting(16, "steps of a dream (paper)")
    # Actor and critic
    actor_hidden: int = setting(256, "hidden width of the actor (code)")
    critic_hidden: int = setting(512, "hidden width of the critic (code)")
    agent_layers: int = setting(3, "hidden layers of either (code; paper: 2)")
    gamma: float = setting(0.985, "discount of a step (paper)", high=1)
    lambda_: float = setting(0.95, "lambda of the return (paper)", high=1)
    entropy: float = setting(3e-4, "weight of the entropy, per nat (paper)")
    floor: float = setting(0.0, "uniform share of the policy, everywhere (V3)", high=1)
    slow_decay: float = setting(0.98, "decay of the critic's slow copy, an update (paper)", high=1)
    range_decay: float = setting(0.99, "decay of the return range, an update (paper)", high=1)
    replay_critic: float = setting(0.0, "weight of the critic's loss on the model's batch, for "
                                   "--dream-from batch (V3)")
    # Optimisers
    optimizer: str = setting("laprop", "optimiser of both (paper)", choices=("laprop", "adam"))
    model_rate: float = setting(4e-5, "learning rate of the world model (code)")
    agent_rate: float = setting(4e-5, "learning rate of actor and critic (code)")
    balance_rate: float = setting(1e-4, "learning rate of the loss weights: about 10 / updates (H)")
    warmup_updates: int = setting(1000, "updates over which the rates rise from 0 (code)")
    eps: float = setting(1e-20, "epsilon of the optimiser (code)", low=1e-30)
    model_clip: float = setting(1000.0, "largest gradient norm of the world model (paper)")
    agent_clip: float = setting(100.0, "largest gradient norm of actor and critic (paper)")

    @property
    def temperature(self) -> float:
        """Of sampling by frequency; infinite, it is uniform."""
        return self.tau if self.sampling == "dfs" else math.inf

    @property
    def kernels(self) -> list[int]:
        """One for each convolution."""
        return list(self.kernel * (len(self.strides) if len(self.kernel) == 1 else 1))

    @property
    def replayed(self) -> int:
        """Frames taken from the replay in an update."""
        contexts = self.dreams * self.context if self.dream_from == "contexts" else 0
        return self.batch * self.length + contexts


OURS = dict(balance=True, event_weights=True, floor=0.01, entropy=1e-3, dream_from="batch",
            replay_critic=0.3)
PRESETS = {
    "paper": {},
    "best": OURS,
    "laptop": dict(  # as many updates as steps, of a quarter of the windows: README, "Results"
        OURS, d_model=256, channels=(32, 64, 64), strides=(4, 2, 2), kernel=(8, 4, 4), batch=4,
        length=64, dreams=64, horizon=15, critic_hidden=256, tau=2.5, optimizer="adam",
        model_rate=4e-4, agent_rate=4e-5, eps=1e-8, warmup_updates=200),
    "debug": dict(  # seconds; learns nothing
        OURS, steps=192, warmup=64, train_every=8, batch=4, length=16, channels=(4, 8, 8, 8),
        strides=(2, 2, 2, 2), groups=4, classes=4, d_model=32, head_dim=16, head_hidden=16,
        dreams=16, horizon=4, actor_hidden=16, critic_hidden=16, agent_layers=1, tau=2.5,
        optimizer="adam", model_rate=1e-3, agent_rate=1e-3, eps=1e-8, warmup_updates=4,
        log_every=1, eval_episodes=2, precision="float32"),
}
MAY_CHANGE = ("steps", "device", "threads", "graphs", "replay_device", "save_minutes",
              "eval_episodes")
# A setting that means nothing unless another one has this value
BELONGS = dict(tau=("sampling", "dfs"), head_dim=("backbone", "mamba2"),
               balance_rate=("balance", True), context=("dream_from", "contexts"),
               replay_critic=("dream_from", "batch"))


def flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def spelled(value) -> str:
    """As on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def typed(name: str, value) -> str:
    """A whole flag: --no-balance, --channels 32,64, --seed 3."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {spelled(value)}"


def check(s: Settings):
    """Refuse settings that cannot work."""
    for f in fields(s):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        if choices := f.metadata["choices"]:
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, 1)
                hint = f": did you mean {near[0]}?" if near else "."
                raise Mistake(f"{flag(f.name)} is one of {', '.join(choices)}, not {value!r}{hint}")
        elif not isinstance(value, (str, bool)):
            for number in value if isinstance(value, tuple) else (value,):
                if not low <= number <= high:
                    raise Mistake(f"{flag(f.name)} must be from {low} to {high}, not {number}.")
    if s.steps <= s.warmup:
        raise Mistake(f"--steps {s.steps} leaves nothing to learn after the random steps of "
                      f"--warmup: give more than {s.warmup}.")
    windows = {"--batch": (s.batch, s.length)}
    if s.dream_from == "contexts":
        windows["--dreams"] = s.dreams, s.context
    elif s.batch * s.length % s.dreams or s.length % (s.batch * s.length // s.dreams):
        raise Mistake(f"--dreams {s.dreams} cannot be spread evenly over --batch {s.batch} windows "
                      f"of --length {s.length}: every window must give equally many.")
    for name, (count, length) in windows.items():
        if count > s.warmup - length + 1:
            raise Mistake(f"{name} {count} asks for more windows of {length} steps than --warmup "
                          f"{s.warmup} steps hold: {max(0, s.warmup - length + 1)} at most.")
    if len(s.channels) != len(s.strides) or 64 % math.prod(s.strides):
        raise Mistake("--channels and --strides need one number for each convolution, and the "
                      "product of the strides must divide 64.")
    if len(s.kernel) not in (1, len(s.strides)) or any(
            kernel < stride or stride == 1 and kernel % 2 == 0
            for kernel, stride in zip(s.kernels, s.strides)):
        raise Mistake(f"{typed('kernel', s.kernel)} does not fit --strides: give one for all or "
                      "one for each, no smaller than its stride, and odd where that is 1.")
    if s.backbone == "mamba2" and 2 * s.d_model % s.head_dim:
        raise Mistake(f"--head-dim {s.head_dim} does not divide twice --d-model {s.d_model}.")


# ---------------------------------------------------------------- the game


def game_title(rom: str) -> str:
    """ms_pacman -> MsPacman, the spelling of the score tables."""
    return "".join(word.capitalize() for word in rom.split("_"))


class Game:
    """`copies` of an Atari game side by side; the only place that knows Atari.

    A frame pools the last two of the four that an action is held for (D12), reduced to 64 x 64
    in colour. Up to 30 no-ops open an episode, or the game would be one fixed film. No sticky
    actions, no clipped rewards. Losing a life is terminal, for learning, but ends no episode.
    """

    FOR_TWO = {"combat", "joust", "maze_craze", "warlords"}  # the emulator ends the process on them

    @classmethod
    def names(cls) -> dict[str, str]:
        """Title -> ROM: MsPacman -> ms_pacman."""
        roms = set(ale_py.roms.get_all_rom_ids()) - cls.FOR_TWO
        return {game_title(rom): rom for rom in sorted(roms)}

    @classmethod
    def named(cls, text: str) -> str:
        """The title for any usual spelling: ms_pacman, ALE/MsPacman-v5, MsPacmanNoFrameskip-v4."""

        def plain(name):
            return re.sub("[^a-z0-9]", "", name.lower())

        titles = {plain(title): title for title in cls.names()}
        wanted = plain(re.sub(r"^ALE/|(Deterministic|NoFrameskip)?-v\d+$", "", text))
        if wanted not in titles:
            near = [titles[name] for name in difflib.get_close_matches(wanted, titles, 3, 0.5)]
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise Mistake(f"there is no game {text!r}: {hint}--list-games lists them all.")
        return titles[wanted]

    def __init__(self, title: str, copies: int = 1, height: int = 64, width: int = 64):
        self.rom = self.names()[title]
        try:
            ale_py.roms.get_rom_path(self.rom)
        except OSError as error:
            raise Mistake(f"the ROM of {title} cannot be used ({str(error).splitlines()[0]}): "
                          "ale-py brings its own, unless ALE_ROMS_DIR names another.") from None
        self.env = AtariVectorEnv(
            self.rom, copies, num_threads=min(copies, os.cpu_count()), img_height=height,
            img_width=width, grayscale=False, stack_num=1, frameskip=4, maxpool=True, noop_max=30,
            episodic_life=False, life_loss_info=False, reward_clipping=False,
            use_fire_reset=False, repeat_action_probability=0.0, full_action_space=False,
            continuous=False, autoreset_mode="NextStep", max_num_frames_per_episode=108_000)
        self.actions = int(self.env.single_action_space.n)

    def reset(self, seeds: np.ndarray) -> np.ndarray:
        """Start every copy afresh, by its seed -> frames (copies, height, width, 3) uint8."""
        frames, info = self.env.reset(seed=np.asarray(seeds, np.int64))
        self.lives, self.opening = info["lives"], info
        return frames[:, 0]

    def step(self, actions: np.ndarray):
        """Actions (copies,) -> frames, rewards, terminal (a life was lost), done (game over).

        Call `reset` when done: it is the reset frame that opens the next episode (D5).
        """
        actions = np.asarray(actions, np.int64)
        if actions.min() < 0 or actions.max() >= self.actions:  # the emulator would hang
            raise ValueError(f"actions are 0 to {self.actions - 1}, not {actions}")
        frames, reward, terminated, truncated, info = self.env.step(actions)
        terminal = terminated | (info["lives"] < self.lives)  # every step (D13); gains mean nothing
        self.lives = info["lives"]
        return frames[:, 0], reward, terminal, terminated | truncated

    def window(self):
        """Show the first copy, just reset, in ale-py's own window -> what to call with each action.

        A second emulator plays the same no-ops and actions, and so the same game.
        """
        ale = ale_py.ALEInterface()
        ale.setBool("display_screen", True)
        ale.setFloat("repeat_action_probability", 0.0)
        ale.loadROM(ale_py.roms.get_rom_path(self.rom))
        ale.reset_game()
        for _ in range(self.opening["episode_frame_number"][0]):  # no-ops so far
            ale.act(ale_py.Action.NOOP)
        actions = ale.getMinimalActionSet()

        def act(action: int) -> np.ndarray:
            for _ in range(4):
                ale.act(actions[action])
            return ale.getScreenRGB()

        return act


# ---------------------------------------------------------------- a run


PURPOSES = ("build", "reset", "play", "windows", "model", "contexts", "dream", "picture", "test")


def randomness(seed: int, step: int, purpose: str) -> np.random.Generator:
    """Seed torch for this purpose at this step, and return numpy's generator for it.

    Nothing else is random. So there is no generator to save, a resumed run draws what it would
    have drawn, and evaluating in between disturbs nothing (D11).
    """
    rng = np.random.default_rng((seed, step, PURPOSES.index(purpose)))
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def episode_seeds(seed: int, episode: int, purpose: str, copies: int = 1) -> np.ndarray:
    """Seeds for the game, one a copy; never negative, which the emulator would take for none."""
    rng = np.random.default_rng((seed, episode, PURPOSES.index(purpose)))
    return rng.integers(2**31, size=copies)


def pick_device(wanted: str, asked_by: str = "device") -> tuple[torch.device, str]:
    """The device that a setting asks for, and the reason in words."""
    if wanted not in DEVICES:
        raise Mistake(f"{flag(asked_by)} is one of {', '.join(DEVICES)}, not {wanted!r}.")
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    have = [name for name in there if there[name]]
    note = ""
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        note = ("; there is an NVIDIA GPU, but this torch is built for the CPU alone: see the "
                "README on how to install the other")
    if wanted == "auto":
        return torch.device(have[0]), "the fastest there is" + note
    if wanted not in have:
        raise Mistake(f"{typed(asked_by, wanted)} is not there{note}. This machine has "
                      f"{', '.join(have)}.")
    return torch.device(wanted), "as asked"


def fast_precision(device: torch.device) -> str:
    """bfloat16 where it is faster than float32. It changes bits, so it is kept with the run.

    A CPU that knows bfloat16 need not be: some multiply twice as fast in it, some half as fast.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if not (able.get("avx512_bf16") or able.get("amx_bf16")):
        return "float32"
    times = {}
    for precision in ("float32", "bfloat16"):
        matrix, clock = torch.ones(1024, 1024, dtype=getattr(torch, precision)), []
        for _ in range(6):
            matrix.mm(matrix)
            clock.append(time.perf_counter())
        times[precision] = min(np.diff(clock))
    return "bfloat16" if 1.2 * times["bfloat16"] < times["float32"] else "float32"


def keep_freed_memory():
    """Have glibc reuse freed memory instead of returning it to the system.

    A seventh of an update on a CPU went into having the same pages mapped and cleared anew.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def memory_of(device: torch.device) -> float:
    """Bytes that the device has to offer; without limit where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def build_networks(s: Settings, actions: int, device) -> tuple[WorldModel, ActorCritic]:
    randomness(s.seed, 0, "build")
    model = WorldModel(
        actions, channels=list(s.channels), strides=list(s.strides), kernels=s.kernels,
        groups=s.groups, classes=s.classes, d_model=s.d_model, layers=s.layers,
        backbone=s.backbone, d_state=s.d_state, head_dim=s.head_dim, dropout=s.dropout,
        head_hidden=s.head_hidden, unimix=s.unimix, free_nats=s.free_nats,
        representation_scale=s.representation_scale, balance=s.balance,
        event_weights=s.event_weights)
    agent = ActorCritic(
        actions, groups=s.groups, classes=s.classes, d_model=s.d_model,
        actor_hidden=s.actor_hidden, critic_hidden=s.critic_hidden, layers=s.agent_layers,
        gamma=s.gamma, lambda_=s.lambda_, entropy=s.entropy, floor=s.floor,
        slow_decay=s.slow_decay, range_decay=s.range_decay,
        replay_critic=s.replay_critic)
    return model.to(device).eval(), agent.to(device).eval()


def has_graphs(s: Settings, device: torch.device) -> bool:
    return s.graphs and device.type == "cuda"


class Graph:
    """A function of tensors, recorded on a CUDA GPU and from then on launched as a whole.

    A GPU is done with a small kernel before Python has launched the next. What is recorded is a
    list of kernels with their addresses: so shapes are fixed, inputs are copied to where they
    were, the outputs of a call are overwritten by the next, and nothing inside may look at a
    number. Random numbers follow torch.manual_seed as ever. The first calls run as they are.
    """

    WARM, stream = 3, None

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= self.WARM:
            return self.beside(inputs)
        if self.graph is None:
            self.inputs, graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
            self.graph = graph
        if inputs:
            torch._foreach_copy_(tree_leaves(self.inputs), tree_leaves(inputs))
        self.graph.replay()
        return self.outputs

    def beside(self, inputs):
        """Call it on the stream where all is recorded: libraries prepare there."""
        Graph.stream, current = Graph.stream or torch.cuda.Stream(), torch.cuda.current_stream()
        Graph.stream.wait_stream(current)
        with torch.cuda.stream(Graph.stream):
            outputs = self.function(*inputs)
        current.wait_stream(Graph.stream)
        return outputs


def make_player(s: Settings, model, agent, games: int = 1, act_on: str = "posterior") -> Player:
    """A player whose state grows no older than any that was trained (T4)."""
    oldest = s.length if s.dream_from == "batch" else 2 * s.context
    player = Player(model, agent, games, oldest, act_on)
    if has_graphs(s, player.d.device):
        player.decide = Graph(player.decide)
    return player


class Run:
    """Everything a run consists of: what is trained, saved and restored."""

    def __init__(self, s: Settings, device: torch.device):
        where = device
        if s.replay_device != "auto":
            where, _ = pick_device(s.replay_device, "replay_device")
        need, have = Replay.bytes_needed(s.steps), memory_of(where)
        if need > 0.9 * have:
            hint = ", or try --replay-device cpu" if where.type != "cpu" else ""
            raise Mistake(f"the replay of --steps {s.steps} takes {need / 2**30:.1f} GiB, and "
                          f"{where} has {have / 2**30:.1f}: ask for fewer{hint}.")
        self.settings, self.device = s, device
        self.replay = Replay(s.steps, device=where)
        self.game = Game(s.game)
        self.model, self.agent = build_networks(s, self.game.actions, device)
        balance = list(self.model.balance.parameters())
        weights = [p for name, p in self.model.named_parameters() if not name.startswith("balance")]
        learning = [p for p in self.agent.parameters() if p.requires_grad]
        eps = max(s.eps, 1e-15) if device.type == "mps" else s.eps  # MPS flushes denormals
        self.model_optimizer = make_optimizer(
            s.optimizer, [dict(params=weights, rate=s.model_rate)]
            + [dict(params=balance, rate=s.balance_rate)] * bool(balance), eps)
        self.agent_optimizer = make_optimizer(
            s.optimizer, [dict(params=learning, rate=s.agent_rate)], eps)
        self.graphs = {}  # phase -> its CUDA graph
        self.player = None  # plays once the random steps are over
        self.step = self.episode = self.updates = self.skipped = self.skipped_in_a_row = 0
        self.seconds, self.score, self.episode_length = 0.0, 0.0, 0
        self.sums, self.counted = {}, 0  # of metrics, since the last row
        self.logs = dict(metrics="", episodes="")  # the text of both tables
        self.frame = self.game.reset(episode_seeds(s.seed, 0, "reset"))  # what is seen now

    def phase(self, function, *inputs, rates_settled: bool = True):
        """function(run, *inputs), from a CUDA graph where that is possible."""
        if has_graphs(self.settings, self.device) and rates_settled:  # or it would freeze them
            if function not in self.graphs:
                self.graphs[function] = Graph(functools.partial(function, self))
            return self.graphs[function](*inputs)
        return function(self, *inputs)

    def autocast(self):
        """Large products in bfloat16 where settled so; scans and losses stay in float32."""
        wanted = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)


# ---------------------------------------------------------------- training


def gradient(optimizer, loss, clip: float):
    """Gradients of a loss, clipped -> (their norm before that, whether loss and norm are finite).

    The learnt loss weights, a group of their own, are left out of the norm.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights, *rest = (group["params"] for group in optimizer.param_groups)
    norm = torch.nn.utils.clip_grad_norm_(weights, clip)
    norm = norm + 0 * sum(p.grad.sum() for params in rest for p in params)  # NaN if they are
    return norm, torch.isfinite(loss.detach() + norm)


def take_step(module, optimizer, finite: Tensor, old_buffers: list, progress: float, step) -> bool:
    """Call `step` if the gradients are finite; else put back the buffers that the loss changed.

    `progress` scales the rates while they warm up.
    """
    if not finite:  # the one wait for the device
        for buffer, value in zip(module.buffers(), old_buffers):
            buffer.copy_(value)
        return False
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * progress
    step()
    return True


# One update is five phases of fixed shapes, in which nothing waits for the device. Between gradient
# and step the host must see that all is finite: there a CUDA graph has to end.


def world_gradient(run: Run, batch: Batch):
    """Phase 1: loss and gradients of the world model, and the latents just drawn."""
    old_buffers = [buffer.clone() for buffer in run.model.buffers()]
    run.model.train()  # input statistics change here and nowhere else (D6)
    with run.autocast():
        loss, metrics, z = run.model.loss(batch)
    norm, finite = gradient(run.model_optimizer, loss, run.settings.model_clip)
    run.model.eval()
    return z, metrics | dict(model_norm=norm), finite, old_buffers


def world_step(run: Run):
    """Phase 2."""
    run.model_optimizer.step()


def learn_world(run: Run, batch: Batch, progress: float):
    """One update of the world model -> (latents just drawn, metrics, whether it was taken)."""
    z, metrics, finite, old_buffers = run.phase(world_gradient, batch)
    taken = take_step(run.model, run.model_optimizer, finite, old_buffers, progress,
                      lambda: run.phase(world_step, rates_settled=progress == 1))
    return z, metrics, taken


@torch.no_grad()
def imagine(run: Run, batch: Batch, z) -> tuple[Dream] | tuple[Dream, Lived]:
    """Phase 3: dreams that start in the model's batch, or else after every context in `batch`; and
    that batch as lived, if the critic is to learn from it too."""
    s, model, lived = run.settings, run.model, ()
    with run.autocast():
        if s.dream_from == "contexts":
            start = model.starts_from_contexts(batch)
        else:
            start, *lived = model.starts_from_batch(batch, z, s.dreams)
        dream = model.imagine(start, s.horizon, lambda t, z, d: run.agent.act(z, d))
    return (dream, *lived) if s.replay_critic else (dream,)


def agent_gradient(run: Run, *seen):
    """Phase 4: loss and gradients of actor and critic, from what phase 3 returned."""
    old_buffers = [buffer.clone() for buffer in run.agent.buffers()]
    with run.autocast():
        loss, metrics = run.agent.loss(*seen)
    norm, finite = gradient(run.agent_optimizer, loss, run.settings.agent_clip)
    return metrics | dict(agent_norm=norm), finite, old_buffers


def agent_step(run: Run):
    """Phase 5."""
    run.agent_optimizer.step()
    run.agent.update_slow_critic()


def learn_to_act(run: Run, seen: tuple, progress: float):
    """One update of actor and critic, from what `imagine` returned -> (metrics, was it taken)."""
    metrics, finite, old_buffers = run.phase(agent_gradient, *seen)
    taken = take_step(run.agent, run.agent_optimizer, finite, old_buffers, progress,
                      lambda: run.phase(agent_step, rates_settled=progress == 1))
    return metrics, taken


def draw_windows(run: Run, rng) -> Batch:
    """Windows of the replay to train the world model on."""
    s = run.settings
    starts = run.replay.training_windows(s.batch, s.length, s.temperature, rng)
    return run.replay.windows(starts, s.length, run.device)


def draw_contexts(run: Run, rng) -> Batch:
    """Windows of the replay to dream on from."""
    s = run.settings
    ratio = s.dreams / s.batch
    starts = run.replay.dreaming_windows(s.dreams, s.context, s.temperature, rng, ratio)
    return run.replay.windows(starts, s.context, run.device)


def train(run: Run, folder: "Folder"):
    """Drama's training loop (paper, algorithm 1), from run.step to the end."""
    s, device, replay = run.settings, run.device, run.replay
    clock = saved = time.monotonic()
    with training_bar(run) as bar:
        while run.step < s.steps:
            step, first = run.step, run.episode_length == 0

            # ---- 1. Play one step, and keep it
            rng = randomness(s.seed, step, "play")
            if step < s.warmup:
                action = int(rng.integers(run.game.actions))
            else:  # in float32: casting the weights for one frame would cost more than it saves
                run.player = run.player or make_player(s, run.model, run.agent)
                seen = torch.from_numpy(run.frame).to(device), torch.tensor([first], device=device)
                action = int(run.player.act(*seen))
            frame, reward, terminal, done = run.game.step([action])
            replay.add(run.frame[0], action, reward[0], terminal[0], first)
            run.frame = frame
            run.score += float(reward[0])
            run.episode_length += 1
            if done[0]:
                log_episode(run, folder)
                run.episode += 1
                run.score, run.episode_length = 0.0, 0
                run.frame = run.game.reset(episode_seeds(s.seed, run.episode, "reset"))  # D5

            if step >= s.warmup and (step - s.warmup) % s.train_every == 0:
                progress = min(1.0, (run.updates + 1) / s.warmup_updates)

                # ---- 2. Learn the world, from windows of the replay
                batch = draw_windows(run, randomness(s.seed, step, "windows"))
                randomness(s.seed, step, "model")
                z, metrics, learnt = learn_world(run, batch, progress)

                # ---- 3. Learn in the dream
                if s.dream_from == "contexts":
                    batch = draw_contexts(run, randomness(s.seed, step, "contexts"))
                randomness(s.seed, step, "dream")
                more, improved = {}, False
                if learnt:  # else the latents to start from may be broken, too
                    more, improved = learn_to_act(run, run.phase(imagine, batch, z), progress)
                count_update(run, folder, metrics | more, improved)

            # ---- 4. Log and save
            run.step += 1
            bar.update()
            now = time.monotonic()
            run.seconds, clock = run.seconds + now - clock, now
            if run.counted == s.log_every or run.counted and run.step == s.steps:
                log_metrics(run, folder, bar)
            if run.step == s.warmup:
                start_learning(bar, run)
            if folder.stop_asked or run.step == s.steps or now - saved > 60 * s.save_minutes:
                folder.save(run)
                saved = time.monotonic()
                if folder.stop_asked:
                    bar.close()
                    print(f"saved at step {run.step:,}: the same command goes on from there")
                    raise SystemExit(130)


def show_progress(**options) -> tqdm:
    """A progress bar; rarely a line where nobody is watching."""
    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(unit="step", dynamic_ncols=True, mininterval=interval, **options)


def training_bar(run: Run) -> tqdm:
    s, learning = run.settings, run.step >= run.settings.warmup
    return show_progress(desc="learning" if learning else "random play", initial=run.step,
                         total=s.steps if learning else s.warmup, smoothing=0)


def start_learning(bar: tqdm, run: Run):
    """Begin the bar anew: counted in, random play would make the time left look too short."""
    bar.total, bar.initial, bar.start_t = run.settings.steps, run.step, time.time()
    bar.set_description("learning")


SKIPPED_IN_A_ROW = 10


def count_update(run: Run, folder: "Folder", metrics: dict, finite: bool):
    """Add an update to the sums for the next row of metrics; stop after ten bad ones in a row."""
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
    broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(float(value)))
    tqdm.write(f"step {run.step}: update skipped, not finite: {broken}")
    if run.skipped_in_a_row == SKIPPED_IN_A_ROW:
        raise Stopped(f"{SKIPPED_IN_A_ROW} updates in a row were not finite ({broken}); "
                      f"the last good save is that of step {folder.saved_step}.")


def log_metrics(run: Run, folder: "Folder", bar: tqdm):
    """A row of metrics.csv: means over the updates since the last row, then the pace."""
    s = run.settings
    means = dict(zip(run.sums["names"], (run.sums["values"] / run.counted).tolist()))
    pace = (bar.n - bar.initial) / max(time.time() - bar.start_t, 1e-9)
    folder.append(run, "metrics", dict(
        step=run.step, updates=run.updates, skipped=run.skipped, **means, steps_per_second=pace,
        frames_per_second=pace * (s.replayed + s.dreams * s.horizon) / s.train_every,
        seconds=run.seconds))
    bar.set_postfix_str(f"model {means['model_loss']:.1f}, return {means['dream_return']:.2f}, "
                        f"entropy {means['entropy']:.2f}", refresh=False)
    run.sums, run.counted = {}, 0


def log_episode(run: Run, folder: "Folder"):
    normalised = human_normalised(run.settings.game, run.score)
    folder.append(run, "episodes", dict(
        step=run.step + 1, score=run.score, length=run.episode_length,
        human_normalised="" if normalised is None else normalised))
    tqdm.write(f"step {run.step + 1:,}: score {run.score:g} in {run.episode_length} steps")


# ---------------------------------------------------------------- benchmark


PRODUCT = 4096  # side of the matrices that show what the machine can do


def bench(s: Settings, device: torch.device, repeats: int = 7):
    """Where the time goes: medians, arithmetic and its share of what a large product reaches."""
    run = Run(s, device)
    rng, times, work = np.random.default_rng(0), {}, {}
    dtype = torch.bfloat16 if s.precision == "bfloat16" else torch.float32

    def wait():
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    def measure(name, phase, *args):
        for i in range(repeats + 2):  # the first warms up, the second counts the arithmetic
            wait()
            start = time.perf_counter()
            with FlopCounterMode(display=False) if i == 1 else contextlib.nullcontext() as counter:
                result = phase(*args)
            wait()
            if i == 1:
                work[name] = counter.get_total_flops()
            elif i > 1:
                times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def draw_batches():
        batch = draw_windows(run, rng)
        return batch, draw_contexts(run, rng) if s.dream_from == "contexts" else batch

    run.replay.frame.random_()  # a full replay: what its frames show costs nothing
    run.replay.length = s.steps
    matrix = torch.randn(PRODUCT, PRODUCT, device=device, dtype=dtype)
    measure("large product", torch.mm, matrix, matrix)
    player = make_player(s, run.model, run.agent)
    frame, first = torch.from_numpy(run.frame).to(device), torch.tensor([False], device=device)
    measure("emulator", run.game.step, [0])
    measure("play", lambda: player.act(frame, first).item())
    batch, contexts = measure("replay sampling", draw_batches)
    z, *_ = measure("model update", learn_world, run, batch, 1.0)
    seen = measure("dream", run.phase, imagine, contexts, z)
    measure("agent update", learn_to_act, run, seen, 1.0)

    median = {name: float(np.median(each)) for name, each in times.items()}
    peak = work["large product"] / median["large product"]
    parts = ("replay sampling", "model update", "dream", "agent update")
    for column in (median, work):
        column["whole update"] = sum(column[part] for part in parts)
    print(f"{s.preset} on {device}, {s.precision}, {torch.get_num_threads()} threads, a replay of "
          f"{s.steps:,} steps; medians of {repeats}\n"
          f"{'phase':<16}{'ms':>10}{'GFLOP':>10}{'GFLOP/s':>10}{'of product':>12}")
    for name, seconds in median.items():
        rate = work[name] / seconds
        print(f"{name:<16}{1e3 * seconds:>10.1f}{work[name] / 1e9:>10.2f}{rate / 1e9:>10.1f}"
              f"{rate / peak:>11.0%}")
    updates, update = (s.steps - s.warmup) / s.train_every, median["whole update"]
    hours = (s.steps * (median["play"] + median["emulator"]) + updates * update) / 3600
    print(f"{s.replayed / update:,.0f} frames replayed and "
          f"{s.dreams * s.horizon / update:,.0f} dreamed a second; {s.steps:,} steps take "
          f"{hours:.1f} hours; peak memory {peak_memory(device) / 2**30:.2f} GiB")


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device where it counts them, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    if os.name != "posix":
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---------------------------------------------------------------- evaluation


# game: random play, human, Drama as published (XS, with dfs), the same with uniform sampling
SCORES = {row.split()[0]: tuple(map(float, row.split()[1:])) for row in """
    Alien 228 7128 820 696;              Amidar 6 1720 131 154
    Assault 222 742 539 511;             Asterix 210 8503 1632 1045
    BankHeist 14 753 137 52;             BattleZone 2360 37188 10860 10900
    Boxing 0 12 78 49;                   Breakout 2 30 7 11
    ChopperCommand 811 7388 1642 1083;   CrazyClimber 10780 35829 83931 77140
    DemonAttack 152 1971 201 151;        Freeway 0 30 15 15
    Frostbite 65 4335 785 975;           Gopher 258 2412 2757 2289
    Hero 1027 30826 7946 7564;           Jamesbond 29 303 372 363
    Kangaroo 52 3035 1384 620;           Krull 1598 2666 9693 7553
    KungFuMaster 258 22736 23920 24030;  MsPacman 307 6952 2270 2508
    Pong -21 15 15 3;                    PrivateEye 25 69571 90 76
    Qbert 164 13455 796 939;             RoadRunner 12 7845 14020 9328
    Seaquest 68 42055 497 384;           UpNDown 533 11693 7387 5756
""".replace("\n", ";").split(";") if row.strip()}


def human_normalised(game: str, score: float) -> float | None:
    """Percent of the way from random play to a human's; None where no such scores are known."""
    if game not in SCORES:
        return None
    random, human, *_ = SCORES[game]
    return 100 * (score - random) / (human - random)


class Move(NamedTuple):
    """A step of games side by side."""

    frame: np.ndarray  # (games, height, width, 3) uint8: what the player saw
    action: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    over: np.ndarray  # (games,) bool: games that are over now
    after: np.ndarray  # the frames it led to


def play(s: Settings, player: Player, device, game: Game, frame: np.ndarray, limit=math.inf):
    """Play `game`, just reset to `frame`, for `limit` steps or until every copy is over -> Moves.

    The player remembers nothing from before (D8); a copy that is over earns nothing more.
    """
    over, step = np.zeros(len(frame), bool), 0
    while step < limit and not over.all():
        randomness(s.seed, step, "test")
        first = torch.full((len(frame),), step == 0, device=device)
        action = player.act(torch.from_numpy(frame).to(device), first).cpu().numpy()
        after, reward, terminal, done = game.step(action)
        reward, over = np.where(over, 0, reward), over | done
        yield Move(frame, action, reward, terminal, over, after)
        frame, step = after, step + 1


def evaluate(s: Settings, player: Player, device) -> list[float]:
    """Scores of full episodes, played side by side, one each, with sampled actions.

    Every episode that began counts: the first to finish are not the typical ones (D9). The game
    is set up as in training (D14). Ctrl-C ends it early, with the episodes that are over by then.
    """
    copies = s.eval_episodes
    game, score, over = Game(s.game, copies), np.zeros(copies), np.zeros(copies, bool)
    frame = game.reset(episode_seeds(s.seed, 0, "test", copies))
    with show_progress(desc="evaluation", iterable=play(s, player, device, game, frame)) as bar:
        try:
            for move in bar:
                score, over = score + move.reward, move.over
                text = f"{over.sum()} of {copies} over, mean so far {score.mean():.1f}"
                bar.set_postfix_str(text, refresh=False)
        except KeyboardInterrupt:
            print(f"ended early: {over.sum()} of {copies} episodes were over, and only they count")
    return score[over].tolist()


@contextlib.contextmanager
def whole(path: Path, remedy: str):
    """While a file is read: refuse it, by its name, if it is not as it was written."""
    try:
        yield
    except (ValueError, KeyError, TypeError):
        raise Mistake(f"{path} is damaged: {remedy}.") from None


def kept_evaluation(path: Path) -> tuple[int, list[float]]:
    """Step and scores of an evaluation on the disk."""
    with whole(path, "delete it, and --eval makes a new one"):
        kept = json.loads(path.read_bytes())
        return int(kept["step"]), [float(score) for score in kept["scores"]]


def evaluate_and_report(s: Settings, player: Player, state: dict, device, path: Path):
    """Evaluate, print the table that closes a run, and write it to `path`."""
    known = len(kept_evaluation(path)[1]) if path.exists() else 0
    scores = evaluate(s, player, device)
    rows = state["logs"]["episodes"].splitlines()[1:]
    last = [float(row.split(",")[1]) for row in rows[-5:]]
    table = {"game": s.game, "steps trained": state["step"],
             "actor sees": f"{player.act_on} latent",
             "episodes": f"{len(scores)} of {s.eval_episodes} begun, sampled actions"}
    if scores:
        table["final score"] = f"{np.mean(scores):.1f}, spread {np.std(scores):.1f}"
        table["lowest, highest"] = f"{min(scores):g}, {max(scores):g}"
    if last:
        table["paper's protocol"] = f"{np.mean(last):.1f}, last {len(last)} training episodes"
    if s.game in SCORES:
        random, human, *paper = SCORES[s.game]
        paper = paper[s.sampling == "uniform"]
        if scores:
            table["human-normalised"] = f"{human_normalised(s.game, np.mean(scores)):.1f} %"
        table["published Drama"] = (f"{paper:g}, {human_normalised(s.game, paper):.1f} %, "
                                    f"{s.sampling} sampling")
        table["random, human"] = f"{random:g}, {human:g}"
    print("\n".join(f"  {name:<17} {value}" for name, value in table.items()))
    if len(scores) < max(known, s.eval_episodes):  # ended early, or less than is known already
        print(f"  not kept{f': {path} holds {known} episodes' if known else ''}")
    else:
        result = dict(game=s.game, preset=s.preset, seed=s.seed, step=state["step"], scores=scores,
                      act_on=player.act_on, last_training_scores=last)
        write_file(path, json.dumps(result, indent=1).encode())
    if len(scores) < s.eval_episodes:
        print("  the same command evaluates again")
        raise SystemExit(130)


FILM_SPEED = 15  # steps a second: the console drew 60 frames


def watch(s: Settings, player: Player, device, path: Path, limit: int = 2000):
    """Film an episode in full size: the same game, seed and actions in a second, larger Game.

    Where there is a display it is also shown in a window, as fast as a human would play.
    """
    small, large = Game(s.game), Game(s.game, height=210, width=160)
    seeds = episode_seeds(s.seed, 1, "test")
    frame, film, score = small.reset(seeds), [large.reset(seeds)[0]], 0.0
    display = sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}
    show = small.window() if display and hasattr(small, "window") else None
    moves, shown = play(s, player, device, small, frame, limit), time.monotonic()
    for move in show_progress(desc="playing", total=limit, iterable=moves):
        film.append(large.step(move.action)[0][0])
        score += float(move.reward[0])
        if show:
            show(move.action[0])
            time.sleep(max(0, 1 / FILM_SPEED - (time.monotonic() - shown)))
            shown = time.monotonic()
    write_png(path, film, per_second=FILM_SPEED)
    span = "the episode" if move.over[0] else f"its first {limit} steps"
    print(f"score {score:g} in {span}: {path} is an animated PNG, which any browser shows")


# ---------------------------------------------------------------- pictures


def write_png(path: Path, frames: list[np.ndarray], per_second: int = 1):
    """Frames (height, width, 3) uint8 -> a PNG, animated if they are several."""
    (height, width, _), parts, count = frames[0].shape, [], iter(range(2 * len(frames)))

    def chunk(kind: bytes, form: str, *numbers, data: bytes = b""):
        body = kind + struct.pack(">" + form, *numbers) + data
        parts.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))

    chunk(b"IHDR", "2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    if len(frames) > 1:
        chunk(b"acTL", "2I", len(frames), 0)
    for i, frame in enumerate(frames):
        rows = np.pad(frame.reshape(height, -1), ((0, 0), (1, 0)))  # each begins with filter 0
        data = zlib.compress(rows.tobytes())
        if len(frames) > 1:
            chunk(b"fcTL", "5I2H2B", next(count), width, height, 0, 0, 1, per_second, 0, 0)
        if i == 0:
            chunk(b"IDAT", "", data=data)
        else:
            chunk(b"fdAT", "I", next(count), data=data)
    chunk(b"IEND", "")
    write_file(path, b"\x89PNG\r\n\x1a\n" + b"".join(parts))


# Letters of 5 x 7 pixels: a byte a column, the top row in the lowest bit
LETTERS = dict(A="7e1111117e", C="3e41414122", D="7f4141221c", E="7f49494941", L="7f40404040",
               M="7f020c027f", N="7f0408107f", O="3e4141413e", R="7f09192946", S="4649494931",
               T="01017f0101", U="3f4040403f")


def label(text: str, height: int) -> np.ndarray:
    """White capitals on black, (height, 100, 3) uint8."""
    columns = np.frombuffer(bytes.fromhex("00".join(LETTERS[letter] for letter in text)), np.uint8)
    image = np.zeros((height, 100, 1), np.uint8)
    top = (height - 7) // 2
    image[top : top + 7, 4 : 4 + len(columns), 0] = 255 * (columns >> np.arange(7)[:, None] & 1)
    return image.repeat(3, -1)


PICTURE_CONTEXT, PICTURE_STEPS = 5, 16


@torch.no_grad()
def dream_picture(model: WorldModel, batch: Batch) -> np.ndarray:
    """Real frames; their reconstructions; an open-loop dream of the same actions after five."""
    context = PICTURE_CONTEXT
    real = model.images(batch.frame)  # (16, 3, 64, 64)
    rebuilt = model.decode(model.posterior(real).argmax(-1))
    start = model.starts_from_contexts(Batch(*(part[:, :context] for part in batch)))
    dream = model.imagine(start, PICTURE_STEPS - context,
                          lambda t, z, d: batch.action[:, context - 1 + t])
    dreamt = torch.cat([rebuilt[:context], model.decode(dream.z[1:, 0])])
    rows = []
    for text, images in dict(REAL=real, RECONSTRUCTED=rebuilt, DREAMT=dreamt).items():
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
        if text == "DREAMT":  # a red line where it leaves the real frames behind
            pixels[context, :, 0] = 255, 0, 0
        rows.append(np.concatenate([label(text, pixels.shape[1]), *pixels], 1))
    return np.concatenate(rows).repeat(2, 0).repeat(2, 1)


def picture_of(run: Run) -> np.ndarray:
    """The dream of the present model from somewhere in the replay."""
    rng = randomness(run.settings.seed, run.step, "picture")
    window = rng.integers(run.replay.length - PICTURE_STEPS + 1, size=1)
    return dream_picture(run.model, run.replay.windows(window, PICTURE_STEPS, run.device))


# ---------------------------------------------------------------- what the model has learnt


CHECK_EPISODES, CHECK_LIMIT = 5, 2000  # and steps of each
DREAMT = (1, 5, 15)  # steps into a dream
EVERY, AT_MOST, AT_ONCE = 4, 512, 32  # steps between dreams; dreams; and how many of them together


class Played(NamedTuple):
    """Whole episodes, one after the other, and after each the frame it ended with."""

    replay: Replay
    spans: list[tuple[int, int]]  # of an episode: its first step, and the frame after its last
    kl: np.ndarray  # (steps,) nats, of q(z_t) from the prior of the play state
    value: np.ndarray  # v(s_t)
    age: np.ndarray  # steps that the play state had seen


@torch.no_grad()
def play_to_check(s: Settings, player: Player, device) -> Played:
    """Fresh episodes side by side, with seeds that neither training nor evaluation uses."""
    model, copies = player.model, CHECK_EPISODES
    game, length, steps = Game(s.game, copies), np.ones(copies, int), []
    frame = game.reset(episode_seeds(s.seed, 2, "test", copies))
    d, age = player.d.clone(), player.age  # before the step, which moves both on
    moves = play(s, player, device, game, frame, CHECK_LIMIT)
    for move in show_progress(desc="playing", total=CHECK_LIMIT, iterable=moves):
        image = model.images(torch.from_numpy(move.frame).to(device))
        kl = kl_divergence(model.posterior(image), model.prior(d))
        value = player.agent.value(player.history[-1][0], d)
        steps.append((move.frame, move.action, move.reward, move.terminal,
                      np.full(copies, not steps), kl.cpu().numpy(), value.cpu().numpy(),
                      np.full(copies, age)))
        d, age, length = player.d.clone(), player.age, length + ~move.over
    length = np.minimum(length, len(steps))  # of those that were not over, too
    steps.append((move.after, *[np.zeros(copies)] * 7))
    columns = [np.stack(column, 1) for column in zip(*steps)]  # (copies, steps + 1, ...)
    columns = [np.concatenate([rows[: n + 1] for rows, n in zip(column, length)])
               for column in columns]
    replay = Replay(len(columns[0]))
    replay.append_steps(dict(zip(("frame", "action", "reward", "terminal", "first"), columns)))
    stops = np.cumsum(length + 1) - 1
    return Played(replay, list(zip(stops - length, stops)), *columns[5:])


@torch.no_grad()
def dream_beside(player: Player, played: Played, device) -> tuple[np.ndarray, Dream]:
    """Steps all along the episodes, and dreams from there that take the recorded actions.

    Half a window of real frames comes before.
    """
    model, context, horizon = player.model, player.half, max(DREAMT)
    starts = np.concatenate([np.arange(first + context, stop - horizon + 1, EVERY)
                             for first, stop in played.spans])
    starts, parts = starts[:: max(1, -(-len(starts) // AT_MOST))], []
    for few in (starts[i : i + AT_ONCE] for i in range(0, len(starts), AT_ONCE)):
        real = played.replay.windows(few - context, context + horizon, device)
        start = model.starts_from_contexts(Batch(*(part[:, : context + 1] for part in real)))
        parts.append(model.imagine(start, horizon, lambda t, z, d: real.action[:, context + t]))
    return starts, parts and Dream(*(torch.cat(part, 1) for part in zip(*parts)))


@torch.no_grad()
def figures(model: WorldModel, replay: Replay, starts: np.ndarray, dream: Dream, k: int, device):
    """What --model-check prints of dreams of k steps -> name: figure, NaN where there is none.

    Frames and KL are those of the last step, z_k; rewards and ends those of all k.
    """

    def frames(step):
        return model.images(replay.windows(starts + step, 1, device).frame)

    def moved(image, before):
        return (image - before).mean(1).abs() > 16 / 255

    def rms(error):  # of 255
        return 255 * error.mean().sqrt().item()

    def foreseen(name, real, guess):
        hits = (real & guess).sum()
        return {f"{name} that came": real.sum().item(),
                f"{name} foreseen, %": (100 * hits / real.sum()).item(),
                f"foreseen {name} that came, %": (100 * hits / guess.sum()).item()}

    image, moving = frames(k), moved(frames(k), frames(k - 1))
    dreamt = model.decode(dream.z[k])
    followed = moved(dreamt, model.decode(dream.z[k - 1]))[moving]
    error, still = ((guess - image).square().mean(1) for guess in (dreamt, frames(0)))
    kl = kl_divergence(model.posterior(image), model.prior(dream.d[k]))
    real = replay.windows(starts, k, device)
    reward, end = dream.reward[:k].T, dream.end[:k].T
    smallest = replay.reward[replay.reward != 0]
    least = abs(smallest).min() if len(smallest) else math.inf
    return {
        "error, all pixels": rms(error), "  had nothing moved": rms(still),
        "error, moving pixels": rms(error[moving]), "  had they not moved": rms(still[moving]),
        "moving pixels that move, %": 100 * followed.float().mean().item(),
        "KL, nats": kl.mean().item(),
        "mean reward": real.reward.mean().item(), "mean dreamt reward": reward.mean().item(),
        **foreseen("rewards", real.reward != 0, reward.abs() > least / 2),
        **foreseen("ends", real.terminal > 0, end > 0.5)}


def model_check(s: Settings, player: Player, device, path: Path):
    """Play, dream beside it, print one table, and draw one of the dreams."""
    played = play_to_check(s, player, device)
    starts, dream = dream_beside(player, played, device)
    if not dream:
        raise Stopped(f"the episodes were over within the {player.half + max(DREAMT)} steps that a "
                      "comparison takes.")
    table = {k: figures(player.model, played.replay, starts, dream, k, device) for k in DREAMT}
    scores, ages, returns, at, quarter = [], {}, [], [], max(1, player.half // 4)
    for first, stop in played.spans:
        steps = slice(first, stop)
        reward, end = (torch.from_numpy(column[steps].astype(np.float32))[:, None]
                       for column in (played.replay.reward, played.replay.terminal))
        value = torch.zeros(len(reward) + 1, 1)
        value[-1] = float(played.value[stop - 1])  # where the episode was cut off
        returns += lambda_return(reward, end, value, s.gamma, 1.0).flatten().tolist()
        scores.append(f"{reward.sum():g}" + "+" * (len(reward) == CHECK_LIMIT))
        at += range(first, stop)
        for step in range(first + player.half, stop):  # before, a state is as old as the episode
            ages.setdefault(int(played.age[step]) // quarter * quarter, []).append(step)
    value, known = played.value[at], played.replay.reward[at].mean()
    agree = float(np.corrcoef(value, returns)[0, 1]) if np.std(returns) and value.std() else 0.0
    kl = {f"{age} on": float(played.kl[ages[age]].mean()) for age in sorted(ages)}

    def line(name, cells):
        return f"{name:<32}" + "".join(
            f"{cell:>10}" if isinstance(cell, (str, int)) else f"{cell:>10.2f}" for cell in cells)

    rows = [line(name, ("-" if math.isnan(table[k][name]) else table[k][name] for k in DREAMT))
            for name in table[1]]
    print(f"{CHECK_EPISODES} episodes, scores {', '.join(scores)}; {len(starts)} dreams; errors "
          f"are of 255\n\n{line('steps of a dream', DREAMT)}", *rows, "", sep="\n")
    print(line("age of the play state, steps", kl), line("KL, nats", kl.values()), sep="\n")
    print(f"\nvalue and return that followed: correlation {agree:.2f}, means {value.mean():.2f} "
          f"and {np.mean(returns):.2f}; real reward a step {known:.3f}")
    clean = {k: {name: None if math.isnan(value) else value for name, value in row.items()}
             for k, row in table.items()}
    write_file(path.with_suffix(".json"), json.dumps(dict(
        dreams=clean, kl_by_age=kl, value_correlation=agree, mean_value=float(value.mean()),
        mean_return=float(np.mean(returns)), scores=scores), indent=1).encode())
    middle = starts[len(starts) // 2 : len(starts) // 2 + 1] - PICTURE_CONTEXT + 1
    window = played.replay.windows(middle, PICTURE_STEPS, device)
    randomness(s.seed, 0, "picture")
    write_png(path, [dream_picture(player.model, window)])
    print(f"one of the dreams beside what happened: {path}")


# ---------------------------------------------------------------- learning curves


SMOOTH = 5  # training episodes that a point of a curve averages, as in the paper's protocol
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")


def no_run(path: Path) -> Mistake:
    return Mistake(f"{path} holds no run." if path.is_dir() else f"there is no folder {path}.")


def learning_curve(folder: Path) -> tuple[str, np.ndarray, list]:
    """A run's game, its training scores and its evaluations: rows of (step, score)."""
    settings, table = folder / "settings.json", folder / "episodes.csv"
    if not settings.exists():
        raise no_run(folder)
    with whole(settings, "the run writes it anew when it goes on"):
        game = json.loads(settings.read_bytes())["game"]
    with whole(table, "the run writes it anew when it goes on"):  # but a half row may be its last
        rows = table.read_text("utf-8").splitlines()[1:] if table.exists() else []
        points = np.array([row.split(",")[:2] for row in rows if row.count(",") > 2], float)
    if not len(points):
        raise Mistake(f"{folder} has not finished an episode yet.")
    tests = (kept_evaluation(path) for path in folder.glob("evaluation-*[0-9].json"))
    return game, points, [(step, np.mean(scores)) for step, scores in tests]


def curves(folders: list[Path], path: Path):
    """Draw the training scores of runs over their steps, a panel a game, as SVG."""
    panels = {}
    for folder in folders:
        game, points, tests = learning_curve(folder)
        panels.setdefault(game, []).append((folder.resolve().name, points, tests))
    width, height, parts = 660, 300, []
    for number, (game, runs) in enumerate(sorted(panels.items())):
        parts.append(f'<g transform="translate(0 {number * height})">{panel(game, runs)}</g>')
    write_file(path, (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * len(panels)}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        + "".join(parts) + "</svg>\n").encode("utf-8", "replace"))
    print(f"training scores of {', '.join(map(str, folders))}: {path}")


def panel(game: str, runs: list, left=70, right=500, top=30, bottom=260) -> str:
    """Every training episode a dot, their running mean a line, every evaluation a ring; known
    scores as dashed lines."""
    known = dict(zip(("random", "human", "published Drama"), SCORES.get(game, ())))
    marks = np.concatenate([[*points, *tests] for _, points, tests in runs])
    steps, scores = marks[:, 0].max(), [*marks[:, 1], *known.values()]
    low, high = min(scores), max(scores) + (max(scores) == min(scores))

    def place(step, score):
        return (f"{left + (right - left) * step / steps:.1f}",
                f"{bottom - (bottom - top) * (score - low) / (high - low):.1f}")

    def text(x, y, words, **style):
        style = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
        return f'<text x="{x}" y="{y}"{style}>{html.escape(words)}</text>'

    parts = [text(left, top - 12, game, font_weight="bold"),
             text((left + right) / 2, bottom + 32, "steps (4 frames each)", text_anchor="middle"),
             f'<path d="M{left} {top}V{bottom}H{right}" fill="none" stroke="black"/>']
    for share in (0, 0.5, 1):
        parts += [text(place(share * steps, 0)[0], bottom + 16, f"{share * steps:,.0f}",
                       text_anchor="middle"),
                  text(left - 6, place(0, low + share * (high - low))[1],
                       f"{low + share * (high - low):,.0f}", text_anchor="end")]
    lowest = math.inf
    for name, score in sorted(known.items(), key=lambda item: item[1]):
        y = place(0, score)[1]
        lowest = min(float(y) + 4, lowest - 14)  # or the words would lie on each other
        parts += [f'<path d="M{left} {y}H{right}" stroke="grey" stroke-dasharray="4 4"/>',
                  text(right + 6, lowest, f"{name} {score:,g}", fill="grey")]
    for number, (name, points, tests) in enumerate(runs):
        colour = COLOURS[number % len(COLOURS)]
        mean = [points[max(0, i + 1 - SMOOTH) : i + 1, 1].mean() for i in range(len(points))]
        line = "L".join(" ".join(place(*point)) for point in zip(points[:, 0], mean))
        dashes = 6 * (number // len(COLOURS))  # when the colours come again
        parts.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2" '
                     f'stroke-dasharray="{dashes}"/>')
        for point in points:
            x, y = place(*point)
            parts.append(f'<circle cx="{x}" cy="{y}" r="2" fill="{colour}" opacity="0.4"/>')
        for x, y in (place(*test) for test in tests):
            parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="none" stroke="{colour}"/>')
        parts.append(text(left + 10, top + 28 + 14 * number, name, fill=colour))
    return "".join(parts)


# ---------------------------------------------------------------- saving and resuming

FORMAT = 1  # of a save
CHUNK = 1024  # steps in a replay file
BYTES_A_STEP = 1500  # on the disk: the worst of 26 games, and a picture at every save


def sync(handle: int):
    """Return when an open file or folder is safe on the disk."""
    os.fsync(handle)
    if sys.platform == "darwin":  # where fsync stops at the drive's cache
        with contextlib.suppress(OSError):  # not every disk can do more
            fcntl.fcntl(handle, fcntl.F_FULLFSYNC)


def sync_folder(path: Path):
    """A file is only as safe as its name: return when the names in a folder are."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            sync(handle)
        finally:
            os.close(handle)


def rename(source: Path, target: Path):
    """Put a file in the place of another, at once."""
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


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def step_of(path: Path) -> int:
    """state-000500.pt -> 500"""
    return int(re.search("[0-9]+", path.name)[0])


def not_finite(values, name: str) -> list[str]:
    """Names of the numbers, in nested containers, that are NaN or infinite."""
    return [name + keystr(path) for path, value in tree_leaves_with_path(values)
            if isinstance(value, (Tensor, float)) and not torch.as_tensor(value).isfinite().all()]


class Damaged(Exception):
    """A file of a save is missing, or is not as it was written."""


class Folder:
    """A run on the disk.

    replay-000.npz     1,024 steps, written once; replay-001.npz the next ...
    state-000500.pt    at step 500, all that changes: networks, optimisers, counters, newest steps
    save-000500.json   the manifest: settings, versions, and the SHA-256 of every file it needs.
                       A save is one when its manifest appears, and not before
    settings.json, metrics.csv, episodes.csv, dream-*.png, evaluation-*.json     are for people

    The save before is kept. Loading verifies everything before it uses anything.
    """

    def __init__(self, path: Path):
        self.path, self.stop_asked, self.saved_step = path, False, 0
        self.chunks = {}  # replay files on the disk: name -> SHA-256
        self.unwritten = dict(metrics="", episodes="")  # rows that found their table locked

    def numbered(self, kind: str, suffix: str) -> list[Path]:
        """Files such as save-000500.json, newest first. Copies under other names are not ours."""
        name = re.compile(rf"{kind}-[0-9]{{6,}}{re.escape(suffix)}")
        found = [path for path in self.path.glob(f"{kind}-*") if name.fullmatch(path.name)]
        return sorted(found, key=step_of, reverse=True)

    def manifests(self) -> list[Path]:
        return self.numbered("save", ".json")

    def open_for_writing(self):
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
            new = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            for path in new:
                sync_folder(path.parent)
            self.lock = open(self.path / "lock", "a")
        except OSError as error:
            raise Mistake(f"{self.path} cannot be written to: {error.strerror}.") from None
        try:  # the system frees the lock when this process ends, however it ends
            if os.name == "posix":
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(self.lock.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            raise Mistake(f"{self.path} is in use by another process: stop it first.") from None

    def check_room(self, run: Run):
        """Refuse to begin what the disk may not hold to the end."""
        if run.step == run.settings.steps:
            return
        weights = sum(p.numel() for part in (run.model, run.agent) for p in part.parameters())
        state = 3 * 4 * weights + Replay.bytes_needed(CHUNK)  # the optimisers keep two more of each
        need = BYTES_A_STEP * (run.settings.steps - run.step) + state * (1 if run.step else 3)
        there = next(path for path in (self.path, *self.path.absolute().parents) if path.is_dir())
        if need > (free := shutil.disk_usage(there).free):
            raise Mistake(f"this run may take {need / 2**20:,.0f} MiB more in {self.path} and the "
                          f"disk has {free / 2**20:,.0f}: make room, or give another --run.")

    def append(self, run: Run, name: str, row: dict):
        """Add a row to metrics.csv or episodes.csv, and to its text in the run."""
        cells = (f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in row.values())
        line = ",".join(cells) + "\n"
        if not run.logs[name]:
            line = ",".join(row) + "\n" + line
        run.logs[name] += line
        self.unwritten[name] += line
        try:
            with open(self.path / f"{name}.csv", "a") as file:
                file.write(self.unwritten[name])
            self.unwritten[name] = ""
        except PermissionError:  # on Windows, while a spreadsheet shows it: with the next row, then
            if os.name == "posix":
                raise

    def save(self, run: Run):
        """Replay files, state, manifest, in this order; then drop what the last two do not need."""
        step, before, state = run.step, self.saved_step, state_of(run)
        if broken := not_finite(state, "run"):
            raise Stopped(f"{', '.join(broken[:3])} is not finite: step {step} is not saved; "
                          f"the last good save is that of step {before}.")
        for start in range(0, step - CHUNK + 1, CHUNK):
            name = f"replay-{start // CHUNK:03d}.npz"
            if name not in self.chunks:
                data = io.BytesIO()
                np.savez_compressed(data, **run.replay.steps(start, start + CHUNK))
                write_file(self.path / name, data.getvalue())
                self.chunks[name] = sha256(data.getvalue())
        data = io.BytesIO()  # in memory first: on a full disk torch.save complains of positions
        torch.save(state, data)
        name = f"state-{step:06d}.pt"
        write_file(self.path / name, data.getvalue())
        settings = asdict(run.settings)
        content = dict(
            format=FORMAT, step=step, files=self.chunks | {name: sha256(data.getvalue())},
            settings=settings, threads=torch.get_num_threads(), device=str(run.device),
            python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
        signed = dict(content=content, sha256=sha256(json.dumps(content).encode()))
        write_file(self.path / f"save-{step:06d}.json", json.dumps(signed, indent=1).encode())
        self.saved_step = step
        write_file(self.path / "settings.json", json.dumps(settings, indent=1).encode())
        if step >= PICTURE_STEPS:
            write_png(self.path / f"dream-{step:06d}.png", [picture_of(run)])
        kept = {f"{kind}-{number:06d}" for kind in ("save", "state") for number in (before, step)}
        half_written = self.numbered("state", ".pt.tmp") + self.numbered("save", ".json.tmp")
        for path in self.manifests() + self.numbered("state", ".pt") + half_written:
            if path.stem not in kept:
                path.unlink()

    def load(self, with_replay: bool = True) -> tuple[dict, dict, dict]:
        """The newest save that is whole: manifest, state, replay files by name; all verified."""
        manifests = self.manifests()
        problems = [f"{path.name} has no manifest, as after a save cut short"
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
            state = files.pop(f"state-{manifest['step']:06d}.pt")
            return manifest, torch.load(io.BytesIO(state), "cpu", weights_only=True), files
        if problems:
            raise Mistake(f"no whole save is left in {self.path}: "
                          f"{'; '.join(dict.fromkeys(problems))}: put the files back from a copy, "
                          "or start over in another folder.")
        raise no_run(self.path)

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
            intact = sha256(json.dumps(content).encode()) == signed["sha256"]
        except (ValueError, KeyError, TypeError, OSError):
            intact = False
        if not intact or content["step"] != step_of(path):
            raise Damaged(f"{path.name} is damaged")
        if content["format"] > FORMAT:
            raise Mistake(f"{path} was written by a newer version of this program: use that one.")
        return content


COUNTED = ("step", "episode", "updates", "skipped", "skipped_in_a_row", "seconds", "score",
           "episode_length", "sums", "counted", "logs")
LEARNING = ("model", "agent", "model_optimizer", "agent_optimizer")


def state_of(run: Run) -> dict:
    """All that a save holds beside the full replay files: not the weights alone (D16)."""
    newest = run.replay.steps(run.step // CHUNK * CHUNK, run.step)
    return dict({name: getattr(run, name) for name in COUNTED},
                learning={name: getattr(run, name).state_dict() for name in LEARNING},
                player=run.player and run.player.state_dict(),
                newest=tree_map(torch.from_numpy, newest),
                counters=tree_map(torch.from_numpy, run.replay.counters()))


def restore(run: Run, state: dict, chunks: dict[str, bytes]):
    """Put a verified save into a new run; the game is played again to where it was."""
    for name in sorted(chunks, key=lambda name: (len(name), name)):
        with np.load(io.BytesIO(chunks[name]), allow_pickle=False) as steps:
            run.replay.append_steps(steps)
    run.replay.append_steps(tree_map(Tensor.numpy, state["newest"]))
    run.replay.load_counters(tree_map(Tensor.numpy, state["counters"]))
    for name in COUNTED:
        setattr(run, name, state[name])
    if run.sums:
        run.sums["values"] = run.sums["values"].to(run.device)
    for name in LEARNING:
        for group, ours in zip(state["learning"][name].get("param_groups", []),
                               getattr(getattr(run, name), "param_groups", [])):
            group |= {key: ours[key] for key in ("eps", "capturable") if key in ours}  # device's
        getattr(run, name).load_state_dict(state["learning"][name])
    if state["player"]:
        run.player = make_player(run.settings, run.model, run.agent)
        run.player.load_state_dict(state["player"])

    # The emulator cannot be saved: its seed and the episode's actions lead to the same state
    run.frame = run.game.reset(episode_seeds(run.settings.seed, run.episode, "reset"))
    for step in range(run.step - run.episode_length, run.step):
        if not np.array_equal(run.frame[0], run.replay.frame[step].cpu().numpy()):
            raise Stopped(f"the game did not repeat itself at step {step}: was this run made with "
                          "another version of ale-py?")
        run.frame, *_ = run.game.step(run.replay.action[step : step + 1])


def load_player(path, device: str = "cpu", games: int = 1, act_on: str = "posterior", **changes):
    """Settings, with `changes`, player and saved state of a run folder: all one needs to play."""
    manifest, state, _ = Folder(Path(path)).load(with_replay=False)
    s, (device, _) = replace(settings_of(manifest), **changes), pick_device(str(device))
    model, agent = build_networks(s, Game(s.game).actions, device)
    model.load_state_dict(state["learning"]["model"])
    agent.load_state_dict(state["learning"]["agent"])
    return s, make_player(s, model, agent, games, act_on), state


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, without the usage that would bury it."""

    def error(self, message: str):
        raise Mistake(message.removeprefix("argument ") + ". See --help.")


def reader(default):
    """How the text after a flag becomes a value like `default`."""
    convert, wanted = {
        int: (int, "a whole number such as 100000"), float: (float, "a number such as 0.5"),
        tuple: (lambda text: tuple(map(int, text.split(","))), "whole numbers such as 32,64"),
    }.get(type(default), (str, ""))

    def read(text):
        try:
            return convert(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}") from None

    return read


def make_parser() -> Parser:
    parser = Parser(prog="drama.py", allow_abbrev=False, description=__doc__.split("\n")[0],
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--run", metavar="DIR", help="run folder (runs/GAME-sSEED)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--eval", metavar="RUN", help="play full episodes with a run's agent")
    instead.add_argument("--watch", metavar="RUN", help="film an episode of a run's agent")
    instead.add_argument("--model-check", metavar="RUN", help="compare its dreams with the game")
    instead.add_argument("--curves", metavar="RUN", nargs="+", help="draw runs' training scores")
    instead.add_argument("--bench", action="store_true", help="time every phase and leave")
    instead.add_argument("--list-games", action="store_true", help="list the games")
    parser.add_argument("--act-on", choices=("posterior", "prior"), help="for --eval and --watch: "
                        "the actor sees the frame or, as in the published code, a guess at it")
    group = parser.add_argument_group("settings, with the values of the preset paper")
    for f in fields(Settings):
        text = f"{f.metadata['help']} ({spelled(f.default)})".replace("%", "%%")
        if isinstance(f.default, bool):
            group.add_argument(flag(f.name), dest=f.name, help=text,
                               action=argparse.BooleanOptionalAction)
        else:
            kind = "N,N,..." if isinstance(f.default, tuple) else type(f.default).__name__.upper()
            metavar = "|".join(f.metadata["choices"]) or kind
            group.add_argument(flag(f.name), dest=f.name, help=text, metavar=metavar,
                               type=reader(f.default))
    return parser


def parse_arguments(argv: list[str]) -> dict:
    """The flags given, and no others, by name."""
    parser = make_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].split("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(word, known, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "see --help."
        raise Mistake(f"unknown {'flag' if word.startswith('-') else 'word'} {word!r}: {hint}")
    return vars(given)


def refuse(flags: dict, because: str):
    """Refuse flags that a command has no use for."""
    for name, value in flags.items():
        raise Mistake(f"{because}: leave out {typed(name, value)}.")


def settings_of(manifest: dict) -> Settings:
    saved = manifest["settings"]
    if unknown := set(saved) - {f.name for f in fields(Settings)}:
        raise Mistake(f"the run was made with {flag(min(unknown))}, which this version does not "
                      "have: go on with the version that made it.")
    if isinstance(saved["kernel"], int):  # as in older files
        saved["kernel"] = [saved["kernel"]]
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def new_settings(flags: dict) -> tuple[Settings, torch.device, str]:
    """Preset, then flags; then what was left to the machine is settled for good."""
    device, why = pick_device(flags.get("device", "auto"))
    flags = dict(preset="paper" if device.type == "cuda" else "laptop") | flags
    preset = dict(PRESETS.get(flags["preset"], {}))
    if flags.get("dream_from") == "contexts":  # which has no batch to hold the critic to
        preset.pop("replay_critic", None)
    s = Settings(**(preset | flags))
    check(s)
    for name, (other, value) in BELONGS.items():
        if flags.get(name) and getattr(s, other) != value:
            raise Mistake(f"{flag(name)} belongs to {typed(other, value)}: leave it out, or ask "
                          "for that.")
    torch.set_num_threads(s.threads or torch.get_num_threads())  # before precisions are timed
    precision = fast_precision(device) if s.precision == "auto" else s.precision
    return replace(s, game=Game.named(s.game), precision=precision), device, why


def resumed_settings(flags: dict, manifest: dict, path: Path) -> Settings:
    """The run's own settings; a flag must agree with them, but for the few that may change."""
    s = settings_of(manifest)
    if "game" in flags:
        flags["game"] = Game.named(flags["game"])
    if flags.get("precision") == "auto":  # what that came to was settled when the run began
        del flags["precision"]
    for name, value in flags.items():
        if name not in MAY_CHANGE and value != getattr(s, name):
            asked = typed(name, value) if isinstance(value, bool) else spelled(value)
            raise Mistake(f"{path} holds a run with {typed(name, getattr(s, name))}, not {asked}: "
                          "leave the flag out to go on with it, or give another folder with --run.")
    if flags.get("steps", s.steps) < s.steps:
        raise Mistake(f"{path} holds a run of {s.steps} steps: --steps can only grow.")
    threads = manifest["threads"]  # their number changes the last bits of sums
    s = replace(s, **(dict(threads=threads) | {k: flags[k] for k in MAY_CHANGE if k in flags}))
    check(s)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    return s


def introduce(run: Run, why: str, path: Path):
    """The first lines: where this runs, what it is, and what it needs."""

    def size(module):
        return f"{sum(p.numel() for p in module.parameters()):,}"

    s, device = run.settings, run.device
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    parts = [f"{name} {size(part)}" for name, part in run.model.named_children()
             if name not in ("two_hot", "balance")]
    print(f"device   {device} ({chip}), {why}; {s.precision}, {torch.get_num_threads()} threads\n"
          f"preset   {s.preset}; {s.game}, seed {s.seed}, {s.steps:,} steps, in {path}\n"
          f"model    {size(run.model)} parameters: {', '.join(parts)}\n"
          f"agent    actor {size(run.agent.actor)}, critic {size(run.agent.critic)}\n"
          f"replay   {Replay.bytes_needed(s.steps) / 2**20:,.0f} MiB on {run.replay.frame.device}"
          + (f"\nresuming at step {run.step:,}" if run.step else ""))


@contextlib.contextmanager
def stoppable(folder: Folder):
    """The first Ctrl-C, or kill, asks the loop to save and end; the second ends at once."""

    def ask(number, frame):
        folder.stop_asked = True
        print("\nstopping after this step; once more to stop without saving", file=sys.stderr)
        for kind in handlers:
            signal.signal(kind, signal.SIG_DFL)

    handlers = {kind: signal.signal(kind, ask) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def train_command(flags: dict):
    if flags.get("run") == "":
        raise Mistake("--run names no folder: is a variable empty?")
    title = Game.named(flags.get("game", Settings.game))
    folder = Folder(Path(flags.pop("run", f"runs/{title}-s{flags.get('seed', 0)}")))
    resuming = bool(folder.manifests())
    if resuming:
        folder.open_for_writing()  # first: who holds the lock may be saving
        manifest, state, chunks = folder.load()
        s = resumed_settings(flags, manifest, folder.path)
        device, why = pick_device(s.device)
    else:
        s, device, why = new_settings(flags)
    result = folder.path / f"evaluation-{s.steps:06d}.json"
    if resuming and manifest["step"] == s.steps and result.exists():
        _, scores = kept_evaluation(result)
        if len(scores) >= s.eval_episodes:
            print(f"finished: mean score {np.mean(scores):.1f}, episodes: {len(scores)} "
                  f"({result}). More --steps go on; --eval {folder.path} --eval-episodes N "
                  "plays more.")
            return
    run = Run(s, device)
    if resuming:
        restore(run, state, chunks)
        folder.chunks = {name: manifest["files"][name] for name in chunks}
        folder.saved_step = run.step
    folder.check_room(run)
    try:
        if resuming:
            for name, text in run.logs.items():  # rows newer than the save will come again
                write_file(folder.path / f"{name}.csv", text.encode())
        else:
            folder.open_for_writing()
            if folder.manifests():
                raise Mistake(f"another process began a run in {folder.path} meanwhile: type the "
                              "same command again to go on with it.")
            folder.save(run)
        introduce(run, why, folder.path)
        with stoppable(folder):
            train(run, folder)
    except OSError as error:
        kept = (f"The last good save is that of step {folder.saved_step}: the same command goes on "
                "from there." if folder.manifests() else "Nothing is saved yet.")
        raise Stopped(f"{reason(error)}. {kept}") from None
    player = make_player(s, run.model, run.agent, s.eval_episodes)
    evaluate_and_report(s, player, state_of(run), device, result)


def play_command(flags: dict, kind: str):
    """--eval, --watch, --model-check: play with what a run has learnt so far."""
    path, act_on = Path(flags.pop(kind)), flags.get("act_on", "posterior")
    allowed = {"device", "threads", "graphs"} | dict(
        eval={"act_on", "eval_episodes"}, watch={"act_on"}, model_check=set())[kind]
    refuse({name: value for name, value in flags.items() if name not in allowed},
           f"{flag(kind)} takes its settings from the run")
    s = Settings(**{name: value for name, value in flags.items() if name != "act_on"})
    check(s)
    if s.threads:
        torch.set_num_threads(s.threads)
    if path.is_dir() and not os.access(path, os.W_OK):
        raise Mistake(f"{path} cannot be written to, and {flag(kind)} leaves its result there.")
    games = dict(eval=s.eval_episodes, watch=1, model_check=CHECK_EPISODES)[kind]
    device, _ = pick_device(s.device)
    s, player, state = load_player(path, device.type, games, act_on, graphs=s.graphs,
                                   eval_episodes=s.eval_episodes)
    name = f"{state['step']:06d}" + "-prior" * (act_on == "prior")
    if kind == "watch":
        watch(s, player, device, path / f"watch-{name}.png")
    elif kind == "model_check":
        model_check(s, player, device, path / f"model-check-{name}.png")
    else:
        evaluate_and_report(s, player, state, device, path / f"evaluation-{name}.json")


NOT_FOR_BENCH = ("run", "act_on", "save_minutes", "log_every", "eval_episodes", "warmup_updates")


def reason(error: Exception) -> str:
    """An error without its number."""
    named = isinstance(error, OSError) and error.strerror and error.filename
    return f"{error.strerror}: {error.filename}" if named else str(error)


def out_of_memory(error: Exception) -> bool:
    """numpy and torch, and torch on each of its devices, say it in their own way."""
    words = "out of memory|allocate memory"
    return isinstance(error, MemoryError) or bool(re.search(words, str(error)))


def main(argv: list[str] | None = None) -> int:
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):  # a name that they cannot spell must not end a run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        flags = parse_arguments(sys.argv[1:] if argv is None else argv)
        if flags.pop("list_games", False):
            refuse(flags, "--list-games only lists")
            print("\n".join(Game.names()))
        elif kinds := [kind for kind in ("eval", "watch", "model_check") if kind in flags]:
            play_command(flags, kinds[0])
        elif "curves" in flags:
            folders = [Path(name) for name in flags.pop("curves")]
            refuse(flags, "--curves takes all from the runs")
            curves(folders, Path("curves.svg"))
        elif flags.pop("bench", False):
            refuse({name: value for name, value in flags.items() if name in NOT_FOR_BENCH},
                   "--bench makes no run")
            s, device, _ = new_settings(flags)
            bench(s, device)
        elif "act_on" in flags:
            raise Mistake("--act-on belongs to --eval or --watch.")
        else:
            train_command(flags)
    except Mistake as mistake:
        print(f"drama.py: {mistake}", file=sys.stderr)
        return 2
    except (OSError, Stopped) as error:
        print(f"drama.py: {reason(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("drama.py: there is not enough memory: what was saved is kept; a new run with a "
              "smaller --batch, --dreams or --d-model, or on another --device, may fit",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
