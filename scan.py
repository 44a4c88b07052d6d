"""Selective state spaces in plain PyTorch: two scans, two layers, one sequence model.

A state space layer carries a state h along a sequence. Each step fades it, writes to it, reads it:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

"Selective" means that dt, B and C are computed from the sequence itself, so that the layer chooses
at each step what to keep. In Mamba (S6) every channel has N decay rates of its own; in Mamba-2
(SSD) the P channels of a head share one. Each scan is written twice: as a loop over the steps,
which is the definition, and in parallel over blocks of steps, which is what one trains with.

    x dt A B C D   the letters of the papers; in shapes B is the batch
    L length   W width = expand * d_model   H heads   P head width, W = H P   N state size
    K blocks   Q steps of a block   R rows = B K, all blocks of all sequences side by side
    reset      (B, L) bool: where it is True, nothing earlier is visible, then or later
    g...       the gradient of ..., in the backward passes

`python scan.py` checks the parallel scans against the loops on this machine and measures them.
Read alongside: Gu and Dao, "Mamba" (arXiv 2312.00752), section 3; Dao and Gu, "Transformers are
SSMs" (arXiv 2405.21060), section 6. Parameters are named as in their reference implementation.
"""
import functools
import itertools
import math
import os
import statistics
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.profiler import ProfilerActivity, profile

HUGE = 1e30  # a step so long that any decay over it, by a rate above 1e-27, is exactly 0; finite


def without_autocast(function):
    """A scan computes in the precision of its inputs, also inside an autocast region."""
    @functools.wraps(function)
    def wrapped(*arguments):
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)
    return wrapped


def at_least_float32(*tensors):
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    return [tensor.to(dtype) for tensor in tensors]


def every_step(step, x, dt, A, B, C, D, state, reset):
    """The definition of either scan: its step, again and again."""
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    h = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state.to(x.dtype)
    resets = itertools.repeat(None) if reset is None else reset.unbind(1)
    y = []
    for x_t, dt_t, B_t, C_t, reset_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1),
                                            resets):
        y_t, h = step(x_t, dt_t, A, B_t, C_t, D, h, reset_t)
        y.append(y_t)
    return torch.stack(y, 1), h


def in_blocks(tensor, K, Q):
    """(B, L, ...) -> (B K, Q, ...), zeros at the end: a step of size 0 changes nothing."""
    missing = K * Q - tensor.shape[1]
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.reshape(-1, Q, *tensor.shape[2:])


# ---- Mamba's scan (S6) ---------------------------------------------------------------------------


@without_autocast
def s6_step(x, dt, A, B, C, D, h, reset=None):
    """x, dt (B, W); A (W, N); B, C (B, N); D (W); h (B, W, N); reset (B) -> y (B, W), h"""
    if reset is not None:
        h = torch.where(reset[:, None, None], 0, h)
    h = torch.exp(dt[..., None] * A) * h  # (B, W, N)
    h = torch.addcmul(h, (dt * x)[..., None], B[:, None])  # h + dt x B^T
    return torch.addcmul((h * C[:, None]).sum(-1), D, x), h


def s6_sequential(x, dt, A, B, C, D, state=None, reset=None):
    """x, dt (B, L, W); A (W, N); B, C (B, L, N); D (W); state (B, W, N) -> y (B, L, W), state"""
    return every_step(s6_step, x, dt, A, B, C, D, state, reset)


def s6(x, dt, A, B, C, D, state=None, reset=None, every=None):
    """The same in parallel: a loop over the steps of one block takes all blocks along at once.

    `every` asks for the state after each piece of so many steps, (B, L / every, W, N).

    1. Every block from a zero state, for its last state alone.   (left out if there is one block)
    2. A loop over the blocks chains these to the state in which each block really starts.
    3. Every block again, now from there, with its outputs; every eighth state is kept.
    The backward pass does the same from the end. It computes eight states at a time once more,
    from the kept one before them, so that no tensor of shape (B, L, W, N) ever exists.
    """
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    state = x.new_zeros(len(x), *A.shape) if state is None else state.to(x.dtype)
    y, states = S6.apply(x, dt, A, B, C, D, state, reset, every)
    return y, states if every else states[:, -1]


def s6_plan(batch, length, width, N, device, every=None):
    """How the work is cut up: (K blocks, Q steps of each, steps from one kept state to the next,
    tiles of rows and channels). This and ssd_plan alone know what a device likes."""
    cpu = device.type == "cpu"
    # Launches cost on a GPU: the loops over Q steps and over K blocks are kept about equally long.
    longest = every or (128 if cpu else min(128, max(16, 2 ** round(math.log2(length) / 2))))
    K = -(-length // longest)
    # On a CPU the arrays of one step should stay in the caches of its cores: 2^18 numbers are 1 MB.
    # A GPU wants large kernels, but buffers that fit.
    wide = min(width, 1024) if cpu else width
    high = max(1, 2 ** (18 if cpu else 22) // (wide * N))
    tiles = [(slice(row, min(row + high, batch * K)), slice(channel, min(channel + wide, width)))
             for row in range(0, batch * K, high) for channel in range(0, width, wide)]
    return K, -(-length // K), 8, tiles


def steps_of(tensor, rows, channels=None):
    """The steps of a tile, each a view that broadcasts to (rows, N, channels)."""
    if channels is None:  # B or C
        return tensor[rows, ..., None].unbind(1)
    return tensor[rows, :, None, channels].unbind(1)


def contract(left, right):
    """Matrix products for (q, rows) at once: (rows, q, i, j) with (q, rows, j, k)."""
    return (left.transpose(0, 1) @ right).transpose(0, 1)


class S6(torch.autograd.Function):
    """Inside, the state is (R, N, W): the channels, of which there are most, are contiguous."""

    @staticmethod
    def blocks(ctx, x, dt, A, B, C, reset):
        """The inputs in the form in which both directions want them."""
        K, Q, _, _ = ctx.plan
        # A reset is a step of endless decay. It is endless in the exponent only: what is written
        # at that step, and all gradients, use the true dt.
        fade = dt if reset is None else dt.masked_fill(reset[..., None], HUGE)
        return (in_blocks(dt, K, Q), in_blocks(fade, K, Q), in_blocks(dt * x, K, Q),
                A.t().contiguous(), in_blocks(B, K, Q), in_blocks(C, K, Q))

    @staticmethod
    @without_autocast
    def forward(ctx, x, dt, A, B, C, D, state, reset, every):
        (batch, length, W), N = x.shape, A.shape[1]
        ctx.plan = K, Q, keep, tiles = s6_plan(batch, length, W, N, x.device, every)
        ctx.every = every
        _, fade, write, A_t, B_k, C_k = S6.blocks(ctx, x, dt, A, B, C, reset)
        kept = x.new_empty(-(-Q // keep), batch * K, N, W)
        starts = kept[0].view(batch, K, N, W)
        starts[:, 0] = state.transpose(1, 2)
        ends = x.new_empty(batch * K, N, W)
        if K > 1:
            for rows, channels in tiles:  # 1. the last state of every block, from zero
                h = torch.zeros_like(ends[rows, :, channels])
                decay, A_tile = torch.empty_like(h), A_t[:, channels]
                for fade_t, write_t, B_t in zip(steps_of(fade, rows, channels),
                                                steps_of(write, rows, channels),
                                                steps_of(B_k, rows)):
                    torch.mul(fade_t, A_tile, out=decay).exp_()
                    h.mul_(decay).addcmul_(write_t, B_t)
                ends[rows, :, channels] = h
            through = (fade.sum(1)[:, None] * A_t).exp_().view_as(starts)
            ends_k = ends.view_as(starts)
            for k in range(K - 1):  # 2. the first state of every block
                torch.addcmul(ends_k[:, k], through[:, k], starts[:, k], out=starts[:, k + 1])
        y = x.new_empty(batch * K, Q, W)
        for rows, channels in tiles:  # 3. all states, a few at a time, and the outputs
            h, decay = S6.buffers(ends[rows, :, channels], keep + 1, 1)
            A_tile, B_tile = A_t[:, channels], steps_of(B_k, rows)
            fade_tile, write_tile = steps_of(fade, rows, channels), steps_of(write, rows, channels)
            for first in range(0, Q, keep):
                q = min(keep, Q - first)
                if first:
                    kept[first // keep, rows, :, channels] = h[keep]
                h[0].copy_(kept[first // keep, rows, :, channels])
                for t, before, after in zip(range(first, Q), h.unbind(), h[1:].unbind()):
                    torch.mul(fade_tile[t], A_tile, out=decay[0]).exp_()
                    torch.mul(before, decay[0], out=after).addcmul_(write_tile[t], B_tile[t])
                part = rows, slice(first, first + q)
                y[(*part, channels)] = contract(C_k[part][:, :, None], h[1:q + 1])[:, :, 0]
            ends[rows, :, channels] = h[q]
        ctx.save_for_backward(x, dt, A, B, C, D, reset, kept)
        y = y.view(batch, K * Q, W)[:, :length].addcmul(x, D)
        states = ends.view(batch, K, N, W) if every else ends.view(batch, K, N, W)[:, -1:]
        return y, states.transpose(2, 3).contiguous()

    @staticmethod
    def buffers(like, *counts):
        return [like.new_empty(count, *like.shape) for count in counts]

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, gy, gstates):
        x, dt, A, B, C, D, reset, kept = ctx.saved_tensors
        (batch, length, W), N = x.shape, A.shape[1]
        K, Q, keep, tiles = ctx.plan
        dt_k, fade, write, A_t, B_k, C_k = S6.blocks(ctx, x, dt, A, B, C, reset)
        gy_k = in_blocks(gy, K, Q)
        gends = x.new_empty(batch * K, N, W)  # of the last state of a block; later of the first
        gends_k = gends.view(batch, K, N, W)
        gends_k[:, -1] = gstates[:, -1].transpose(1, 2)
        if K > 1:
            gstarts = torch.empty_like(gends)
            for rows, channels in tiles:  # 1. what each block alone passes back to its first state
                g = torch.zeros_like(gends[rows, :, channels])
                decay, A_tile = torch.empty_like(g), A_t[:, channels]
                for fade_t, gy_t, C_t in zip(steps_of(fade, rows, channels)[::-1],
                                             steps_of(gy_k, rows, channels)[::-1],
                                             steps_of(C_k, rows)[::-1]):
                    torch.mul(fade_t, A_tile, out=decay).exp_()
                    g.addcmul_(gy_t, C_t).mul_(decay)
                gstarts[rows, :, channels] = g
            through = (fade.sum(1)[:, None] * A_t).exp_().view_as(gends_k)
            gstarts = gstarts.view_as(gends_k)
            for k in range(K - 1, 0, -1):  # 2. the gradient of the last state of every block
                torch.addcmul(gstarts[:, k], through[:, k], gends_k[:, k], out=gends_k[:, k - 1])
                if ctx.every:
                    gends_k[:, k - 1] += gstates[:, k - 1].transpose(1, 2)
        gwrite, gdt = torch.empty_like(write), torch.empty_like(write)
        gA, gB, gC = torch.zeros_like(A_t), torch.zeros_like(B_k), torch.zeros_like(C_k)
        for rows, channels in tiles:  # 3. a few states at a time, forwards, then their gradients
            g = gends[rows, :, channels].contiguous()
            h, decay, gh = S6.buffers(g, keep + 1, keep, keep)
            A_tile, gA_tile = A_t[:, channels], torch.zeros_like(g)
            B_tile, C_tile = steps_of(B_k, rows), steps_of(C_k, rows)
            dt_tile, fade_tile, write_tile, gy_tile, gdt_tile = (
                steps_of(tensor, rows, channels) for tensor in (dt_k, fade, write, gy_k, gdt))
            for first in range((Q - 1) // keep * keep, -1, -keep):
                q = min(keep, Q - first)
                h[0].copy_(kept[first // keep, rows, :, channels])
                for i in range(q):
                    t = first + i
                    torch.mul(fade_tile[t], A_tile, out=decay[i]).exp_()
                    torch.mul(h[i], decay[i], out=h[i + 1]).addcmul_(write_tile[t], B_tile[t])
                for i in reversed(range(q)):
                    t = first + i
                    torch.addcmul(g, gy_tile[t], C_tile[t], out=gh[i])
                    torch.mul(gh[i], decay[i], out=g)
                    gfade = torch.mul(g, h[i], out=decay[i])  # of the exponent dt A
                    gA_tile.addcmul_(gfade, dt_tile[t])
                    torch.sum(gfade.mul_(A_tile), 1, keepdim=True, out=gdt_tile[t])
                part = rows, slice(first, first + q)
                w_part, gy_part = write[(*part, channels)], gy_k[(*part, channels)]
                gwrite[(*part, channels)] = contract(B_k[part][:, :, None], gh[:q])[:, :, 0]
                gB[part] += contract(w_part[:, :, None], gh[:q].mT)[:, :, 0]
                gC[part] += contract(gy_part[:, :, None], h[1:q + 1].mT)[:, :, 0]
            gA[:, channels] += gA_tile.sum(0)
            gends[rows, :, channels] = g
        gwrite, gdt, gB, gC = (g.view(batch, K * Q, -1)[:, :length] for g in (gwrite, gdt, gB, gC))
        gx = torch.addcmul(gy * D, gwrite, dt)
        gdt = torch.addcmul(gdt, gwrite, x)
        gD = (gy * x).sum((0, 1))
        return gx, gdt, gA.t(), gB, gC, gD, gends_k[:, 0].transpose(1, 2), None, None


# ---- Mamba-2's scan (SSD) ------------------------------------------------------------------------


@without_autocast
def ssd_step(x, dt, A, B, C, D, h, reset=None):
    """x (B, H, P); dt (B, H); A, D (H); B, C (B, N); h (B, H, P, N); reset (B) -> y (B, H, P), h"""
    if reset is not None:
        h = torch.where(reset[:, None, None, None], 0, h)
    h = torch.exp(dt * A)[..., None, None] * h  # (B, H, P, N)
    h.addcmul_((dt[..., None] * x)[..., None], B[:, None, None])  # h + dt x B^T
    read = (C[:, None, None] @ h.mT)[:, :, 0]  # (B, H, P)
    return torch.addcmul(read, D[:, None], x), h


def ssd_sequential(x, dt, A, B, C, D, state=None, reset=None):
    """x (B, L, H, P); dt (B, L, H); A, D (H); B, C (B, L, N); state (B, H, P, N) -> y, state"""
    return every_step(ssd_step, x, dt, A, B, C, D, state, reset)


def ssd(x, dt, A, B, C, D, state=None, reset=None, every=None):
    """The same in parallel. One decay for a whole head makes a block of Q steps a matrix product.

    y_j = sum_i (C_j . B_i) exp(s_j - s_i) dt_i x_i, i <= j, with s the running sum of dt A: a
    (Q, Q) matrix times the inputs. The state in which the block starts acts like N more inputs, of
    weights C_j exp(s_j), so that one product of a (Q, Q + N) matrix gives the outputs. Between
    blocks only the states pass. The backward pass is the same with every matrix transposed; what
    is kept for it are inputs and first states, not the matrices. `every` as in s6.
    """
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    state = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state.to(x.dtype)
    y, states = SSD.apply(x, dt, A, B, C, D, state, reset, every)
    return y, states if every else states[:, -1]


def ssd_plan(length, device, every=None):
    """(K blocks, Q steps of each): the matrices cost Q, the states 1 / Q, the loop K."""
    longest = every or (32 if device.type == "cpu" else 64)
    K = -(-length // longest)
    return K, -(-length // K)


def ssd_decays(dt, A, segment):
    """What is left, after the decay, from one point of a block to another; dt (K, B, H, Q)."""
    s = (dt * A[:, None]).cumsum(-1)  # (K, B, H, Q)
    visible = s.new_ones(s.shape[-1], s.shape[-1]).triu()  # 1 from i to j >= i, else 0
    enter, leave, through = s.exp(), (s[..., -1:] - s).exp_(), s[..., -1:].exp()
    if segment is not None:  # only what lies between the same two resets sees each other
        visible = visible * (segment[..., None] == segment[..., None, :])  # (K, B, 1, Q, Q)
        enter = enter * (segment == 0)  # (K, B, H, Q), from the block's start to j
        leave = leave * (segment == segment[..., -1:])  # (K, B, H, Q), from i to the block's end
        through = through * (segment[..., -1:] == 0)  # (K, B, H, 1), from start to end
    # Below the diagonal the difference is positive and might overflow, hence the clamp; a mask of
    # -inf would do without it, but exp is ten times slower on infinities.
    between = (s[..., None, :] - s[..., None]).clamp_(max=0).exp_().mul_(visible)
    return between, enter, leave, through[..., None]  # between (K, B, H, Q from i, Q to j)


class SSD(torch.autograd.Function):
    """Inside, tensors are (K, B, H, Q, ...): every product is one batch over blocks and heads."""

    @staticmethod
    def split(tensor, K, Q):
        """(B, L, ...) -> (K, B, Q, ...)"""
        return in_blocks(tensor, K, Q).unflatten(0, (-1, K)).transpose(0, 1)

    @staticmethod
    def join(tensor, length):
        """(K, B, Q, ...) -> (B, L, ...)"""
        return tensor.transpose(0, 1).flatten(1, 2)[:, :length]

    @staticmethod
    @without_autocast
    def forward(ctx, x, dt, A, B, C, D, state, reset, every):
        (batch, length, H, P), N = x.shape, B.shape[-1]
        K, Q = ssd_plan(length, x.device, every)
        dt = SSD.split(dt, K, Q).transpose(2, 3).contiguous()  # (K, B, H, Q)
        B, C = SSD.split(B, K, Q).contiguous(), SSD.split(C, K, Q).contiguous()  # (K, B, Q, N)
        segment = None
        if reset is not None:  # numbered by a sum of its own: nothing large joins the one of dt A
            segment = SSD.split(reset.int()[..., None], K, Q).transpose(2, 3).cumsum(-1)
        between, enter, leave, through = ssd_decays(dt, A, segment)
        # 1. The inputs of each block and, below them, the state in which it starts: (Q + N, P).
        inputs = x.new_empty(K + 1, batch, H, Q + N, P)
        inputs[:K, ..., :Q, :] = SSD.split(x, K, Q).transpose(2, 3)
        inputs[0, ..., Q:, :] = state.transpose(2, 3)
        # 2. What each block alone adds to the state, and the chain of states.
        write = B[:, :, None] * (leave * dt)[..., None]  # (K, B, H, Q, N)
        added = write.transpose(3, 4) @ inputs[:K, ..., :Q, :]  # (K, B, H, N, P)
        firsts = inputs[..., Q:, :].unbind()
        for plus, decay, first, after in zip(added.unbind(), through.unbind(), firsts, firsts[1:]):
            torch.addcmul(plus, decay, first, out=after)
        # 3. The outputs. D joins the diagonal, where a step meets itself.
        weights = x.new_empty(K, batch, H, Q + N, Q)
        scores = (B @ C.transpose(2, 3))[:, :, None]  # (K, B, 1, Q, Q)
        inside = torch.mul(between.mul_(dt[..., None]), scores, out=weights[..., :Q, :])
        inside.diagonal(dim1=-2, dim2=-1).add_(D[:, None])
        torch.mul(C.transpose(2, 3)[:, :, None], enter[..., None, :], out=weights[..., Q:, :])
        y = weights.transpose(3, 4) @ inputs[:K]  # (K, B, H, Q, P)
        ctx.save_for_backward(dt, A, B, C, D, segment, inputs)
        ctx.length, ctx.every = length, every
        states = inputs[1:, ..., Q:, :] if every else inputs[K:, ..., Q:, :]  # (K or 1, B, H, N, P)
        return (SSD.join(y.transpose(2, 3), length).contiguous(),
                states.transpose(0, 1).contiguous().mT)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, gy, gstates):
        dt, A, B, C, D, segment, inputs = ctx.saved_tensors
        (K, batch, H, Q), N, P = dt.shape, B.shape[-1], inputs.shape[-1]
        inputs = inputs[:K]
        between, enter, leave, through = ssd_decays(dt, A, segment)
        # 1. The gradients of a block's outputs and, below them, of the state that it hands on.
        gouts = gy.new_empty(K, batch, H, Q + N, P)
        gouts[..., :Q, :] = SSD.split(gy, K, Q).transpose(2, 3)
        gouts[-1, ..., Q:, :] = gstates[:, -1].transpose(2, 3)
        # 2. The chain of states, backwards.
        read = C[:, :, None] * enter[..., None]  # (K, B, H, Q, N)
        gadded = read.transpose(3, 4) @ gouts[..., :Q, :]  # (K, B, H, N, P)
        gadded_k, through_k, glasts = gadded.unbind(), through.unbind(), gouts[..., Q:, :].unbind()
        for k in range(K - 1, 0, -1):
            torch.addcmul(gadded_k[k], through_k[k], glasts[k], out=glasts[k - 1])
            if ctx.every:
                glasts[k - 1].add_(gstates[:, k - 1].transpose(2, 3))
        gfirst = torch.addcmul(gadded[0], through[0], gouts[0, ..., Q:, :])
        # 3. The gradients of the inputs.
        scores = (B @ C.transpose(2, 3))[:, :, None]  # (K, B, 1, Q, Q)
        weights = gy.new_empty(K, batch, H, Q, Q + N)
        inside = torch.mul(between, scores, out=weights[..., :Q])
        inside.mul_(dt[..., None]).diagonal(dim1=-2, dim2=-1).add_(D[:, None])
        torch.mul(B[:, :, None], (leave * dt)[..., None], out=weights[..., Q:])
        gx = SSD.join((weights @ gouts).transpose(2, 3), ctx.length)  # (B, L, H, P)
        # 4. The gradients of the weights.
        gweights = inputs @ gouts[..., :Q, :].transpose(3, 4)  # (K, B, H, Q + N, Q)
        gread = gweights[..., Q:, :]  # (K, B, H, N, Q)
        gwrite = inputs[..., :Q, :] @ gouts[..., Q:, :].transpose(3, 4)  # (K, B, H, Q, N)
        gthrough = (gouts[..., Q:, :] * inputs[..., Q:, :]).sum((3, 4)) * through[..., 0, 0]
        gD = gweights[..., :Q, :].diagonal(dim1=-2, dim2=-1).sum((0, 1, 3))
        ginside = between.mul_(gweights[..., :Q, :])  # (K, B, H, Q, Q)
        gscores = (ginside * dt[..., None]).sum(2)  # (K, B, Q, Q)
        ginside.mul_(scores)
        gfrom = ginside.sum(-1)  # (K, B, H, Q)
        gto = (dt[..., None, :] @ ginside)[..., 0, :]  # (K, B, H, Q)
        genter = (gread * C.transpose(2, 3)[:, :, None]).sum(3) * enter
        gleave = (gwrite * B[:, :, None]).sum(4) * leave
        # 5. Every decay is a difference of two s, and s is a running sum of dt A.
        gfrom += gleave
        gs = gto + genter - gfrom * dt
        gs[..., -1] += (gleave * dt).sum(-1) + gthrough
        grate = gs.flip(-1).cumsum(-1).flip(-1)  # (K, B, H, Q), of dt A
        gdt = torch.addcmul(gfrom, grate, A[:, None])
        gA = (grate * dt).sum((0, 1, 3))
        gB = gscores @ C + (gwrite * (leave * dt)[..., None]).sum(2)
        gC = gscores.transpose(2, 3) @ B + (gread * enter[..., None, :]).sum(2).transpose(2, 3)
        gdt, gB, gC = (SSD.join(g, ctx.length) for g in (gdt.transpose(2, 3), gB, gC))
        return gx, gdt, gA, gB, gC, gD, gfirst.transpose(2, 3), None, None


# ---- The layers ----------------------------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """With the reference's epsilon, in the precision of its gains: mixed types have no kernel."""

    def __init__(self, width):
        super().__init__(width, eps=1e-5)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class State(NamedTuple):
    """What a layer carries from step to step. It is returned, never changed in place."""
    conv: Tensor  # (B, channels, d_conv - 1), the last inputs of the convolution
    scan: Tensor  # Mamba (B, W, N), Mamba2 (B, H, P, N)


def taps(conv1d):
    """d_conv weights (channels), each of them contiguous."""
    return conv1d.weight[:, 0].t().contiguous().unbind()


def causal_conv(x, conv1d, past, reset=None, every=None):
    """Depthwise convolution and SiLU. x (B, L, channels), past (B, channels, d_conv - 1).

    Written as d_conv shifted products: a tap that reaches behind a reset is then easily left out.
    """
    length, reach = x.shape[1], past.shape[2]
    piece = every or length
    seen = torch.cat([past.transpose(1, 2), x], 1)  # (B, d_conv - 1 + L, channels)
    now = seen[:, reach:]
    last = seen[:, piece:].unfold(1, reach, piece)  # (B, L / piece, channels, d_conv - 1)
    if reset is not None:  # two steps see each other if as many resets have come before
        segment = F.pad(reset.int(), (reach, 0)).cumsum(1)[..., None]  # (B, d_conv - 1 + L, 1)
        segments = segment[:, piece:].unfold(1, reach, piece)  # of `last`
        last = torch.where(segments == segments[..., -1:], last, 0)
    weights = taps(conv1d)
    y = torch.addcmul(conv1d.bias, now, weights[reach])
    for tap in range(reach):
        earlier = seen[:, tap:tap + length]
        if reset is not None:
            earlier = torch.where(segment[:, tap:tap + length] == segment[:, reach:], earlier, 0)
        y = torch.addcmul(y, earlier, weights[tap])  # (B, L, channels)
    return F.silu(y), last if every else last[:, 0]


def causal_conv_step(x_t, conv1d, past, reset=None):
    """One step of it. x_t (B, channels), past (B, channels, d_conv - 1)."""
    past = past.transpose(1, 2)  # as it lies in memory
    if reset is not None:
        past = torch.where(reset[:, None, None], 0, past)
    seen = torch.cat([past, x_t[:, None]], 1)  # (B, d_conv, channels)
    y = conv1d.bias
    for seen_tap, weight in zip(seen.unbind(1), taps(conv1d)):
        y = torch.addcmul(y, seen_tap, weight)  # (B, channels)
    return F.silu(y), seen[:, 1:].transpose(1, 2)


def initial_step_bias(count):
    """softplus of it is log-uniform in [1e-3, 1e-1]: memories from ten steps to a thousand."""
    dt = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


class Mamba(nn.Module):
    """Selective scan S6 between two gates. `layers` is how many are stacked.

    Source: Gu and Dao (2023), figure 3; parameters as in their reference implementation.
    """

    def __init__(self, d_model, layers=1, *, d_state=16, d_conv=4, expand=2):
        super().__init__()
        width, rank = expand * d_model, math.ceil(d_model / 16)
        self.sizes = [rank, d_state, d_state]  # dt B C
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)  # x z
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width)
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, width)
        nn.init.uniform_(self.dt_proj.weight, -rank ** -0.5, rank ** -0.5)
        self.dt_proj.bias = initial_step_bias(width)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(width, 1))  # (W, N)
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, d_model, bias=False)
        with torch.no_grad():  # the sum over the layers keeps its size
            self.out_proj.weight /= math.sqrt(layers)

    def initial_state(self, batch):
        channels, _, d_conv = self.conv1d.weight.shape
        zeros = functools.partial(torch.zeros, device=self.D.device)
        return State(zeros((batch, channels, d_conv - 1)), zeros((batch, *self.A_log.shape)))

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state"""
        before = self.initial_state(len(u)) if state is None else state
        x, z = self.in_proj(u).chunk(2, -1)  # (B, L, W)
        x, conv = causal_conv(x, self.conv1d, before.conv, reset, every)  # (B, L, W)
        y, scan = s6(*self.scan_inputs(x), before.scan, reset, every)  # (B, L, W)
        return self.out_proj(y * F.silu(z)), State(conv, scan)

    def step(self, u_t, state, reset=None):
        """u_t (B, d_model), reset (B) -> y_t (B, d_model), state"""
        x, z = self.in_proj(u_t).chunk(2, -1)  # (B, W)
        x, conv = causal_conv_step(x, self.conv1d, state.conv, reset)  # (B, W)
        y, scan = s6_step(*self.scan_inputs(x), state.scan, reset)  # (B, W)
        return self.out_proj(y * F.silu(z)), State(conv, scan)

    def scan_inputs(self, x):
        dt, B, C = self.x_proj(x).split(self.sizes, -1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)  # (B, L, W)
        return x, dt, -self.A_log.exp(), B, C, self.D


class Mamba2(nn.Module):
    """The same around SSD: all inputs of the scan come from one projection, and the gated output
    is normalised. Raises ValueError if head_dim does not divide the width.

    Source: Dao and Gu (2024), figure 6; parameters as in their reference implementation.
    """

    def __init__(self, d_model, layers=1, *, d_state=16, d_conv=4, expand=2, head_dim=64):
        super().__init__()
        width = expand * d_model
        heads, rest = divmod(width, head_dim)
        if rest:
            raise ValueError(f"head_dim {head_dim} does not divide the layer's width {width}"
                             f" (expand {expand} times d_model {d_model})")
        self.head_dim, self.sizes = head_dim, [width, d_state, d_state]  # x B C
        channels = sum(self.sizes)
        self.in_proj = nn.Linear(d_model, width + channels + heads, bias=False)  # z x B C dt
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        self.dt_bias = initial_step_bias(heads)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())  # (H)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(width)
        self.out_proj = nn.Linear(width, d_model, bias=False)
        with torch.no_grad():  # the sum over the layers keeps its size
            self.out_proj.weight /= math.sqrt(layers)

    def initial_state(self, batch):
        (channels, _, d_conv), heads, N = self.conv1d.weight.shape, len(self.D), self.sizes[1]
        zeros = functools.partial(torch.zeros, device=self.D.device)
        return State(zeros((batch, channels, d_conv - 1)),
                     zeros((batch, heads, N, self.head_dim)).mT)  # as ssd leaves it in memory

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state"""
        before = self.initial_state(len(u)) if state is None else state
        z, xBC, dt = self.projections(u)  # (B, L, W), (B, L, W + 2 N), (B, L, H)
        xBC, conv = causal_conv(xBC, self.conv1d, before.conv, reset, every)  # (B, L, W + 2 N)
        y, scan = ssd(*self.scan_inputs(xBC, dt), before.scan, reset, every)  # (B, L, H, P)
        return self.out_proj(self.norm(y.flatten(2) * F.silu(z))), State(conv, scan)

    def step(self, u_t, state, reset=None):
        """u_t (B, d_model), reset (B) -> y_t (B, d_model), state"""
        z, xBC, dt = self.projections(u_t)  # (B, W), (B, W + 2 N), (B, H)
        xBC, conv = causal_conv_step(xBC, self.conv1d, state.conv, reset)  # (B, W + 2 N)
        y, scan = ssd_step(*self.scan_inputs(xBC, dt), state.scan, reset)  # (B, H, P)
        return self.out_proj(self.norm(y.flatten(1) * F.silu(z))), State(conv, scan)

    def projections(self, u):
        width, heads = self.sizes[0], len(self.D)
        return self.in_proj(u).split([width, sum(self.sizes), heads], -1)

    def scan_inputs(self, xBC, dt):
        x, B, C = xBC.split(self.sizes, -1)
        x = x.unflatten(-1, (-1, self.head_dim))  # (B, L, H, P)
        return x, F.softplus(dt + self.dt_bias), -self.A_log.exp(), B, C, self.D


BACKBONES = {"mamba": Mamba, "mamba2": Mamba2}


# ---- The sequence model --------------------------------------------------------------------------


class ResidualLayer(nn.Module):
    """u + dropout(mixer(norm(u)))."""

    def __init__(self, d_model, mixer, dropout):
        super().__init__()
        self.norm = RMSNorm(d_model)
        self.mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(self, u, state=None, reset=None, every=None):
        y, state = self.mixer(self.norm(u), state, reset, every)
        return u + self.dropout(y), state

    def step(self, u_t, state, reset=None):
        y_t, state = self.mixer.step(self.norm(u_t), state, reset)
        return u_t + self.dropout(y_t), state


class SequenceModel(nn.Module):
    """What came so far, at every step: a stem, residual layers of one kind, a final norm.

    forward takes whole sequences, in pieces if the state is carried on; step one step at a time.
    """

    def __init__(self, d_input, d_model, *, layers=2, backbone="mamba2", d_state=16, head_dim=64,
                 dropout=0.1):
        super().__init__()
        self.d_model = d_model
        sizes = dict(d_state=d_state)
        if backbone == "mamba2":
            sizes["head_dim"] = head_dim
        self.stem = nn.Sequential(nn.Linear(d_input, d_model), RMSNorm(d_model),
                                  nn.SiLU(), nn.Dropout(dropout))
        self.layers = nn.ModuleList(
            ResidualLayer(d_model, BACKBONES[backbone](d_model, layers, **sizes), dropout)
            for _ in range(layers))
        self.norm = RMSNorm(d_model)

    def initial_state(self, batch):
        return tuple(layer.mixer.initial_state(batch) for layer in self.layers)

    def forward(self, inputs, state=None, reset=None, every=None):
        """inputs (B, L, d_input), reset (B, L) -> d (B, L, d_model), a state for each layer.

        The states are those after the last step; or, (B, L / every, ...), those after each piece
        of `every` steps, which must divide L.
        """
        assert not every or inputs.shape[1] % every == 0, (inputs.shape, every)
        before = self.initial_state(len(inputs)) if state is None else state
        u, after = self.stem(inputs), []  # (B, L, d_model)
        for layer, layer_state in zip(self.layers, before):
            u, layer_state = layer(u, layer_state, reset, every)  # (B, L, d_model)
            after.append(layer_state)
        return self.norm(u), tuple(after)

    def step(self, inputs_t, state, reset=None):
        """inputs_t (B, d_input), reset (B) -> d_t (B, d_model), a state for each layer"""
        u, after = self.stem(inputs_t), []  # (B, d_model)
        for layer, layer_state in zip(self.layers, state):
            u, layer_state = layer.step(u, layer_state, reset)  # (B, d_model)
            after.append(layer_state)
        return self.norm(u), tuple(after)


# ---- python scan.py: are the scans right, and what do they cost? ---------------------------------


SCANS = {"s6": (s6, s6_sequential), "ssd": (ssd, ssd_sequential)}  # parallel, by definition


def example(kind, batch, length, width, device, N=16, P=64):
    """Inputs as they are in a fresh layer: step sizes around 0.02, decay rates from 1 to 16."""
    channels, rates = ((width,), (width, N)) if kind == "s6" else ((width // P, P), (width // P,))
    randn = functools.partial(torch.randn, device=device)
    dt = F.softplus(randn(batch, length, channels[0]) - 4)
    A = -1 - 15 * torch.rand(rates, device=device)
    B, C, D = randn(batch, length, N), randn(batch, length, N), randn(channels[0])
    inputs = (randn(batch, length, *channels), dt, A, B, C, D)
    return [tensor.requires_grad_() for tensor in inputs], randn(batch, *channels, N)


def forward_backward(scan, inputs, *rest):
    y, state = scan(*inputs, *rest)
    return y, state, *torch.autograd.grad(y.sum() + state.sum(), inputs)


def largest_error(kind, device):
    """Of values and gradients against the loop's, relative to the largest number of each."""
    errors = []
    for length in (1, 63, 300):
        inputs, state = example(kind, 2, length, 128, device)
        reset = torch.rand(2, length, device=device) < 0.02
        fast, slow = (forward_backward(scan, inputs, state, reset) for scan in SCANS[kind])
        errors += [((f - s).abs().max() / s.abs().max()).item() for f, s in zip(fast, slow)]
    return max(errors)


def seconds(run, device, repeats=5):
    """The median, after one run to warm up."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        if device != "cpu":
            getattr(torch, device).synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_megabytes(run, device):
    """On top of what was allocated before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if device == "mps":  # counts no peaks, but its driver's pool only grows
        torch.mps.empty_cache()
        before = torch.mps.driver_allocated_memory()
        run()
        return (torch.mps.driver_allocated_memory() - before) / 2 ** 20
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler talks into the table
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in record.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes)) / 2 ** 20


def main(tokens=16384, width=512):
    torch.manual_seed(0)
    device = ("cuda" if torch.cuda.is_available() else
              "mps" if torch.backends.mps.is_available() else "cpu")
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for kind in ("s6", "ssd"):
        error = largest_error(kind, device)
        print(f"{kind:4} against its loop: largest relative error, gradients included, {error:.1e}")
        assert error < 1e-4, "the parallel scan is wrong on this device"
    counter = {"cuda": "the allocator's counter", "mps": "growth of the driver's pool",
               "cpu": "allocations seen by torch.profiler"}[device]
    print(f"\nForward and backward, float32, width {width}, state 16, {tokens:,} tokens in all; "
          f"median of 5.\nPeak memory: {counter}, on top of the inputs. Step loop: the definition,"
          f" one sequence.\n\nscan  batch x length     ms   tokens/s   peak MB   "
          "against step loop, both at batch 1")
    for kind in ("s6", "ssd"):
        for length in (64, 256, 1024, 4096, 16384):
            inputs, _ = example(kind, tokens // length, length, width, device)
            run = functools.partial(forward_backward, SCANS[kind][0], inputs)
            took, memory = seconds(run, device), peak_megabytes(run, device)
            times = ""
            if length <= 256:
                inputs, _ = example(kind, 1, length, width, device)
                fast, slow = (seconds(functools.partial(forward_backward, scan, inputs), device)
                              for scan in SCANS[kind])
                times = f"{slow / fast:6.1f} times as fast"
            print(f"{kind:4} {tokens // length:6} x {length:<6} {1e3 * took:7.1f} "
                  f"{tokens / took:10,.0f} {memory:9.0f}   {times}")


if __name__ == "__main__":
    main()
