#!/usr/bin/env bash
# torch 2.13.0 without a GPU: torch.manual_seed takes the longer, the deeper its caller stands.
#
# Seeding looks like the setting of one number, and for the CPU's generator it is: 1 microsecond.
# But torch.manual_seed also turns to CUDA, XPU and MTIA, and each of them, while it has not been
# started, keeps the call for later, beside traceback.format_stack(): the text of the whole call
# stack, three times, at every seed. That makes 0.1 ms at the top of a script, 0.4 ms under 50
# calls, about what a test runner piles up, and 2 ms under 200. Whoever seeds every step, so that
# a run can be taken up again, pays it at every step. torch.default_generator.manual_seed(n) costs
# what one expects, and seeds the CPU alone.
#
# Times are the best of 20. Seen with Python 3.11 on Linux, AMD Zen 4. Fails if anything else is
# seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
CUDA_VISIBLE_DEVICES= "$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import time
import traceback

import torch


def seconds(seed, depth):
    if depth:
        return seconds(seed, depth - 1)
    times = []
    for number in range(20):
        start = time.perf_counter()
        seed(number)
        times.append(time.perf_counter() - start)
    return min(times)


shallow, deep = (seconds(torch.manual_seed, depth) for depth in (0, 200))
alone = [seconds(torch.default_generator.manual_seed, depth) for depth in (0, 200)]
print("over" if shallow > 20 * alone[0] else "under", "20 times the time of the CPU's generator")
print("under 200 calls", "over" if deep > 8 * shallow else "under", "8 times that;",
      "the generator", "over" if alone[1] > 3 * alone[0] else "under", "3 times")

askers, format_stack = [], traceback.format_stack
traceback.format_stack = lambda: askers.append(format_stack()[-2]) or []
torch.manual_seed(0)
for asker in askers:
    print(asker.split("site-packages/")[1].split('"')[0])
PYTHON
diff "$folder/seen" - <<'END'
over 20 times the time of the CPU's generator
under 200 calls over 8 times that; the generator under 3 times
torch/cuda/__init__.py
torch/xpu/__init__.py
torch/mtia/__init__.py
END
echo "as stated"
