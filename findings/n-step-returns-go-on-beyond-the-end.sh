#!/usr/bin/env bash
# torchrl 0.14.1: returns of n steps go on beyond the end of an episode, at all but its last step.
#
# An n-step return adds n rewards and the value of where they lead, which is nothing if that is the
# end. MultiStepTransform, in a replay, and MultiStep, behind a collector, cut rewards and distance at
# the end, and put the last observation in place of the next one; but next.terminated stays that of
# one step. So n - 1 of the n transitions that lead into the end say they do not, and the losses' value
# estimators add the value of the terminal state, which is trained on nothing and means nothing: a
# table of values keeps what it began with there for ever, and hands it back to two thirds of all
# states where n is 3. Their docstring says that done keys are left untouched; done_keys=[] moves them
# along with the rest, and the values come out right. With n_steps=1 nothing is amiss.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 torchrl==0.14.1 \
    tensordict==0.14.3 gymnasium==1.4.0
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, MultiStep, OneHot, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.envs.transforms import MultiStepTransform
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate, ValueEstimators

torch.set_num_threads(1)


def replay(data, **keys):
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(data)), batch_size=60,
        transform=MultiStepTransform(gamma=0.9, **keys))
    buffer.extend(data)
    return buffer


def walks(count):
    """Six steps from place 0 to place 6, where the walk terminates, with a reward of 1."""
    place, over = torch.eye(7), torch.tensor([False] * 5 + [True]).repeat(count)[:, None]
    return TensorDict({
        "observation": place[:6].repeat(count, 1), "action": torch.ones(6 * count, 1),
        "next": {"observation": place[1:].repeat(count, 1), "reward": over.float(), "done": over,
                 "terminated": over, "truncated": torch.zeros_like(over)}}, [6 * count])


def learn(start, **keys):
    """A table of the seven places' values, all of them `start` at first, after 600 updates."""
    torch.manual_seed(0)
    buffer, table = replay(walks(30), **keys), torch.nn.Linear(7, 1, bias=False)
    torch.nn.init.constant_(table.weight, start)
    loss = DQNLoss(QValueActor(table, in_keys=["observation"], spec=OneHot(1)),
                   action_space="one_hot", delay_value=True, loss_function="l2")
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    target, optimizer = SoftUpdate(loss, eps=0.9), torch.optim.SGD(loss.parameters(), 1.0)
    for _ in range(600):
        optimizer.zero_grad()
        loss(buffer.sample())["loss"].backward()
        optimizer.step()
        target.step()
    (values,) = loss.parameters()
    return " ".join(f"{value:.2f}" for value in values.flatten().tolist())


def fallen(data):
    """Of CartPole's transitions: those that lead to a fallen pole, and those that say so."""
    x, _, angle, _ = data["next", "observation"].unbind(-1)
    return int(((x.abs() > 2.4) | (angle.abs() > 0.2095)).sum()), int(data["next", "terminated"].sum())


for start in (0.0, 10.0):
    for keys in (dict(n_steps=1), dict(n_steps=3), dict(n_steps=3, done_keys=[])):
        print(f"values from {start:.0f}", keys, learn(start, **keys))
env = GymEnv("CartPole-v1")
env.set_seed(0)
torch.manual_seed(0)
steps = env.rollout(2000, break_when_any_done=False)
for n in (1, 3, 5):
    print(f"{n} steps: fallen, terminated: replay", *fallen(replay(steps, n_steps=n)[:]),
          "collector", *fallen(MultiStep(gamma=0.9, n_steps=n)(steps.clone())))
PYTHON
diff <(grep -v INFO "$folder/seen") - <<'END'  # torchrl tells of its storage
values from 0 {'n_steps': 1} 0.59 0.66 0.73 0.81 0.90 1.00 0.00
values from 0 {'n_steps': 3} 0.59 0.66 0.73 0.81 0.90 1.00 0.00
values from 0 {'n_steps': 3, 'done_keys': []} 0.59 0.66 0.73 0.81 0.90 1.00 0.00
values from 10 {'n_steps': 1} 0.59 0.66 0.73 0.81 0.90 1.00 10.00
values from 10 {'n_steps': 3} 5.90 6.56 0.73 8.10 9.00 1.00 10.00
values from 10 {'n_steps': 3, 'done_keys': []} 0.59 0.66 0.73 0.81 0.90 1.00 10.00
1 steps: fallen, terminated: replay 84 84 collector 84 84
3 steps: fallen, terminated: replay 252 84 collector 252 84
5 steps: fallen, terminated: replay 420 84 collector 420 84
END
echo "as stated"
