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

STEPS, GAMMA = 20_000, 0.99


def deviation(id, mode):
    """Of the discounted return, by the wrapper after so many steps of play; by hand without it."""
    env = gymnasium.make(id)
    if mode == "single":
        env = NormalizeReward(env, GAMMA)
    elif mode != "by hand":
        env = SyncVectorEnv([lambda: gymnasium.make(id)], autoreset_mode=mode)
        env = NormalizeRewards(env, GAMMA)
    rng, returns, so_far, over = np.random.default_rng(0), [], 0.0, False
    env.reset(seed=0)
    played = 0
    while played < STEPS:
        played += not (over and mode == AutoresetMode.NEXT_STEP)  # whose step after an end is a reset
        action = rng.integers(3) if id == "MountainCar-v0" else rng.uniform(-2, 2, 1)
        several = mode not in ("single", "by hand")
        _, reward, terminated, truncated, _ = env.step(np.array([action]) if several else action)
        assert not np.any(terminated)  # all ends are time limits
        if mode == "by hand":
            so_far = GAMMA * so_far + reward
            returns.append(so_far)
        over = bool(np.any(truncated))
        if over and mode in ("single", "by hand"):
            env.reset()
            so_far = 0.0
        elif over and mode == AutoresetMode.DISABLED:
            env.reset(options={"reset_mask": np.array([True])})
    return np.std(returns) if returns else env.return_rms.var**0.5


for id in ("MountainCar-v0", "Pendulum-v1"):
    truth = deviation(id, "by hand")
    print(f"{id}, by hand: {truth:.2g}")
    for mode in ("single", *AutoresetMode):
        print(f"{id}, {getattr(mode, 'name', mode)}: {deviation(id, mode) / truth:.1f} of that")
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
