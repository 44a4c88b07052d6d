#!/usr/bin/env bash
# supersuit 3.11.0 with stable-baselines3 2.9.2: games that end by a time limit are learnt as deaths.
#
# A game cut off by a time limit would have gone on, and stable-baselines3 values what lies behind the cut:
# its own vector environments say "TimeLimit.truncated" in the infos, PPO then adds the value of the last
# observation to the reward, and replay buffers keep a flag. concat_vec_envs_v1 with
# base_class="stable_baselines3", the way from PettingZoo to it, joins terminated and truncated and does
# not say that word, though it hands the last observation on: all cuts are deaths, with no warning. Of a
# reward of 1 at each step, cut after every 5, PPO should learn a value of 1 / (1 - 0.9) = 10; it learns
# 2.7, what the few steps until the cut bring. Most games of PettingZoo end by a number of steps.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check supersuit==3.11.0 \
    stable_baselines3==2.9.2 pettingzoo==1.27.0 gymnasium==1.3.0 numpy==2.4.6 torch==2.13.0
"$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import gymnasium
import numpy as np
import supersuit
import torch
from gymnasium.wrappers import TimeLimit
from pettingzoo import ParallelEnv
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.vec_env import DummyVecEnv

torch.set_num_threads(1)
LIMIT, SEEN, ACTIONS = 5, np.ones(1, np.float32), gymnasium.spaces.Discrete(2)


class Alone(gymnasium.Env):
    """Every step brings a reward of 1, and so on for ever."""

    observation_space, action_space = gymnasium.spaces.Box(0, 1, (1,)), ACTIONS

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return SEEN, {}

    def step(self, action):
        return SEEN, 1.0, False, False, {}


class Together(ParallelEnv):
    """The same for two, with its time limit."""

    metadata, render_mode, possible_agents = {"name": "together"}, None, ["one", "other"]
    observation_space = lambda self, agent: Alone.observation_space
    action_space = lambda self, agent: ACTIONS

    def reset(self, seed=None, options=None):
        self.agents, self.steps = self.possible_agents[:], 0
        return {agent: SEEN for agent in self.agents}, {agent: {} for agent in self.agents}

    def step(self, actions):
        self.steps += 1
        agents, cut = self.agents, self.steps == LIMIT
        self.agents = [] if cut else agents
        each = lambda what: {agent: what for agent in agents}
        return each(SEEN), each(1.0), each(False), each(cut), {agent: {} for agent in agents}


def own():
    return DummyVecEnv([lambda: TimeLimit(Alone(), LIMIT)] * 2)


def by_supersuit():
    env = supersuit.pettingzoo_env_to_vec_env_v1(Together())
    return supersuit.concat_vec_envs_v1(env, 1, base_class="stable_baselines3")


def by_hand():
    """The value at which PPO's advantages, lambda 0.95, of the 5 steps until a death are 0 on average."""
    of_ends, of_others, end, others = [], [], 1.0, 0.0
    for _ in range(LIMIT):
        of_ends, of_others = of_ends + [end], of_others + [others]
        end, others = 0.9 * 0.95 * end, 1 + 0.9 * 0.95 * others
    return (sum(of_ends) + sum(of_others)) / (sum(of_ends) + 0.1 * sum(of_others))


print(f"by hand: {1 / (1 - 0.9):.1f}, and with deaths {by_hand():.1f}")
for make in (own, by_supersuit):
    torch.manual_seed(0)
    np.random.seed(0)
    env = make()
    env.reset()
    for _ in range(LIMIT):
        _, _, over, infos = env.step(np.zeros(2, np.int64))
    print(f"{make.__name__}: over {over.tolist()}, told:", *sorted(infos[0]))
    agent = PPO("MlpPolicy", env, n_steps=50, batch_size=100, n_epochs=10, gamma=0.9,
                learning_rate=0.01, device="cpu", policy_kwargs={"net_arch": [8]})
    agent.learn(6000)
    value = agent.policy.predict_values(torch.ones(1, 1)).item()
    print(f"{make.__name__}: PPO's value {value:.1f}")
    agent = DQN("MlpPolicy", env, buffer_size=200, learning_starts=1000, device="cpu")
    agent.learn(200)
    buffer = agent.replay_buffer
    print(f"{make.__name__}: DQN's replay: ends {int(buffer.dones.sum())}, "
          f"of them by time {int(buffer.timeouts.sum())}")
PYTHON
diff "$folder/seen" - <<'END'
by hand: 10.0, and with deaths 2.7
own: over [True, True], told: TimeLimit.truncated terminal_observation
own: PPO's value 10.0
own: DQN's replay: ends 40, of them by time 40
by_supersuit: over [1, 1], told: terminal_observation
by_supersuit: PPO's value 2.7
by_supersuit: DQN's replay: ends 40, of them by time 0
END
echo "as stated"
