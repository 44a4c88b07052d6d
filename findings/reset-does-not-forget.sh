#!/usr/bin/env bash
# ale-py 0.12.1: without a seed, a reset does not forget the game before (Assault, Seaquest).
#
# The emulator is deterministic, and AtariVectorEnv draws only a number of no-ops anew; with
# noop_max=1 there are none, and all games of equal actions should be one film. They are in
# Breakout. In Assault and Seaquest what was played before a reset changes the film after it;
# with a seed, which loads the ROM anew, they too are one.
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

for game in ("breakout", "assault", "seaquest"):
    env = AtariVectorEnv(game, 1, noop_max=1, use_fire_reset=False)
    rng = np.random.default_rng(0)
    equal, films = rng.integers(env.single_action_space.n, size=(40, 1)), {}
    for seed in (None, 3):
        films[seed] = set()
        for _ in range(8):
            env.reset(seed=seed)
            films[seed].add(b"".join(env.step(action)[0].tobytes() for action in equal))
            for _ in range(100):  # then a game that differs every time
                env.step(rng.integers(env.single_action_space.n, size=1))
    print(f"{game}: {len(films[None])} films without a seed, {len(films[3])} with")
PYTHON
diff "$folder/seen" - <<'END'
breakout: 1 films without a seed, 1 with
assault: 8 films without a seed, 1 with
seaquest: 2 films without a seed, 1 with
END
echo "as stated"
