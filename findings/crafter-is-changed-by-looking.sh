#!/usr/bin/env bash
# crafter 1.8.3: a seed does not fix the game, and looking at it by night changes it.
#
# Games of one seed and equal actions soon part: animals of a part of the map are kept in a set,
# whose order goes by their places in memory, and a random index picks the one that disappears.
# Besides, the grain of the picture at night is drawn with the random numbers that the game goes on
# with, one for each pixel of the map: whoever renders once more (for a film, say), or asks for
# frames of another size=, plays another game from the first dusk on. By day neither matters.
# (The public tracker has both, as issue 31 of danijar/crafter.)
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet crafter==1.8.3 numpy==2.4.6 pillow==12.2.0
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import pickle

import crafter
import numpy as np


def film(seed):
    env, choose = crafter.Env(seed=seed), np.random.RandomState(0)
    return [env.reset().tobytes()] + [env.step(choose.randint(17))[3]["semantic"].tobytes()
                                      for _ in range(100)]


films = {seed: [film(seed) for _ in range(6)] for seed in range(6)}
one = [len({film[0] for film in six}) == 1 for six in films.values()]
parted = sum(len({film[-1] for film in six}) > 1 for six in films.values())
print(f"first frames equal: {all(one)}; all maps after 100 steps equal: {not parted}")

for side in (64, 96):
    env = crafter.Env(size=(side, side), seed=0)
    env.reset()
    for time, steps in (("day", 10), ("night", 145)):
        for _ in range(steps):
            env.step(0)
        game = env._world.random
        twin = pickle.loads(pickle.dumps(game))
        env.render()
        drawn = 0
        while pickle.dumps(twin) != pickle.dumps(game):
            twin.uniform()
            drawn += 1
        print(f"{side} x {side}, {time}: a look takes {drawn:,} random numbers")
PYTHON
diff "$folder/seen" - <<'END'
first frames equal: True; all maps after 100 steps equal: False
64 x 64, day: a look takes 0 random numbers
64 x 64, night: a look takes 3,087 random numbers
96 x 96, day: a look takes 0 random numbers
96 x 96, night: a look takes 6,300 random numbers
END
echo "as stated"
