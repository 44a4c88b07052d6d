#!/usr/bin/env bash
# gymnasium 1.4.0: MaxAndSkipObservation ends half of all episodes on an observation from before.
#
# It holds an action for `skip` frames and gives the maximum of the last two of them. Nothing else
# is kept: an episode that ends on an earlier frame ends on the two frames of the step before, while
# reward and flags are of now; one that never got so far ends on those of another episode, or on
# zeros. With skip=4 that is two ends of four, and of CartPole's, under random play, two of three.
# So a final observation is nothing to bootstrap from, at a time limit, nor to learn from.
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
from gymnasium.wrappers import MaxAndSkipObservation


class Count(gymnasium.Env):
    """Shows how often it was stepped in this episode, which is cut off after `limit` times."""

    observation_space = gymnasium.spaces.Box(0, 1000, (1,), np.int64)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, limit):
        self.limit = limit

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.array([0]), {}

    def step(self, action):
        self.steps += 1
        return np.array([self.steps]), 1.0, False, self.steps == self.limit, {}


def last_of(env, seed=None):
    env.reset(seed=seed)
    env.action_space.seed(seed)
    over = False
    while not over:
        seen, _, terminated, truncated, _ = env.step(env.action_space.sample())
        over = terminated or truncated
    return seen


for limit in (2, 10, 11, 12, 13):
    seen = last_of(MaxAndSkipObservation(Count(limit)))
    print(f"cut off after {limit} frames, it shows frame {seen[0]}")

old = 0
for seed in range(200):
    env = MaxAndSkipObservation(gymnasium.make("CartPole-v1"))
    seen = last_of(env, seed)
    old += not np.all(seen >= np.float32(env.unwrapped.state))
print(f"{old} of {seed + 1} ends of CartPole are no maximum of the last state and another")
PYTHON
diff "$folder/seen" - <<'END'
cut off after 2 frames, it shows frame 0
cut off after 10 frames, it shows frame 8
cut off after 11 frames, it shows frame 11
cut off after 12 frames, it shows frame 12
cut off after 13 frames, it shows frame 12
131 of 200 ends of CartPole are no maximum of the last state and another
END
echo "as stated"
