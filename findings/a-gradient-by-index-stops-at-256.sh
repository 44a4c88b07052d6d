#!/usr/bin/env bash
# torch 2.13.0 on a CPU: in bfloat16 gradients of w[i] stop at 256, those of index_select do not.
#
# A row that is picked 5,000 times gets 5,000 gradients of 1; in bfloat16 their sum is 4,992. That
# is what index_select, gather and products with one-hot vectors give. w[i], embedding and
# embedding_bag add in the type of w, where 256 + 1 is 256: a row that is frequent in a batch gets a
# twentieth of its gradient. So do index_put with accumulate, where index_add of rows is right, and
# index_reduce, whose mean of ones is 0.05, where scatter_reduce's is 1. Autocast spares parameters,
# which stay float32, but not activations that are picked by x[i].
#
# Seen with Python 3.11 on Linux, x86_64. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - > "$folder/seen" <<'PYTHON'
import torch
import torch.nn.functional as F

TIMES = 5000
picks = torch.zeros(TIMES, dtype=torch.long)
everywhere = picks[:, None].expand(-1, 2)
ways = {
    "w[i]": lambda w: w[picks],
    "F.embedding": lambda w: F.embedding(picks, w),
    "F.embedding_bag": lambda w: F.embedding_bag(picks[None], w, mode="sum"),
    "w.index_select": lambda w: w.index_select(0, picks),
    "w.gather": lambda w: w.gather(0, everywhere),
    "one-hot @ w": lambda w: F.one_hot(picks, 4).to(w.dtype) @ w,
}
for kind in (torch.float32, torch.bfloat16):
    print(kind)
    for name, pick in ways.items():
        w = torch.zeros(4, 2, dtype=kind, requires_grad=True)
        pick(w).sum().backward()
        print(f"  {name}: {w.grad[0, 0]:.0f}")
    zeros, ones = torch.zeros(4, 2, dtype=kind), torch.ones(TIMES, 2, dtype=kind)
    put = zeros.index_put((picks,), ones, accumulate=True)
    mean = zeros.index_reduce(0, picks, ones, "mean", include_self=False)
    other = zeros.scatter_reduce(0, everywhere, ones, "mean", include_self=False)
    print(f"  index_put: {put[0, 0]:.0f}, index_add: {zeros.index_add(0, picks, ones)[0, 0]:.0f}")
    print(f"  mean by index_reduce: {mean[0, 0]:.2f}, by scatter_reduce: {other[0, 0]:.2f}")
PYTHON
diff "$folder/seen" - <<'END'
torch.float32
  w[i]: 5000
  F.embedding: 5000
  F.embedding_bag: 5000
  w.index_select: 5000
  w.gather: 5000
  one-hot @ w: 5000
  index_put: 5000, index_add: 5000
  mean by index_reduce: 1.00, by scatter_reduce: 1.00
torch.bfloat16
  w[i]: 256
  F.embedding: 256
  F.embedding_bag: 256
  w.index_select: 4992
  w.gather: 4992
  one-hot @ w: 4992
  index_put: 256, index_add: 4992
  mean by index_reduce: 0.05, by scatter_reduce: 1.00
END
echo "as stated"
