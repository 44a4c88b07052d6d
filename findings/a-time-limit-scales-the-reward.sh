#!/usr/bin/env bash
# gymnasium 1.4.0: the same rewards are normalised to five times the size by another autoreset mode.
#
# NormalizeReward divides rewards by the deviation of the discounted return so far, and that return
# should begin at 0 in every episode. Where episodes end by a time limit it does so with SAME_STEP and
# DISABLED alone. With NEXT_STEP, which is the default, and in the wrapper of a single game it goes on
# from one episode into the next, settles, and hardly deviates. In MountainCar, which random play does
# not solve, a reward of -1 becomes -0.04 with the first two and -0.20 with the others; in Pendulum
# they differ by half. There is no warning, and a learning rate chosen for one size meets another.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gymnasium==1.4.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeReward
from gymnasium.wrappers.vector import NormalizeReward as NormalizeRewards

GAMMA = 0.99


def games(id, mode, inside=lambda game: game):
    return SyncVectorEnv([lambda: inside(gymnasium.make(id))], autoreset_mode=mode)


def play(env):
    """Reward and end of 20,000 steps of random play; all ends are time limits."""
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(20_000):
        _, (reward,), (terminated,), (truncated,), _ = env.step(env.action_space.sample())
        assert not terminated
        if truncated and env.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            env.reset(options={"reset_mask": np.array([True])})
        yield reward, truncated


def by_hand(id):
    """The deviation of the discounted return."""
    so_far, returns = 0.0, []
    for reward, over in play(games(id, AutoresetMode.SAME_STEP)):
        so_far = GAMMA * so_far + reward
        returns.append(so_far)
        so_far *= not over
    return np.std(returns)


def by_wrapper(env, wrapper):
    for _ in play(env):
        pass
    return wrapper.return_rms.var**0.5


for id in ("MountainCar-v0", "Pendulum-v1"):
    truth = by_hand(id)
    print(f"{id}, by hand: {truth:.2g}")
    single = games(id, AutoresetMode.SAME_STEP, lambda game: NormalizeReward(game, GAMMA))
    print(f"{id}, single: {by_wrapper(single, single.envs[0]) / truth:.1f} of that")
    for mode in AutoresetMode:
        several = NormalizeRewards(games(id, mode), GAMMA)
        print(f"{id}, {mode.name}: {by_wrapper(several, several) / truth:.1f} of that")
PYTHON
diff "$folder/seen" - <<'END'
MountainCar-v0, by hand: 24
MountainCar-v0, single: 0.2 of that
MountainCar-v0, NEXT_STEP: 0.2 of that
MountainCar-v0, SAME_STEP: 1.0 of that
MountainCar-v0, DISABLED: 1.0 of that
Pendulum-v1, by hand: 1.8e+02
Pendulum-v1, single: 0.7 of that
Pendulum-v1, NEXT_STEP: 0.7 of that
Pendulum-v1, SAME_STEP: 1.0 of that
Pendulum-v1, DISABLED: 1.0 of that
END
echo "as stated"
