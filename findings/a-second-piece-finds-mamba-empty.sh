#!/usr/bin/env bash
# transformers 5.24.0: a second piece of several tokens meets Mamba, FalconMamba and Jamba forgetful.
#
# A recurrent network's state is made to be handed on: from a prompt to what is generated, from one
# window of a long sequence to the next. Given one token and the cache of those before, these models
# go on where they were. Given several at once they scan from a state of zeros, and say nothing; only
# the convolution, which sees four tokens, takes up what came before, so that nothing looks broken.
# The new state holds nothing of the old either. Emptying the state before the second piece changes
# not a bit of what it gives. Mamba-2 and its hybrids take the state up both ways.
#
# This is the form without compiled kernels. Seen with torch 2.13.0 and Python 3.11 on Linux, on a
# CPU. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - > "$folder/seen" 2> "$folder/warnings" <<'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

HYBRID = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
MODELS = dict(
    mamba=dict(state_size=8),
    falcon_mamba=dict(state_size=8),
    jamba=dict(HYBRID, mamba_d_state=8, num_experts=1, num_experts_per_tok=1,
               attn_layer_period=2, attn_layer_offset=1),
    mamba2=dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16),
    falcon_h1=dict(HYBRID, mamba_n_heads=8, mamba_d_head=16, mamba_d_ssm=128, mamba_d_state=16,
                   mamba_n_groups=1, mamba_chunk_size=16))


@torch.no_grad()
def in_pieces(model, tokens, piece, empty=False):
    """Logits of 20 tokens, then of the others in pieces, each with the cache of those before."""
    out = model(tokens[:, :20], use_cache=True)
    logits = [out.logits]
    for layer in out.cache.layers:
        if empty and hasattr(layer, "recurrent_states"):
            for state in layer.recurrent_states.values():
                state.zero_()
    for start in range(20, 40, piece):
        out = model(tokens[:, start:start + piece], cache=out.cache, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


for name, sizes in MODELS.items():
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=50, hidden_size=64, num_hidden_layers=2, **sizes)
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), torch.randint(1, 50, (2, 40))
    whole = model(tokens).logits.detach()
    single, several = in_pieces(model, tokens, 1), in_pieces(model, tokens, 20)
    same = "as at once" if (several - whole).abs().max() < 1e-5 else "another result"
    if torch.equal(several, in_pieces(model, tokens, 20, empty=True)):
        same += ", the one of an empty state"
    one = "as at once" if (single - whole).abs().max() < 1e-5 else "another result"
    print(f"{name}: one by one {one}; twenty {same}")
PYTHON
diff "$folder/seen" - <<'SEEN' || { cat "$folder/warnings"; exit 1; }
mamba: one by one as at once; twenty another result, the one of an empty state
falcon_mamba: one by one as at once; twenty another result, the one of an empty state
jamba: one by one as at once; twenty another result, the one of an empty state
mamba2: one by one as at once; twenty as at once
falcon_h1: one by one as at once; twenty as at once
SEEN
echo "as stated"
