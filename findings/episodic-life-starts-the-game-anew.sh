#!/usr/bin/env bash
# ale-py 0.12.1, gymnasium 1.4.0: with episodes of one life no agent ever sees its second life.
#
# Since DQN, "a lost life ends the episode" has meant that learners are told of an end and the game
# plays on: the next episode begins with one life less and the wall half broken. AtariVectorEnv's
# episodic_life=True and AtariPreprocessing's terminal_on_life_loss=True start the whole game anew
# instead, at every lost life: all episodes begin with a full wall and all lives. The usual thing
# is another argument, life_loss_info=True, which says of itself only that it gives a signal. But
# its step after the signal is one of the game, not the reset that AutoresetMode.NEXT_STEP tells.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6 \
    opencv-python-headless==5.0.0.93
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import ale_py
import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.wrappers import AtariPreprocessing

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gymnasium.register_envs(ale_py)
for game, name in (("breakout", "Breakout"), ("ms_pacman", "MsPacman")):
    for argument in ("episodic_life", "life_loss_info"):
        env = AtariVectorEnv(game, 1, use_fire_reset=False, **{argument: True})
        env.reset(seed=0)
        rng, over, begins = np.random.default_rng(0), False, []
        while len(begins) < 6:
            _, _, terminated, _, info = env.step(rng.integers(env.single_action_space.n, size=1))
            if over:  # the step that, by NEXT_STEP, resets
                begins.append((int(info["lives"][0]), bool(info["episode_frame_number"][0] > 100)))
            over = terminated[0]
        print(f"{game}, {argument}: lives {[lives for lives, _ in begins]},",
              f"{sum(late for _, late in begins)} of them in a game that plays on")
    env = gymnasium.make(f"{name}NoFrameskip-v4")
    env, begins = AtariPreprocessing(env, terminal_on_life_loss=True), []
    for episode in range(6):
        over = False
        begins.append(int(env.reset(seed=None if episode else 0)[1]["lives"]))
        while not over:
            over = env.step(int(rng.integers(env.action_space.n)))[2]
    print(f"{game}, terminal_on_life_loss: lives {begins}")
PYTHON
diff "$folder/seen" - <<'END'
breakout, episodic_life: lives [5, 5, 5, 5, 5, 5], 0 of them in a game that plays on
breakout, life_loss_info: lives [4, 3, 2, 1, 5, 4], 5 of them in a game that plays on
breakout, terminal_on_life_loss: lives [5, 5, 5, 5, 5, 5]
ms_pacman, episodic_life: lives [3, 3, 3, 3, 3, 3], 0 of them in a game that plays on
ms_pacman, life_loss_info: lives [2, 1, 3, 2, 1, 3], 4 of them in a game that plays on
ms_pacman, terminal_on_life_loss: lives [3, 3, 3, 3, 3, 3]
END
echo "as stated"
