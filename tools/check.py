"""What a run's world model and critic have learnt, set beside what really happens.

    python -m tools.check runs/Breakout-s0      a table; it is kept as JSON, with one dream as PNG

Five fresh episodes are played, with seeds that neither training nor evaluation uses. All along them
begin dreams, after half a window of real frames, that take the recorded actions. After 1, 5 and 15
steps: errors, of 255, of the frames and of the pixels that moved; how many of these move in the
dream; KL; rewards and ends, counted over all steps of the dreams, which overlap. Then the KL by the
age of the play state, and how well the value agrees with the return that followed.
"""

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import NamedTuple

import drama  # first: it sets up torch
import numpy as np
import torch
from agent import Dream, Player, WorldModel, dream_picture, kl_divergence, lambda_return
from buffer import Batch, Replay, versions, write_json, write_png

EPISODES, LIMIT = 5, 2000  # and the most steps of each
DREAMT = (1, 5, 15)  # steps into a dream
EVERY, AT_MOST, AT_ONCE = 4, 512, 32  # steps between dreams; dreams; how many of them together


class Played(NamedTuple):
    """Episodes, one after the other, and what player and critic had before each action."""

    replay: Replay
    kl: np.ndarray  # (steps,) nats, of q(z_t) from the prior of the play state
    value: np.ndarray  # (steps,) v(s_t)
    age: np.ndarray  # (steps,) steps that the play state had seen


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
    reseed = functools.partial(drama.randomness, s.seed, purpose="test")
    moves = player.play(drama.make_game(s, EPISODES), seeds, reseed, LIMIT)
    for move in drama.show_progress(desc="playing", total=LIMIT, iterable=moves):
        posterior = model.posterior(model.images(torch.from_numpy(move.frame).to(device)))
        kl = kl_divergence(posterior, model.prior(d_past)).cpu().numpy()
        value = player.agent.value(player.history[-1][0], d_past).cpu().numpy()
        steps.append(dict(
            frame=move.frame, action=move.action, reward=move.reward, terminal=move.terminal,
            first=np.full(EPISODES, not steps), running=running, kl=kl, value=value,
            age=np.full(EPISODES, age)))
        d_past, age, running = player.d_past.clone(), player.age, ~move.over
    played = {name: np.stack([step[name] for step in steps], 1) for name in steps[0]}
    running = played.pop("running")  # (episodes, steps)
    played = {name: column[running] for name, column in played.items()}
    replay = Replay(len(played["action"]))
    replay.append_steps(played)
    return Played(replay, played["kl"], played["value"], played["age"])


def windows(replay: Replay, starts: np.ndarray, length: int, device) -> Batch:
    """As `replay.windows`, and beyond the ends: there the first or the last step comes again."""
    rows = (starts[:, None] + np.arange(length)).clip(0, replay.length - 1)
    batch = replay.windows(rows.flatten(), 1, device)
    return Batch(*(part.view(*rows.shape, *part.shape[2:]) for part in batch))


@torch.no_grad()
def dream_beside(player: Player, replay: Replay) -> tuple[np.ndarray, np.ndarray, Dream]:
    """Steps all along the episodes, how many come from there on, and dreams that take the actions
    that were taken.

    A dream sees the half window before, of its own episode; early in one, less. So it begins half a
    window into an episode or, if the episode is short, in its middle.
    """
    model, device = player.model, player.d_past.device
    context, horizon, parts = player.half, max(DREAMT), []
    begun = np.array([(start, stop - start) for first, stop in spans(replay) for start in
                      range(first + min(context, (stop - first) // 2), stop, EVERY)])
    starts, left = begun[:: -(-len(begun) // AT_MOST)].T
    for few in np.split(starts, range(AT_ONCE, len(starts), AT_ONCE)):
        real = windows(replay, few - context, context + horizon, device)
        start = model.starts_from_contexts(Batch(*(part[:, : context + 1] for part in real)))
        parts.append(model.imagine(start, horizon,
                                   lambda t, z, d_past: real.action[:, context + t]))
    return starts, left, Dream(*(torch.cat(part, 1) for part in zip(*parts)))


@torch.no_grad()
def measure(model: WorldModel, replay: Replay, starts, left, dream: Dream, k: int) -> dict:
    """Dreams of k steps, from `starts` of which so many steps were `left` in the episode -> name:
    figure, NaN where there is none.

    Frames and KL are those of the last step, z_k; rewards and ends those of all k, or of all left.
    The frame that comes with game over is an old one in Atari, so no dream is held to it.
    """
    device, seen = dream.reward.device, left > k
    lived = torch.from_numpy(np.arange(k) < left[:, None])  # (dreams, k)

    def frames(step):
        return model.images(replay.windows(starts[seen] + step, 1, device).frame)

    def moved(image, before):
        return (image - before).mean(1).abs() > 16 / 255

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
        **foreseen("rewards", real_reward != 0, reward.abs() > least / 2),
        **foreseen("ends", real_end, end > 0.5)}


def judge(player: Player, replay: Replay) -> tuple[np.ndarray, dict[int, dict]]:
    """Where dreams began in episodes that were played, and their figures by steps of a dream."""
    starts, *dreams = dream_beside(player, replay)
    return starts, {k: measure(player.model, replay, starts, *dreams, k) for k in DREAMT}


def kl_by_age(played: Played, half: int) -> dict[str, float]:
    """Mean KL of the play state from the age on to which it is rebuilt (T4); before, it is as old
    as the episode."""
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
        value[-1] = float(played.value[stop - 1])  # counts where the episode was cut off
        returns += lambda_return(reward, end, value, s.gamma, 1.0).flatten().tolist()
    vary = np.std(returns) > 0 and played.value.std() > 0
    agree = float(np.corrcoef(played.value, returns)[0, 1]) if vary else 0.0
    return dict(value_correlation=agree, mean_value=float(played.value.mean()),
                mean_return=float(np.mean(returns)))


def line(name: str, cells) -> str:
    """A row of the table; a figure to compare the one above with stands further in."""
    texts = ("-" if cell != cell else cell if isinstance(cell, str) else
             f"{cell:,}" if isinstance(cell, int) else f"{cell:,.2f}" for cell in cells)
    return f"{'  ' * name.startswith('had') + name:<32}" + "".join(f"{text:>10}" for text in texts)


def check(s: drama.Settings, player: Player, step: int, path: Path):
    """Play, dream beside it, keep the figures and a picture of one dream, print one table."""
    played = play(s, player)
    replay, reward = played.replay, played.replay["reward"].numpy().astype(float)
    starts, table = judge(player, replay)
    ages, values = kl_by_age(played, player.half), value_and_return(s, played)
    scores = [reward[first:stop].sum() for first, stop in spans(replay)]
    lengths = [stop - first for first, stop in spans(replay)]
    clean = {k: {name: None if math.isnan(figure) else figure for name, figure in row.items()}
             for k, row in table.items()}
    write_json(path.with_suffix(".json"), dict(
        game=s.game, step=step, dreams=clean, kl_by_age=ages, **values, scores=scores,
        lengths=lengths, versions=versions()))
    drama.randomness(s.seed, 0, "picture")
    middle = starts[len(starts) // 2 : len(starts) // 2 + 1] - 4
    window = windows(replay, middle, drama.PICTURE_STEPS, player.d_past.device)
    write_png(path, [dream_picture(player.model, window, context=5).numpy()])

    scores = [f"{score:,.10g}" + "+" * (n == LIMIT) for score, n in zip(scores, lengths)]
    print(f"{EPISODES} episodes, scores {'; '.join(scores)}; {len(starts)} dreams; errors are of "
          f"255\n\n{line('steps of a dream', DREAMT)}")
    print(*(line(name, (table[k][name] for k in DREAMT)) for name in table[1]), sep="\n")
    if ages:
        print("", line("age of the play state, steps", ages), line("KL, nats", ages.values()),
              sep="\n")
    print("\nvalue and return that followed: correlation {:.2f}, means {:.2f} and {:.2f}; ".format(
        *values.values()) + f"real reward a step {reward.mean():.3f}")
    print(f"one of the dreams beside what happened: {path}")


def run_command(argv: list[str]):
    parser = drama.Parser(prog="python -m tools.check", description=__doc__.split("\n")[0],
                          allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("run", metavar="RUN", help="folder of the run")
    parser.add_argument("--out", metavar="DIR", help="where to write (the run's folder)")
    parser.add_settings(drama.own_preset(), ("device", "threads"))
    flags = parser.parse(argv)
    path = Path(flags.pop("run"))
    _, device, out = drama.playing_settings(path, flags, "tools.check")
    s, player, state = drama.load_player(path, device, EPISODES)
    check(s, player, state["step"], out / f"model-check-{state['step']:06d}.png")


def main(argv: list[str] | None = None) -> int:
    return drama.command_line(run_command, argv, "tools.check")


if __name__ == "__main__":
    sys.exit(main())
