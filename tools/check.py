"""What a run's world model and critic have learnt, set beside what really happens.

    python -m tools.check runs/Breakout-s0      a table; it is kept as JSON, with one dream as PNG

Five fresh episodes are played, with seeds that neither training nor evaluation uses. All along them
dreams begin, after half a window of real frames, and take the recorded actions. After 1, 5 and 15
steps: errors, of 255, of the frames and of the pixels that moved; how many of these move in the
dream; KL; rewards and ends, counted over all steps of the dreams, which overlap; and by what factor
the squared error grows if dreams exchange their actions. Then how much of what moves the model sees
at all: the share of the change from frame to frame that the reconstructions show, by how many of
the 4,096 pixels moved. A ball is two of them, and may be missing where all else is well. Then
open-loop drift, the error of longer dreams after four real frames; the KL by the age of the play
state; how well the value agrees with the return that followed; and the policy's entropy.
"""

import argparse
import functools
import io
import math
import sys
from pathlib import Path
from typing import NamedTuple

import drama  # first: it sets up torch
import numpy as np
import torch
from agent import Player, Trajectory, WorldModel, dream_picture, kl_divergence, lambda_return
from buffer import Batch, Replay, packed, versions, write_file, write_json, write_png
from tools.curves import check_place

EPISODES, LIMIT = 5, 2000  # and the most steps of each
DREAMT = (1, 5, 15)  # steps into a dream
EVERY, AT_MOST, AT_ONCE = 4, 512, 32  # steps between dreams; dreams; how many of them together
MOVED, PAIRS = (8, 64, 512, 4096), 2048  # pixels that move, at most; pairs of frames
DRIFT, BURN_IN, STARTS, SAMPLES = (1, 5, 15, 50), 4, 32, 4  # as others measure it: open_loop_drift


class Played(NamedTuple):
    """Episodes, one after the other, and what player and critic had before each action."""

    replay: Replay
    kl: np.ndarray  # (steps,) nats, of q(z_t) from the prior of the play state
    value: np.ndarray  # (steps,) v(s_t)
    age: np.ndarray  # (steps,) steps that the play state had seen
    entropy: np.ndarray  # (steps,) nats, of pi(a | s_t)


def moved(image, before):
    """Images (N, 3, 64, 64), and those a step before -> which pixels moved, (N, 64, 64)."""
    return (image - before).mean(1).abs() > 16 / 255


def spans(replay: Replay) -> list[tuple[int, int]]:
    """The first step of every episode, and the one after its last."""
    opened = np.flatnonzero(replay["first"]).tolist()
    return list(zip(opened, [*opened[1:], replay.length]))


@torch.no_grad()
def play(s: drama.Settings, player: Player) -> Played:
    """Fresh episodes, side by side; what comes after an episode's last action is left out."""
    model, device, steps = player.model, player.d_past.device, []
    seeds, running = drama.episode_seeds(s.seed, 2, "test", EPISODES), np.ones(EPISODES, bool)
    d_past, age = player.d_past.clone(), player.age  # before the step, which moves both on
    reseeding = functools.partial(drama.reseed, s.seed, purpose="test")
    moves = player.play(drama.make_game(s, EPISODES), seeds, reseeding, LIMIT)
    for move in drama.show_progress(desc=f"playing at most {LIMIT:,} steps", iterable=moves):
        posterior = model.posterior(model.images(torch.from_numpy(move.frame).to(device)))
        kl = kl_divergence(posterior, model.prior(d_past)).cpu().numpy()
        z = player.history[-1][0]
        value = player.agent.value(z, d_past).cpu().numpy()
        policy = player.agent.policy(player.agent.features(z, d_past)).clamp(min=1e-30)
        entropy = -(policy * policy.log()).sum(-1).cpu().numpy()
        steps.append(dict(
            frame=move.frame, action=move.action, reward=move.reward, terminal=move.terminal,
            first=np.full(EPISODES, not steps), running=running, kl=kl, value=value,
            age=np.full(EPISODES, age), entropy=entropy))
        d_past, age, running = player.d_past.clone(), player.age, ~move.over
    played = {name: np.stack([step[name] for step in steps], 1) for name in steps[0]}
    running = played.pop("running")  # (episodes, steps)
    played = {name: column[running] for name, column in played.items()}
    replay = Replay(len(played["action"]))
    replay.append_steps(played)
    return Played(replay, *(played[name] for name in Played._fields[1:]))


def windows(replay: Replay, starts: np.ndarray, length: int, device) -> Batch:
    """Like `replay.windows`, but also beyond the ends: there the first or last step is repeated."""
    rows = (starts[:, None] + np.arange(length)).clip(0, replay.length - 1)
    batch = replay.windows(rows.flatten(), 1, device)
    return Batch(*(part.view(*rows.shape, *part.shape[2:]) for part in batch))


@torch.no_grad()
def dream_beside(player: Player, replay: Replay, horizon: int = max(DREAMT),
                 exchanged: bool = False):
    """Steps all along the episodes (N,), how many come from there on (N,), and Dreams from there
    that take the recorded actions or those of other dreams, with the same random numbers.

    A dream sees the half window before it, of its own episode; early in one, less. So the first
    begins half a window into an episode or, if the episode is short, in its middle.
    """
    torch.manual_seed(0)
    model, device = player.model, player.d_past.device
    context, parts = player.half, []
    begun = np.array([(start, stop - start) for first, stop in spans(replay) for start in
                      range(first + min(context, (stop - first) // 2), stop, EVERY)])
    starts, left = begun[:: -(-len(begun) // AT_MOST)].T
    acting = np.roll(starts, len(starts) // 2 * exchanged)  # from far away, and none its own
    for at in range(0, len(starts), AT_ONCE):
        few = slice(at, at + AT_ONCE)
        start = model.starts_from_contexts(
            windows(replay, starts[few] - context, context + 1, device))
        action = windows(replay, acting[few], horizon, device).action
        parts.append(model.imagine(start, horizon, lambda t, z, d_past: action[:, t]))
    return starts, left, Trajectory(*(torch.cat(part, 1) for part in zip(*parts)))


@torch.no_grad()
def measure(model: WorldModel, replay: Replay, starts, left, dream: Trajectory, k: int) -> dict:
    """Dreams of k steps from `starts`, from which so many steps were `left` in the episode -> name:
    figure, NaN where there is none.

    Frames and KL are those of the last step, z_k; rewards and ends those of all k, or of all left.
    The frame that comes with game over is an old one in Atari, so no dream is compared with it.
    """
    device, seen = dream.reward.device, left > k
    lived = torch.from_numpy(np.arange(k) < left[:, None])  # (dreams, k)

    def frames(step):
        return model.images(replay.windows(starts[seen] + step, 1, device).frame)

    def rms(error):  # of 255
        return 255 * error.mean().sqrt().item()

    def foreseen(name, real, guess):
        hits = (real & guess).sum()
        return {f"{name} that came": real.sum().item(),
                f"{name} foreseen, %": (100 * hits / real.sum()).item(),
                f"foreseen {name} that came, %": (100 * hits / guess.sum()).item()}

    image, dreamt = frames(k), model.decode(dream.z[k][seen])
    moving = moved(image, frames(k - 1))
    followed = moved(dreamt, model.decode(dream.z[k - 1][seen]))[moving]
    error, still = ((guess - image).square().mean(1) for guess in (dreamt, frames(0)))
    kl = kl_divergence(model.posterior(image), model.prior(dream.d_past[k][seen]))
    real = windows(replay, starts, k, "cpu")
    real_reward, real_end = real.reward[lived], real.terminal[lived] > 0
    reward, end = (part[:k].T.cpu()[lived] for part in (dream.reward, dream.end))
    earned = replay["reward"][replay["reward"] != 0].abs()
    least = earned.min() if len(earned) else math.inf
    return {
        "error, all pixels": rms(error), "had nothing moved": rms(still),
        "error, moving pixels": rms(error[moving]), "had they not moved": rms(still[moving]),
        "moving pixels that move, %": 100 * followed.float().mean().item(),
        "KL, nats": kl.mean().item(),
        "mean reward": real_reward.mean().item(), "mean dreamt reward": reward.mean().item(),
        "ends, % of steps": 100 * real_end.float().mean().item(),
        "dreamt ends, % of steps": 100 * end.mean().item(),
        **foreseen("rewards", real_reward != 0, reward.abs() > least / 2),
        **foreseen("ends", real_end, end > 0.5)}


@torch.no_grad()
def action_shuffle_ratio(model: WorldModel, replay: Replay, starts, left, dream: Trajectory,
                         exchanged: Trajectory, k: int) -> float:
    """Mean squared error of frame k of dreams that took another dream's actions, over that of the
    dreams that took their own: 1 means that the model does not heed the action."""
    seen = left > k
    image = model.images(replay.windows(starts[seen] + k, 1, dream.reward.device).frame)
    own, others = (
        (model.decode(each.z[k][seen]) - image).square().mean() for each in (dream, exchanged))
    return (others / own).item() if len(starts) > 1 else math.nan


def judge(player: Player, replay: Replay, steps=DREAMT) -> tuple[np.ndarray, dict[int, dict]]:
    """Where dreams began in episodes that were played, and their figures by steps into a dream."""
    starts, left, dream = dream_beside(player, replay, max(steps))
    *_, exchanged = dream_beside(player, replay, max(steps), exchanged=True)
    beside = player.model, replay, starts, left, dream
    return starts, {k: measure(*beside, k) | {
        "action-shuffle ratio": action_shuffle_ratio(*beside, exchanged, k)} for k in steps}


@torch.no_grad()
def change_shown(model: WorldModel, replay: Replay, device) -> dict[int, float]:
    """At most so many pixels moved -> share of their change that the reconstructions show, %: 0 for
    what they leave out, 100 for what they show as it is, NaN where no frames moved like that."""
    after, sums = np.flatnonzero(~replay["first"].numpy()), torch.zeros(2, len(MOVED))
    after = after[:: -(-len(after) // PAIRS) or 1]
    for at in range(0, len(after), 8 * AT_ONCE):
        image, before = (model.images(replay.windows(after[at:at + 8 * AT_ONCE] - back, 1, device)
                                      .frame) for back in (0, 1))
        shown, hidden = (model.decode(model.posterior(x).argmax(-1)) for x in (image, before))
        real, guess = (image - before).mean(1), (shown - hidden).mean(1)  # (pairs, 64, 64)
        moving = moved(image, before)
        group = torch.bucketize(moving.sum((1, 2)), torch.tensor(MOVED, device=device)).cpu()
        for row, product in enumerate((guess * real, real * real)):
            sums[row].index_add_(0, group, (product * moving).sum((1, 2)).cpu())
    return dict(zip(MOVED, (100 * sums[0] / sums[1]).tolist()))


@torch.no_grad()
def open_loop_drift(player: Player, replay: Replay) -> tuple[list[float], dict[str, np.ndarray]]:
    """STARTS x SAMPLES dreams of 50 steps, or as many as the episodes have room for, that see
    BURN_IN real frames, then actions -> mean squared error of every step, frames in [0, 1], and
    what was compared. Both are empty if there is not even room for one step.

    real (starts, steps, height, width, 3), dream (starts, samples, steps, height, width, 3) uint8;
    for the action that led to each frame: rrew, rend (starts, steps), reward and whether the life
    ended; drew, dend (starts, samples, steps), the same as dreamt, the end as a probability.
    """
    def room(steps):
        return [at for first, stop in spans(replay)
                for at in range(first, stop - BURN_IN - steps + 1)]

    steps = next((n for n in range(max(DRIFT), 0, -1) if len(room(n)) >= STARTS), 0)
    if not steps:
        return [], {}
    model, begun, errors, frames = player.model, np.array(room(steps)), [], []
    starts = begun[np.arange(STARTS) * len(begun) // STARTS]
    real = windows(replay, starts, BURN_IN + steps, player.d_past.device)
    repeated = Batch(*(part.repeat_interleave(SAMPLES, 0) for part in real))
    start = model.starts_from_contexts(Batch(*(part[:, :BURN_IN] for part in repeated)))
    dream = model.imagine(
        start, steps, lambda t, z, d_past: repeated.action[:, BURN_IN - 1 + t])
    for image, z in zip(real.frame[:, BURN_IN:].unbind(1), dream.z[1:]):
        dreamt = model.decode(z).unflatten(0, (STARTS, SAMPLES))
        errors.append((dreamt - model.images(image).unsqueeze(1)).square().mean().item())
        frames.append((255 * dreamt).round().byte().movedim(-3, -1))
    arrays = dict(
        real=real.frame[:, BURN_IN:], dream=torch.stack(frames, 2),
        rrew=real.reward[:, BURN_IN - 1 : -1], rend=real.terminal[:, BURN_IN - 1 : -1],
        drew=dream.reward.T.unflatten(0, (STARTS, SAMPLES)),
        dend=dream.end.T.unflatten(0, (STARTS, SAMPLES)))
    return errors, {name: array.cpu().numpy() for name, array in arrays.items()}


def kl_by_age(played: Played, half: int) -> dict[str, float]:
    """Mean KL by the age of the play state, from the age on to which it is rebuilt (T4); before, it
    is as old as the episode."""
    group = np.where(played.age < half, -1, played.age // (width := max(1, half // 4)) * width)
    return {f"{age} on": float(played.kl[group == age].mean())
            for age in np.unique(group[group >= 0]).tolist()}


def value_and_return(s: drama.Settings, played: Played) -> dict[str, float]:
    """What the critic said before each step beside the discounted rewards that came."""
    returns = []
    for first, stop in spans(played.replay):
        reward, end = (played.replay[name][first:stop, None].float()
                       for name in ("reward", "terminal"))
        value = torch.zeros(len(reward) + 1, 1)
        value[-1] = float(played.value[stop - 1])  # where cut off: that of the last state seen
        returns += lambda_return(reward, end, value, s.gamma, 1.0).flatten().tolist()
    vary = np.std(returns) > 0 and played.value.std() > 0
    agree = float(np.corrcoef(played.value, returns)[0, 1]) if vary else 0.0
    return dict(value_correlation=agree, mean_value=float(played.value.mean()),
                mean_return=float(np.mean(returns)))


def finite(figures: dict) -> dict:
    """As JSON takes them: None for NaN."""
    return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


def line(name: str, cells) -> str:
    """A row of the table; a figure to compare the one above with is indented."""
    texts = ("-" if cell != cell else cell if isinstance(cell, str) else
             f"{cell:,}" if isinstance(cell, int) else f"{cell:,.2f}" for cell in cells)
    return f"{'  ' * name.startswith('had') + name:<32}" + "".join(f"{text:>10}" for text in texts)


def print_drift(errors: list[float], npz: Path | None):
    """The errors of some steps, the last among them, and in words what the episodes left out."""
    if len(errors) < max(DRIFT):
        fits = f"these take {len(errors)}" if errors else "open-loop drift is left out"
        print(f"\nno room in the episodes for {STARTS} dreams of {max(DRIFT)} steps after "
              f"{BURN_IN} real frames: {fits}"
              + f", and {npz} is not written" * bool(npz and not errors))
    if errors:
        steps = sorted({k for k in DRIFT if k < len(errors)} | {len(errors)})
        print("", line(f"steps after {BURN_IN} real frames", steps),
              line("mean squared error, of 1", (f"{errors[k - 1]:.1e}" for k in steps)), sep="\n")


def check(s: drama.Settings, player: Player, step: int, path: Path, npz: Path | None):
    """Play, dream beside it, keep the figures and a picture of one dream, print one table."""
    played = play(s, player)
    replay, reward = played.replay, played.replay["reward"].numpy().astype(float)
    starts, table = judge(player, replay)
    shown = change_shown(player.model, replay, player.d_past.device)
    drift, arrays = open_loop_drift(player, replay)
    ages, values = kl_by_age(played, player.half), value_and_return(s, played)
    scores = [reward[first:stop].sum() for first, stop in spans(replay)]
    lengths = [stop - first for first, stop in spans(replay)]
    write_json(path.with_suffix(".json"), dict(
        game=s.game, step=step, dreams={k: finite(row) for k, row in table.items()},
        change_shown=finite(shown), open_loop_drift=drift, kl_by_age=ages, **values,
        entropy=float(played.entropy.mean()), scores=scores, lengths=lengths,
        versions=versions()))
    if npz and drift:
        np.savez_compressed(file := io.BytesIO(), **arrays)
        write_file(npz, file.getvalue())
    drama.reseed(s.seed, 0, "picture")
    middle = starts[len(starts) // 2 : len(starts) // 2 + 1] - 4
    window = windows(replay, middle, drama.PICTURE_STEPS, player.d_past.device)
    write_png(path, [packed(dream_picture(player.model, window, context=5).numpy())])

    scores = [f"{score:,.10g}" + "+" * (n == LIMIT) for score, n in zip(scores, lengths)]
    print(f"{EPISODES} episodes, scores {'; '.join(scores)}; {len(starts)} dreams; errors are of "
          f"255\n\n{line('steps of a dream', DREAMT)}")
    print(*(line(name, (table[k][name] for k in DREAMT)) for name in table[1]), sep="\n")
    print("", line("pixels that move, up to", MOVED),
          line("of their change shown, %", shown.values()), sep="\n")
    print_drift(drift, npz)
    if ages:
        print("", line("age of the play state, steps", ages), line("KL, nats", ages.values()),
              sep="\n")
    print("\nvalue and return that followed: correlation {:.2f}, means {:.2f} and {:.2f}; ".format(
        *values.values()) + f"real reward a step {reward.mean():.3f}, entropy of the policy "
          f"{played.entropy.mean():.2f} nats")
    print(f"one of the dreams beside what happened: {path}")


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.check", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--out", metavar="DIR", help="where to write (the run's folder)")
    parser.add_argument("--npz", metavar="FILE", type=Path,
                        help="keep the frames, rewards and ends of the open-loop drift")
    parser.add_settings(drama.own_preset(), ("device", "threads"))
    flags = parser.parse(argv)
    path, npz = Path(flags.pop("run")), flags.pop("npz", None)
    if npz:
        check_place(npz, "--npz FILE")
    flags["temperature"] = 1.0  # the values are those of the policy as it was trained
    s, player, state, out = drama.open_player(path, flags, "tools.check", EPISODES)
    check(s, player, state["step"], out / f"model-check-{state['step']:06d}.png", npz)


main = functools.partial(drama.command_line, run_command, name="tools.check")

if __name__ == "__main__":
    sys.exit(main())
