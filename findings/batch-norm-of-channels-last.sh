#!/usr/bin/env bash
# torch 2.13.0 on a CPU: training batch norm misjudges the variance of large channels-last images.
#
# Contiguous images are summed pairwise, and the variance is right to six digits. The same images
# in channels-last layout are summed in float32, one number after the other, in a part for each
# thread: with four million numbers a channel and one thread the variance is some 0.5 % off, with
# two threads by another amount. So the number of threads changes what is learnt.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import torch

torch.manual_seed(0)
images = 0.3 * torch.randn(1024, 4, 64, 64) + 0.5
exact = images.double().transpose(0, 1).flatten(1).var(1)
for threads in (1, 2):
    torch.set_num_threads(threads)
    for layout in (torch.contiguous_format, torch.channels_last):
        norm = torch.nn.BatchNorm2d(4, momentum=1.0)
        norm(images.contiguous(memory_format=layout))
        error = ((norm.running_var.double() - exact) / exact).abs().max()
        size = "over 1e-3" if error > 1e-3 else "under 1e-5" if error < 1e-5 else f"{error:.0e}"
        print(f"{threads} threads, {str(layout)[6:]}: relative error of the variance {size}")
PYTHON
diff "$folder/seen" - <<'END'
1 threads, contiguous_format: relative error of the variance under 1e-5
1 threads, channels_last: relative error of the variance over 1e-3
2 threads, contiguous_format: relative error of the variance under 1e-5
2 threads, channels_last: relative error of the variance over 1e-3
END
echo "as described"
