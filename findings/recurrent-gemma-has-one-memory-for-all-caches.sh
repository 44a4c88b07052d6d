#!/usr/bin/env bash
# transformers 5.24.0: RecurrentGemma keeps its recurrent state in itself, and not in the cache.
#
# A cache holds what a model has seen: each sequence has one of its own, and whoever searches copies
# it. RecurrentGemma takes a cache, too, but keeps there what its attention has seen, and the states
# of its recurrent blocks as attributes of the modules, where the next call finds them, whosever it
# is. Two sequences that are played in turn, each with its own cache, go on from each other's states;
# a copied cache goes on from where the original has got to. In beam search nobody puts the states in
# order when beams change places, so that the score it gives is not that of the sequence it gives. And
# a prompt of one token, as for free generation, takes up the end of what was generated before. There
# is no warning. One sequence at a time is right, if its prompt has two tokens or more.
#
# Seen with torch 2.13.0 and Python 3.11 on Linux, on a CPU. Fails if anything else is seen.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy==2.4.6 torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - > "$folder/seen" <<'PYTHON'
import copy

import torch
from transformers import DynamicCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
torch.set_grad_enabled(False)
config = RecurrentGemmaConfig(
    vocab_size=64, hidden_size=32, lru_width=32, intermediate_size=64, num_hidden_layers=3,
    num_attention_heads=4, head_dim=8, attention_window_size=64, eos_token_id=None)
model = RecurrentGemmaForCausalLM(config).eval()
print("layers:", *config.layer_types)
first, second = torch.randint(3, 64, (2, 40))


def prompt(tokens):
    cache = DynamicCache(config=config)
    model(tokens[None, :10], cache=cache, use_cache=True)
    return cache


def step(tokens, place, cache):
    return model(tokens[None, place:place + 1], cache=cache, use_cache=True,
                 position_ids=torch.tensor([[place]])).logits[0, -1]


def other(steps, tokens):
    """How many of the steps from place 10 on are not as they are without a cache."""
    right = model(tokens[None], use_cache=False).logits[0, 10:]
    return sum(bool((a - b).abs().max() > 1e-3) for a, b in zip(steps, right))


for tokens in (first, second):
    cache = prompt(tokens)
    print("alone: wrong", other([step(tokens, place, cache) for place in range(10, 40)], tokens))
caches = prompt(first), prompt(second)
steps = [[step(*both, cache) for both, cache in (((first, place), caches[0]),
                                                 ((second, place), caches[1]))]
         for place in range(10, 40)]
print("in turn: wrong", *(other(some, tokens) for some, tokens in zip(zip(*steps), (first, second))))
cache = prompt(first)
copied = copy.deepcopy(cache)
for name, each in (("original", cache), ("copy", copied)):
    print(f"{name}: wrong", other([step(first, place, each) for place in range(10, 20)], first))


def free():
    return model.generate(torch.tensor([[2]]), max_new_tokens=8, do_sample=False,
                          return_dict_in_generate=True, output_logits=True).logits[0]


once = free()
model.generate(first[None], max_new_tokens=8, do_sample=False)
print("free generation as before:", bool((free() - once).abs().max() < 1e-3))
for use_cache in (True, False):
    found = model.generate(
        first[None, :8], max_new_tokens=12, num_beams=4, do_sample=False, length_penalty=0.0,
        use_cache=use_cache, return_dict_in_generate=True, output_scores=True)
    tokens = found.sequences[0]
    chances = model(tokens[None], use_cache=False).logits[0, 7:-1].log_softmax(-1)
    chance = chances.gather(1, tokens[8:, None]).sum()
    print(f"four beams, use_cache={use_cache}: score right:",
          bool((found.sequences_scores[0] - chance).abs() < 1e-3))
PYTHON
diff "$folder/seen" - <<'END'
layers: linear_attention linear_attention sliding_attention
alone: wrong 0
alone: wrong 0
in turn: wrong 30 30
original: wrong 0
copy: wrong 10
free generation as before: False
four beams, use_cache=True: score right: False
four beams, use_cache=False: score right: True
END
echo "as stated"
