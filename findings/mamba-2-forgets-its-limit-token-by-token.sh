#!/usr/bin/env bash
# transformers 5.24.0: Mamba-2's `time_step_limit` holds for a sequence, and not for a token.
#
# A limit on the step size dt is part of what a model was trained with. Mamba2Model clamps dt where
# it scans several tokens at once: in training, over a prompt, and for a second piece of several
# tokens with the first one's cache. Where one token comes with a cache, as all but the first do
# when it generates or acts, softplus(dt) is used as it is: the model that speaks is not the model
# that was trained. With the default, (0, inf), there is nothing to clamp and both ways agree to
# rounding. With (0.001, 0.1), the range in which dt begins, hidden values of a network fresh from
# its initialisation, of two layers, differ by 1e-2 to 2e-2 after 20 tokens, ten thousand times
# rounding.
#
# This is the form without compiled kernels. Seen with torch 2.13.0 and Python 3.11 on Linux, on a
# CPU. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - > "$folder/seen" 2> "$folder/warnings" <<'PYTHON'
import math

import torch
from transformers import Mamba2Config, Mamba2Model


@torch.no_grad()
def furthest(limit, piece):
    """Largest difference of what 40 tokens at once give from 20 tokens, then pieces."""
    torch.manual_seed(0)
    config = Mamba2Config(vocab_size=50, hidden_size=32, num_heads=4, head_dim=16, state_size=16,
                          n_groups=1, num_hidden_layers=2, chunk_size=16, time_step_limit=limit)
    model, tokens = Mamba2Model(config).eval(), torch.randint(50, (2, 40))
    whole = model(tokens).last_hidden_state
    out = model(tokens[:, :20], use_cache=True)
    parts = [out.last_hidden_state]
    for start in range(20, 40, piece):
        out = model(tokens[:, start:start + piece], cache_params=out.cache_params, use_cache=True)
        parts.append(out.last_hidden_state)
    return (torch.cat(parts, 1) - whole).abs().max().item()


for limit in ((0.0, math.inf), (0.001, 0.1)):
    for piece in (10, 1):
        difference = furthest(limit, piece)
        print(limit, f"pieces of {piece}:", "as at once" if difference < 1e-5 else
              "another result" if difference > 1e-3 else difference)
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/warnings"; exit 1; }
(0.0, inf) pieces of 10: as at once
(0.0, inf) pieces of 1: as at once
(0.001, 0.1) pieces of 10: as at once
(0.001, 0.1) pieces of 1: another result
SEEN
echo "as stated"
