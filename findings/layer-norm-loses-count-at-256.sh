#!/usr/bin/env bash
# torch 2.13.0 on a CPU: in bfloat16 the gradients of a layer norm's parameters stop growing.
#
# They are sums over all rows. Norms, convolutions and linear layers keep such sums in float32 and
# round once; layer norm's backward adds rows up in the type of its input, in a part for each
# thread. In bfloat16 256 + 1 is 256: of 4,096 rows that ask for 1 each one thread counts 256, two
# count 512, in float16 2,048 and 4,096. It does not help that the parameters and their gradients
# are float32, as they are under autocast, which leaves layer norm in bfloat16. Gradients of either
# sign are not cut off but blurred, by some percent. Group norm and batch norm count right.
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import torch

ROWS, WIDTH = 4096, 64
norms = {"layer norm": torch.nn.LayerNorm(WIDTH), "group norm": torch.nn.GroupNorm(1, WIDTH),
         "batch norm": torch.nn.BatchNorm1d(WIDTH)}
torch.manual_seed(0)
linear, rows = torch.nn.Linear(WIDTH, WIDTH), torch.randn(ROWS, WIDTH)
mixed = torch.randn(ROWS, WIDTH) + 0.1


def gradient(norm, dtype, asked):
    """What the bias is to change by, if each row asks for so much."""
    norm.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        made = norm(linear(rows))
    assert made.dtype == dtype and norm.bias.dtype == torch.float32
    made.backward(asked.to(dtype))
    return norm.bias.grad


for name, norm in norms.items():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        counts = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            counts.append(f"{gradient(norm, dtype, torch.ones(ROWS, WIDTH))[0].item():g}")
        print(f"{name}, {str(dtype)[6:]}: {' and '.join(counts)} of {ROWS} rows")

torch.set_num_threads(1)
for name, norm in norms.items():
    error = gradient(norm, torch.bfloat16, mixed) - mixed.bfloat16().float().sum(0)
    share = (error.norm() / mixed.sum(0).norm()).item()
    print(f"{name}, bfloat16, either sign: {'over' if share > 0.01 else 'under'} 1 % off")
PYTHON
diff "$folder/seen" - <<'END'
layer norm, float32: 4096 and 4096 of 4096 rows
layer norm, bfloat16: 256 and 512 of 4096 rows
layer norm, float16: 2048 and 4096 of 4096 rows
group norm, float32: 4096 and 4096 of 4096 rows
group norm, bfloat16: 4096 and 4096 of 4096 rows
group norm, float16: 4096 and 4096 of 4096 rows
batch norm, float32: 4096 and 4096 of 4096 rows
batch norm, bfloat16: 4096 and 4096 of 4096 rows
batch norm, float16: 4096 and 4096 of 4096 rows
layer norm, bfloat16, either sign: over 1 % off
group norm, bfloat16, either sign: under 1 % off
batch norm, bfloat16, either sign: under 1 % off
END
echo "as stated"
