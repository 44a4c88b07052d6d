#!/usr/bin/env bash
# torchrl 0.14.1: SliceSampler draws an episode first, so that a short one's steps come up the most.
#
# A sequence model learns from windows of a replay, and "uniform" sampling draws each of them as often
# as any other. SliceSampler draws one of the episodes, however long, and then a window of it: three
# episodes of 900, 90 and 10 steps get a third of the windows of 8 each, and a step of the shortest is
# replayed 90 times as often as one of the longest. The episode under way counts as one as soon as it
# has a window's length: behind nine finished ones of 1,000 steps its first 8 steps are a tenth of all
# that is replayed. Episodes too short for a window are never drawn (strict_length=True, the default).
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 torchrl==0.14.1 tensordict==0.14.3
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer


def shares(lengths, running, **keys):
    """Per cent of the replayed steps that are of each episode; the last one may still be running."""
    torch.manual_seed(0)
    episode = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    done = torch.cat([episode[1:] != episode[:-1], torch.tensor([not running])])
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(len(episode)), batch_size=8 * 400_000,
        sampler=SliceSampler(slice_len=8, **keys))
    buffer.extend(TensorDict({"episode": episode, ("next", "done"): done[:, None]}, [len(episode)]))
    drawn = torch.bincount(buffer.sample()["episode"], minlength=len(lengths))
    return [round(100 * share) for share in (drawn / drawn.sum()).tolist()]


for keys in (dict(end_key=("next", "done")), dict(traj_key="episode")):
    print(*keys, "900, 90, 10:", shares([900, 90, 10], False, **keys))
    print(*keys, "900, 90, 7:", shares([900, 90, 7], False, **keys))
    print(*keys, "nine of 1,000 and 8 so far:", shares([1000] * 9 + [8], True, **keys))
PYTHON
diff <(grep -v INFO "$folder/seen") - <<'END'  # torchrl tells of its storage
end_key 900, 90, 10: [33, 33, 33]
end_key 900, 90, 7: [50, 50, 0]
end_key nine of 1,000 and 8 so far: [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
traj_key 900, 90, 10: [33, 33, 33]
traj_key 900, 90, 7: [50, 50, 0]
traj_key nine of 1,000 and 8 so far: [10, 10, 10, 10, 10, 10, 10, 10, 10, 10]
END
echo "as stated"
