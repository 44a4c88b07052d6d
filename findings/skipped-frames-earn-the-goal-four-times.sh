#!/usr/bin/env bash
# torchrl 0.14.1: FrameSkipTransform plays on after an end, earns it again, or does not notice it.
#
# To skip frames is to hold an action for some of them, and to stop where the episode does; GymEnv's
# own frame_skip does so. FrameSkipTransform always plays all of them, adds up what they give, and
# takes observation and flags of the last one alone, where gymnasium leaves undefined what comes after
# an end. The goal of MountainCarContinuous is worth 100, and whoever holds an action for 4 frames gets
# it up to four times: 389, where no play is worth 100. Acrobot's tip falls back from the height that
# ends it, and a fallen CartPole gets up again: those episodes go on, with no end to learn from. Of the
# three CartPole warns, once. The docstring tells of repeated actions only.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 torchrl==0.14.1 \
    tensordict==0.14.3 gymnasium==1.4.0
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import torch
from torchrl.envs import FrameSkipTransform, GymEnv, TransformedEnv

torch.set_num_threads(1)
EPISODES = 50


def one_hot(count, action):
    return torch.eye(count, dtype=torch.int64)[action]


policies = {
    "MountainCarContinuous-v0": lambda observation: torch.where(observation[1:2] < 0, -1.0, 1.0),
    "Acrobot-v1": lambda observation: one_hot(3, 2 if observation[4] < 0 else 0),
    "CartPole-v1": lambda observation: one_hot(2, int(observation[2] + observation[3] > 0)),
}
for game, policy in policies.items():
    scores = {}
    for name, env in (("argument", GymEnv(game, frame_skip=4)),
                      ("transform", TransformedEnv(GymEnv(game), FrameSkipTransform(4)))):
        env.set_seed(0)
        scores[name] = [
            env.rollout(1000, policy)["next", "reward"].sum().item() for _ in range(EPISODES)]
        print(f"{game}, {name}: mean return {sum(scores[name]) / EPISODES:.1f}, "
              f"from {min(scores[name]):.0f} to {max(scores[name]):.0f}")
    other = sum(abs(a - b) > 0.5 for a, b in zip(*scores.values()))
    print(f"{game}: {other} of {EPISODES} episodes differ")
PYTHON
diff "$folder/seen" - <<'END'
MountainCarContinuous-v0, argument: mean return 89.1, from 89 to 89
MountainCarContinuous-v0, transform: mean return 344.9, from 288 to 389
MountainCarContinuous-v0: 50 of 50 episodes differ
Acrobot-v1, argument: mean return -122.0, from -178 to -91
Acrobot-v1, transform: mean return -128.6, from -207 to -91
Acrobot-v1: 16 of 50 episodes differ
CartPole-v1, argument: mean return 137.2, from 42 to 299
CartPole-v1, transform: mean return 138.0, from 42 to 299
CartPole-v1: 6 of 50 episodes differ
END
echo "as stated"
