"""All that learns: Drama's world model, the dreams it makes, and the actor-critic they train.

The time index, everywhere in this project (paper, figure 1 and algorithm 1):

    step             t                t+1
    frame            O_t              O_{t+1}
    latent           z_t              z_{t+1}         z_t ~ q(z | O_t): from the frame alone
    actor sees       [z_t, d_{t-1}]                   d_{t-1} = 0 at an episode's first frame
    action           a_t
    outcome          r_t, e_t                         what a_t earned; whether it ended the life
    deterministic    d_t = f(z_<=t, a_<=t)            holds a_t
    read from d_t    z^_{t+1}, r^_t, e^_t             never from d_{t-1}

^ marks a guess. q is the posterior, what a frame shows; z^_{t+1} comes from the prior, what d_t
foresees. z_t is sampled from the posterior in play and at a dream's first step, and from the prior
inside a dream. Because q looks at one frame only, a whole batch of windows is encoded, scanned and
scored at once; scan.py does the scanning.

Names: d is always d_t and d_past always d_{t-1}. Shapes: B batch, L length, N dreams, T horizon,
K groups, C classes, Z = K * C, D width of d, F = Z + D, A actions. Losses: paper, equations 6 and
7. D1, P6, T2 and the like name faults of the published code that are settled here; the README
lists them.

The training loop calls WorldModel.loss, WorldModel.imagine and ActorCritic.loss: begin with these.
Of scan.py, the last to be read, it is enough to know that SequenceModel makes d_t from latents and
actions.
"""

import copy
import ctypes
import functools
import math
import sys
import time
from collections import deque
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scan import BACKBONES, RMSNorm, SequenceModel, State

# ---------------------------------------------------------------- distributions


def one_hot(index: Tensor, classes: int, dtype=torch.float32) -> Tensor:
    """(...) integers -> (..., classes), exactly 0 or 1 (D1)."""
    return F.embedding(index, torch.eye(classes, dtype=dtype, device=index.device))


def unimix_softmax(logits: Tensor, uniform: float) -> Tensor:
    """(1 - uniform) softmax + uniform / classes, in float32: uniform > 0 rules no class out."""
    return (1 - uniform) * logits.float().softmax(-1) + uniform / logits.shape[-1]


def sample(probs: Tensor) -> Tensor:
    """(..., classes) probabilities -> (...) indices: inverse CDF, one uniform number each."""
    cdf = probs.cumsum(-1)
    threshold = torch.rand(probs.shape[:-1], device=probs.device).unsqueeze(-1) * cdf[..., -1:]
    return (cdf < threshold).sum(-1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL[p || q] of (..., K, C) categoricals, summed over the K of a step -> (...)."""
    return (p * (p.log() - q.log())).sum((-2, -1))


class TwoHot(nn.Module):
    """A number as a distribution over 255 bins at symexp(k), k evenly spaced from -20 to 20.

    Targets are split between the two bins around them and expectations are taken in raw space,
    not in symlog space, where a rare large reward would all but vanish (P10). The bins mirror
    each other about an exact 0, and are added in mirrored pairs: a flat distribution reads 0.
    Source: DreamerV3 (2024), section "Robust prediction".
    """

    LIMIT, HALF = 20.0, 127

    def __init__(self):
        super().__init__()
        positive = torch.linspace(0, self.LIMIT, self.HALF + 1).expm1()[1:]
        bins = torch.cat([-positive.flip(0), torch.zeros(1), positive])
        self.register_buffer("bins", bins, persistent=False)

    @classmethod
    def initialise(cls, layer: nn.Linear):
        """Zero weights, less mass further out: flat tails would read 100,000s for a long time."""
        nn.init.zeros_(layer.weight)
        k = torch.linspace(-cls.LIMIT, cls.LIMIT, 2 * cls.HALF + 1)
        layer.bias.data.copy_(-1.5 * k.abs())

    def mean(self, logits: Tensor) -> Tensor:
        """(..., 255) logits -> (...) expectation, in float32 (D7)."""
        p = logits.float().softmax(-1)
        below, above = p[..., : self.HALF].flip(-1), p[..., self.HALF + 1 :]
        return ((above - below) * self.bins[self.HALF + 1 :]).sum(-1)

    def loss(self, logits: Tensor, *targets: Tensor) -> Tensor:
        """Sum of the cross-entropies of (..., 255) logits to each target, (...) numbers; one beyond
        the last bin counts as that bin."""
        target = torch.stack(targets, -1).clamp(self.bins[0], self.bins[-1])  # (..., targets)
        below = torch.searchsorted(self.bins, target, right=True).sub(1).clamp(0, 2 * self.HALF - 1)
        low, high = self.bins[below], self.bins[below + 1]
        share = (target - low) / (high - low)  # of the upper bin
        log_p = logits.float().log_softmax(-1)
        picked = log_p.gather(-1, torch.cat([below, below + 1], -1))  # (..., 2 targets)
        return -(picked * torch.cat([1 - share, share], -1)).sum(-1)


# ---------------------------------------------------------------- networks


def mlp(d_input: int, hidden: int, layers: int, d_output: int) -> nn.Sequential:
    """`layers` times Linear, RMSNorm, SiLU, then a Linear."""
    blocks = []
    for width in [d_input] + [hidden] * (layers - 1):
        blocks += [nn.Linear(width, hidden), RMSNorm(hidden), nn.SiLU()]
    return nn.Sequential(*blocks, nn.Linear(hidden, d_output))


class ToCells(nn.Module):
    """(B, channels, side, side) -> (B, cells, features): side * side, or the image as one."""

    def __init__(self, cells: int):
        super().__init__()
        self.cells = cells

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).unflatten(1, (-1, self.cells)).mT


class ToImage(nn.Module):
    """(B, cells, features) -> (B, channels, side, side) in the layout of images."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.shape = channels, side, side

    def forward(self, x: Tensor) -> Tensor:
        return x.mT.reshape(-1, *self.shape).contiguous(memory_format=image_layout(x.device))


class BatchNorm(nn.BatchNorm2d):
    """On a CPU torch 2.13 sums channels-last images in float32, one number after the other: beyond
    half a million a channel, as in `paper`, the variance is 1 % off, and depends on the number of
    threads. Contiguous images are summed pairwise."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or x[:, 0].numel() < 2**19:
            return self.normalise(x)
        return self.normalise(x.contiguous()).contiguous(memory_format=image_layout(x.device))

    def normalise(self, x: Tensor) -> Tensor:
        return super().forward(x)


class BatchRenorm(BatchNorm):
    """Batch norm for `glide` batches; after as many more it trains by the running averages, as it
    plays. Gradients stay those of batch norm.

    Normalised by the statistics of one scene, what moves in it stands out and is learnt sooner. But
    play and dreams know only the averages, by which later scenes look like none it has seen.
    Source: Ioffe (arXiv 1702.03275), equation 1; its limits do what gliding does here.
    """

    def __init__(self, channels: int, glide: int):
        super().__init__(channels)
        self.glide = glide

    def normalise(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().normalise(x)
        with torch.no_grad():
            own = (2 - self.num_batches_tracked / self.glide).clamp(0, 1)  # weight of the batch
            mean, variance = self.running_mean.clone(), self.running_var.clone()
            F.batch_norm(x, mean, variance, training=True, momentum=1.0)  # overwrites both
            self.num_batches_tracked += 1
            share = 0.01 + 0.09 * own  # averages over 10 batches, as in batch norm, later over 100
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance, share)
            variance *= 1 - 1 / x[:, 0].numel()  # the biased one, which batch norm divides by
            centre, spread = self.running_mean.lerp(mean, own), self.running_var.lerp(variance, own)
            rate = (spread + self.eps).rsqrt()
            scale, shift = (variance + self.eps).sqrt() * rate, (mean - centre) * rate
        weight, bias = self.weight * scale, torch.addcmul(self.bias, self.weight, shift)
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)


def encoder(size: int, channels: list[int], strides: list[int], kernels: list[int], cells: int,
            norm):
    """Frames (B, 3, size, size) -> features (B, cells, channels[-1] * side * side / cells).
    norm(channels) makes a batch norm. Raises ValueError for lists that do not fit each other or the
    frames."""
    if len(channels) != len(strides) or size % math.prod(strides):
        raise ValueError("channels and strides need one number for each convolution, and the "
                         f"product of the strides must divide {size}")
    if len(kernels) != len(strides) or any(
            k < stride or stride == 1 and k % 2 == 0 for k, stride in zip(kernels, strides)):
        raise ValueError("kernel needs one number for all convolutions or one for each, no smaller "
                         "than its stride, and odd where that is 1")
    blocks = []
    for before, after, stride, kernel in zip([3] + channels, channels, strides, kernels):
        conv = nn.Conv2d(before, after, kernel, stride, padding=(kernel - 1) // 2)
        blocks += [conv, norm(after), nn.SiLU()]
    return nn.Sequential(*blocks, ToCells(cells))


def decoder(d_input: int, d_cell: int, channels: list[int], strides: list[int], kernels: list[int],
            side: int, norm):
    """The encoder mirrored: (B, cells, d_input) -> d_cell features each -> logits of frames
    (B, 3, size, size)."""
    blocks = [nn.Linear(d_input, d_cell), ToImage(channels[-1], side)]
    mirrored = (part[::-1] for part in (channels, [3] + channels[:-1], strides, kernels))
    for before, after, stride, kernel in zip(*mirrored):
        padding = (kernel - 1) // 2
        extra = stride + 2 * padding - kernel  # so that the side grows by exactly `stride`
        # ToPixels is a ConvTranspose2d, faster where there are so few channels
        kind = ToPixels if after == 3 and kernel == 2 * stride else nn.ConvTranspose2d
        conv = kind(before, after, kernel, stride, padding, output_padding=extra)
        blocks += [norm(before), nn.SiLU(), conv]
    return nn.Sequential(*blocks)


def truncated_normal(*modules: nn.Module):
    """Weights of variance 2 / (fan_in + fan_out), cut at two deviations; biases 0."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            deviation = math.sqrt(2 / (fan_in + fan_out)) / 0.8796  # a deviation of 1, once cut
            nn.init.trunc_normal_(layer.weight, 0, deviation, -2 * deviation, 2 * deviation)
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------- world model


class Start(NamedTuple):
    """Where a dream begins: what the actor sees at step t, and the state that step t-1 left."""

    z: Tensor  # (N, K) indices of z_t
    d_past: Tensor  # (N, D) d_{t-1}
    state: tuple[State, ...]  # of the sequence model
    first: Tensor  # (N,) bool: step t opens an episode, so d_past and state count as zero


class Trajectory(NamedTuple):
    """Steps 0 .. T of N dreams or real windows, time first: what the agent sees at each, and what
    came of all but the last."""

    z: Tensor  # (T + 1, N, K) indices of z_t
    d_past: Tensor  # (T + 1, N, D) d_{t-1}
    action: Tensor  # (T, N) a_t
    reward: Tensor  # (T, N) r_t; in a dream its expectation, read from d_t
    end: Tensor  # (T, N) e_t; in a dream its probability; also 1 where an episode was cut off
    truncated: Tensor  # (T, N) bool: the latter; never in a dream


class WorldModel(nn.Module):
    """Discrete autoencoder, sequence model, and heads for what comes next.

    `harmony` learns one weight for each of the image, reward and latent losses (HarmonyDream,
    equation 6); `event_weight` favours the few pixels that moved. With `local` each cell of the
    encoder's last image has categoricals of its own: those of a whole image overlook a small ball.
    After `batch_renorm` batches it comes to see a frame in training as it will in play (0: never).
    """

    def __init__(self, actions: int, *, channels: list[int], strides: list[int], kernels: list[int],
                 groups: int, classes: int, d_model: int, layers: int, backbone: str,
                 d_state: int, head_dim: int, length: int, dropout: float, head_hidden: int,
                 unimix: float, free_nats: float, representation_scale: float, harmony: bool,
                 event_weight: float, local: bool, batch_renorm: int, size: int = 64):
        super().__init__()
        self.actions, self.groups, self.classes = actions, groups, classes
        self.unimix, self.free_nats = unimix, free_nats
        self.representation_scale, self.event_weight = representation_scale, event_weight
        d_latent, side = groups * classes, size // math.prod(strides)
        self.cells = side**2 if local else 1
        norm = functools.partial(BatchRenorm, glide=batch_renorm) if batch_renorm else BatchNorm
        self.encoder = encoder(size, channels, strides, kernels, self.cells, norm)
        if groups % self.cells:
            raise ValueError(f"local latents need {self.cells} groups, or a multiple: as many for "
                             "each cell of the encoder's last image")
        d_cell, d_features = d_latent // self.cells, channels[-1] * side**2 // self.cells
        self.posterior_head = nn.Linear(d_features, d_cell)
        self.decoder = decoder(d_cell, d_features, channels, strides, kernels, side, norm)
        self.sequence = SequenceModel(d_latent + actions, d_model, layers=layers, dropout=dropout,
                                      backbone=backbone, d_state=d_state, head_dim=head_dim,
                                      length=length)
        self.prior_head = nn.Linear(d_model, d_latent)
        self.two_hot = TwoHot()
        self.reward_head = mlp(d_model, head_hidden, 1, len(self.two_hot.bins))
        self.end_head = mlp(d_model, head_hidden, 1, 1)
        truncated_normal(self.encoder, self.decoder, self.reward_head, self.end_head)
        TwoHot.initialise(self.reward_head[-1])
        self.harmony = nn.ParameterDict(  # logarithms of what the losses are divided by
            {name: nn.Parameter(torch.zeros(())) for name in ("image", "reward", "latent")}
            if harmony else {})

    def images(self, frame: Tensor) -> Tensor:
        """uint8 frames (..., size, size, 3) -> (prod(...), 3, size, size) in [0, 1]."""
        image = frame.flatten(end_dim=-4).permute(0, 3, 1, 2).to(autocast_dtype(frame.device)) / 255
        return image.contiguous(memory_format=image_layout(frame.device))

    def posterior(self, image: Tensor) -> Tensor:
        """Images (B, 3, size, size) -> probabilities of z (B, K, C)."""
        logits = self.posterior_head(self.encoder(image)).flatten(1)  # (B, cells, ...) -> (B, Z)
        return unimix_softmax(logits.unflatten(-1, (self.groups, self.classes)), self.unimix)

    @torch.no_grad()
    def encode(self, frame: Tensor) -> Tensor:
        """uint8 frames (..., size, size, 3) -> sampled z (..., K)."""
        return sample(self.posterior(self.images(frame))).unflatten(0, frame.shape[:-3])

    def prior(self, d: Tensor) -> Tensor:
        """d_t (..., D) -> probabilities of z_{t+1} (..., K, C)."""
        logits = self.prior_head(d)
        return unimix_softmax(logits.unflatten(-1, (self.groups, self.classes)), self.unimix)

    def token(self, z: Tensor, action: Tensor) -> Tensor:
        """Latents, as indices (..., K) or one-hot (..., K, C), and actions -> (..., Z + A)."""
        if not z.is_floating_point():
            z = one_hot(z, self.classes, autocast_dtype(z.device))
        return torch.cat([z.flatten(-2), one_hot(action, self.actions, z.dtype)], -1)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents, indices (B, K) or one-hot (B, K, C) -> images (B, 3, size, size) in [0, 1]."""
        if not latent.is_floating_point():
            latent = one_hot(latent, self.classes)
        return self.decoder(latent.flatten(1).unflatten(1, (self.cells, -1))).float().sigmoid()

    def image_loss(self, image: Tensor, batch) -> Tensor:
        """Squared error of images (B * L, 3, size, size), summed over the pixels of a step -> mean.

        A small ball is lost in a plain sum over the pixels. If few, under 5 %, have moved since the
        frame before, the still ones count half, the moved `event_weight` times that (1: all alike).
        """
        frame = batch.frame.flatten(0, 1).permute(0, 3, 1, 2)
        target = torch.empty_like(image).copy_(frame) / 255  # in float32 (D7), laid out as image
        error = F.mse_loss(image, target, reduction="none")
        if self.event_weight > 1:
            error = error * self.pixel_weights(batch.frame, batch.first).unsqueeze(1)
        return error.sum() / len(error)

    def pixel_weights(self, frame: Tensor, first: Tensor) -> Tensor:
        """Frames (B, L, size, size, 3) -> weight of every pixel (B * L, size, size)."""
        red, green, blue = frame.unbind(-1)
        grey = red.short() + green + blue  # (B, L, size, size): three times the grey level
        moved = (grey[:, 1:] - grey[:, :-1]).abs() > 3 * 16
        share = moved.float().mean((-2, -1))
        few = (share > 0) & (share < 0.05) & ~first[:, 1:]
        weight = torch.where(moved, 0.5 * self.event_weight, 0.5)
        weight = torch.where(few[..., None, None], weight, 1.0)
        return F.pad(weight, (0, 0, 0, 0, 1, 0), value=1.0).flatten(0, 1)

    def loss(self, batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Windows (B, L) -> loss and metrics.

        A batch has the parts of SCHEMA in buffer.py. Losses: paper, equations 6 and 7. The free nat
        applies step by step: applied to their mean, it would leave rare surprising frames without a
        gradient (P6). No KL leads from an episode's last step to the next one's first frame (T2).
        """
        B, L = batch.action.shape
        posterior = self.posterior(self.images(batch.frame))  # (B * L, K, C)
        z = sample(posterior.detach())
        # Straight through: the value is z, exactly; the gradient is that of its probabilities
        latent = one_hot(z, self.classes) + (posterior - posterior.detach())
        image_loss = self.image_loss(self.decode(latent), batch)

        posterior, latent = posterior.unflatten(0, (B, L)), latent.unflatten(0, (B, L))
        d, _ = self.sequence(self.token(latent, batch.action), reset=batch.first)  # (B, L, D)
        prior, posterior = self.prior(d[:, :-1]), posterior[:, 1:]  # both of step t + 1
        dynamics = kl_divergence(posterior.detach(), prior)  # (B, L - 1)
        representation = kl_divergence(posterior, prior.detach())
        within = (~batch.first[:, 1:]).float()  # t and t + 1 in one episode

        def mean_within(kl):
            return (kl * within).sum() / within.sum().clamp(min=1)

        end_logit = self.end_head(d).float().squeeze(-1)
        losses = dict(
            image=image_loss,
            reward=self.two_hot.loss(self.reward_head(d), batch.reward).mean(),
            end=F.binary_cross_entropy_with_logits(end_logit, batch.terminal),
            dynamics=mean_within(dynamics.clamp(min=self.free_nats)),
            representation=mean_within(representation.clamp(min=self.free_nats)),
        )
        total = sum(F.softplus(scale) for scale in self.harmony.values())
        for name, value in losses.items():  # all are minimised
            part = "latent" if name in ("dynamics", "representation") else name
            value = self.representation_scale * value if name == "representation" else value
            total = total + (value / self.harmony[part].exp() if part in self.harmony else value)

        metrics = {f"{name}_loss": value.detach() for name, value in losses.items()}
        metrics["model_loss"] = total.detach()
        metrics["kl"] = mean_within(dynamics).detach()
        metrics["posterior_entropy"] = -(posterior * posterior.log()).sum((-2, -1)).mean().detach()
        metrics |= {f"harmony_{name}": (-scale).exp().detach()
                    for name, scale in self.harmony.items()}
        return total, metrics

    @torch.no_grad()
    def starts_from_batch(self, batch, z: Tensor, count: int) -> tuple[Start, Trajectory]:
        """`count` starts spread evenly over windows (B, L) with latents z (B, L, K), and the
        windows themselves as a trajectory.

        A dream starts at the head of each of `count` pieces, from the state that the piece before
        left; the first piece of a window has none before it and starts from zero, as d_past does
        there, even inside an episode.
        """
        B, L = batch.action.shape
        piece = B * L // count
        d, states = self.sequence(self.token(z, batch.action), reset=batch.first, every=piece)
        d_past = F.pad(d[:, :-1], (0, 0, 1, 0)).masked_fill(batch.first[..., None], 0.0)

        def before_each(after_each):  # states of pieces: (B, pieces, ...) -> (count, ...)
            before = torch.empty_like(after_each)  # with the layout of states
            before[:, 0].zero_()
            before[:, 1:] = after_each[:, :-1]
            return before.flatten(0, 1)

        start = Start(
            z=z[:, ::piece].flatten(0, 1),
            d_past=d_past[:, ::piece].flatten(0, 1),
            state=tuple(State(*map(before_each, layer)) for layer in states),
            first=batch.first[:, ::piece].flatten(),
        )
        truncated = batch.first[:, 1:] & (batch.terminal[:, :-1] == 0)
        end = batch.terminal[:, :-1] + truncated
        steps = (z, d_past, batch.action[:, :-1], batch.reward[:, :-1], end, truncated)
        return start, Trajectory(*(part.transpose(0, 1) for part in steps))

    @torch.no_grad()
    def starts_from_contexts(self, batch) -> Start:
        """One start per window: its last frame, seen after a scan of the steps before it.

        Paper, algorithm 1, with the posterior of the last frame in place of a prior sample.
        """
        z = self.encode(batch.frame)  # (N, L, K)
        d, state = self.sequence(self.token(z, batch.action)[:, :-1], reset=batch.first[:, :-1])
        return Start(z[:, -1], d[:, -1], state, batch.first[:, -1])

    @torch.no_grad()
    def imagine(self, start: Start, horizon: int, policy) -> Trajectory:
        """Dream `horizon` steps on; `policy(t, z, d_past)`: (N, K), (N, D) -> actions (N,).

        Reward and end are read from d_t, which holds a_t, not from the feature before it (D2).
        """
        z, state, reset = start.z, start.state, start.first
        d_past = torch.where(reset[:, None], 0.0, start.d_past)
        zs, ds, actions = [z], [d_past], []
        for t in range(horizon):
            actions.append(policy(t, z, d_past))
            d, state = self.sequence.step(self.token(z, actions[-1]), state, reset)
            z, d_past, reset = sample(self.prior(d)), d, None  # of step t + 1
            zs.append(z)
            ds.append(d_past)
        d_past = torch.stack(ds)  # (T + 1, N, D)
        reward = self.two_hot.mean(self.reward_head(d_past[1:]))  # shifted by one, these are d_t
        end = self.end_head(d_past[1:]).float().squeeze(-1).sigmoid()
        truncated = torch.zeros_like(end, dtype=torch.bool)
        return Trajectory(torch.stack(zs), d_past, torch.stack(actions), reward, end, truncated)


@torch.no_grad()
def dream_picture(model: WorldModel, batch, context: int = 5) -> Tensor:
    """One window (1, L) as a picture (height, width, 3) uint8 of three rows: the frames; their
    reconstructions; and, from a red line on, a dream that sees `context` frames, then actions."""
    real = model.images(batch.frame)  # (L, 3, 64, 64)
    rebuilt = model.decode(model.posterior(real).argmax(-1))
    start = model.starts_from_contexts(type(batch)(*(part[:, :context] for part in batch)))
    dream = model.imagine(start, len(real) - context,
                          lambda t, z, d_past: batch.action[:, context - 1 + t])
    dreamt = torch.cat([rebuilt[:context], model.decode(dream.z[1:, 0])])
    rows = (255 * torch.stack([real, rebuilt, dreamt])).round().byte()  # (3, L, 3, 64, 64)
    rows = F.pad(rows.permute(0, 1, 3, 4, 2).cpu(), (0, 0, 1, 1, 1, 1))  # (3, L, 66, 66, 3)
    rows[2, context, :, 0] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    picture = rows.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return picture.repeat_interleave(2, 0).repeat_interleave(2, 1)


# ---------------------------------------------------------------- actor-critic


def lambda_return(reward: Tensor, end: Tensor, value: Tensor, gamma: float, lambda_: float):
    """R_t = r_t + gamma (1 - e_t) [(1 - lambda) v_{t+1} + lambda R_{t+1}],  R_T = v_T.

    reward, end (T, N): of steps 0 .. T-1; value (T + 1, N): of states 0 .. T. Returns (T, N).
    It mixes in the value of the state that a_t led to, not of the one it left (D3).
    """
    assert reward.shape == end.shape == value[1:].shape, (reward.shape, end.shape, value.shape)
    onward = gamma * (1 - end)
    near, far = reward + (1 - lambda_) * onward * value[1:], lambda_ * onward
    returns = [value[-1]]
    for near_t, far_t in zip(near.flip(0), far.flip(0)):
        returns.append(torch.addcmul(near_t, far_t, returns[-1]))
    return torch.stack(returns[:0:-1])


class ReturnRange(nn.Module):
    """Running distance S between the 5th and 95th percentile of returns, to scale advantages.

    The first distance starts the average; `value` and `seen` are saved with the weights (D15).
    """

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("quantiles", torch.tensor([0.05, 0.95]), persistent=False)

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        low, high = torch.quantile(returns.flatten(), self.quantiles)
        decay = self.decay * self.seen  # 0 at the first update
        self.value.copy_(decay * self.value + (1 - decay) * (high - low))
        self.seen.fill_(1.0)
        return self.value


class ActorCritic(nn.Module):
    """Actor pi(a | s) and critic v(s) on s_t = [z_t, d_{t-1}], trained in dreams.

    What lies beyond a dream's last step the critic learns from itself, and a young one may talk
    itself into values that were never earned. `replay_critic` is the weight of a second loss, which
    holds it to the rewards of the real steps that the dreams started from (DreamerV3 of 2024).
    """

    def __init__(self, actions: int, *, groups: int, classes: int, d_model: int,
                 actor_hidden: int, critic_hidden: int, layers: int, gamma: float,
                 lambda_: float, entropy: float, unimix: float, range_decay: float,
                 range_floor: float, replay_critic: float):
        super().__init__()
        self.classes, self.replay_critic = classes, replay_critic
        self.gamma, self.lambda_ = gamma, lambda_
        self.entropy, self.unimix, self.range_floor = entropy, unimix, range_floor
        self.two_hot = TwoHot()
        d_feature = groups * classes + d_model
        self.actor = mlp(d_feature, actor_hidden, layers, actions)
        self.critic = mlp(d_feature, critic_hidden, layers, len(self.two_hot.bins))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.orthogonal_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.orthogonal_(self.actor[-1].weight, gain=0.01)  # begin by trying everything
        TwoHot.initialise(self.critic[-1])
        self.slow_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.return_range = ReturnRange(range_decay)

    def features(self, z: Tensor, d_past: Tensor) -> Tensor:
        """Indices z_t (..., K) and d_{t-1} (..., D) -> s_t (..., F)."""
        dtype = autocast_dtype(d_past.device)
        return torch.cat([one_hot(z, self.classes, dtype).flatten(-2), d_past.to(dtype)], -1)

    def policy(self, features: Tensor, temperature: float = 1.0) -> Tensor:
        """s_t (..., F) -> pi (..., A): one and the same in play, dream and loss. A temperature
        divides the logits and multiplies the uniform share, which frees a player who is stuck."""
        share = min(1.0, self.unimix * temperature)
        return unimix_softmax(self.actor(features) / temperature, share)

    def value(self, z: Tensor, d_past: Tensor) -> Tensor:
        """z_t (N, K), d_{t-1} (N, D) -> v(s_t) (N,)."""
        return self.two_hot.mean(self.critic(self.features(z, d_past)))

    def act(self, z: Tensor, d_past: Tensor, temperature: float = 1.0) -> Tensor:
        """z_t (N, K), d_{t-1} (N, D) -> actions (N,), drawn from pi at this temperature."""
        return sample(self.policy(self.features(z, d_past), temperature))

    def critic_loss(self, features: Tensor, steps: Trajectory):
        """s_0 .. s_T (T + 1, N, F) and their outcomes -> the critic's loss (T, N), its values
        (T + 1, N) and the returns (T, N).

        Its targets are the returns by its own values and by those of its slow copy, a running
        average that steadies it. After the last step, and where the episode was truncated, its
        value stands in for what is not known; truncated steps have no loss.
        """
        logits = self.critic(features[:-1])  # (T, N, bins)

        def returns_from(value):
            reward = torch.where(steps.truncated, value[:-1], steps.reward)
            return lambda_return(reward, steps.end, value, self.gamma, self.lambda_)

        with torch.no_grad():
            value = self.two_hot.mean(torch.cat([logits, self.critic(features[-1:])]))
            returns = returns_from(value)
            slow_returns = returns_from(self.two_hot.mean(self.slow_critic(features)))
        loss = self.two_hot.loss(logits, returns, slow_returns) * ~steps.truncated
        return loss, value, returns

    def loss(self, dream: Trajectory, real: Trajectory | None = None) -> tuple[Tensor, dict]:
        """Dreams of T steps, and real ones if the critic learns from them -> loss and metrics.

        The actor learns by REINFORCE: an action becomes likelier by its advantage, what it earned
        beyond the critic's guess, which has no gradient; the entropy keeps it trying. Every step is
        weighted by the chance that the dream gets that far: the ends it foresees are neither
        ignored nor rounded (P7).
        """
        features = self.features(dream.z, dream.d_past)  # (T + 1, N, F)
        alive = torch.cumprod(1 - dream.end, 0)  # (T, N): after step t
        weight = torch.cat([torch.ones_like(alive[:1]), alive[:-1]])  # (T, N): up to step t

        critic_loss, value, returns = self.critic_loss(features, dream)
        scale = self.return_range.update(returns).clamp(min=self.range_floor)
        advantage = (returns - value[:-1]) / scale

        # Without unimix a probability may round to 0, whose logarithm would break the entropy.
        pi = self.policy(features[:-1]).clamp(min=1e-30)  # (T, N, A)
        log_pi = pi.log()
        log_taken = log_pi.gather(-1, dream.action.unsqueeze(-1)).squeeze(-1)
        entropy = -(pi * log_pi).sum(-1)
        actor_loss = -advantage * log_taken - self.entropy * entropy

        actor_loss, critic_loss = (weight * actor_loss).mean(), (weight * critic_loss).mean()
        total = actor_loss + critic_loss
        metrics = dict(
            actor_loss=actor_loss,
            critic_loss=critic_loss,
            entropy=entropy.mean(),
            return_range=self.return_range.value.clone(),
            dream_return=returns[0].mean(),
            dream_value=value[0].mean(),
            dream_reward=dream.reward.mean(),
            dream_end=dream.end.mean(),
            advantage=advantage.abs().mean(),
        )
        if real is not None:
            real_features = self.features(real.z, real.d_past)
            real_loss, real_value, real_returns = self.critic_loss(real_features, real)
            total = total + self.replay_critic * real_loss.mean()
            metrics |= dict(replay_critic_loss=real_loss.mean(), replay_value=real_value.mean(),
                            replay_return=real_returns.mean())
        return total, {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, share: Tensor | float):
    """slow <- slow + share (fast - slow), weights and running statistics; 1 makes them equal."""
    pairs = zip(slow.state_dict().values(), fast.state_dict().values())
    slow, fast = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
    torch._foreach_lerp_(slow, fast, [share] * len(slow))


class Move(NamedTuple):
    """A step of games side by side; arrays of numpy."""

    frame: np.ndarray  # (games, size, size, 3) uint8: what the player saw
    action: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    over: np.ndarray  # (games,) bool: games that are over now
    after: np.ndarray  # the frames it led to


class Player:
    """Plays `games` side by side with the state carried from step to step: O(1) a step.

    Left alone, a state would grow older than any in training, and it was made by older weights. So
    at the age of `oldest` steps it is rebuilt, with the present weights, by one scan over the newer
    half of these: its age runs from oldest / 2 to oldest (T4). Play changes nothing else (D6).

    `act_on="prior"` shows the actor a guess at the frame in place of the frame, as the published
    code does; it is there for comparison. `temperature` is that of ActorCritic.act.
    """

    def __init__(self, model: WorldModel, agent: ActorCritic, games: int, oldest: int,
                 act_on: str = "posterior", temperature: float = 1.0):
        if act_on not in ("posterior", "prior"):
            raise ValueError(f"act_on is posterior or prior, not {act_on!r}")
        self.model, self.agent, self.act_on, self.temperature = model, agent, act_on, temperature
        self.half = max(1, oldest // 2)
        self.state = model.sequence.initial_state(games)
        self.d_past = next(model.parameters()).new_zeros(games, model.sequence.d_model)
        self.history = deque(maxlen=self.half)  # (z, action, first) of the last steps
        self.age = 0  # steps that the state has seen

    def decide(self, frame: Tensor, first: Tensor, d_past: Tensor, state: tuple[State, ...]):
        """d_{t-1} and the state that step t-1 left -> z_t, a_t, d_t, state."""
        z = seen = self.model.encode(frame)  # (games, K)
        d_past = torch.where(first[:, None], 0.0, d_past)
        if self.act_on == "prior":
            seen = torch.where(first[:, None], z, sample(self.model.prior(d_past)))
        action = self.agent.act(seen, d_past, self.temperature)
        return z, action, *self.model.sequence.step(self.model.token(z, action), state, first)

    @torch.no_grad()
    def act(self, frame: Tensor, first: Tensor) -> Tensor:
        """Frames (games, size, size, 3) uint8, first (games,) bool -> actions (games,)."""
        z, action, self.d_past, self.state = self.decide(frame, first, self.d_past, self.state)
        self.history.append((z, action, first.clone()))  # a caller may reuse its flags
        self.age += 1
        if self.age == 2 * self.half:
            z, actions, first = (torch.stack(column, 1) for column in zip(*self.history))
            d, self.state = self.model.sequence(self.model.token(z, actions), reset=first)
            self.d_past, self.age = d[:, -1], self.half
        return action

    def play(self, game, seeds, reseed, limit: int | float = math.inf):
        """Play `game` from its start, with these seeds, for `limit` steps or until every copy is
        over -> Moves; `reseed(step)` is called before every step.

        The player remembers nothing from before (D8); a copy that is over earns nothing more.
        """
        frame, device = game.reset(seeds), self.d_past.device
        over, step = np.zeros(len(frame), bool), 0
        while step < limit and not over.all():
            reseed(step)
            first = torch.full((len(frame),), step == 0, device=device)
            action = self.act(torch.from_numpy(frame).to(device), first).cpu().numpy()
            after, reward, terminal, done = game.step(action)
            reward, over = np.where(over, 0, reward), over | done
            yield Move(frame, action, reward, terminal, over, after)
            frame, step = after, step + 1

    def state_dict(self) -> dict:
        """All that the next action depends on besides the weights."""
        history = [torch.stack(column) for column in zip(*self.history)]
        return dict(state=[tuple(layer) for layer in self.state], d=self.d_past,
                    history=history, age=self.age)

    def load_state_dict(self, saved: dict):
        device = self.d_past.device
        self.state = tuple(State(*(part.to(device) for part in layer)) for layer in saved["state"])
        self.d_past, self.age = saved["d"].to(device), saved["age"]
        self.history.clear()
        self.history.extend(zip(*(column.to(device) for column in saved["history"])))


# ---------------------------------------------------------------- optimisers


class LaProp(torch.optim.Optimizer):
    """Adam with the gradient scaled before it is averaged, not after (Ziyin et al., 2020).

    v <- b2 v + (1 - b2) g^2
    m <- b1 m + (1 - b1) rate g / (sqrt(v / (1 - b2^k)) + eps)
    theta <- theta - m / (1 - b1^k)             at the k-th update; no weight decay (D4)

    If `found_inf` is 1 nothing changes, as in torch's own fused optimisers.
    """

    def __init__(self, params, lr: Tensor, betas=(0.9, 0.999), eps=1e-20):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))
        self.found_inf = torch.zeros_like(lr)

    def __setstate__(self, state):
        super().__setstate__(state)
        for p, saved in self.state.items():  # torch does not move k; in older files it is no tensor
            saved["step"] = torch.as_tensor(saved["step"], dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def step(self):
        good = 1 - self.found_inf
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(m=torch.zeros_like(p), v=torch.zeros_like(p),
                                         step=p.new_zeros(()))
            m, v, steps = ([self.state[p][name] for p in params] for name in ("m", "v", "step"))
            gradient = [torch.where(good > 0, p.grad, 0.0) for p in params]
            torch._foreach_add_(steps, [good] * len(steps))  # a scalar would be read by the host
            k = steps[0].clamp(min=1)  # one for all: they all learn in every update
            new1, new2 = ([good * (1 - b)] * len(params) for b in group["betas"])  # shares
            grown1, grown2 = (-torch.expm1(k * math.log(b)) for b in group["betas"])  # 1 - b^k
            torch._foreach_lerp_(v, torch._foreach_mul(gradient, gradient), new2)
            scale = torch._foreach_div(v, grown2)
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_div_(gradient, scale)
            torch._foreach_mul_(gradient, group["lr"])
            torch._foreach_lerp_(m, gradient, new1)
            torch._foreach_add_(params, torch._foreach_mul(m, -good / grown1))


def make_optimizer(kind: str, groups: list[dict], eps: float) -> torch.optim.Optimizer:
    """`groups` hold params and `rate`, the learning rate that they rise to."""
    device = groups[0]["params"][0].device
    groups = [dict(group, lr=torch.zeros((), device=device)) for group in groups]
    if kind == "laprop":
        return LaProp(groups, lr=groups[0]["lr"], eps=eps)
    return torch.optim.Adam(groups, lr=groups[0]["lr"], eps=eps, fused=True,
                            capturable=device.type == "cuda")


def take_step(module: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor,
              max_grad_norm: float, buffers: list[Tensor], good: Tensor | bool = True):
    """One step down the clipped gradient of a loss -> (gradient norm, whether it was taken).

    It is taken if `good` and if loss and gradients are finite. Else nothing changes: the buffers of
    the module return to `buffers`, their values before the loss. The device decides, so that the
    host need not wait for it. Learnt loss weights, a parameter group of their own, are not part of
    the norm.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    weights, *rest = (group["params"] for group in optimizer.param_groups)
    norm = nn.utils.clip_grad_norm_(weights, max_grad_norm)
    norm = norm + 0 * sum(p.grad.sum() for params in rest for p in params)  # NaN unless all finite
    good = torch.isfinite(loss.detach() + norm) & good
    optimizer.found_inf = (~good).float()
    if norm.device.type != "mps" or good:  # fused Adam on MPS overlooks found_inf
        optimizer.step()
    for buffer, before in zip(module.buffers(), buffers):
        buffer.copy_(torch.where(good, buffer, before))
    return norm, good


# ---------------------------------------------------------------- about devices and speed alone


def image_layout(device: torch.device) -> torch.memory_format:
    """Layout of images: channels last is 1.6 times faster on a CPU; MPS does not have it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class ToPixels(nn.ConvTranspose2d):
    """Equal to its base, for kernels of two strides: one 2 x 2 convolution makes all pixels of a
    stride x stride block at once. For 3 channels that halves its time on a CPU in bfloat16.

    Pixel s j + r of a row is x[j] weight[r] + x[j - 1] weight[s + r] + bias. Source: Shi et
    al. (arXiv 1609.05158).
    """

    def forward(self, x: Tensor) -> Tensor:
        s, first, side = self.stride[0], self.padding[0], x.shape[-1]
        weight = self.weight.unflatten(3, (2, s)).unflatten(2, (2, s)).flip(2, 4)
        weight = weight.permute(1, 3, 5, 0, 2, 4).reshape(-1, self.in_channels, 2, 2)
        y = F.conv2d(x, weight, self.bias.repeat_interleave(s * s), padding=1)
        y = y.unflatten(1, (-1, s, s)).permute(0, 1, 4, 2, 5, 3)  # (B, C, rows, s, columns, s)
        y = y.flatten(4, 5).flatten(2, 3)
        return y[..., first:first + s * side, first:first + s * side]


def autocast_dtype(device: torch.device) -> torch.dtype:
    """The type that autocast multiplies in at present: bfloat16 or float32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def fast_precision(device: torch.device) -> str:
    """bfloat16 where it is faster than float32. It changes results, so it is kept with the run.

    A CPU that knows bfloat16 need not be faster in it: some are twice as fast, some half as fast.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float32"
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    if not (able.get("avx512_bf16") or able.get("amx_bf16")):
        return "float32"
    times = {}
    for precision in ("float32", "bfloat16"):
        matrix, clock = torch.ones(1024, 1024, dtype=getattr(torch, precision)), []
        for _ in range(6):
            matrix.mm(matrix)
            clock.append(time.perf_counter())
        times[precision] = min(after - before for before, after in zip(clock, clock[1:]))
    return "bfloat16" if 1.2 * times["bfloat16"] < times["float32"] else "float32"


def keep_freed_memory():
    """Have glibc reuse freed memory instead of returning it to the system.

    A seventh of an update's time on a CPU went into mapping and clearing the same pages anew.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
