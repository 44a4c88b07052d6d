#!/usr/bin/env bash
# ale-py 0.12.1 and gymnasium 1.4.0: noop_max=30 is 0 to 29 no-ops in one, 1 to 30 in the other.
#
# Atari episodes are opened by a random number of no-ops, "up to 30". AtariVectorEnv is made to
# replace gymnasium's AtariPreprocessing, has its argument noop_max with the same default, and
# means another range: it draws below noop_max and may draw 0. So one game in thirty begins without
# any, and with noop_max=1, which in AtariPreprocessing is one no-op, the emulator gets none.
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
for noop_max in (1, 2, 30):
    vector = AtariVectorEnv("pong", 1, num_threads=1, noop_max=noop_max, use_fire_reset=False)
    single = AtariPreprocessing(gymnasium.make("PongNoFrameskip-v4"), noop_max=noop_max)
    for name, env, seeds in (("AtariVectorEnv", vector, np.arange(400)[:, None]),
                             ("AtariPreprocessing", single, range(400))):
        noops = {int(np.ravel(env.reset(seed=seed)[1]["episode_frame_number"])[0])
                 for seed in seeds}
        print(f"noop_max={noop_max}, {name}: {min(noops)} to {max(noops)}")
PYTHON
diff "$folder/seen" - <<'END'
noop_max=1, AtariVectorEnv: 0 to 0
noop_max=1, AtariPreprocessing: 1 to 1
noop_max=2, AtariVectorEnv: 0 to 1
noop_max=2, AtariPreprocessing: 1 to 2
noop_max=30, AtariVectorEnv: 0 to 29
noop_max=30, AtariPreprocessing: 1 to 30
END
echo "as stated"
