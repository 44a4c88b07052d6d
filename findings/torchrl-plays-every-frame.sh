#!/usr/bin/env bash
# torchrl 0.14.1, ale-py 0.12.1: GymEnv("ALE/Pong-v5") decides at every frame, not at every fourth.
#
# The id says frameskip=4, and so does its documentation; gymnasium.make(id) holds an action for four
# frames. GymEnv(id), which makes the same id by itself, writes its own frame_skip over it, and that
# is 1 where none is given: four times as many steps a second of play, a discount that reaches a
# quarter as far, a score over so many "steps" that is of a quarter of the game. Whoever then says
# frameskip=4, in the emulator's own word, gets 1 again, with no warning; frame_skip=4 is meant. The
# sticky actions of the id stay. GymWrapper(gymnasium.make(id)) plays as gymnasium does.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ale-py==0.12.1 gymnasium==1.4.0 numpy==2.4.6 torch==2.13.0 \
    torchrl==0.14.1 tensordict==0.14.3
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import ale_py
import gymnasium
from torchrl.envs import GymEnv, GymWrapper

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gymnasium.register_envs(ale_py)


def frames(env):
    """How many the emulator plays in a step of torchrl."""
    env.reset()
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    env.rollout(10, auto_reset=True)  # resets once more
    return (env.unwrapped.ale.getEpisodeFrameNumber() - before) / 10


for id in ("ALE/Pong-v5", "ALE/Breakout-v5"):
    env = gymnasium.make(id)
    env.reset()
    for _ in range(10):
        env.step(0)
    print(f"{id}: gymnasium.make", env.unwrapped.ale.getEpisodeFrameNumber() / 10)
    print(f"{id}: GymWrapper of it", frames(GymWrapper(gymnasium.make(id))))
    for flags in ({}, dict(frameskip=4), dict(frame_skip=4)):
        env = GymEnv(id, **flags)
        sticky = env.unwrapped.spec.kwargs["repeat_action_probability"]
        print(f"{id}: GymEnv", flags, frames(env), "sticky", sticky)
PYTHON
diff "$folder/seen" - <<'END'
ALE/Pong-v5: gymnasium.make 4.0
ALE/Pong-v5: GymWrapper of it 4.0
ALE/Pong-v5: GymEnv {} 1.0 sticky 0.25
ALE/Pong-v5: GymEnv {'frameskip': 4} 1.0 sticky 0.25
ALE/Pong-v5: GymEnv {'frame_skip': 4} 4.0 sticky 0.25
ALE/Breakout-v5: gymnasium.make 4.0
ALE/Breakout-v5: GymWrapper of it 4.0
ALE/Breakout-v5: GymEnv {} 1.0 sticky 0.25
ALE/Breakout-v5: GymEnv {'frameskip': 4} 1.0 sticky 0.25
ALE/Breakout-v5: GymEnv {'frame_skip': 4} 4.0 sticky 0.25
END
echo "as stated"
