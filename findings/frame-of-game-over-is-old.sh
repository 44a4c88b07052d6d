#!/usr/bin/env bash
# ale-py 0.12.1: the observation that comes with the end of an episode is an old one.
#
# AtariVectorEnv shows the brighter of the last two of the frames for which an action is held.
# When one of them ends the episode it stops before it has read the screen, and returns the
# observation of the step before, often bit for bit, else mixed with it: what ended the game is
# not to be seen. With episodic_life that is so of every lost life; without, lost lives are shown
# as they are.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
from collections import Counter

import numpy as np
from ale_py import ALEInterface, LoggerMode, roms
from ale_py.vector_env import AtariVectorEnv

ALEInterface.setLoggerMode(LoggerMode.Error)
for game in ("assault", "breakout", "ms_pacman"):
    for episodic_life in (False, True):
        env = AtariVectorEnv(  # the screen as it is
            game, 1, img_height=210, img_width=160, grayscale=False, stack_num=1, noop_max=1,
            use_fire_reset=False, reward_clipping=False, episodic_life=episodic_life)
        ale, counts, rng = ALEInterface(), Counter(), np.random.default_rng(0)
        ale.setInt("random_seed", 0)
        ale.setFloat("repeat_action_probability", 0.0)
        for episode in range(12):
            ale.loadROM(roms.get_rom_path(game))  # the same game beside it
            ale.reset_game()
            (((seen,),), _), over = env.reset(seed=0), False
            while not over:
                before, lives, screens = seen, ale.lives(), []
                action = rng.integers(env.single_action_space.n, size=1)
                ((seen,),), _, (over,), _, _ = env.step(action)
                for _ in range(4):
                    ale.act(ale.getMinimalActionSet()[action[0]])
                    screens.append(ale.getScreenRGB())
                if over or ale.lives() < lives:
                    kind = "episode ends" if over else "lost lives"
                    counts[kind] += 1
                    counts[kind, "old"] += np.array_equal(seen, before)
                    counts[kind, "right"] += np.array_equal(seen, np.maximum(*screens[2:]))
        for kind in ("lost lives", "episode ends"):
            if counts[kind]:
                print(f"{game}, episodic_life={episodic_life}: {counts[kind]} {kind}, "
                      f"{counts[kind, 'right']} as they were, {counts[kind, 'old']} the step before")
PYTHON
diff "$folder/seen" - <<'END'
assault, episodic_life=False: 36 lost lives, 36 as they were, 0 the step before
assault, episodic_life=False: 12 episode ends, 0 as they were, 2 the step before
assault, episodic_life=True: 12 episode ends, 0 as they were, 4 the step before
breakout, episodic_life=False: 48 lost lives, 48 as they were, 1 the step before
breakout, episodic_life=False: 12 episode ends, 7 as they were, 12 the step before
breakout, episodic_life=True: 12 episode ends, 0 as they were, 12 the step before
ms_pacman, episodic_life=False: 24 lost lives, 24 as they were, 0 the step before
ms_pacman, episodic_life=False: 12 episode ends, 0 as they were, 12 the step before
ms_pacman, episodic_life=True: 12 episode ends, 0 as they were, 12 the step before
END
echo "as stated"
