#!/usr/bin/env bash
# ale-py 0.12.1: without a seed, copies of a game made in one second stick to the same actions.
#
# With repeat_action_probability=0.25 every frame an action is repeated by chance, the chance of
# each copy its own. Without a seed it begins at the clock's whole second, and a reset does not
# draw it anew: copies of AtariVectorEnv that were made within one second repeat their actions at
# the same frames for ever, and play one film if their actions are equal. With a seed each copy
# is another. (gymnasium.make("ALE/...") seeds itself, and has none of this.)
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import numpy as np
from ale_py.vector_env import AtariVectorEnv

COPIES = 32
for seed in (None, 0):
    env = AtariVectorEnv("breakout", COPIES, noop_max=1, use_fire_reset=False,
                         repeat_action_probability=0.25)
    equal = np.random.default_rng(0).integers(env.single_action_space.n, size=100)
    env.reset(seed=seed)
    for episode in (1, 2):
        films = [b""] * COPIES
        for action in equal:
            frames = env.step(np.full(COPIES, action))[0]
            films = [film + frame.tobytes() for film, frame in zip(films, frames)]
        twins = COPIES - len(set(films))
        print(f"seed {seed}, episode {episode}: {'some' if twins else 'no'} copies play one film")
        env.reset()
PYTHON
diff "$folder/seen" - <<'END'
seed None, episode 1: some copies play one film
seed None, episode 2: some copies play one film
seed 0, episode 1: no copies play one film
seed 0, episode 2: no copies play one film
END
echo "as stated"
