#!/usr/bin/env bash
# torchrl 0.14.1: by default DreamerV3ModelLoss gives 32 nats a step away, where DreamerV3 gives 1.
#
# DreamerV3 asks its prior to foresee the latent, 32 categoricals of 32 classes, but for one nat a
# step: the divergence is summed over the categoricals, and not learnt from below 1. With the default
# kl_mode="balanced" and free_bits=1.0 that nat is given to each categorical: a model that is 28.8 nats
# off at every step has no gradient at all, in prior and posterior, and a loss of 1.0, as a perfect one
# has. What is above counts by a mean over the categoricals, a thirty-second. The docstring of
# categorical_kl_balanced says how it clamps; kl_mode="separate" is the loss of DreamerV3.
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
from tensordict.nn import TensorDictModule
from torchrl.objectives import DreamerV3ModelLoss

K, C, STEPS = 32, 32, (2, 3)


def peaked(nats):
    """Logits of a categorical that is so many nats from the uniform one: found by halving."""
    low, high = 0.0, 20.0
    for _ in range(50):
        logits = torch.zeros(C)
        logits[0] = middle = (low + high) / 2
        p = logits.softmax(0)
        low, high = (middle, high) if (p * (C * p).log()).sum() < nats else (low, middle)
    return logits


for nats in (0.0, 0.9, 1.1):
    for mode in ("balanced", "separate"):
        prior = torch.zeros(*STEPS, K, C, requires_grad=True)
        posterior = peaked(nats).expand(*STEPS, K, C).clone().requires_grad_()
        world = TensorDictModule(
            lambda pixels: (prior, posterior, torch.zeros_like(pixels), torch.zeros(*STEPS, 255)),
            in_keys=[("next", "pixels")],
            out_keys=[("next", name) for name in (
                "prior_logits", "posterior_logits", "reco_pixels", "reward_logits")])
        data = dict(pixels=torch.zeros(*STEPS, 3, 8, 8), reward=torch.zeros(*STEPS, 1),
                    done=torch.zeros(*STEPS, 1, dtype=torch.bool))
        losses, _ = DreamerV3ModelLoss(world, kl_mode=mode)(TensorDict({"next": data}, STEPS))
        losses = {name[11:]: loss for name, loss in losses.items()
                  if name[11:] in ("kl", "dynamic", "representation")}
        gradients = torch.autograd.grad(sum(losses.values()), (prior, posterior))
        learns = ["learns" if gradient.any() else "does not" for gradient in gradients]
        print(f"{K * nats:.1f} nats off, {mode}:",
              *(f"{name} {loss.item():.2f}," for name, loss in losses.items()),
              f"prior {learns[0]}, posterior {learns[1]}")
PYTHON
diff "$folder/seen" - <<'END'
0.0 nats off, balanced: kl 1.00, prior does not, posterior does not
0.0 nats off, separate: dynamic 1.00, representation 0.10, prior does not, posterior does not
28.8 nats off, balanced: kl 1.00, prior does not, posterior does not
28.8 nats off, separate: dynamic 28.80, representation 2.88, prior learns, posterior learns
35.2 nats off, balanced: kl 1.10, prior learns, posterior learns
35.2 nats off, separate: dynamic 35.20, representation 3.52, prior learns, posterior learns
END
echo "as stated"
