#!/usr/bin/env bash
# ale-py 0.12.1, gymnasium 1.4.0: make_vec of an Atari id plays by other rules than make of it.
#
# For most games make_vec(id, n) is n times make(id). Atari's ids have a vector entry point of their
# own, and make_vec takes it unless told otherwise: then rewards are clipped to -1, 0 and 1, so that
# an episode's return, RecordEpisodeStatistics' too, is no score but the number of rewards; frames
# come as stacks of four, 84 x 84 and grey; up to 29 no-ops open an episode, and FIRE does where the
# game has it. The id's sticky actions stay. vectorization_mode="sync" gives what make gives.
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
from gymnasium.wrappers.vector import RecordEpisodeStatistics

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
gymnasium.register_envs(ale_py)
for id in ("ALE/KungFuMaster-v5", "ALE/MsPacman-v5"):
    for mode in (None, "sync"):
        env = RecordEpisodeStatistics(gymnasium.make_vec(id, 8, vectorization_mode=mode))
        rng, returns, rewards = np.random.default_rng(0), [], set()
        env.action_space.seed(0)
        env.reset(seed=0)
        while len(returns) < 8:
            *_, reward, terminated, truncated, info = env.step(env.action_space.sample())
            rewards |= {int(each) for each in reward}
            if "episode" in info:
                returns += info["episode"]["r"][info["_episode"]].tolist()
        size = "x".join(map(str, env.single_observation_space.shape))
        kind = "clipped" if rewards <= {-1, 0, 1} else "whole"
        print(f"{id} {mode or 'by default'}: {type(env.unwrapped).__name__}, frames {size}, "
              f"rewards {kind}, mean return", "above" if np.mean(returns) > 150 else "below", 150)
    env = gymnasium.make_vec(id, 2, noop_max=1, use_fire_reset=False)
    env.reset(seed=np.array([0, 1]))
    films = [env.step(np.zeros(2, int) + step % 4)[0] for step in range(200)]
    equal = all(np.array_equal(*film) for film in films)
    print(f"{id}: of other seeds, equal actions make", "equal films" if equal else "two films")
PYTHON
diff "$folder/seen" - <<'END'
ALE/KungFuMaster-v5 by default: AtariVectorEnv, frames 4x84x84, rewards clipped, mean return below 150
ALE/KungFuMaster-v5 sync: SyncVectorEnv, frames 210x160x3, rewards whole, mean return above 150
ALE/KungFuMaster-v5: of other seeds, equal actions make two films
ALE/MsPacman-v5 by default: AtariVectorEnv, frames 4x84x84, rewards clipped, mean return below 150
ALE/MsPacman-v5 sync: SyncVectorEnv, frames 210x160x3, rewards whole, mean return above 150
ALE/MsPacman-v5: of other seeds, equal actions make two films
END
echo "as stated"
