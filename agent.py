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

z_t is the posterior of a real frame in play and at a dream's first step, and a sample of the
prior inside a dream. Because q looks at one frame only, a whole batch of windows is encoded,
scanned and scored at once; scan.py does the scanning.

Shapes: B batch, L length, N dreams, T horizon, K groups, C classes, Z = K * C, D width of d,
F = Z + D, A actions. Losses: paper, equations 6 and 7. D1, P6, T2 and the like name faults of the
published code that are settled here; the README lists them.

Of scan.py it is enough to know that SequenceModel makes d_t of latents and actions. What is in the
way of a first reading is marked so. Read next: drama.py.
"""

import copy
import math
from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scan import RMSNorm, SequenceModel, State

# ---------------------------------------------------------------- distributions


def one_hot(index: Tensor, classes: int, dtype=torch.float32) -> Tensor:
    """(...) integers -> (..., classes), exactly 0 or 1 (D1)."""
    return F.embedding(index, torch.eye(classes, dtype=dtype, device=index.device))


def mixed_softmax(logits: Tensor, uniform: float) -> Tensor:
    """(1 - uniform) softmax + uniform / classes, in float32: uniform > 0 rules none out."""
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
    each other about an exact 0, and halves are added pairwise, so a flat distribution reads 0.
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
        """Zero weights, and less mass the further out: flat tails would read 100,000s for long."""
        nn.init.zeros_(layer.weight)
        k = torch.linspace(-cls.LIMIT, cls.LIMIT, 2 * cls.HALF + 1)
        layer.bias.data.copy_(-1.5 * k.abs())

    def mean(self, logits: Tensor) -> Tensor:
        """(..., 255) logits -> (...) expectation, in float32 (D7)."""
        p = logits.float().softmax(-1)
        below, above = p[..., : self.HALF].flip(-1), p[..., self.HALF + 1 :]
        return ((above - below) * self.bins[self.HALF + 1 :]).sum(-1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of (..., 255) logits to (...) numbers; beyond the last bin counts as it."""
        target = target.clamp(self.bins[0], self.bins[-1])
        below = torch.searchsorted(self.bins, target, right=True).sub(1).clamp(0, 2 * self.HALF - 1)
        low, high = self.bins[below], self.bins[below + 1]
        share = ((target - low) / (high - low)).unsqueeze(-1)  # of the upper bin
        log_p = logits.float().log_softmax(-1)
        picked = log_p.gather(-1, torch.stack([below, below + 1], -1))  # (..., 2)
        return -(picked * torch.cat([1 - share, share], -1)).sum(-1)


# ---------------------------------------------------------------- networks


def mlp(d_input: int, hidden: int, layers: int, d_output: int) -> nn.Sequential:
    """`layers` times Linear, RMSNorm, SiLU, then a Linear."""
    blocks = []
    for width in [d_input] + [hidden] * (layers - 1):
        blocks += [nn.Linear(width, hidden), RMSNorm(hidden), nn.SiLU()]
    return nn.Sequential(*blocks, nn.Linear(hidden, d_output))


def image_layout(device: torch.device) -> torch.memory_format:
    """Layout of images: channels last is 1.6 times faster on a CPU; MPS does not have it."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class Interleave(torch.autograd.Function):
    """Put the stride x stride pixels of every position, computed as channels, into their places.
    (At a first reading go on to `encoder`: from here to there it is all about speed.)

    (B, n, n, stride, stride, C) -> (B, side, side, C), without the first `padding` rows and columns
    and what is beyond `side`. Written by hand because autograd would make a full tensor for each of
    the slices.
    """

    @staticmethod
    def pairs(apart, image, padding):
        """Views of the same pixels, (B, side / stride, pixels, side / stride, pixels, C)."""
        stride = apart.shape[3]
        n = image.shape[1] // stride
        image = image.unflatten(2, (n, stride)).unflatten(1, (n, stride))
        # Row a of position p is row stride p + a - padding of the image. So, for every m, what is
        # `cut` of position i + m goes where it is `put` in the i-th stride of the image.
        groups = []
        for m in range(padding // stride, (padding + stride - 1) // stride + 1):
            first, last = max(padding, m * stride), min(padding, m * stride) + stride
            groups.append((slice(m, m + n), slice(first - m * stride, last - m * stride),
                           slice(first - padding, last - padding)))
        for rows, cut_rows, put_rows in groups:
            for columns, cut_columns, put_columns in groups:
                source = apart[:, rows, columns, cut_rows, cut_columns].transpose(2, 3)
                yield source, image[:, :, put_rows, :, put_columns]

    @staticmethod
    def forward(ctx, apart, side, padding):
        ctx.shape, ctx.padding = apart.shape, padding
        image = apart.new_empty(len(apart), side, side, apart.shape[-1])
        for source, target in Interleave.pairs(apart, image, padding):
            target.copy_(source)
        return image

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        apart = gradient.new_zeros(ctx.shape)
        for target, source in Interleave.pairs(apart, gradient, ctx.padding):
            target.copy_(source)
        return apart, None, None


class TransposedConv(nn.ConvTranspose2d):
    """nn.ConvTranspose2d from (B, C, side, side) to (B, C', stride * side, stride * side).

    Computed as an ordinary convolution that yields all stride x stride pixels of a position at
    once, as channels, which are then put in their places: four times faster on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        (stride, _), (padding, _), (kernel, _) = self.stride, self.padding, self.kernel_size
        # Pixel a of position i takes tap a + stride j of the input at position i - j. That makes
        # kernel / stride taps, unless the image, which begins `padding` pixels on, ends later.
        taps = max(-(-kernel // stride), (stride - 1 + padding) // stride + 1)
        missing = taps * stride - kernel
        weight = F.pad(self.weight, (0, missing, 0, missing))  # (C, C', taps stride, taps stride)
        weight = weight.view(*weight.shape[:2], taps, stride, taps, stride).flip(2, 4)
        weight = weight.permute(3, 5, 1, 0, 2, 4).flatten(0, 2)  # (stride^2 C', C, taps, taps)
        weight = weight.contiguous(memory_format=image_layout(x.device))
        y = F.conv2d(x, weight, self.bias.repeat(stride**2), padding=taps - 1)
        apart = y.permute(0, 2, 3, 1).unflatten(-1, (stride, stride, -1))
        return Interleave.apply(apart, stride * x.shape[-1], padding).permute(0, 3, 1, 2)


class ToImage(nn.Module):
    """(B, C * side * side) -> (B, C, side, side) in the layout of images."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.shape = channels, side, side

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, self.shape).contiguous(memory_format=image_layout(x.device))


def encoder(channels: list[int], strides: list[int], kernels: list[int]) -> nn.Sequential:
    """Frames (B, 3, 64, 64) -> (B, channels[-1] * side * side)."""
    blocks = []
    for before, after, stride, kernel in zip([3] + channels, channels, strides, kernels):
        conv = nn.Conv2d(before, after, kernel, stride, padding=(kernel - 1) // 2)
        blocks += [conv, nn.BatchNorm2d(after), nn.SiLU()]
    return nn.Sequential(*blocks, nn.Flatten())


def decoder(d_input: int, channels: list[int], strides: list[int], kernels: list[int], side: int):
    """The encoder mirrored: (B, d_input) -> logits of frames (B, 3, 64, 64)."""
    blocks = [nn.Linear(d_input, channels[-1] * side * side), ToImage(channels[-1], side)]
    mirrored = (part[::-1] for part in (channels, [3] + channels[:-1], strides, kernels))
    for before, after, stride, kernel in zip(*mirrored):
        padding = (kernel - 1) // 2
        extra = stride + 2 * padding - kernel  # so that the side grows by exactly `stride`
        conv = TransposedConv(before, after, kernel, stride, padding, output_padding=extra)
        blocks += [nn.BatchNorm2d(before), nn.SiLU(), conv]
    return nn.Sequential(*blocks)


def truncated_normal(*modules: nn.Module):
    """Weights of variance 2 / (fan_in + fan_out), cut at two deviations; biases 0."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            deviation = math.sqrt(2 / (fan_in + fan_out)) / 0.8796  # what the cut leaves of 1
            nn.init.trunc_normal_(layer.weight, 0, deviation, -2 * deviation, 2 * deviation)
            nn.init.zeros_(layer.bias)


def working_type(device: torch.device) -> torch.dtype:
    """What autocast multiplies in at present: bfloat16 or float32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def few_frames(count: int, device: torch.device) -> list[slice]:
    """`count` frames in pieces: what is made of a few of them stays in a CPU's caches, where whole
    batches take two to three times as long. A GPU, where launches cost, has them all at once."""
    few = 32 if device.type == "cpu" else count
    return [slice(start, start + few) for start in range(0, count, few)]


class ImageError(torch.autograd.Function):
    """sum of weight (sigmoid(logit) - frame / 255)^2 over all pixels, in float32.

    logit (B, 3, size, size), frame (B, size, size, 3) uint8, weight (B, size, size) or None.
    Written by hand because a dozen passes over the largest tensors of all took a third of the
    update on a CPU: here a few frames at a time go from logits to gradient.
    """

    @staticmethod
    def forward(ctx, logit, frame, weight):
        gradient, total = torch.empty_like(logit), 0.0
        for part in few_frames(len(logit), logit.device):
            image = logit[part].float().sigmoid()
            error = image - frame[part].permute(0, 3, 1, 2) / 255
            weighted = error if weight is None else error * weight[part].unsqueeze(1)
            total = total + (weighted * error).sum()
            gradient[part] = torch.ops.aten.sigmoid_backward(2 * weighted, image)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream), None, None


# ---------------------------------------------------------------- world model


class Start(NamedTuple):
    """Where a dream begins: what the actor sees at step t, and the state that step t-1 left."""

    z: Tensor  # (N, K) indices of z_t
    d: Tensor  # (N, D) d_{t-1}
    state: tuple[State, ...]  # of the sequence model
    first: Tensor  # (N,) bool: step t opens an episode, so d and state count as zero


class Dream(NamedTuple):
    """T imagined steps of N dreams, time first."""

    z: Tensor  # (T + 1, N, K) indices of z_0 .. z_T
    d: Tensor  # (T + 1, N, D) d_{-1} .. d_{T-1}
    action: Tensor  # (T, N) a_0 .. a_{T-1}
    reward: Tensor  # (T, N) expected r_t, read from d_t
    end: Tensor  # (T, N) probability of e_t, read from d_t


class Lived(NamedTuple):
    """Real steps 0 .. T of B windows, time first: what the critic sees of all, and the outcomes of
    all but the last."""

    z: Tensor  # (T + 1, B, K) indices of z_t
    d: Tensor  # (T + 1, B, D) d_{t-1}
    reward: Tensor  # (T, B) r_t
    end: Tensor  # (T, B) 1 where a_t ended the life, or nothing is known of what came after
    cut: Tensor  # (T, B) bool: the latter, where the time was up


class WorldModel(nn.Module):
    """Discrete autoencoder, sequence model, and heads for what comes next.

    `balance` learns one weight for each of the image, reward and latent losses (HarmonyDream,
    equation 6); `event_weights` looks closer at the few pixels that moved.
    """

    def __init__(self, actions: int, *, channels: list[int], strides: list[int], kernels: list[int],
                 groups: int, classes: int, d_model: int, layers: int, backbone: str,
                 d_state: int, head_dim: int, dropout: float, head_hidden: int, unimix: float,
                 free_nats: float, representation_scale: float, balance: bool,
                 event_weights: bool, size: int = 64):
        super().__init__()
        self.actions, self.groups, self.classes = actions, groups, classes
        self.unimix, self.free_nats = unimix, free_nats
        self.representation_scale, self.event_weights = representation_scale, event_weights
        d_latent, side = groups * classes, size // math.prod(strides)
        self.encoder = encoder(channels, strides, kernels)
        self.posterior_head = nn.Linear(channels[-1] * side * side, d_latent)
        self.decoder = decoder(d_latent, channels, strides, kernels, side)
        self.sequence = SequenceModel(d_latent + actions, d_model, layers=layers, dropout=dropout,
                                      backbone=backbone, d_state=d_state, head_dim=head_dim)
        self.prior_head = nn.Linear(d_model, d_latent)
        self.two_hot = TwoHot()
        self.reward_head = mlp(d_model, head_hidden, 1, len(self.two_hot.bins))
        self.end_head = mlp(d_model, head_hidden, 1, 1)
        truncated_normal(self.encoder, self.decoder, self.reward_head, self.end_head)
        TwoHot.initialise(self.reward_head[-1])
        self.balance = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(())) for name in ("image", "reward", "latent")}
            if balance else {})

    def images(self, frame: Tensor) -> Tensor:
        """uint8 frames (..., size, size, 3) -> (prod(...), 3, size, size) in [0, 1]."""
        image = frame.flatten(end_dim=-4).permute(0, 3, 1, 2).to(working_type(frame.device)) / 255
        return image.contiguous(memory_format=image_layout(frame.device))

    def posterior(self, image: Tensor) -> Tensor:
        """Images (B, 3, size, size) -> probabilities of z (B, K, C)."""
        logits = self.posterior_head(self.encoder(image))
        return mixed_softmax(logits.unflatten(-1, (self.groups, self.classes)), self.unimix)

    @torch.no_grad()
    def encode(self, frame: Tensor) -> Tensor:
        """uint8 frames (..., size, size, 3) -> sampled z (..., K), a few frames at a time."""
        flat = frame.flatten(end_dim=-4)
        pieces = few_frames(len(flat), flat.device)
        parts = [self.posterior(self.images(flat[piece])) for piece in pieces]
        return sample(torch.cat(parts)).unflatten(0, frame.shape[:-3])

    def prior(self, d: Tensor) -> Tensor:
        """d_t (..., D) -> probabilities of z_{t+1} (..., K, C)."""
        logits = self.prior_head(d)
        return mixed_softmax(logits.unflatten(-1, (self.groups, self.classes)), self.unimix)

    def token(self, z: Tensor, action: Tensor) -> Tensor:
        """Latents, as indices (..., K) or one-hot (..., K, C), and actions -> (..., Z + A)."""
        if not z.is_floating_point():
            z = one_hot(z, self.classes, working_type(z.device))
        return torch.cat([z.flatten(-2), one_hot(action, self.actions, z.dtype)], -1)

    def decode(self, z: Tensor) -> Tensor:
        """Latents, as indices (B, K) -> images (B, 3, size, size) in [0, 1]."""
        return self.decoder(one_hot(z, self.classes).flatten(-2)).float().sigmoid()

    def image_weights(self, frame: Tensor, first: Tensor) -> Tensor:
        """Frames (B, L, size, size, 3) -> weight of every pixel (B * L, size, size).

        A small ball is lost in a plain sum over the pixels. Where a few pixels, under 5 %, have
        moved since the frame before, they keep weight 1 and the still ones take half.
        """
        red, green, blue = frame.unbind(-1)
        grey = red.short() + green + blue  # (B, L, size, size): three times the grey level
        moved = ((grey[:, 1:] - grey[:, :-1]).abs() > 3 * 16).float()
        share = moved.mean((-2, -1))
        few = (share > 0) & (share < 0.05) & ~first[:, 1:]
        weight = torch.where(few[..., None, None], 0.5 + 0.5 * moved, 1.0)
        return F.pad(weight, (0, 0, 0, 0, 1, 0), value=1.0).flatten(0, 1)

    def loss(self, batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Windows (B, L) -> loss, metrics, and the latents just drawn, as indices (B, L, K).

        Paper, equations 6 and 7. The free nat is taken step by step: averaged first, it would
        leave rare surprising frames without a gradient (P6). No KL leads from an episode's last
        step to the next one's first frame (T2).
        """
        B, L = batch.action.shape
        posterior = self.posterior(self.images(batch.frame))  # (B * L, K, C)
        z = sample(posterior.detach())
        latent = one_hot(z, self.classes) + (posterior - posterior.detach())  # straight through
        logit = self.decoder(latent.flatten(-2))  # (B * L, 3, size, size)
        pixel = self.image_weights(batch.frame, batch.first) if self.event_weights else None
        image_error = ImageError.apply(logit, batch.frame.flatten(0, 1), pixel)

        posterior, latent = posterior.unflatten(0, (B, L)), latent.unflatten(0, (B, L))
        d, _ = self.sequence(self.token(latent, batch.action), reset=batch.first)  # (B, L, D)
        prior, posterior = self.prior(d[:, :-1]), posterior[:, 1:]  # both of step t + 1
        dynamics = kl_divergence(posterior.detach(), prior)  # (B, L - 1)
        representation = kl_divergence(posterior, prior.detach())
        within = (~batch.first[:, 1:]).float()  # one episode

        def mean_within(kl):
            return (kl * within).sum() / within.sum().clamp(min=1)

        end_logit = self.end_head(d).float().squeeze(-1)
        losses = dict(
            image=image_error / (B * L),
            reward=self.two_hot.loss(self.reward_head(d), batch.reward).mean(),
            end=F.binary_cross_entropy_with_logits(end_logit, batch.terminal),
            dynamics=mean_within(dynamics.clamp(min=self.free_nats)),
            representation=mean_within(representation.clamp(min=self.free_nats)),
        )
        latent_loss = losses["dynamics"] + self.representation_scale * losses["representation"]
        parts = dict(image=losses["image"], reward=losses["reward"], latent=latent_loss)
        total = losses["end"]
        for name, part in parts.items():
            s = self.balance[name] if self.balance else None
            total = total + (part if s is None else part / s.exp() + F.softplus(s))

        metrics = {f"{name}_loss": value.detach() for name, value in losses.items()}
        metrics["model_loss"] = total.detach()
        metrics["kl"] = mean_within(dynamics).detach()
        metrics["posterior_entropy"] = -(posterior * posterior.log()).sum((-2, -1)).mean().detach()
        metrics |= {f"balance_{name}": (-s).exp().detach() for name, s in self.balance.items()}
        return total, metrics, z.unflatten(0, (B, L))

    @torch.no_grad()
    def starts_from_batch(self, batch, z: Tensor, count: int) -> tuple[Start, Lived]:
        """`count` starts spread evenly over the batch just trained on, with its latents (B, L, K),
        and the batch itself as lived.

        The latents are scanned again, without dropout; a dream starts at the head of each of
        `count` pieces, from the state that the piece before left. No frame is encoded again.
        """
        B, L = batch.action.shape
        piece = B * L // count
        d, states = self.sequence(self.token(z, batch.action), reset=batch.first, every=piece)
        d = F.pad(d[:, :-1], (0, 0, 1, 0)).masked_fill(batch.first[..., None], 0.0)  # d_{t-1}

        def before_each(after_each):  # piece: (B, pieces, ...) -> (count, ...)
            before = torch.empty_like(after_each)  # with the layout of states
            before[:, 0].zero_()
            before[:, 1:] = after_each[:, :-1]
            return before.flatten(0, 1)

        start = Start(
            z=z[:, ::piece].flatten(0, 1),
            d=d[:, ::piece].flatten(0, 1),
            state=tuple(State(*map(before_each, layer)) for layer in states),
            first=batch.first[:, ::piece].flatten(),
        )
        cut = batch.first[:, 1:] & (batch.terminal[:, :-1] == 0)
        steps = (z, d, batch.reward[:, :-1], batch.terminal[:, :-1] + cut, cut)
        return start, Lived(*(part.transpose(0, 1) for part in steps))

    @torch.no_grad()
    def starts_from_contexts(self, batch) -> Start:
        """One start a window: its last frame, seen after a scan of the steps before it.

        Paper, algorithm 1, with the posterior of the last frame in place of a prior sample.
        """
        z = self.encode(batch.frame)  # (N, L, K)
        d, state = self.sequence(self.token(z, batch.action)[:, :-1], reset=batch.first[:, :-1])
        return Start(z[:, -1], d[:, -1], state, batch.first[:, -1])

    @torch.no_grad()
    def imagine(self, start: Start, horizon: int, policy) -> Dream:
        """Dream `horizon` steps on; `policy(t, z, d)` takes (N, K), (N, D) and gives actions (N,).

        Reward and end are read from d_t, which holds a_t, not from the feature before it (D2).
        """
        z, state, reset = start.z, start.state, start.first
        d = torch.where(reset[:, None], 0.0, start.d)
        zs, ds, actions = [z], [d], []
        for t in range(horizon):
            actions.append(policy(t, z, d))
            d, state = self.sequence.step(self.token(z, actions[-1]), state, reset)
            z, reset = sample(self.prior(d)), None
            zs.append(z)
            ds.append(d)
        d = torch.stack(ds)  # (T + 1, N, D)
        reward = self.two_hot.mean(self.reward_head(d[1:]))
        end = self.end_head(d[1:]).float().squeeze(-1).sigmoid()
        return Dream(torch.stack(zs), d, torch.stack(actions), reward, end)


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

    The first one seen starts the average, and both figures are saved with the weights (D15).
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
        decay = self.decay * self.seen  # 0 at the first
        self.value.copy_(decay * self.value + (1 - decay) * (high - low))
        self.seen.fill_(1.0)
        return self.value


class ActorCritic(nn.Module):
    """Actor pi(a | s) and critic v(s) on s_t = [z_t, d_{t-1}], trained in dreams.

    What is beyond a dream's last step the critic learns from itself, and a young one may talk
    itself into values that no one ever earned. `replay_critic` weighs a second loss that holds it
    to the rewards of the real steps the dreams started from (DreamerV3 of 2024).
    """

    def __init__(self, actions: int, *, groups: int, classes: int, d_model: int,
                 actor_hidden: int, critic_hidden: int, layers: int, gamma: float,
                 lambda_: float, entropy: float, floor: float, slow_decay: float,
                 range_decay: float, replay_critic: float):
        super().__init__()
        self.classes, self.replay_critic = classes, replay_critic
        self.gamma, self.lambda_ = gamma, lambda_
        self.entropy, self.floor, self.slow_decay = entropy, floor, slow_decay
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

    def features(self, z: Tensor, d: Tensor) -> Tensor:
        """Indices z_t (..., K) and d_{t-1} (..., D) -> s_t (..., F)."""
        dtype = working_type(d.device)
        return torch.cat([one_hot(z, self.classes, dtype).flatten(-2), d.to(dtype)], -1)

    def policy(self, features: Tensor) -> Tensor:
        """s_t (..., F) -> pi (..., A): one and the same in play, dream, loss and evaluation."""
        return mixed_softmax(self.actor(features), self.floor)

    def value(self, z: Tensor, d: Tensor) -> Tensor:
        """z_t (N, K), d_{t-1} (N, D) -> v(s_t) (N,)."""
        return self.two_hot.mean(self.critic(self.features(z, d)))

    def act(self, z: Tensor, d: Tensor) -> Tensor:
        """z_t (N, K), d_{t-1} (N, D) -> sampled actions (N,); nothing is ever greedy."""
        return sample(self.policy(self.features(z, d)))

    def critic_loss(self, features: Tensor, reward: Tensor, end: Tensor, cut: Tensor | None = None):
        """s_0 .. s_T (T + 1, N, F) and what came of T steps (T, N) -> the critic's loss (T, N), its
        values (T + 1, N) and the returns (T, N).

        Returns end in the critic's own value after the last step and, if there are any, at the
        steps where the episode was cut off: these teach nothing.
        """
        logits = self.critic(features[:-1])  # (T, N, bins)

        def returns_from(value):
            known = reward if cut is None else torch.where(cut, value[:-1], reward)
            return lambda_return(known, end, value, self.gamma, self.lambda_)

        with torch.no_grad():
            value = self.two_hot.mean(torch.cat([logits, self.critic(features[-1:])]))
            returns = returns_from(value)
            slow_returns = returns_from(self.two_hot.mean(self.slow_critic(features)))
        loss = self.two_hot.loss(logits, returns) + self.two_hot.loss(logits, slow_returns)
        return loss if cut is None else loss * ~cut, value, returns

    def loss(self, dream: Dream, lived: Lived | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Dreams of T steps, and real ones if the critic learns from them -> loss and metrics.

        Every step counts by the chance that the dream has got that far: the ends it foresaw are
        neither ignored nor rounded (P7).
        """
        features = self.features(dream.z, dream.d)  # (T + 1, N, F)
        alive = torch.cumprod(1 - dream.end, 0)  # (T, N): after step t
        weight = torch.cat([torch.ones_like(alive[:1]), alive[:-1]])  # (T, N): up to step t

        critic_loss, value, returns = self.critic_loss(features, dream.reward, dream.end)
        scale = self.return_range.update(returns).clamp(min=1.0)
        advantage = (returns - value[:-1]) / scale

        # Without a floor a probability may round to 0, whose logarithm would break the entropy.
        log_pi = self.policy(features[:-1]).clamp(min=1e-30).log()  # (T, N, A)
        log_taken = log_pi.gather(-1, dream.action.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_pi.exp() * log_pi).sum(-1)
        actor_loss = -advantage * log_taken - self.entropy * entropy

        total = (weight * (actor_loss + critic_loss)).mean()
        metrics = dict(
            actor_loss=(weight * actor_loss).mean(),
            critic_loss=(weight * critic_loss).mean(),
            entropy=entropy.mean(),
            return_range=self.return_range.value.clone(),
            dream_return=returns[0].mean(),
            dream_value=value[0].mean(),
            dream_reward=dream.reward.mean(),
            dream_end=dream.end.mean(),
            advantage=advantage.abs().mean(),
        )
        if lived is not None:
            real_loss, real_value, real_returns = self.critic_loss(
                self.features(lived.z, lived.d), lived.reward, lived.end, lived.cut)
            total = total + self.replay_critic * real_loss.mean()
            metrics |= dict(replay_critic_loss=real_loss.mean(), replay_value=real_value.mean(),
                            replay_return=real_returns.mean())
        return total, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def update_slow_critic(self):
        """slow <- decay slow + (1 - decay) critic, once an update."""
        slow, fast = list(self.slow_critic.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(slow, fast, 1 - self.slow_decay)


class Player:
    """Plays `games` side by side with the state carried from step to step: O(1) a step.

    Left alone, a state would grow older than any that was trained, and it remembers old weights.
    So at the age of `oldest` steps it is rebuilt, with the present weights, by one scan over the
    newer half of them, and ages run from oldest / 2 to oldest (T4). Play changes nothing else (D6).

    `act_on="prior"` shows the actor a guess at the frame in place of the frame, as the published
    code does; it exists to be compared with.
    """

    def __init__(self, model: WorldModel, agent: ActorCritic, games: int, oldest: int,
                 act_on: str = "posterior"):
        if act_on not in ("posterior", "prior"):
            raise ValueError(f"act_on is posterior or prior, not {act_on!r}")
        self.model, self.agent, self.act_on = model, agent, act_on
        self.half = max(1, oldest // 2)
        self.state = model.sequence.initial_state(games)
        self.d = next(model.parameters()).new_zeros(games, model.sequence.d_model)  # d_{t-1}
        self.history = deque(maxlen=self.half)  # (z, action, first) of the last steps
        self.age = 0  # steps that the state has seen

    @torch.no_grad()
    def act(self, frame: Tensor, first: Tensor) -> Tensor:
        """Frames (games, size, size, 3) uint8, first (games,) bool -> actions (games,)."""
        step = self.decide(frame, first, self.d, self.state)
        (z, action), (self.d, self.state) = step[:2], step[2:]
        # Copies: a CUDA graph overwrites its outputs, and a caller may reuse its flags.
        self.history.append((z.clone(), action.clone(), first.clone()))
        self.age += 1
        if self.age == 2 * self.half:
            z, past, first = (torch.stack(column, 1) for column in zip(*self.history))
            d, self.state = self.model.sequence(self.model.token(z, past), reset=first)
            self.d, self.age = d[:, -1], self.half
        return action

    def decide(self, frame: Tensor, first: Tensor, d: Tensor, state: tuple[State, ...]):
        """d_{t-1} and the state that step t-1 left -> z_t, a_t, d_t, state."""
        z = seen = self.model.encode(frame)  # (games, K)
        d = torch.where(first[:, None], 0.0, d)
        if self.act_on == "prior":
            seen = torch.where(first[:, None], z, sample(self.model.prior(d)))
        action = self.agent.act(seen, d)
        return z, action, *self.model.sequence.step(self.model.token(z, action), state, first)

    def state_dict(self) -> dict:
        """All that the next action depends on beside the weights."""
        history = [torch.stack(column) for column in zip(*self.history)]
        return dict(state=[tuple(layer) for layer in self.state], d=self.d,
                    history=history, age=self.age)

    def load_state_dict(self, saved: dict):
        device = self.d.device
        self.state = tuple(State(*(part.to(device) for part in layer)) for layer in saved["state"])
        self.d, self.age = saved["d"].to(device), saved["age"]
        self.history.clear()
        self.history.extend(zip(*(column.to(device) for column in saved["history"])))


# ---------------------------------------------------------------- optimisers


class LaProp(torch.optim.Optimizer):
    """Adam with the gradient scaled before it is averaged, not after (Ziyin et al., 2020).

    v <- b2 v + (1 - b2) g^2
    m <- b1 m + (1 - b1) rate g / (sqrt(v / (1 - b2^k)) + eps)
    theta <- theta - m / (1 - b1^k)             at the k-th update; no weight decay (D4)
    """

    def __init__(self, params, lr: float, betas=(0.9, 0.999), eps=1e-20):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps))

    def __setstate__(self, state):
        super().__setstate__(state)
        for p, saved in self.state.items():  # torch does not move k; in older files it is no tensor
            saved["step"] = torch.as_tensor(saved["step"], dtype=p.dtype, device=p.device)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(m=torch.zeros_like(p), v=torch.zeros_like(p),
                                         step=p.new_zeros(()))
            gradient, (b1, b2) = [p.grad for p in params], group["betas"]
            m, v, steps = ([self.state[p][name] for p in params] for name in ("m", "v", "step"))
            torch._foreach_add_(steps, 1)
            k = steps[0]  # one for all, who learn in every update; on the device, for CUDA graphs
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, gradient, gradient, value=1 - b2)
            scale = torch._foreach_div(v, -torch.expm1(k * math.log(b2)))  # 1 - b2^k
            torch._foreach_sqrt_(scale)
            torch._foreach_add_(scale, group["eps"])
            torch._foreach_mul_(m, b1)
            torch._foreach_addcdiv_(m, gradient, scale, value=(1 - b1) * group["lr"])
            torch._foreach_add_(params, torch._foreach_div(m, torch.expm1(k * math.log(b1))))


def make_optimizer(kind: str, groups: list[dict], eps: float) -> torch.optim.Optimizer:
    """`groups` hold params and rate. On a CPU fused Adam makes one pass over the parameters."""
    if kind == "laprop":
        return LaProp(groups, lr=0.0, eps=eps)
    on_cuda = groups[0]["params"][0].device.type == "cuda"
    return torch.optim.Adam(groups, lr=0.0, eps=eps, fused=True, capturable=on_cuda)
