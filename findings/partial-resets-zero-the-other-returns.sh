#!/usr/bin/env bash
# gymnasium 1.4.0: whoever resets one of several games sets the recorded returns of all to 0.
#
# With AutoresetMode.DISABLED the games that are over are reset by options={"reset_mask": over}, and
# the vector wrapper RecordEpisodeStatistics has code to forget just their returns. But it looks for
# the mask when SyncVectorEnv, or AsyncVectorEnv, has taken it out of the caller's dictionary, finds
# none, and forgets the returns and lengths of the games that go on, too. What it records of an
# episode, with no warning, is the part since the last reset of any game. And the dictionary is left
# empty: passed once more, it resets all games. A RecordEpisodeStatistics in each game counts right.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6
cat > "$folder/play.py" <<'PYTHON'
import ale_py
import gymnasium
import numpy as np
from gymnasium import wrappers
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv


def game(inside):
    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/Breakout-v5", repeat_action_probability=0)
    return wrappers.RecordEpisodeStatistics(env) if inside else env


def play(kind, inside):
    env = kind([lambda: game(inside)] * 4, autoreset_mode=AutoresetMode.DISABLED)
    if not inside:
        env = wrappers.vector.RecordEpisodeStatistics(env)
    rng, count, episodes = np.random.default_rng(0), np.zeros((4, 2)), []
    env.reset(seed=0)
    while len(episodes) < 12:
        _, reward, terminated, truncated, info = env.step(rng.integers(4, size=4))
        count += np.stack([reward, np.ones(4)], 1)
        over = terminated | truncated
        if over.any():
            for i in np.flatnonzero(over):
                seen = [info["episode"][key][i] for key in "rl"]
                episodes.append([*count[i], *seen])
            count[over] = 0
            env.reset(options={"reset_mask": over})
    env.close()
    score, length, recorded_score, recorded_length = np.array(episodes).mean(0)
    print(f"{kind.__name__}, recorded {'in each' if inside else 'around all'}: mean score "
          f"{score:.2f}, recorded {recorded_score:.2f}; mean length {length:.0f}, recorded "
          f"{recorded_length:.0f}")


if __name__ == "__main__":
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    for kind in (SyncVectorEnv, AsyncVectorEnv):
        for inside in (False, True):
            play(kind, inside)
    env = SyncVectorEnv([lambda: game(False)] * 2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    options = {"reset_mask": np.array([True, False])}
    for _ in range(2):
        env.step(np.array([1, 1]))
        env.reset(options=options)
        frames = [ale.getEpisodeFrameNumber() for ale in env.get_attr("ale")]
        print("the first game is reset: frames played", *frames, "and options", options)
PYTHON
"$folder/venv/bin/python" "$folder/play.py" > "$folder/seen"
diff "$folder/seen" - <<'END'
SyncVectorEnv, recorded around all: mean score 1.17, recorded 0.33; mean length 178, recorded 50
SyncVectorEnv, recorded in each: mean score 1.17, recorded 1.17; mean length 178, recorded 178
AsyncVectorEnv, recorded around all: mean score 1.17, recorded 0.33; mean length 178, recorded 50
AsyncVectorEnv, recorded in each: mean score 1.17, recorded 1.17; mean length 178, recorded 178
the first game is reset: frames played 0 4 and options {}
the first game is reset: frames played 0 0 and options {}
END
echo "as stated"
