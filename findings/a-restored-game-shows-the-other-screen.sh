#!/usr/bin/env bash
# ale-py 0.12.1: after restoreState the screen is still that of the moment the game was left at.
#
# Searching and exploring agents keep states of the game and come back to them: cloneState, and later
# restoreState. RAM, lives, the count of frames and game_over are then those of the state. The screen
# is not part of it: getScreenRGB, and so the observation of gymnasium's environment, is of where the
# game has been until now, be it an episode later, and is drawn anew by the next act. A policy that is
# asked what to do from there looks at another place. Whatever is to be seen of a state has to be
# kept beside it.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import ale_py
import gymnasium
import numpy as np

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gymnasium.register_envs(ale_py)


def screens(game):
    """What a screen shows, by name, before and after a restored game goes on."""
    env = gymnasium.make(f"ALE/{game}-v5", frameskip=1, repeat_action_probability=0.0).unwrapped
    env.reset(seed=0)
    rng = np.random.default_rng(0)

    def play(steps):
        for action in rng.integers(env.action_space.n, size=steps):
            env.step(action)

    def told():
        return env.ale.getRAM().tolist(), env.ale.lives(), env.ale.getFrameNumber()

    play(200)
    kept, state = (env.clone_state(), env.ale.getScreenRGB().copy()), told()
    after = env.step(0)[0].copy()
    play(300)
    last = env.ale.getScreenRGB().copy()
    env.restore_state(kept[0])
    assert told() == state and not np.array_equal(last, kept[1])
    for name, seen in ("getScreenRGB", env.ale.getScreenRGB()), ("observation", env._get_obs()):
        yield name, "kept" if np.array_equal(seen, kept[1]) else (
            "left" if np.array_equal(seen, last) else "neither")
    yield "after a step", "right" if np.array_equal(env.step(0)[0], after) else "wrong"


for game in ("Breakout", "Freeway", "MontezumaRevenge", "MsPacman", "Seaquest"):
    print(game, *(f"{name}: {what}" for name, what in screens(game)), sep=", ")
PYTHON
diff "$folder/seen" - <<'SEEN'
Breakout, getScreenRGB: left, observation: left, after a step: right
Freeway, getScreenRGB: left, observation: left, after a step: right
MontezumaRevenge, getScreenRGB: left, observation: left, after a step: right
MsPacman, getScreenRGB: left, observation: left, after a step: right
Seaquest, getScreenRGB: left, observation: left, after a step: right
SEEN
echo "as stated"
