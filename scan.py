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
This is the last of the four files to read. Alongside: Gu and Dao, "Mamba" (arXiv 2312.00752),
section 3; Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6. Parameters are named
as in their reference implementation.
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

HUGE = 1e30  # finite, yet a decay over a step of this length, by any rate above 1e-27, is exactly 0
LOG2_E = math.log2(math.e)  # exp2(LOG2_E a) is exp(a), with torch 2.13 on x86 2.6 times as fast
finite = functools.partial(torch.nan_to_num, nan=0.0, posinf=0.0, neginf=0.0)  # else 0


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


def check_sizes(x, every=None):
    """x (B, L, ...); ValueError if there is no step, or if pieces of `every` steps do not fit."""
    batch, length = x.shape[:2]
    if not batch or not length:
        raise ValueError(f"a scan needs one sequence of one step at least, not ({batch}, {length})")
    if every is not None and (every < 1 or length % every):
        raise ValueError(f"pieces of {every} steps do not make up a sequence of {length}")


def every_step(step, x, dt, A, B, C, D, state, reset):
    """The definition of either scan: its step, again and again."""
    check_sizes(x)
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    h = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state.to(x.dtype)
    resets = itertools.repeat(None) if reset is None else reset.unbind(1)
    y = []
    for x_t, dt_t, B_t, C_t, reset_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1),
                                            resets):
        y_t, h = step(x_t, dt_t, A, B_t, C_t, D, h, reset_t)
        y.append(y_t)
    return torch.stack(y, 1), h


def in_parallel(scan, x, dt, A, B, C, D, state, reset, every):
    """What S6 and SSD have in common: nothing passes a reset, not even what is no number.

    They multiply what lies behind a reset by 0, which does not rid them of a NaN. So a step that is
    not finite in all it has, or is beyond 1e19 and might overflow on the way, is taken out before,
    and whatever has seen it, or comes after it and before the next reset, is made NaN afterwards.
    """
    check_sizes(x, every)
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    state = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state.to(x.dtype)
    reset = x.new_zeros(x.shape[:2], dtype=torch.bool) if reset is None else reset
    with torch.no_grad():
        *written, read, carried = (
            torch.linalg.vector_norm(tensor, dim=tuple(range(2, tensor.dim())))
            for tensor in (x, dt, B, C, state[:, None]))
        bad = ~(torch.cat([carried, math.prod(written) + read], 1) < HUGE)  # (B, 1 + L), also NaN
        seen = bad.cumsum(1)
        lost = seen[:, 1:] > (seen[:, :-1] * reset).cummax(1).values  # more than at the last reset
        lost = torch.where(lost, math.nan, 0.0).view(*lost.shape, *[1] * (x.dim() - 2))
    dt, B, C = (tensor.masked_fill(bad[:, 1:, None], 0.0) for tensor in (dt, B, C))
    piece = every or x.shape[1]
    y, states = scan.apply(x, dt, A, B, C, D, state, reset, every)
    y, states = y + lost, states + lost[:, piece - 1::piece, ..., None]
    return y, states if every else states[:, -1]


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
    return in_parallel(S6, x, dt, A, B, C, D, state, reset, every)


def s6_plan(batch, length, width, N, device, every=None):
    """How the work is divided: (K blocks, Q steps of each, steps from one kept state to the next,
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


def steps_of(rows, channels, wide, narrow):
    """The steps of a tile, of tensors (R, Q, W) and (R, Q, N), as views that broadcast with it."""
    return (*(tensor[rows, :, None, channels].unbind(1) for tensor in wide),
            *(tensor[rows, ..., None].unbind(1) for tensor in narrow))


def contract(left, right):
    """Matrix products for (q, rows) at once: (rows, q, i, j) with (q, rows, j, k)."""
    return (left.transpose(0, 1) @ right).transpose(0, 1)


class S6(torch.autograd.Function):
    """Inside, the state is (R, N, W): the channels, of which there are most, are contiguous.

    h_t = a_t h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, a_t = exp(dt_t A); so, backwards,

        gh_t = gy_t C_t^T + g             of the state; g = a_{t+1} gh_{t+1}, from the step behind
        gfade_t = a_t gh_t h_{t-1}        of the exponent dt_t A
        gwrite_t = gh_t B_t               of dt_t x_t
        gx_t = dt_t gwrite_t + D gy_t     gdt_t = x_t gwrite_t + sum_n A gfade_t
        gB_t = sum_w dt_t x_t gh_t        gC_t = sum_w gy_t h_t
        gA = sum_t dt_t gfade_t           gD = sum_t gy_t x_t
        gends_{k-1} = gstarts_k + through_k gends_k       of the last state of each block
    """

    @staticmethod
    def blocks(ctx, x, dt, A, B, C, reset):
        """The inputs in the form in which both directions want them."""
        K, Q, _, _ = ctx.plan
        fade = (LOG2_E * dt).masked_fill_(reset[..., None], HUGE)  # here a reset is an endless step
        return (in_blocks(dt, K, Q), in_blocks(fade, K, Q), in_blocks(finite(dt * x), K, Q),
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
        finite(state.transpose(1, 2), out=starts[:, 0])
        ends = x.new_empty(batch * K, N, W)
        if K > 1:
            for rows, channels in tiles:  # 1. the last state of every block, from zero
                h = torch.zeros_like(ends[rows, :, channels])
                decay, A_tile = torch.empty_like(h), A_t[:, channels]
                for fade_t, write_t, B_t in zip(*steps_of(rows, channels, (fade, write), (B_k,))):
                    torch.mul(fade_t, A_tile, out=decay).exp2_()
                    h.mul_(decay).addcmul_(write_t, B_t)
                ends[rows, :, channels] = h
            through = (fade.sum(1)[:, None] * A_t).exp2_().view_as(starts)
            ends_k = ends.view_as(starts)
            for k in range(K - 1):  # 2. the first state of every block
                torch.addcmul(ends_k[:, k], through[:, k], starts[:, k], out=starts[:, k + 1])
        y = x.new_empty(batch * K, Q, W)
        for rows, channels in tiles:  # 3. all states, a few at a time, and the outputs
            h = x.new_empty(keep + 1, *ends[rows, :, channels].shape)
            decay = torch.empty_like(h[0])
            A_tile = A_t[:, channels]
            fade_tile, write_tile, B_tile = steps_of(rows, channels, (fade, write), (B_k,))
            for first in range(0, Q, keep):
                q = min(keep, Q - first)
                if first:
                    kept[first // keep, rows, :, channels] = h[keep]
                h[0].copy_(kept[first // keep, rows, :, channels])
                for t, before, after in zip(range(first, Q), h.unbind(), h[1:].unbind()):
                    torch.mul(fade_tile[t], A_tile, out=decay).exp2_()
                    torch.mul(before, decay, out=after).addcmul_(write_tile[t], B_tile[t])
                part = rows, slice(first, first + q)
                y[(*part, channels)] = contract(C_k[part][:, :, None], h[1:q + 1])[:, :, 0]
            ends[rows, :, channels] = h[q]
        ctx.save_for_backward(x, dt, A, B, C, D, reset, kept)
        y = y.view(batch, K * Q, W)[:, :length].addcmul(x, D)
        states = ends.view(batch, K, N, W)[:, 0 if every else -1:]
        return y, states.transpose(2, 3).contiguous()

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, gy, gstates):
        x, dt, A, B, C, D, reset, kept = ctx.saved_tensors
        (batch, length, W), N = x.shape, A.shape[1]
        K, Q, keep, tiles = ctx.plan
        dt_k, fade, write, A_t, B_k, C_k = S6.blocks(ctx, x, dt, A, B, C, reset)
        lost = 0 * (gy.sum() + gstates.sum())  # NaN if a gradient is no number: gD shows it
        gy, gstates = finite(gy), finite(gstates)
        gy_k = in_blocks(gy, K, Q)
        gends = x.new_empty(batch * K, N, W)  # of the last state of a block; later of the first
        gends_k = gends.view(batch, K, N, W)
        gends_k[:, -1] = gstates[:, -1].transpose(1, 2)
        if K > 1:
            gstarts = torch.empty_like(gends)
            for rows, channels in tiles:  # 1. what each block alone passes back to its first state
                g = torch.zeros_like(gends[rows, :, channels])
                decay, A_tile = torch.empty_like(g), A_t[:, channels]
                steps = list(zip(*steps_of(rows, channels, (fade, gy_k), (C_k,))))
                for fade_t, gy_t, C_t in reversed(steps):
                    torch.mul(fade_t, A_tile, out=decay).exp2_()
                    g.addcmul_(gy_t, C_t).mul_(decay)
                gstarts[rows, :, channels] = g
            through = (fade.sum(1)[:, None] * A_t).exp2_().view_as(gends_k)
            gstarts = gstarts.view_as(gends_k)
            for k in range(K - 1, 0, -1):  # 2. the gradient of the last state of every block
                torch.addcmul(gstarts[:, k], through[:, k], gends_k[:, k], out=gends_k[:, k - 1])
                if ctx.every:
                    gends_k[:, k - 1] += gstates[:, k - 1].transpose(1, 2)
        gwrite, gdt = torch.empty_like(write), torch.empty_like(write)
        gA, gB, gC = torch.zeros_like(A_t), torch.zeros_like(B_k), torch.zeros_like(C_k)
        for rows, channels in tiles:  # 3. a few states at a time, forwards, then their gradients
            g = gends[rows, :, channels].contiguous()
            h, decay, gh = (g.new_empty(count, *g.shape) for count in (keep + 1, keep, keep))
            A_tile, gA_tile = A_t[:, channels], torch.zeros_like(g)
            dt_tile, fade_tile, write_tile, gy_tile, gdt_tile, B_tile, C_tile = steps_of(
                rows, channels, (dt_k, fade, write, gy_k, gdt), (B_k, C_k))
            for first in range((Q - 1) // keep * keep, -1, -keep):
                q = min(keep, Q - first)
                h[0].copy_(kept[first // keep, rows, :, channels])
                for i in range(q):
                    t = first + i
                    torch.mul(fade_tile[t], A_tile, out=decay[i]).exp2_()
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
        gx, gdt = torch.addcmul(gy * D, gwrite, dt), torch.addcmul(gdt, gwrite, x)
        gD = (gy * finite(x)).sum((0, 1)) + lost
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

    Its Q inputs and the state before it, which acts like N more, times one (Q + N, Q) matrix are
    the outputs. Between blocks only states pass. The backward pass is the same with every matrix
    transposed; kept for it are inputs and first states, not the matrices. `every` as in s6.
    """
    return in_parallel(SSD, x, dt, A, B, C, D, state, reset, every)


def ssd_plan(length, device, every=None):
    """(K blocks, Q steps of each): the matrices cost Q, the states 1 / Q, the loop K."""
    longest = every or (32 if device.type == "cpu" else 64)
    K = -(-length // longest)
    return K, -(-length // K)


def ssd_decays(dt, A, reset):
    """How much is left at the end of step j (columns) of the state before the block (row 0) and of
    what step i wrote (row 1 + i). dt (K, B, H, Q), reset (K, B, 1, Q) -> (K, B, H, 1 + Q, Q), views

    Exponents dt A are summed, for a product of numbers near 1 rounds at each of them; and each sum
    is its own. From differences of running sums one dt A of -1e4 would take all digits below 1e-3.
    """
    rates = (dt * (A * LOG2_E)[:, None]).masked_fill_(reset, -HUGE)  # (K, B, H, Q)
    ones = dt.new_ones(1 + dt.shape[-1], dt.shape[-1])
    decays = (rates[..., None, :] * ones.triu()).cumsum(-1).exp2_().mul_(ones.triu(-1))
    enter, leave = decays[..., 0, :].clone(), decays[..., 1:, -1].clone()  # (K, B, H, Q)
    return decays, enter, leave, enter[..., -1:, None]


class SSD(torch.autograd.Function):
    """Inside, tensors are (K, B, H, Q, ...): every product is one batch over blocks and heads.

    A block takes the state from `first` to `last`. Of `first`, `enter` is left at step j and
    `through` at the end; of what step i wrote, `between` is left at j >= i and `leave` at the end:

        weights_ij = between_ij dt_i scores_ij, + D if i = j              scores_ij = B_i . C_j
        y_j = sum_i weights_ij x_i + first read_j                         read_j = enter_j C_j
        last = through first + sum_i x_i write_i^T                        write_i = leave_i dt_i B_i

    Backwards each product is transposed (gadded is what y hands to gfirst), and of its factors

        gweights_ij = x_i . gy_j      gread_j = gy_j first                gwrite_i = x_i glast
        gscores_ij = sum_h between_ij dt_i gweights_ij                    gD = sum_i gweights_ii

    A decay is exp of a sum of rates dt A; the gradient of the sum is the decay times its gradient:
    between_ij scores_ij gweights_ij and leave_i B_i . gwrite_i, both times dt_i, enter_j C_j .
    gread_j and through first . glast. All from i, without this factor, add up to gfrom_i, its own
    gradient; all that lead over step k, from i < k to j >= k, with it, to grate_k, of the rate; so
    that gdt_k = gfrom_k + A grate_k and gA = sum_k dt_k grate_k.
    """

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
        reset = SSD.split(reset[..., None], K, Q).transpose(2, 3)  # (K, B, 1, Q)
        decays, enter, leave, through = ssd_decays(dt, A, reset)
        # 1. The inputs of each block and, below them, the state in which it starts: (Q + N, P).
        inputs = x.new_empty(K + 1, batch, H, Q + N, P)
        finite(SSD.split(x, K, Q).transpose(2, 3), out=inputs[:K, ..., :Q, :])
        finite(state.transpose(2, 3), out=inputs[0, ..., Q:, :])
        # 2. What each block alone adds to the state, and the chain of states.
        write = B[:, :, None] * (leave * dt)[..., None]  # (K, B, H, Q, N)
        added = write.transpose(3, 4) @ inputs[:K, ..., :Q, :]  # (K, B, H, N, P)
        firsts = inputs[..., Q:, :].unbind()
        for plus, decay, first, after in zip(added.unbind(), through.unbind(), firsts, firsts[1:]):
            torch.addcmul(plus, decay, first, out=after)
        # 3. The outputs. D joins the diagonal, where a step meets itself.
        weights = x.new_empty(K, batch, H, Q + N, Q)
        scores = (B @ C.transpose(2, 3))[:, :, None]  # (K, B, 1, Q, Q)
        between = decays[..., 1:, :].mul_(dt[..., None])  # (K, B, H, Q, Q)
        inside = torch.mul(between, scores, out=weights[..., :Q, :])
        inside.diagonal(dim1=-2, dim2=-1).add_(D[:, None])
        torch.mul(C.transpose(2, 3)[:, :, None], enter[..., None, :], out=weights[..., Q:, :])
        y = weights.transpose(3, 4) @ inputs[:K]  # (K, B, H, Q, P)
        ctx.save_for_backward(dt, A, B, C, D, reset, inputs)
        ctx.length, ctx.every = length, every
        states = inputs[1 if every else K:, ..., Q:, :].transpose(0, 1)  # (B, K or 1, H, N, P)
        return SSD.join(y.transpose(2, 3), length).contiguous(), states.contiguous().mT

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, gy, gstates):
        dt, A, B, C, D, reset, inputs = ctx.saved_tensors
        (K, batch, H, Q), N, P = dt.shape, B.shape[-1], inputs.shape[-1]
        inputs = inputs[:K]
        lost, gstates = 0 * (gy.sum() + gstates.sum()), finite(gstates)
        decays, enter, leave, through = ssd_decays(dt, A, reset)
        between = decays[..., 1:, :]
        # 1. The gradients of a block's outputs and, below them, of the state that it hands on.
        gouts = gy.new_empty(K, batch, H, Q + N, P)
        finite(SSD.split(gy, K, Q).transpose(2, 3), out=gouts[..., :Q, :])
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
        gD = gweights[..., :Q, :].diagonal(dim1=-2, dim2=-1).sum((0, 1, 3)) + lost
        gscores = (between.mul_(gweights[..., :Q, :]) * dt[..., None]).sum(2)  # (K, B, Q, Q)
        # 5. The gradients of the exponents, each where its decay was.
        between.mul_(scores)
        decays[..., 0, :] *= (gread * C.transpose(2, 3)[:, :, None]).sum(3)
        decays[..., 1:, -1] += (gwrite * B[:, :, None]).sum(4) * leave
        decays[..., 0, -1] += (gouts[..., Q:, :] * inputs[..., Q:, :]).sum((3, 4)) * enter[..., -1]
        gfrom = between.sum(-1)  # (K, B, H, Q)
        between.mul_(dt[..., None])
        over = decays.cumsum(-2)[..., :Q, :]  # (K, B, H, Q, Q), from before k to j
        grate = over.mul_(dt.new_ones(Q, Q).triu()).sum(-1)  # (K, B, H, Q)
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


def causal_conv(x, conv1d, past, reset=None, every=None):
    """Depthwise convolution and SiLU. x (B, L, channels), past (B, channels, d_conv - 1).

    Written as d_conv shifted products: a tap that reaches behind a reset is then easily left out.
    """
    check_sizes(x, every)
    length, reach = x.shape[1], past.shape[2]
    piece = every or length
    seen = torch.cat([past.transpose(1, 2), x], 1)  # (B, d_conv - 1 + L, channels)
    now = seen[:, reach:]
    last = seen[:, piece:].unfold(1, reach, piece)  # (B, L / piece, channels, d_conv - 1)
    if reset is not None:  # two steps see each other if as many resets have come before
        segment = F.pad(reset.int(), (reach, 0)).cumsum(1)[..., None]  # (B, d_conv - 1 + L, 1)
        segments = segment[:, piece:].unfold(1, reach, piece)  # of `last`
        last = torch.where(segments == segments[..., -1:], last, 0)
    weights = conv1d.weight[:, 0].t().contiguous().unbind()  # d_conv taps (channels)
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
    for seen_tap, weight in zip(seen.unbind(1), conv1d.weight[:, 0].t().contiguous().unbind()):
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
        self.in_proj = nn.Linear(d_model, 2 * width, bias=False)  # x gate
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
        x, gate = self.in_proj(u).chunk(2, -1)  # (B, L, W)
        x, conv = causal_conv(x, self.conv1d, before.conv, reset, every)  # (B, L, W)
        y, scan = s6(*self.scan_inputs(x), before.scan, reset, every)  # (B, L, W)
        return self.out_proj(y * F.silu(gate)), State(conv, scan)

    def step(self, u_t, state, reset=None):
        """u_t (B, d_model), reset (B) -> y_t (B, d_model), state"""
        x, gate = self.in_proj(u_t).chunk(2, -1)  # (B, W)
        x, conv = causal_conv_step(x, self.conv1d, state.conv, reset)  # (B, W)
        y, scan = s6_step(*self.scan_inputs(x), state.scan, reset)  # (B, W)
        return self.out_proj(y * F.silu(gate)), State(conv, scan)

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
        self.in_proj = nn.Linear(d_model, width + channels + heads, bias=False)  # gate x B C dt
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
        gate, xBC, dt = self.projections(u)  # (B, L, W), (B, L, W + 2 N), (B, L, H)
        xBC, conv = causal_conv(xBC, self.conv1d, before.conv, reset, every)  # (B, L, W + 2 N)
        y, scan = ssd(*self.scan_inputs(xBC, dt), before.scan, reset, every)  # (B, L, H, P)
        return self.out_proj(self.norm(y.flatten(2) * F.silu(gate))), State(conv, scan)

    def step(self, u_t, state, reset=None):
        """u_t (B, d_model), reset (B) -> y_t (B, d_model), state"""
        gate, xBC, dt = self.projections(u_t)  # (B, W), (B, W + 2 N), (B, H)
        xBC, conv = causal_conv_step(xBC, self.conv1d, state.conv, reset)  # (B, W + 2 N)
        y, scan = ssd_step(*self.scan_inputs(xBC, dt), state.scan, reset)  # (B, H, P)
        return self.out_proj(self.norm(y.flatten(1) * F.silu(gate))), State(conv, scan)

    def projections(self, u):
        width, heads = self.sizes[0], len(self.D)
        return self.in_proj(u).split([width, sum(self.sizes), heads], -1)

    def scan_inputs(self, xBC, dt):
        x, B, C = xBC.split(self.sizes, -1)
        x = x.unflatten(-1, (-1, self.head_dim))  # (B, L, H, P)
        return x, F.softplus(dt + self.dt_bias), -self.A_log.exp(), B, C, self.D


# One of yours: Layer(d_model, layers, d_state=...) with the same three methods. forward takes whole
# sequences, a State or None, resets and `every` (then it returns the State after each piece), step
# one step; a State is two tensors (B, ...), returned and never changed in place.
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
        errors += [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(fast, slow)]
    return max(errors)


def seconds(run, device, repeats=5):
    """The median, after one run to warm up."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        run()
        getattr(torch, device).synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_megabytes(run, device):
    """On top of what was allocated before."""
    if device != "cpu":  # MPS counts no peaks, but its driver's pool only grows
        reset, used = dict(
            cuda=(torch.cuda.reset_peak_memory_stats, torch.cuda.max_memory_allocated),
            mps=(torch.mps.empty_cache, torch.mps.driver_allocated_memory))[device]
        reset()
        before = used()
        run()
        return (used() - before) / 2 ** 20
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler talks into the table
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in record.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes)) / 2 ** 20


def main(tokens=16384, width=512):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for kind in SCANS:
        error = largest_error(kind, device)
        print(f"{kind:4} against its loop: largest relative error, gradients included, {error:.1e}")
        assert error < 1e-4, "the parallel scan is wrong on this device"
    counter = {"cuda": "the allocator's counter", "mps": "growth of the driver's pool",
               "cpu": "allocations seen by torch.profiler"}[device]
    print(f"\nForward and backward, float32, width {width}, state 16, {tokens:,} tokens in all; "
          f"median of 5.\nPeak memory: {counter}, on top of the inputs. Step loop: the definition,"
          f" one sequence.\n\nscan  batch x length     ms   tokens/s   peak MB   "
          "against step loop, both at batch 1")
    for kind, length in itertools.product(SCANS, (64, 256, 1024, 4096, 16384)):
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
