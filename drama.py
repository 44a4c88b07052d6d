"""Drama: an agent that learns a game inside its own model of it, on a laptop.

    python drama.py --game Breakout             learn; run it again to go on where it stopped
    python drama.py --eval runs/Breakout-s0     play full episodes and print the scores
    python drama.py --watch runs/Breakout-s0    film an episode
    python drama.py --export runs/Breakout-s0 Breakout.pt    its agent in one file, for both above

All that runs: settings, game, training loop, saving, evaluation, command line. Read it first, to
the end of the training loop; then buffer.py, all that is remembered; agent.py, all that learns; and
scan.py, the sequence layers. Steps are the agent's; in Atari each is four frames of the game.
"""

import argparse
import ast
import contextlib
import copy
import difflib
import functools
import math
import os
import platform
import re
import runpy
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

# Read by torch when it is imported. Threads that wait for each other spin only for a moment: if
# they spun on, an update would take two or three times as long once another program wants a core.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads just ends the program

import ale_py
import gymnasium
import numpy as np
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from torch import Tensor
from tqdm import tqdm

from agent import BACKBONES, ActorCritic, Player, WorldModel, dream_picture, fast_precision
from agent import follow, keep_freed_memory, make_optimizer, take_step
from buffer import RENAMED, SAMPLERS, Batch, Clock, Folder, Mistake, Replay, StopSignal, Stopped
from buffer import command_line, export, human_normalised, in_digits, in_one_sentence
from buffer import in_todays_words, kept_evaluation, known_scores, load_run, make_folder
from buffer import mean_and_error, packed, random_play, reason, versions, write_json, write_png

# ---------------------------------------------------------------- settings

DEVICES = ("auto", "cuda", "mps", "cpu")
# A preset lists what departs from `paper`, the defaults below
OURS = dict(random_hold=16, harmony=True, local=True, event_weight=30.0, dream_from="batch",
            policy_unimix=0.01, entropy=3e-3, range_floor=0.1, replay_critic=0.3,
            player_decay=0.995, cooldown=0.2, temperature=0.5)
PRESETS = {
    "paper": {},
    "best": OURS,
    # Every fourth step of play the model takes four training steps, of one window each, the agent
    # one, in dreams from all four (README, "Results"). Adam is one fused pass over the parameters,
    # LaProp a dozen; dreams are as long as DreamerV3's; the critic is as wide as the actor.
    "laptop": dict(
        OURS, d_model=256, channels=(32, 64, 64), strides=(4, 2, 2), kernel=(8, 4, 4), batch=4,
        length=64, batch_renorm=20_000, horizon=15, critic_hidden=256, tau=0.625, optimizer="adam",
        train_every=4, model_steps=4, dreams=128, warmup_updates=50, log_every=25,
        model_lr=8e-4, agent_lr=1e-4, eps=1e-8),
    "debug": dict(  # takes seconds; learns nothing harder than Dot
        OURS, local=False, batch_renorm=8, steps=192, learning_starts=64, train_every=8, batch=4,
        length=16, channels=(4, 8, 8, 8), strides=(2, 2, 2, 2), groups=4, classes=4, d_model=32,
        head_dim=16, head_hidden=16, dreams=16, horizon=4, actor_hidden=16, critic_hidden=16,
        agent_layers=1, tau=2.5, optimizer="adam", model_lr=1e-3, agent_lr=1e-3, eps=1e-8,
        warmup_updates=4, log_every=1, eval_episodes=2, precision="float32"),
}


def setting(default, help: str, low=None, high=10**6, choices=()):
    """A field with help and bounds; by default whole numbers are 1 or more, others 0 or more."""
    low = (1 if isinstance(default, (int, tuple)) else 0) if low is None else low
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=[*choices]))


@dataclass(frozen=True)
class Settings:
    """Every hyper-parameter, as a flag. The defaults are the preset `paper`.

    Sources: paper (its tables and section numbers); code: the published code where the paper is
    silent or its scores came from another value; H: HarmonyDream; V3: DreamerV3; IRIS; ours.
    """

    # The run
    preset: str = setting("paper", "settings to start from; default without CUDA: laptop",
                          choices=PRESETS)
    game: str = setting("Breakout", "an Atari game, Dot, a Gymnasium id, or FILE.py:CLASS")
    game_args: str = setting("", "arguments of a Gymnasium game, such as continuous=False,size=8")
    action_repeat: int = setting(1, "steps for which a Gymnasium game holds an action; Atari: 4")
    seed: int = setting(0, "seed of the game, of the first actions and of all else", 0, 10**18)
    steps: int = setting(100_000, "length of the run, agent steps (Atari 100k)", high=10**12)
    device: str = setting("auto", "where to learn", choices=DEVICES)
    threads: int = setting(0, "CPU threads; 0 leaves it to torch", low=0, high=1024)
    precision: str = setting("auto", "of large products; auto: bfloat16 where that is faster",
                             choices=("auto", "float32", "bfloat16"))
    replay_device: str = setting("auto", "where frames are kept; auto: as device", choices=DEVICES)
    save_minutes: float = setting(5.0, "minutes between saves")
    log_every: int = setting(100, "updates between rows of metrics.csv")
    eval_episodes: int = setting(20, "episodes of an evaluation, side by side", high=1000)
    temperature: float = setting(1.0, "divides the policy's logits in evaluations and films (IRIS) "
                                 "and multiplies its uniform share (ours)", low=0.1, high=10)
    learning_starts: int = setting(1032, "random steps before the first update (paper)")
    random_hold: int = setting(1, "steps until one of these draws its action anew, on average, if "
                               "none of the last 100 earned anything (ours)")
    train_every: int = setting(1, "steps between updates (paper)")
    # Sampling
    sampling: str = setting("dfs", "by frequency, or its ablation (paper, 2.4)", choices=SAMPLERS)
    tau: float = setting(10.0, "temperature of dfs, in draws (code): 10 for 16 a step", low=0.01)
    batch: int = setting(16, "windows of a world-model update (paper)")
    length: int = setting(128, "steps of such a window, and of a transformer's cache (paper)",
                          low=2)
    model_steps: int = setting(1, "steps of the model per update, each on its share of a batch")
    # World model
    channels: tuple = setting((16, 32, 48, 64, 64), "filters of the encoder's convolutions (code)")
    strides: tuple = setting((1, 2, 2, 2, 2), "their strides, pixels (code)")
    kernel: tuple = setting((5,), "their kernels, pixels; one number stands for all (code)")
    groups: int = setting(32, "categoricals of the latent (paper)")
    classes: int = setting(32, "classes of each (paper)", low=2)
    backbone: str = setting("mamba2", "sequence layers (paper)", choices=BACKBONES)
    layers: int = setting(2, "sequence layers (paper)")
    d_model: int = setting(512, "width of the sequence model (paper)")
    d_state: int = setting(16, "its state, numbers per channel (paper)")
    head_dim: int = setting(64, "channels of a head (code; paper: 128)")
    dropout: float = setting(0.1, "dropout of the sequence model, a share (paper)", high=0.99)
    head_hidden: int = setting(256, "hidden width of the reward and termination heads (code)")
    unimix: float = setting(0.01, "uniform share of every latent (paper)", low=1e-6, high=1)
    free_nats: float = setting(1.0, "nats of a step's KL that cost nothing (paper, eq. 7)")
    representation_scale: float = setting(0.1, "weight of L_rep (paper, eq. 6)")
    harmony: bool = setting(False, "learn the weights of the model's losses (H)")
    event_weight: float = setting(1.0, "image weight of what moves, if few pixels do (ours)", low=1)
    local: bool = setting(False, "give every cell of the encoder its own latents (ours)")
    batch_renorm: int = setting(0, "batches that normalise images by their own statistics; later "
                                "ones by averages, as in play (ours); 0: all by their own", 0)
    # Dreams
    dream_from: str = setting("contexts", "where dreams begin: after windows drawn for them "
                              "(paper), in the model's batch (ours)", choices=("contexts", "batch"))
    dreams: int = setting(1024, "dreams per update (paper)")
    context: int = setting(8, "frames of a context, for --dream-from contexts (paper)", low=2)
    horizon: int = setting(16, "steps of a dream (paper)", high=1000)
    # Actor and critic
    actor_hidden: int = setting(256, "hidden width of the actor (code)")
    critic_hidden: int = setting(512, "hidden width of the critic (code)")
    agent_layers: int = setting(3, "hidden layers of either (code; paper: 2)")
    gamma: float = setting(0.985, "discount of a step (paper)", high=1)
    lambda_: float = setting(0.95, "lambda of the return (paper)", high=1)
    entropy: float = setting(3e-4, "weight of the entropy, per nat (paper)")
    policy_unimix: float = setting(0.0, "uniform share of the policy, everywhere (V3)", high=1)
    slow_decay: float = setting(0.98, "decay of the critic's slow copy per update (paper)", high=1)
    range_decay: float = setting(0.99, "decay of the return range per update (paper)", high=1)
    range_floor: float = setting(1.0, "smallest range that advantages are divided by (paper)",
                                 low=1e-3)
    replay_critic: float = setting(0.0, "weight of the critic's loss on the model's batch (V3)")
    player_decay: float = setting(0.0, "decay per update of the averaged weights, which play and "
                                  "dream (ours)", high=0.9999)
    # Optimisers
    optimizer: str = setting("laprop", "of model and agent (paper)", choices=("laprop", "adam"))
    model_lr: float = setting(4e-5, "learning rate of the world model (code)")
    agent_lr: float = setting(4e-5, "learning rate of actor and critic (code)")
    harmony_lr: float = setting(1e-4, "learning rate of the loss weights: about 10 / updates (H)")
    warmup_updates: int = setting(1000, "updates over which the rates rise from 0 (code)")
    cooldown: float = setting(0.0, "last share of the run, in which they fall to 0 (ours)", high=1)
    eps: float = setting(1e-20, "epsilon of the optimiser (code)", low=1e-20)
    model_max_grad_norm: float = setting(1000.0, "largest gradient norm of the model (paper)")
    agent_max_grad_norm: float = setting(100.0, "largest gradient norm of the agent (paper)")


# ---------------------------------------------------------------- the game


def make_game(s: Settings, copies: int = 1, film: str = ""):
    """The game of these settings, `copies` of it side by side. All that the loop asks of a game:

    actions         how many it has: they are 0 .. actions - 1
    reset(seeds)    start every copy afresh, by its seed -> frames
    step(actions)   (copies,) -> frames, rewards, terminal, done
    picture()       what the first copy shows in full size, for a `film` ("file" or "window")
    source          in words, what its frames are made of

    Frames are (copies, 64, 64, 3) uint8, and the caller may keep them; the rest is (copies,).
    `terminal`: a life is lost, no value flows back over it; `done`: the episode is over, `reset`
    follows; `done` alone: time is up. Same seed and actions, same frames: resuming relies on it."""
    if s.game in AtariGame.names():
        if s.game_args or s.action_repeat > 1:
            raise Mistake("--game-args and --action-repeat are for Gymnasium games, not Atari.")
        return AtariGame(s.game, copies, film)
    make_one = functools.partial(make_gymnasium, s.game, s.game_args)
    return GymnasiumGame(make_one, copies, s.action_repeat)


FOR_TWO = ("combat", "joust", "maze_craze", "warlords")  # players; they would end the process


class AtariGame:
    """Atari, preprocessed by ale-py. A frame pools the last two of the four that an action is held
    for (D12; at game over it is an old one), in 64 x 64. Up to 29 no-ops open an episode;
    else it would be one fixed film. No sticky actions, no clipped rewards. A lost life is terminal,
    for learning, but ends no episode. A rise by 2 lives or more after the first step does: when
    Frostbite's player freezes on the last life, the console plays its demo from there."""

    @classmethod
    @functools.cache
    def names(cls) -> dict[str, str]:
        """Title, as in the score tables -> ROM: MsPacman -> ms_pacman."""
        roms = sorted(set(ale_py.roms.get_all_rom_ids()) - {*FOR_TWO})
        return {"".join(word.capitalize() for word in rom.split("_")): rom for rom in roms}

    def __init__(self, title: str, copies: int = 1, film: str = ""):
        self.rom = self.names()[title]
        try:
            path = ale_py.roms.get_rom_path(self.rom)
        except OSError as error:
            raise Mistake(f"the ROM of {title} cannot be used ({str(error).splitlines()[0]}): "
                          "ale-py brings its own, unless ALE_ROMS_DIR names another.") from None
        self.env = AtariVectorEnv(
            self.rom, copies, num_threads=min(copies, torch.get_num_threads()), img_height=64,
            img_width=64, grayscale=False, stack_num=1, frameskip=4, maxpool=True, noop_max=30,
            episodic_life=False, life_loss_info=False, reward_clipping=False,
            use_fire_reset=False, repeat_action_probability=0.0, full_action_space=False,
            continuous=False, autoreset_mode="NextStep", max_num_frames_per_episode=108_000)
        self.actions, self.screen = int(self.env.single_action_space.n), None
        self.source = "the console's screen, 210 x 160"
        if film:  # a second emulator, kept in step by the same no-ops and actions
            self.screen = ale_py.ALEInterface()
            self.screen.setBool("display_screen", film == "window")
            self.screen.setFloat("repeat_action_probability", 0.0)
            self.screen.loadROM(path)

    def reset(self, seeds) -> np.ndarray:
        frames, info = self.env.reset(seed=np.asarray(seeds, np.int64))
        self.lives, self.played, self.pooled = info["lives"], False, [np.uint8(0)] * 2
        if self.screen:
            self.screen.reset_game()
            self.hold(ale_py.Action.NOOP, info["episode_frame_number"][0])
        return frames[:, 0]

    def step(self, actions):
        actions = np.asarray(actions, np.int64)
        if actions.min() < 0 or actions.max() >= self.actions:  # the emulator would hang
            raise ValueError(f"actions are 0 to {self.actions - 1}, not {actions}")
        frames, reward, terminated, truncated, info = self.env.step(actions)
        over = terminated | (self.played & (info["lives"] > self.lives + 1))
        terminal = over | (info["lives"] < self.lives)  # compared at every step (D13)
        self.lives, self.played = info["lives"], True
        if self.screen:
            self.hold(self.screen.getMinimalActionSet()[actions[0]], 4)
        return frames[:, 0], reward, terminal, over | truncated

    def hold(self, action, frames: int):
        for _ in range(frames):
            self.screen.act(action)
            self.pooled = self.pooled[-1], self.screen.getScreenRGB()

    def picture(self) -> np.ndarray:
        return np.maximum(*self.pooled)


# ---------------------------------------------------------------- a run

PURPOSES = ("build", "reset", "play", "windows", "model", "contexts", "dream", "picture", "test")


def reseed(seed: int, step: int, purpose: str) -> np.random.Generator:
    """Seed torch for one purpose at one step -> numpy's generator for the same.

    Nothing else is random. So there is no generator to save, a resumed run draws what it would
    have drawn, and evaluating in between disturbs nothing (D11). PURPOSES may only grow at its end.
    """
    rng = np.random.default_rng((seed, step, PURPOSES.index(purpose)))
    torch.manual_seed(int(rng.integers(2**62)))
    return rng


def episode_seeds(seed: int, episode: int, purpose: str, copies: int = 1) -> np.ndarray:
    """Seeds for the game, one per copy; never negative: the emulator would take that for none."""
    rng = np.random.default_rng((seed, episode, PURPOSES.index(purpose)))
    return rng.integers(2**31, size=copies)


def build_networks(s: Settings, actions: int, device) -> tuple[WorldModel, ActorCritic]:
    keep_freed_memory()
    reseed(s.seed, 0, "build")
    kernels = list(s.kernel) * (len(s.strides) if len(s.kernel) == 1 else 1)
    try:
        model = WorldModel(
            actions, channels=list(s.channels), strides=list(s.strides), kernels=kernels,
            groups=s.groups, classes=s.classes, d_model=s.d_model, layers=s.layers,
            backbone=s.backbone, d_state=s.d_state, head_dim=s.head_dim, length=s.length,
            dropout=s.dropout, head_hidden=s.head_hidden, unimix=s.unimix, free_nats=s.free_nats,
            representation_scale=s.representation_scale, harmony=s.harmony,
            event_weight=s.event_weight, local=s.local, batch_renorm=s.batch_renorm)
    except ValueError as error:  # sizes that do not fit each other
        raise Mistake(f"{error}.") from None
    agent = ActorCritic(
        actions, groups=s.groups, classes=s.classes, d_model=s.d_model,
        actor_hidden=s.actor_hidden, critic_hidden=s.critic_hidden, layers=s.agent_layers,
        gamma=s.gamma, lambda_=s.lambda_, entropy=s.entropy, unimix=s.policy_unimix,
        range_decay=s.range_decay, range_floor=s.range_floor, replay_critic=s.replay_critic)
    return model.to(device).eval(), agent.to(device).eval()


class Run:
    """Everything a run consists of: what is trained, saved and restored."""

    def __init__(self, s: Settings, device: torch.device):
        self.settings, self.device = s, device
        asked = (None if s.replay_device == "auto" else
                 pick_device(s.replay_device, "replay_device")[0])
        self.replay = Replay(s.steps, Replay.place(s.steps, device, asked))
        self.game = make_game(s)
        self.model, self.agent = build_networks(s, self.game.actions, device)
        loss_weights = list(self.model.harmony.parameters())
        networks = [p for name, p in self.model.named_parameters() if "harmony" not in name]
        learning = [p for p in self.agent.parameters() if p.requires_grad]
        eps = max(s.eps, 1e-15) if device.type == "mps" else s.eps  # MPS flushes denormals
        self.model_optimizer = make_optimizer(
            s.optimizer, [dict(params=networks, rate=s.model_lr)]
            + [dict(params=loss_weights, rate=s.harmony_lr)] * bool(loss_weights), eps)
        self.agent_optimizer = make_optimizer(
            s.optimizer, [dict(params=learning, rate=s.agent_lr)], eps)
        self.playing_model, self.playing_agent = copy.deepcopy((self.model, self.agent))
        self.player = None  # plays with these once the random steps are over
        self.step = self.updates = self.skipped = self.skipped_in_a_row = 0
        self.seconds = self.cpu_seconds = 0.0
        self.scores = []  # of all training episodes
        self.sums, self.counted, self.summary = {}, 0, ""  # of metrics, since the last row
        self.begin_episode(0)

    def begin_episode(self, number: int):
        self.episode, self.score, self.episode_length = number, 0.0, 0
        self.frame = self.game.reset(episode_seeds(self.settings.seed, number, "reset"))  # seen now

    def autocast(self):
        """Large products in bfloat16 if the settings say so; scans and losses stay in float32."""
        wanted = self.settings.precision == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def draw_windows(self, count: int, length: int, rng, dreams_per_window=None) -> Batch:
        """Replay windows to train the world model on or, given dreams_per_window, to dream from."""
        sampler, tau = SAMPLERS[self.settings.sampling], self.settings.tau
        starts = self.replay.draw_starts(count, length, sampler, tau, rng, dreams_per_window)
        return self.replay.windows(starts, length, self.device)


# ---------------------------------------------------------------- training


def update_world_model(run: Run, batch: Batch):
    """One update from windows (B, L), a step for each share of them -> mean metrics, whether every
    step was taken."""
    s, model, taken = run.settings, run.model, []
    for share in zip(*(column.chunk(s.model_steps) for column in batch)):
        buffers = [buffer.clone() for buffer in model.buffers()]
        model.train()  # input statistics change here and nowhere else (D6)
        with run.autocast():
            loss, metrics = model.loss(Batch(*share))
        model.eval()
        norm, good = take_step(model, run.model_optimizer, loss, s.model_max_grad_norm, buffers)
        taken.append((metrics | dict(model_norm=norm), good))
    metrics, good = zip(*taken)
    means = {name: sum(each[name] for each in metrics) / len(metrics) for name in metrics[0]}
    return means, torch.stack(good).all()


def update_agent(run: Run, batch: Batch, good: Tensor):
    """One update of actor and critic, if the model's was `good`, in dreams from its batch or after
    the contexts of another -> metrics, whether it was taken. It dreams in the model that plays."""
    s, model, agent, real = run.settings, run.playing_model, run.agent, None
    buffers = [buffer.clone() for buffer in agent.buffers()]
    with run.autocast():
        if s.dream_from == "contexts":
            start = model.starts_from_contexts(batch)
        else:
            start, real = model.starts_from_batch(batch, model.encode(batch.frame), s.dreams)
        dream = model.imagine(start, s.horizon, lambda t, z, d_past: agent.act(z, d_past))
        loss, metrics = agent.loss(dream, real if s.replay_critic else None)
    norm, good = take_step(agent, run.agent_optimizer, loss, s.agent_max_grad_norm, buffers, good)
    follow(agent.slow_critic, agent.critic, good * (1 - s.slow_decay))
    return metrics | dict(agent_norm=norm), good


def set_rates(run: Run):
    """Learning rates rise from 0 to full over the first updates, and fall at the run's end."""
    s, left = run.settings, 1 - run.step / run.settings.steps  # a share of the run
    share = min(1, (run.updates + 1) / s.warmup_updates, left / s.cooldown if s.cooldown else 1)
    for group in run.model_optimizer.param_groups + run.agent_optimizer.param_groups:
        group["lr"].fill_(group["rate"] * share)


def train(run: Run, folder: Folder, stop: StopSignal):
    """Drama's training loop (paper, algorithm 1), from run.step to the end."""
    s, replay, saved = run.settings, run.replay, time.monotonic()
    bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
    clock = Clock(s.learning_starts)
    with show_progress(total=s.steps, initial=run.step, bar_format=bar_format) as bar:
        while run.step < s.steps:
            step, first = run.step, run.episode_length == 0

            # ---- 1. Play one step, and keep it
            rng = reseed(s.seed, step, "play")
            if step < s.learning_starts:
                action = int(rng.integers(run.game.actions))
                poor = not first and not replay["reward"][-100:].any()
                if poor and rng.random() >= 1 / s.random_hold:
                    action = int(replay["action"][-1])
            else:  # not under autocast: casting the weights costs more than one frame saves
                run.player = run.player or make_player(s, run.playing_model, run.playing_agent)
                frame = torch.from_numpy(run.frame).to(run.device)
                action = int(run.player.act(frame, torch.tensor([first], device=run.device)))
            after, reward, terminal, done = run.game.step([action])
            replay.add(frame=run.frame[0], action=action, reward=reward[0], terminal=terminal[0],
                       first=first)
            run.frame, run.score = after, run.score + float(reward[0])
            run.episode_length += 1
            if done[0]:
                end_episode(run, folder)

            if step >= s.learning_starts and (step - s.learning_starts) % s.train_every == 0:
                # ---- 2. Learn the world, from windows of the replay
                set_rates(run)
                batch = run.draw_windows(s.batch, s.length, reseed(s.seed, step, "windows"))
                reseed(s.seed, step, "model")
                metrics, good = update_world_model(run, batch)
                average_weights(run, "model")

                # ---- 3. Learn in the dream
                if s.dream_from == "contexts":
                    rng = reseed(s.seed, step, "contexts")
                    batch = run.draw_windows(s.dreams, s.context, rng, s.dreams / s.batch)
                reseed(s.seed, step, "dream")
                agent_metrics, good = update_agent(run, batch, good)
                average_weights(run, "agent")
                count_update(run, folder, metrics | agent_metrics, bool(good))

            # ---- 4. Log and save
            run.step += 1
            run.pace = clock.tick(run)
            if run.counted == s.log_every or run.counted and run.step == s.steps:
                log_metrics(run, folder)
            left = tqdm.format_interval((s.steps - run.step) / run.pace)
            doing = f"{run.pace:.2f} step/s, {left} left{run.summary}"
            bar.set_postfix_str(doing if run.step > s.learning_starts else "random play", False)
            bar.update()
            if stop.asked or run.step == s.steps or time.monotonic() - saved > 60 * s.save_minutes:
                save(run, folder)
                saved = time.monotonic()
                if stop.asked:
                    tqdm.write(f"saved at step {run.step:,}: the same command goes on from there")
                    raise SystemExit(130)


def average_weights(run: Run, name: str):
    """What plays is what learns, averaged over a tenth of all updates or, if less, by its decay."""
    share = max(1 - run.settings.player_decay, 10 / (10 + run.updates))
    follow(getattr(run, f"playing_{name}"), getattr(run, name), share)


def count_update(run: Run, folder: Folder, metrics: dict, good: bool):
    """Add an update to the sums for the next row of metrics; stop after ten bad ones in a row."""
    run.updates += 1
    if good:
        values = torch.stack([value.float() for value in metrics.values()])
        run.sums = run.sums or dict(names=list(metrics), values=torch.zeros_like(values))
        run.sums["values"] += values
        run.counted, run.skipped_in_a_row = run.counted + 1, 0
        return
    run.skipped, run.skipped_in_a_row = run.skipped + 1, run.skipped_in_a_row + 1
    broken = ", ".join(name for name, value in metrics.items() if not math.isfinite(float(value)))
    tqdm.write(f"step {run.step}: update skipped, not finite: {broken}")
    if run.skipped_in_a_row == 10:
        raise Stopped(f"10 updates in a row were not finite ({broken}). {folder.kept()}")


def show_progress(**options) -> tqdm:
    """A progress bar; where nobody is watching, a line now and then."""
    interval = 0.5 if sys.stderr.isatty() else 60
    return tqdm(unit="step", dynamic_ncols=True, mininterval=interval, **options)


def log_metrics(run: Run, folder: Folder):
    """A row of metrics.csv: means over the updates since the last row, then the pace."""
    s, means = run.settings, (run.sums["values"] / run.counted).tolist()
    means = dict(zip(run.sums["names"], means))
    contexts = s.dreams * s.context if s.dream_from == "contexts" else 0
    frames = s.batch * s.length + contexts + s.dreams * s.horizon  # replayed and dreamed
    folder.append("metrics", dict(
        step=run.step, updates=run.updates, skipped=run.skipped, **means,
        steps_per_second=run.pace, frames_per_second=run.pace * frames / s.train_every,
        seconds=run.seconds, cpu_seconds=run.cpu_seconds))
    run.summary = (f", model {means['model_loss']:.1f}, return {means['dream_return']:.2f}, "
                   f"entropy {means['entropy']:.2f}")
    run.sums, run.counted = {}, 0


def end_episode(run: Run, folder: Folder):
    """A row of episodes.csv, and a new episode: the reset frame opens it (D5)."""
    folder.append("episodes", dict(
        step=run.step + 1, score=run.score, length=run.episode_length,
        human_normalised=human_normalised(run.settings.game, run.score)))
    score = in_digits(run.score, ",")
    tqdm.write(f"step {run.step + 1:,}: score {score} in {run.episode_length} steps")
    run.scores.append(run.score)
    run.begin_episode(run.episode + 1)


# ---------------------------------------------------------------- saving and resuming

COUNTED = ("step", "episode", "updates", "skipped", "skipped_in_a_row", "seconds", "cpu_seconds",
           "score", "scores", "episode_length", "sums", "counted")
LEARNING = ("model", "agent", "model_optimizer", "agent_optimizer", "playing_model",
            "playing_agent")
PICTURE_STEPS = 16


def state_of(run: Run) -> dict:
    """All that a save holds besides the replay: more than the weights (D16)."""
    return dict({name: getattr(run, name) for name in COUNTED}, frame=torch.from_numpy(run.frame),
                learning={name: getattr(run, name).state_dict() for name in LEARNING},
                player=run.player and run.player.state_dict())


def save(run: Run, folder: Folder):
    """Save the run, and draw a dream of the model that plays, from somewhere in the replay."""
    s = run.settings
    folder.save(run.step, state_of(run), run.replay, asdict(s), threads=torch.get_num_threads(),
                device=str(run.device))
    if run.step >= PICTURE_STEPS:
        episode = run.replay["first"].numpy().cumsum()
        within = episode[: 1 - PICTURE_STEPS] == episode[PICTURE_STEPS - 1 :]
        windows = np.flatnonzero(within == within.max())  # in one episode, if any is long enough
        window = reseed(s.seed, run.step, "picture").choice(windows, size=1)
        batch = run.replay.windows(window, PICTURE_STEPS, run.device)
        write_png(folder.path / f"dream-{run.step:06d}.png",
                  [packed(dream_picture(run.playing_model, batch).numpy())])


def restore(run: Run, state: dict):
    """Put a verified state into a new run whose replay is filled; play the game to where it was."""
    for name in COUNTED:
        setattr(run, name, state[name])
    if run.sums:
        run.sums["values"] = run.sums["values"].to(run.device)
    for name in LEARNING:
        ours, saved = getattr(run, name), state["learning"][name]
        if "param_groups" in saved:  # moments come from the file, rates etc. from the settings
            saved["param_groups"] = [group | dict(params=theirs["params"]) for group, theirs in
                                     zip(ours.param_groups, saved["param_groups"])]
        ours.load_state_dict(saved)
    if state["player"]:
        run.player = make_player(run.settings, run.playing_model, run.playing_agent)
        run.player.load_state_dict(state["player"])

    # The game cannot be saved: its seed and the episode's actions lead to the same state
    run.begin_episode(run.episode)
    same, last = True, state.get("frame")
    for step in range(run.step - state["episode_length"], run.step):
        same = same and np.array_equal(run.frame[0], run.replay["frame"][step].cpu().numpy())
        run.frame, *_ = run.game.step(run.replay["action"][step : step + 1].numpy())
    if same and (last is None or np.array_equal(run.frame, last.numpy())):
        run.score, run.episode_length = state["score"], state["episode_length"]
    else:
        print("the game does not repeat itself: its last episode ends where the save was made")
        run.begin_episode(run.episode + 1)


def settings_of(manifest: dict) -> Settings:
    saved, known = in_todays_words(manifest["settings"]), {f.name for f in fields(Settings)}
    if unknown := set(saved) - known:
        raise Mistake(f"the run was made with {flag(min(unknown))}, which this version does not "
                      "have: go on with the version that made it.")
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def load_player(path, device: str = "cpu", games: int | None = 1, act_on: str = "posterior",
                **changes):
    """Load a run's folder or an exported agent -> settings, with `changes`; player of so many games
    (None: one per episode of an evaluation); saved state, with the unchanged settings as `own`."""
    manifest, state, _ = load_run(Path(path), with_replay=False)
    device, learnt = pick_device(str(device))[0], state["learning"]
    with in_one_sentence(f"{path} does not fit this version"):
        own, parts = settings_of(manifest), learnt["playing_agent"]
        s = replace(own, **changes)
        actions = [len(part) for name, part in parts.items() if name.startswith("actor")][-1]
        model, agent = build_networks(s, actions, device)
        model.load_state_dict(learnt["playing_model"])
        agent.load_state_dict(parts)
    player = make_player(s, model, agent, games or s.eval_episodes, act_on, s.temperature)
    return s, player, state | dict(own=own)


# ---------------------------------------------------------------- evaluation


def make_player(s: Settings, model, agent, games: int = 1, act_on: str = "posterior",
                temperature: float = 1.0) -> Player:
    """A player whose state grows no older than any that was trained (T4)."""
    oldest = s.length if s.dream_from == "batch" else min(s.length, 2 * s.context)
    return Player(model, agent, games, oldest, act_on, temperature)


def evaluate(s: Settings, player: Player) -> dict[str, list]:
    """Full episodes, one per copy, side by side, with sampled actions: scores, lengths and seeds.

    Every episode that began counts: the first to finish are not the typical ones (D9). The game
    is set up as in training (D14). Ctrl-C ends it early, with the episodes that are over by then.
    """
    copies, seeds = s.eval_episodes, episode_seeds(s.seed, 0, "test", s.eval_episodes)
    reseeding, earned = functools.partial(reseed, s.seed, purpose="test"), 0
    moves = player.play(make_game(s, copies), seeds, reseeding)
    score, length, over = np.zeros(copies), np.zeros(copies, int), np.zeros(copies, bool)
    with show_progress(desc="evaluation", iterable=moves) as bar:
        try:
            for step, move in enumerate(bar):
                length += ~over
                score, over = score + move.reward, move.over
                earned = step if move.reward.any() else earned
                mean, idle = in_digits(float(score.mean()), ","), step - earned
                bar.set_postfix_str(f"{over.sum()} of {copies} over, mean {mean}, nothing earned "
                                    f"for {idle} steps", refresh=False)
        except KeyboardInterrupt:
            print(f"ended early: {over.sum()} of {copies} episodes were over, and only they count")
    return {name: column[over].tolist() for name, column in
            dict(scores=score, lengths=length, seeds=seeds).items()}


def evaluate_and_report(s: Settings, player: Player, state: dict, path: Path):
    """Evaluate, write the result to `path`, and print the table that closes a run."""
    about = dict(game=s.game, preset=s.preset, seed=s.seed)
    kept = kept_evaluation(path) if path.exists() else dict(scores=[])
    if about != {name: kept.get(name, value) for name, value in about.items()}:
        raise Mistake(f"{path} is of another agent: --out DIR names another place.")
    held = len(kept["scores"])
    played, last, known = evaluate(s, player), state["scores"][-5:], known_scores().get(s.game)
    scores = played["scores"]
    keep = len(scores) >= max(held, s.eval_episodes)  # all episodes, and no fewer than the file has
    digits = 1 if max(map(abs, scores + last), default=0) >= 100 else 3
    table = {"game": s.game, "steps trained": f"{state['step']:,}",
             "actor sees": f"{player.act_on} latent",
             "episodes": f"{len(scores)} of {s.eval_episodes} begun, actions sampled at "
                         f"temperature {player.temperature:g}"}
    if scores:
        mean, error = mean_and_error(scores)
        table["final score"] = f"{mean:,.{digits}f}" + (
            f", standard error {error:,.{digits}f}" if len(scores) > 1 else "")
        table["lowest, highest"] = ", ".join(in_digits(f(scores), ",") for f in (min, max))
    if last:
        short = " (the paper's protocol takes 5)" * (len(last) < 5)
        number = f"the last {len(last)} of {len(state['scores'])} episodes"
        table["in training"] = f"{np.mean(last):,.{digits}f}, {number}{short}"
    if known and scores:
        normalised = round(human_normalised(s.game, np.mean(scores)), 1) + 0.0  # never -0.0
        table["human-normalised"] = f"{normalised:.1f} %"
    if known:
        paper = known["Drama_XS_uniform" if s.sampling == "uniform" else "Drama_XS_DFS"]
        table["published Drama"] = f"{paper:,g}, {human_normalised(s.game, paper):.1f} %"
        table["random, human"] = f"{known['random']:,g}, {known['human']:,g}"
    if measured := random_play(s.game):  # by this protocol
        table["random play here"] = "{:,g}, standard error {:,g}".format(*measured)
    try:
        if keep:
            write_json(path, dict(
                **about, step=state["step"], steps=s.steps, **played, act_on=player.act_on,
                temperature=player.temperature, last_training_scores=last, versions=versions()))
    finally:  # show it in any case: it may have taken an hour
        print("\n".join(f"  {name:<17} {value}" for name, value in table.items()))
    if not keep:
        print(f"  not kept{f': {path} holds {held} episodes' if held else ''}")
    if len(scores) < s.eval_episodes:
        print("  the same command evaluates again")
        raise SystemExit(130)


def watch(s: Settings, player: Player, path: Path, limit: int = 2000):
    """Film an episode in full size; in Atari, where there is a display, also show it in a window,
    as fast as a human would play: 15 steps a second, since the console drew 60 frames."""
    display = s.game in AtariGame.names() and (
        sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ})
    game, film, score, shown = make_game(s, film="window" if display else "file"), [], 0.0, 0.0
    reseeding = functools.partial(reseed, s.seed, purpose="test")
    moves = player.play(game, episode_seeds(s.seed, 1, "test"), reseeding, limit)
    try:
        for move in show_progress(desc=f"at most {limit:,} steps", iterable=moves):
            film.append(packed(game.picture()))
            score += float(move.reward[0])
            if display:
                time.sleep(max(0, 1 / 15 - (time.monotonic() - shown)))
                shown = time.monotonic()
    except KeyboardInterrupt:
        if not film:
            raise
    if len({frame[:2] for frame in film}) > 1:
        raise Mistake("the game's pictures differ in size, and make no film.")
    write_png(path, film, per_second=15)
    span = "the episode" if move.over[0] else f"its first {len(film)} steps"
    print(f"score {in_digits(score, ',')} in {span}: {path} is an animated PNG for any browser")


# ---------------------------------------------------------------- any Gymnasium game


run_once = functools.cache(runpy.run_path)


def make_gymnasium(name: str, arguments: str = "") -> gymnasium.Env:
    """Make `CarRacing-v3`, `module:Id-v0` or `my_game.py:MyGame` with `continuous=False,map=E1`."""
    try:
        call = ast.parse(f"dict({arguments})", mode="eval").body
        options = {word.arg: getattr(word.value, "id", None) or ast.literal_eval(word.value)
                   for word in call.keywords + call.args} | {"disable_env_checker": True}
    except (SyntaxError, ValueError, AttributeError):
        raise Mistake(f"--game-args {arguments!r} is not name=value,name=value; what is neither a "
                      "number nor a plain word stands in quotes.") from None
    game, (file, _, title) = name, name.rpartition(":")
    if title.endswith(".py") or not title:
        raise Mistake(f"{name} needs the name of its class or function: {name.rstrip(':')}:MyGame.")
    with in_one_sentence(f"{name} cannot be made"):
        if file.endswith(".py"):
            sys.path += {str(Path(file).parent)} - {*sys.path}  # for what the file imports
            if title not in (names := run_once(file)):
                raise Mistake(f"{file} has no {title}.")
            game = EnvSpec(title, entry_point=names[title])
        try:
            return gymnasium.make(game, **{"render_mode": "rgb_array"} | options)
        except Exception:  # it may know no render_mode, and need none
            return gymnasium.make(game, **options)


def rgb(picture) -> np.ndarray:
    """A picture as games give it -> (H, W, 3) uint8, a copy: many games reuse one buffer."""
    picture = np.atleast_3d(picture)
    if picture.dtype.kind in "bf" and 0 <= picture.min() <= picture.max() <= 1:
        picture = np.rint(picture * 255.0).astype(np.uint8)
    if picture.dtype != np.uint8 or picture.shape[2:] not in ((1,), (3,)):
        raise Mistake("the game shows no picture: it observes none in uint8, and what it renders "
                      "is not (height, width, 3) in uint8, bool or floats of 0 to 1.")
    return np.broadcast_to(picture, (*picture.shape[:2], 3)).copy()


class GymnasiumGame:
    """Copies of a Gymnasium game; `make()` returns a new environment of it.

    A frame is the observation, or its only entry that is a picture (uint8, 32 pixels or more a
    side: smaller ones may be codes), or else what the game renders, reduced to 64 x 64 by area. A
    time limit is not terminal, even if a game sets both flags; without one, Atari's limit holds.
    """

    LIMIT = 27_000  # steps of an episode

    def __init__(self, make, copies: int = 1, action_repeat: int = 1):
        self.envs, self.action_repeat = [make()], action_repeat
        with in_one_sentence("the game fails"):
            actions, seen = self.envs[0].action_space, self.envs[0].observation_space
        if not isinstance(actions, spaces.Discrete):
            raise Mistake(f"the game's actions are {type(actions).__name__}, and only Discrete is "
                          "learned; some games have that too: continuous=False (CarRacing), "
                          "max_buttons_pressed=1 (ViZDoom), retro.Actions.DISCRETE (stable-retro).")
        self.actions, self.first_action = int(actions.n), int(actions.start)
        entries = dict(seen) if isinstance(seen, spaces.Dict) else {"": seen}
        pictures = [name for name, space in entries.items() if isinstance(space, spaces.Box)
                    and space.dtype == np.uint8 and space.shape[2:] in ((), (1,), (3,))
                    and min((*space.shape, 0)[:2]) >= 32]
        self.entry = pictures[0] if len(pictures) == 1 else None  # "": all of it; None: render()
        self.look()
        self.envs += [make() for _ in range(copies - 1)]

    def look(self, steps: int = 100):
        """Play at random until something is seen to move, and note in words what is seen."""
        rng, first = np.random.default_rng(0), self.reset([0])
        name = {None: "render()", "": "observation"}.get(self.entry, f"observation {self.entry!r}")
        self.source = "{}, {} x {}".format(name, *self.shown.shape)
        for step in range(steps):
            frame, _, _, done = self.step(rng.integers(self.actions, size=1))
            if (frame != first).any() and (frame != frame[:, :1, :1]).any():
                return
            if done:
                self.reset([step])
        raise Mistake(f"nothing is to be seen in the game ({self.source}): {steps} random steps "
                      "looked all alike, or were each of one colour; some games draw nothing if "
                      f"SDL_VIDEODRIVER is set (it is {os.environ.get('SDL_VIDEODRIVER', 'not')}).")

    def frame_of(self, copy: int, seen) -> np.ndarray:
        """What a copy observes or renders -> (64, 64, 3) uint8; the first's picture is kept."""
        if self.entry is None:
            try:
                seen = self.envs[copy].render()
            except NotImplementedError:
                seen = None
        picture = rgb(seen[self.entry] if self.entry else seen)
        self.shown = picture if copy == 0 else self.shown
        image = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        image = torch.nn.functional.interpolate(image, (64, 64), mode="area")[0]
        return image.round().byte().permute(1, 2, 0).numpy()

    @in_one_sentence("the game fails")
    def reset(self, seeds) -> np.ndarray:
        seen, _ = zip(*(env.reset(seed=int(seed))
                        for env, seed in zip(self.envs, seeds, strict=True)))
        self.frames = np.stack([self.frame_of(copy, each) for copy, each in enumerate(seen)])
        self.steps, (self.terminal, self.done) = 0, np.zeros((2, len(seen)), bool)
        return self.frames.copy()

    @in_one_sentence("the game fails")
    def step(self, actions):
        rewards, self.steps = np.zeros(len(self.envs)), self.steps + 1
        for copy in np.flatnonzero(~self.done):  # a copy that is done stands still
            for _ in range(self.action_repeat):
                action = int(actions[copy]) + self.first_action
                seen, reward, terminated, truncated, _ = self.envs[copy].step(action)
                rewards[copy] += float(reward)
                if not abs(rewards[copy]) < 3e38:
                    raise Mistake(f"the game's reward is {reward}, which cannot be learnt.")
                if terminated or truncated:
                    break
            self.frames[copy] = self.frame_of(copy, seen)
            self.terminal[copy] = bool(terminated) and not truncated
            self.done[copy] = bool(terminated) or bool(truncated) or self.steps == self.LIMIT
        return self.frames.copy(), rewards, self.terminal.copy(), self.done.copy()

    def picture(self) -> np.ndarray:
        factor = -(-128 // min(128, *self.shown.shape[:2]))  # small ones are enlarged
        return self.shown.repeat(factor, 0).repeat(factor, 1)


class Dot(gymnasium.Env):
    """A hello world: the left or the right half is white; naming it is worth 1, fifty times."""

    action_space, observation_space = spaces.Discrete(2), spaces.Box(0, 255, (64, 64, 3), np.uint8)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.dot = -1, -1
        return self.step(0)[0], {}

    def step(self, action):
        reward, self.steps = float(action == self.dot), self.steps + 1
        self.dot, frame = int(self.np_random.integers(2)), np.zeros((64, 64, 3), np.uint8)
        frame[:, 32 * self.dot : 32 * self.dot + 32] = 255
        return frame, reward, self.steps == 50, False, {}


gymnasium.register("Dot", Dot)

# ---------------------------------------------------------------- command line

# A setting that means nothing while another one has one of these values
HAS_NO_EFFECT = dict(tau=("sampling", "uniform"), head_dim=("backbone", "mamba", "gru"),
                     d_state=("backbone", "gru", "transformer"), harmony_lr=("harmony", False),
                     context=("dream_from", "batch"), replay_critic=("dream_from", "contexts"))
MAY_CHANGE = ("steps", "device", "threads", "replay_device", "save_minutes", "eval_episodes")


def game_title(text: str) -> str:
    """The name a game goes by: MsPacman for any usual spelling, such as ms_pacman, ALE/MsPacman-v5
    or MsPacmanNoFrameskip-v4; a Gymnasium id and a user's own file as they are."""

    def plain(name):
        return re.sub("[^a-z0-9]", "", name.lower())

    titles = {plain(title): title for title in (*AtariGame.names(), "Dot")}
    wanted = plain(re.sub(r"^ALE/|(Deterministic|NoFrameskip)?-v\d+$", "", text))
    known = gymnasium.registry.get(text)
    if re.search(r":|\.py$", text) or known and "ale_py" not in str(known.entry_point):
        return text
    if wanted in titles or known:
        return titles.get(wanted, text)
    if wanted in map(plain, FOR_TWO):
        raise Mistake(f"{text} is a game for two players.")
    near = [titles[name] for name in difflib.get_close_matches(wanted, titles, 3, 0.5)]
    near += difflib.get_close_matches(text, gymnasium.registry, 1, 0.8)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise Mistake(f"there is no game {text!r}: {hint}--list-games lists Atari's.")


def flag(name: str) -> str:
    return "--" + name.strip("_").replace("_", "-")


def as_text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def as_flag(name: str, value) -> str:
    """As on the command line: --no-harmony, --channels 32,64, --seed 3."""
    if isinstance(value, bool):
        return flag(name if value else f"no_{name}")
    return f"{flag(name)} {as_text(value)}"


def check(s: Settings):
    """Refuse settings that cannot work; those of the networks are refused where they are built."""
    for f in fields(s):
        value, low, high = getattr(s, f.name), f.metadata["low"], f.metadata["high"]
        numbers = value if isinstance(value, tuple) else (value,) * (type(value) in (int, float))
        for number in numbers:
            if not low <= number <= high:
                raise Mistake(f"{flag(f.name)} must be from {low} to {high}, not {number}.")
    if s.steps <= s.learning_starts:
        raise Mistake(f"--steps {s.steps} leaves nothing to learn after the random steps of "
                      f"--learning-starts: give more than {s.learning_starts}.")
    if s.dreams * s.horizon > 2**24:
        raise Mistake(f"--dreams {s.dreams} of --horizon {s.horizon} are {s.dreams * s.horizon:,} "
                      f"steps, and {2**24:,} are the most that torch finds a quantile of.")
    if s.batch % s.model_steps:
        raise Mistake(f"--model-steps {s.model_steps} cannot share out --batch {s.batch} windows.")
    windows = {"--batch": (s.batch, s.length)}
    if s.dream_from == "contexts":
        windows["--dreams"] = s.dreams, s.context
    elif s.batch * s.length % s.dreams or s.length % (s.batch * s.length // s.dreams):
        raise Mistake(f"--dreams {s.dreams} cannot be spread evenly over --batch {s.batch} windows "
                      f"of --length {s.length}: every window must give equally many.")
    for name, (count, length) in windows.items():
        if count > (held := max(0, s.learning_starts - length + 1)):
            raise Mistake(f"{name} {count} asks for more windows of {length} steps than "
                          f"--learning-starts {s.learning_starts} steps hold: {held} at most.")


def pick_device(wanted: str, asked_by: str = "device") -> tuple[torch.device, str]:
    """The device that a setting asks for, and the reason in words."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    have, note = [name for name in there if there[name]], ""
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        note = "; this torch cannot use the NVIDIA GPU: the README says how to install one that can"
    if wanted == "auto":
        return torch.device(have[0]), "the fastest there is" + note
    if wanted not in have:
        raise Mistake(f"{as_flag(asked_by, wanted)} is not there{note}. This machine has "
                      f"{', '.join(have)}.")
    return torch.device(wanted), "as asked"


def own_preset(device: str = "auto") -> str:
    """The preset that a device takes if none is asked for."""
    return "paper" if pick_device(device)[0].type == "cuda" else "laptop"


def whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


class Parser(argparse.ArgumentParser):
    """Flags for settings, with a preset's values in the help; errors are one sentence."""

    WANTED = dict(int="a whole number such as 100000", float="a number such as 0.5",
                  whole_numbers="whole numbers such as 32,64")

    def error(self, message: str):
        message = re.sub(r"^argument |['{}]", "", message)
        message = re.sub(r"invalid (\w+) value: (.*)", lambda found:
                         f"{found[2]} is not {self.WANTED[found[1]]}", message)
        raise Mistake(f"{message}. See --help.")

    def add_settings(self, preset: str, names=tuple(f.name for f in fields(Settings))):
        group = self.add_argument_group(f"settings, with the values of the preset {preset}")
        for f in (f for f in fields(Settings) if f.name in names):
            value = dict(PRESETS[preset], preset=preset).get(f.name, f.default)
            options = dict(dest=f.name, default=argparse.SUPPRESS,
                           help=f"{f.metadata['help']} ({as_text(value)})".replace("%", "%%"))
            kind, choices = type(f.default), f.metadata["choices"]
            if kind is bool:
                options["action"] = argparse.BooleanOptionalAction
            else:
                read = game_title if f.name == "game" else whole_numbers if kind is tuple else kind
                options |= dict(type=read, choices=choices or None, metavar="|".join(choices) or
                                ("N,N,..." if kind is tuple else kind.__name__.upper()))
            group.add_argument(flag(f.name), **options)

    def parse(self, argv: list[str]) -> dict:
        """The flags given, and no others, by name; old names are understood."""
        for before, word in zip([self.prog, *argv], argv):
            if re.fullmatch("(--[^=]*=)?", word) and "--game-args" not in (before, word[:-1]):
                raise Mistake(f"nothing stands after {word or before}: is a variable empty?")
        today = {flag(no + old): flag(no + new) for old, new in RENAMED.items()
                 for no in ("", "no_")}
        today |= {"--event-weights": "--event-weight=2", "--no-event-weights": "--event-weight=1"}
        words = [today.get(name, name) + equals + value
                 for name, equals, value in (word.partition("=") for word in argv)]
        given, unknown = self.parse_known_intermixed_args(words)
        if unknown:
            word = unknown[0].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(word, known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "see --help."
            raise Mistake(f"unknown {'flag' if word.startswith('-') else 'word'} {word!r}: {hint}")
        return vars(given)


def refuse(flags: dict, because: str):
    for name, value in flags.items():
        raise Mistake(f"{because}: leave out {as_flag(name, value)}.")


def without_effect(s: Settings, flags: dict) -> Settings:
    """Put settings that mean nothing beside others at their defaults; a flag for one is refused."""
    for name, (by, *values) in HAS_NO_EFFECT.items():
        if (now := getattr(s, by)) in values:
            if flags.get(name, plain := getattr(Settings, name)) != plain:
                raise Mistake(f"{flag(name)} means nothing with {as_flag(by, now)}: leave it out.")
            s = replace(s, **{name: plain})
    return s


def new_settings(flags: dict) -> tuple[Settings, torch.device, str]:
    """Preset, then flags; then what was left to the machine is settled for good."""
    device, why = pick_device(flags.get("device", "auto"))
    flags = dict(preset=own_preset(device.type)) | flags
    check(s := Settings(**(PRESETS[flags["preset"]] | flags)))
    s = without_effect(s, flags)
    torch.set_num_threads(s.threads or torch.get_num_threads())  # before precisions are timed
    precision = fast_precision(device) if s.precision == "auto" else s.precision
    return replace(s, precision=precision), device, why


def resumed_settings(flags: dict, manifest: dict, path: Path) -> Settings:
    """The run's own settings; a flag must agree with them, but for the few that may change."""
    s = settings_of(manifest)
    if flags.get("precision") == "auto":  # what auto means was settled when the run began
        del flags["precision"]
    for name, value in flags.items():
        if name not in MAY_CHANGE and value != getattr(s, name):
            way = ("leave that out to go on with it, or name another folder with --run"
                   if name != "temperature" else f"--eval {path} takes that")
            raise Mistake(f"{path} holds a run with {as_flag(name, getattr(s, name))}, not "
                          f"{as_flag(name, value)}: {way}.")
    if flags.get("steps", s.steps) < s.steps:
        raise Mistake(f"{path} holds a run of {s.steps} steps: --steps can only grow.")
    threads = manifest["threads"]  # their number changes the last bits of sums
    s = replace(s, **(dict(threads=threads) | {k: flags[k] for k in MAY_CHANGE if k in flags}))
    check(s)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    return s


def introduce(run: Run, why: str, path: Path):
    """The first lines: where this runs, what it is, and what it needs."""
    s, device, frames = run.settings, run.device, run.replay.columns["frame"]
    chip = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    parts = [*run.model.named_children(), *run.agent.named_children()]
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts
             if name != "harmony"}
    sizes = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if size)
    print(f"device   {device} ({chip}), {why}; {s.precision}, {torch.get_num_threads()} threads\n"
          f"preset   {s.preset}; {s.game}, seed {s.seed}, {s.steps:,} steps, in {path}\n"
          f"game     {run.game.actions} actions; frames: {run.game.source}\n"
          f"sizes    {sizes}; replay {frames.nbytes / 2**20:,.0f} MiB on {frames.device}"
          + (f"\nresuming at step {run.step:,}" if run.step else ""))


def train_command(flags: dict):
    """Begin a run, or go on with the one in the folder, to its end and an evaluation."""
    title = re.sub(r"[^\w.-]+", "-", flags.get("game", Settings.game))
    preset = flags.get("preset") or own_preset(flags.get("device", "auto"))
    if preset != own_preset():  # must not take the usual run's place
        title += f"-{preset}"
    folder = Folder(Path(flags.pop("run", f"runs/{title}-s{flags.get('seed', 0)}")))
    with contextlib.closing(folder):
        resuming = bool(folder.manifests())
        if resuming:
            folder.open_for_writing()  # first: whoever holds the lock may be saving
            manifest, state, files = folder.load()
            s = resumed_settings(flags, manifest, folder.path)
            device, why = pick_device(s.device)
        else:
            s, device, why = new_settings(flags)
        result = folder.path / f"evaluation-{s.steps:06d}.json"
        if resuming and manifest["step"] == s.steps and result.exists():
            scores = kept_evaluation(result)["scores"]
            if len(scores) >= s.eval_episodes:
                return print(f"finished: {s.preset}, {s.steps:,} steps, mean score "
                             f"{np.mean(scores):,.9g}, episodes: {len(scores)} ({result}). More "
                             f"--steps go on; --eval {folder.path} --eval-episodes N plays more.")
        run = Run(s, device)
        if resuming:
            folder.resume(manifest, state, files, run.replay)
            restore(run, state)
        weights = sum(p.numel() for net in (run.model, run.agent) for p in net.parameters())
        folder.check_room(s.steps - run.step, weights, new=not resuming)
        if not resuming:
            folder.open_for_writing(new=True)
        try:
            if resuming:
                folder.rewrite_tables()
            else:
                save(run, folder)
            introduce(run, why, folder.path)
            with StopSignal() as stop:
                train(run, folder, stop)
        except (Mistake, OSError) as error:  # the game's or the disk's, in the middle of a run
            raise Stopped(f"{reason(error).rstrip('.')}. {folder.kept()}") from None
        player = make_player(s, run.playing_model, run.playing_agent, s.eval_episodes,
                             temperature=s.temperature)
        evaluate_and_report(s, player, state_of(run), result)


def play_command(flags: dict, kind: str):
    """--eval, --watch: play with what a run has learnt so far, or with an exported agent."""
    path, act_on = Path(flags.pop(kind)), flags.pop("act_on", "posterior")
    games = 1 if kind == "watch" else None
    s, player, state, out = open_player(path, flags, flag(kind), games, act_on)
    name = f"{state['step']:06d}" + "-prior" * (act_on == "prior")
    name += f"-temperature-{s.temperature:g}" * (s.temperature != state["own"].temperature)
    if kind == "watch":
        watch(s, player, out / f"watch-{name}.png")
    else:
        evaluate_and_report(s, player, state, out / f"evaluation-{name}.json")


def open_player(path: Path, flags: dict, command: str, games: int | None, act_on="posterior"):
    """For commands that take most settings from a run: these, a player of so many games (None: one
    for each episode of an evaluation), the saved state, and the folder for its results: the run's
    or, beside an exported agent, one named after it."""
    out = Path(flags.pop("out", path.with_suffix("") if path.is_file() else path))
    allowed = ["device", "threads", "temperature"] + ["eval_episodes"] * (games is None)
    refuse({name: value for name, value in flags.items() if name not in allowed},
           f"{command} takes its settings from the run")
    s = Settings(**flags)
    check(s)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    s, player, state = load_player(path, flags.pop("device", "auto"), games, act_on, **flags)
    if out.is_file():
        raise Mistake(f"{out} is a file: --out DIR names a folder for the result.")
    if out != path and (out / "settings.json").exists() and not out.samefile(path):
        raise Mistake(f"{out} holds a run of its own: --out DIR names another place.")
    make_folder(out, f", and {command} leaves its result there: --out DIR names another place")
    return s, player, state, out


def run_command(argv: list[str]):
    parser = Parser(prog="drama.py", allow_abbrev=False, description=__doc__.split("\n")[0],
                    argument_default=argparse.SUPPRESS)
    parser.add_argument("--run", metavar="DIR", help="run folder (runs/GAME-sSEED)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--eval", metavar="RUN", help="play full episodes with a run's agent")
    instead.add_argument("--watch", metavar="RUN", help="film an episode of a run's agent")
    instead.add_argument("--export", metavar=("RUN", "FILE"), nargs=2, help="write a run's agent "
                         "to a file FILE.pt, which --eval and --watch take like a run")
    instead.add_argument("--list-games", action="store_true", help="list the Atari games")
    parser.add_argument("--out", metavar="DIR", help="for --eval and --watch: where to write")
    parser.add_argument("--act-on", choices=("posterior", "prior"), help="for --eval and --watch: "
                        "the actor sees the frame or, as in the published code, a guess at it")
    parser.add_settings(own_preset())
    flags = parser.parse(argv)
    if flags.pop("list_games", False):
        refuse(flags, "--list-games only lists")
        print("\n".join(AtariGame.names()))
    elif paths := flags.pop("export", None):
        refuse(flags, "--export takes all from the run")
        print(f"{paths[1]}: {export(*map(Path, paths))}")
    elif kinds := [kind for kind in ("eval", "watch") if kind in flags]:
        play_command(flags, kinds[0])
    else:
        refuse({name: flags[name] for name in ("act_on", "out") if name in flags},
               "only --eval and --watch take that")
        train_command(flags)


main = functools.partial(command_line, run_command)

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
