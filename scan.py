"""Sequence layers in plain PyTorch: two selective scans, five layers, one sequence model.

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

`python scan.py` checks the parallel scans against the loops on this machine. This is the last of
the four files to read. Alongside: Gu and Dao, "Mamba" (arXiv 2312.00752), section 3; Dao and Gu,
"Transformers are SSMs" (arXiv 2405.21060), section 6; Mamba-3 is arXiv 2603.15569. Parameters of
the Mambas are named as in their reference implementation.
"""
import functools
import itertools
import math
from inspect import signature
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HUGE = 1e30  # finite, yet a decay over a step of this length, by any rate above 1e-27, is exactly 0
LOG2_E = math.log2(math.e)  # exp2(LOG2_E a) is exp(a), and 2.6 times as fast with torch 2.13 on x86
finite = functools.partial(torch.nan_to_num, nan=0.0, posinf=0.0, neginf=0.0)  # others become 0


def without_autocast(function):
    """A scan computes in the precision of its inputs, even inside an autocast region."""
    @functools.wraps(function)
    def wrapped(*arguments):
        device = next(a.device for a in arguments if isinstance(a, Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*arguments)
    return wrapped


def differentiated_by_hand(cls):
    """What every autograd.Function here needs besides its forward and backward."""
    cls.forward = staticmethod(without_autocast(cls.forward))
    cls.backward = staticmethod(once_differentiable(without_autocast(cls.backward)))
    return cls


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


def step_by_step(step, x, dt, A, B, C, D, state=None, reset=None):
    """The definition of either scan: its step, again and again."""
    check_sizes(x)
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    h = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state.to(x.dtype)
    resets, y = itertools.repeat(None) if reset is None else reset.unbind(1), []
    for x_t, dt_t, B_t, C_t, reset_t in zip(*(part.unbind(1) for part in (x, dt, B, C)), resets):
        y_t, h = step(x_t, dt_t, A, B_t, C_t, D, h, reset_t)
        y.append(y_t)
    return torch.stack(y, 1), h


def in_parallel(scan, x, dt, B, C, *rest, state, reset, every):
    """What S6 and SSD have in common: nothing passes a reset, not even NaN or infinity.

    They multiply what lies before a reset by 0, which does not rid them of a NaN. So a step with a
    part that is not finite, or with |x| |dt| |B| + |C| beyond 1e30, which might overflow on the
    way, is `lost`, and so is all that has seen it, up to the next reset: the scans take it out and
    return NaN in its place.
    """
    check_sizes(x, every)
    state = x.new_zeros(*x[:, 0].shape, B.shape[-1]) if state is None else state.to(x.dtype)
    reset = x.new_zeros(x.shape[:2], dtype=torch.bool) if reset is None else reset
    with torch.no_grad():
        x_norm, dt_norm, B_norm, C_norm, carried = (
            torch.linalg.vector_norm(part, dim=tuple(range(2, part.dim())))  # (B, L), and (B, 1)
            for part in (x, dt, B, C, state[:, None]))
        norms = torch.cat([carried, x_norm * dt_norm * B_norm + C_norm], 1)
        bad = ~(norms < HUGE)  # (B, 1 + L), also where NaN
        seen = bad.cumsum(1)
        lost = seen[:, 1:] > (seen[:, :-1] * reset).cummax(1).values  # more than at the last reset
    y, states = scan.apply(x, dt, B, C, *rest, state, reset, lost, every)
    return y, states if every else states[:, -1]


def in_blocks(tensor, K, Q):
    """(B, L, ...) -> (B K, Q, ...), zeros at the end: a step of size 0 changes nothing."""
    missing = K * Q - tensor.shape[1]
    if missing:
        tensor = F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing))
    return tensor.reshape(-1, Q, *tensor.shape[2:])


# ---- Mamba's scan (S6) ---------------------------------------------------------------------------


@without_autocast
def s6_step(x, dt, A, B, C, D, h, reset=None, every=None):
    """x, dt (B, W); A (W, N); B, C (B, N); D (W); h (B, W, N); reset (B) -> y (B, W), h

    `every` is there because a layer calls both forms alike: one step has no pieces.
    """
    if reset is not None:
        h = torch.where(reset[:, None, None], 0, h)
    h = torch.exp(dt[..., None] * A) * h  # (B, W, N)
    h = torch.addcmul(h, (dt * x)[..., None], B[:, None])  # h + dt x B^T
    return torch.addcmul((h * C[:, None]).sum(-1), D, x), h


s6_sequential = functools.partial(step_by_step, s6_step)


def s6(x, dt, A, B, C, D, state=None, reset=None, every=None):
    """The same in parallel: a loop over the steps of a block handles all blocks at once.

    x, dt (B, L, W); A (W, N); B, C (B, L, N); D (W); state (B, W, N) -> y (B, L, W), state or, if
    `every` is given, the state after each piece of so many steps (B, L / every, W, N).

    1. Every block from a zero state, for its last state alone.   (left out if there is one block)
    2. A loop over the blocks chains these into the state in which each block really starts.
    3. Every block again, now from that state, with its outputs; every eighth state is kept.
    The backward pass does the same from the end. It recomputes eight states at a time, from the
    kept one before them, so that no tensor of shape (B, L, W, N) ever exists.
    """
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    return in_parallel(S6, x, dt, B, C, A, D, state=state, reset=reset, every=every)


def s6_plan(length, device, every=None):
    """How the work is divided: (K blocks, Q steps of each, steps from one kept state to the next).
    Only this and ssd_plan know what suits a device. On a GPU launches are the cost: the loops over
    Q steps and over K blocks are kept about equally long."""
    longest = 128 if device.type == "cpu" else min(128, max(16, 2 ** round(math.log2(length) / 2)))
    K = -(-length // (every or longest))
    return K, -(-length // K), 8


def contract(left, right):
    """Matrix products for (q, rows) at once: (rows, q, i, j) with (q, rows, j, k)."""
    return (left.transpose(0, 1) @ right).transpose(0, 1)


@differentiated_by_hand
class S6(torch.autograd.Function):
    """Inside, the state is (R, N, W): the channels, of which there are most, are contiguous.

    h_t = a_t h_{t-1} + dt_t x_t B_t^T and y_t = h_t C_t + D x_t, a_t = exp(dt_t A); so, backwards,

        gh_t = gy_t C_t^T + g             of the state; g = a_{t+1} gh_{t+1}, from the step after
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
        K, Q, _ = ctx.plan
        fade = (LOG2_E * dt).masked_fill_(reset[..., None], HUGE)  # here a reset is an endless step
        return (in_blocks(dt, K, Q), in_blocks(fade, K, Q), in_blocks(finite(dt * x), K, Q),
                A.t().contiguous(), in_blocks(B, K, Q), in_blocks(C, K, Q))

    @staticmethod
    def steps(wide, narrow):
        """Tensors (R, Q, W) and (R, Q, N), step by step, as views that broadcast with a state."""
        return (*(tensor[:, :, None].unbind(1) for tensor in wide),
                *(tensor[..., None].unbind(1) for tensor in narrow))

    def forward(ctx, x, dt, B, C, A, D, state, reset, lost, every):
        (batch, length, W), N = x.shape, A.shape[1]
        dt, B, C = (tensor.masked_fill(lost[..., None], 0.0) for tensor in (dt, B, C))
        ctx.plan, ctx.every = s6_plan(length, x.device, every), every
        K, Q, keep = ctx.plan
        _, fade, write, A_t, B_k, C_k = S6.blocks(ctx, x, dt, A, B, C, reset)
        fade_t, write_t, B_t = S6.steps((fade, write), (B_k,))
        kept = x.new_empty(-(-Q // keep), batch * K, N, W)
        starts = kept[0].view(batch, K, N, W)
        finite(state.transpose(1, 2), out=starts[:, 0])
        h = x.new_zeros(keep + 1, batch * K, N, W)
        decay = torch.empty_like(h[0])
        if K > 1:
            for t in range(Q):  # 1. the last state of every block, from zero
                torch.mul(fade_t[t], A_t, out=decay).exp2_()
                h[0].mul_(decay).addcmul_(write_t[t], B_t[t])
            through = (fade.sum(1)[:, None] * A_t).exp2_().view_as(starts)
            ends = h[0].view_as(starts)
            for k in range(K - 1):  # 2. the first state of every block
                torch.addcmul(ends[:, k], through[:, k], starts[:, k], out=starts[:, k + 1])
        y = x.new_empty(batch * K, Q, W)
        h[0] = kept[0]
        for first in range(0, Q, keep):  # 3. all states, a few at a time, and the outputs
            q = min(keep, Q - first)
            if first:
                kept[first // keep] = h[0] = h[keep]
            for t, before, after in zip(range(first, Q), h, h[1:]):
                torch.mul(fade_t[t], A_t, out=decay).exp2_()
                torch.mul(before, decay, out=after).addcmul_(write_t[t], B_t[t])
            part = slice(first, first + q)
            y[:, part] = contract(C_k[:, part, None], h[1:q + 1])[:, :, 0]
        ctx.save_for_backward(x, dt, A, B, C, D, reset, kept)
        y = y.view(batch, K * Q, W)[:, :length].addcmul(x, D)
        y.masked_fill_(lost[..., None], math.nan)
        states = h[q].view_as(starts)[:, 0 if every else -1:].transpose(2, 3)
        piece = every or length
        return y, states.masked_fill(lost[:, piece - 1::piece, None, None], math.nan)

    def backward(ctx, gy, gstates):
        x, dt, A, B, C, D, reset, kept = ctx.saved_tensors
        (batch, length, W), (K, Q, keep) = x.shape, ctx.plan
        dt_k, fade, write, A_t, B_k, C_k = S6.blocks(ctx, x, dt, A, B, C, reset)
        spoilt = 0 * (gy.sum() + gstates.sum())  # NaN if a gradient is not finite: gD shows it
        gy, gstates = finite(gy), finite(gstates).transpose(2, 3)
        gy_k, gwrite, gdt = in_blocks(gy, K, Q), torch.empty_like(write), torch.empty_like(write)
        fade_t, gy_t, write_t, dt_t, gdt_t, B_t, C_t = S6.steps((fade, gy_k, write, dt_k, gdt),
                                                                (B_k, C_k))
        gends = torch.empty_like(kept[0])  # of the last state of a block; later of the first
        gends_k = gends.view(batch, K, *kept.shape[2:])
        gends_k[:, -1] = gstates[:, -1]
        h, decay, gh = (gends.new_zeros(count, *gends.shape) for count in (keep + 1, keep, keep))
        if K > 1:
            for t in reversed(range(Q)):  # 1. what each block alone passes back to its first state
                torch.mul(fade_t[t], A_t, out=decay[0]).exp2_()
                gh[0].addcmul_(gy_t[t], C_t[t]).mul_(decay[0])
            through = (fade.sum(1)[:, None] * A_t).exp2_().view_as(gends_k)
            gstarts = gh[0].view_as(gends_k)
            for k in range(K - 1, 0, -1):  # 2. the gradient of the last state of every block
                torch.addcmul(gstarts[:, k], through[:, k], gends_k[:, k], out=gends_k[:, k - 1])
                if ctx.every:
                    gends_k[:, k - 1] += gstates[:, k - 1]
        g, gA, gB, gC = gends, torch.zeros_like(gends), torch.empty_like(B_k), torch.empty_like(C_k)
        for first in range((Q - 1) // keep * keep, -1, -keep):
            q = min(keep, Q - first)  # 3. a few states at a time, forwards, then their gradients
            h[0] = kept[first // keep]
            for i, t in enumerate(range(first, first + q)):
                torch.mul(fade_t[t], A_t, out=decay[i]).exp2_()
                torch.mul(h[i], decay[i], out=h[i + 1]).addcmul_(write_t[t], B_t[t])
            for i in reversed(range(q)):
                t = first + i
                torch.addcmul(g, gy_t[t], C_t[t], out=gh[i])
                torch.mul(gh[i], decay[i], out=g)
                gfade = torch.mul(g, h[i], out=decay[i])  # of the exponent dt A
                gA.addcmul_(gfade, dt_t[t])
                torch.sum(gfade.mul_(A_t), 1, keepdim=True, out=gdt_t[t])
            part = slice(first, first + q)
            gwrite[:, part] = contract(B_k[:, part, None], gh[:q])[:, :, 0]
            gB[:, part] = contract(write[:, part, None], gh[:q].mT)[:, :, 0]
            gC[:, part] = contract(gy_k[:, part, None], h[1:q + 1].mT)[:, :, 0]
        gwrite, gdt, gB, gC = (g_k.view(batch, K * Q, -1)[:, :length]
                               for g_k in (gwrite, gdt, gB, gC))
        gx, gdt = torch.addcmul(gy * D, gwrite, dt), torch.addcmul(gdt, gwrite, x)
        gD = (gy * finite(x)).sum((0, 1)) + spoilt
        return gx, gdt, gB, gC, gA.sum(0).t(), gD, gends_k[:, 0].transpose(1, 2), None, None, None


# ---- Mamba-2's scan (SSD) ------------------------------------------------------------------------


@without_autocast
def ssd_step(x, dt, A, B, C, D, h, reset=None, every=None):
    """x (B, H, P); dt (B, H); A, D (H); B, C (B, N); h (B, H, P, N); reset (B) -> y (B, H, P), h"""
    if reset is not None:
        h = torch.where(reset[:, None, None, None], 0, h)
    h = torch.exp(dt * A)[..., None, None] * h  # (B, H, P, N)
    h.addcmul_((dt[..., None] * x)[..., None], B[:, None, None])  # h + dt x B^T
    read = (C[:, None, None] @ h.mT)[:, :, 0]  # (B, H, P)
    return torch.addcmul(read, D[:, None], x), h


ssd_sequential = functools.partial(step_by_step, ssd_step)


def ssd(x, dt, A, B, C, D, state=None, reset=None, every=None):
    """The same in parallel. One decay for a whole head makes a block of Q steps a matrix product.

    x (B, L, H, P); dt (B, L, H); A, D (H); B, C (B, L, N); state (B, H, P, N); `every` as in s6.

    A block's Q inputs and the state before it, which acts like N more, times one (Q + N, Q) matrix
    give its outputs. Only states pass between blocks. The backward pass is the same with every
    matrix transposed; it keeps inputs and first states, not the matrices.
    """
    x, dt, A, B, C, D = at_least_float32(x, dt, A, B, C, D)
    own, B, C = D + dt * (B * C).sum(-1, keepdim=True), B[:, :, None], C[:, :, None]
    return in_parallel(SSD, x, dt, B, C, dt * A, own, state=state, reset=reset, every=every)


def ssd_plan(length, device, every=None):
    """K blocks, Q steps of each, blocks per piece. Costs: matrices Q, states 1 / Q, the loop K."""
    if every:
        Q = max(Q for Q in range(1, min(every, 128) + 1) if every % Q == 0)
        return length // Q, Q, every // Q
    K = -(-length // (32 if device.type == "cpu" else 64))
    return K, -(-length // K), K


@functools.cache
def ssd_spans(Q, device, dtype):
    """Which rates each decay of `ssd_decays` spans, (Q, (1 + Q) Q) of 0 and 1, and what is added to
    them: -HUGE where step j comes before step i, for a decay of 0."""
    step, row = torch.arange(Q, device=device), torch.arange(1 + Q, device=device)[:, None]
    spans = (step[:, None, None] >= row) & (step[:, None, None] <= step)  # (Q, 1 + Q, Q)
    beside = torch.where(step < row - 1, -HUGE, 0.0)
    return spans.flatten(1).to(dtype), beside.flatten().to(dtype)


def ssd_decays(rate, reset):
    """How much is left at the end of step j (columns) of the state before the block (row 0) and of
    what step i wrote (row 1 + i). rate (K, B, H, Q), reset (K, B, 1, Q) -> (K, B, H, 1 + Q, Q), and
    of these enter, leave (K, B, H, Q) and through (K, B, H, 1, 1)

    Exponents are summed, since a product of numbers near 1 rounds at each of them; each sum is its
    own, since in differences of running sums one rate of -1e4 would take all digits below 1e-3.
    """
    rate, Q = (LOG2_E * rate).masked_fill_(reset, -HUGE), rate.shape[-1]  # (K, B, H, Q)
    spans, beside = ssd_spans(Q, rate.device, rate.dtype)
    decays = torch.addmm(beside, rate.flatten(0, 2), spans).exp2_().view(*rate.shape[:3], 1 + Q, Q)
    enter, leave = decays[..., 0, :].clone(), decays[..., 1:, -1].clone()  # (K, B, H, Q)
    return decays, enter, leave, enter[..., -1:, None]


@differentiated_by_hand
class SSD(torch.autograd.Function):
    """The scan with a rate for each step, B and C (B, L, G, N) for each head or, if G = 1, for all,
    and own (B, L, H), what a step reads of itself:

        h_t = exp(rate_t) h_{t-1} + dt_t x_t B_t^T    y_t = exp(rate_t) h_{t-1} C_t + own_t x_t

    Inside, tensors are (K, B, H, Q, ...): every product is one batch over blocks and heads. A block
    takes the state from `first` to `last`. Of `first`, `enter` is left at step j and `through` at
    the end; of what step i wrote, `between` is left at j > i and `leave` at the end:

        weights_ij = between_ij dt_i scores_ij, and own_i if i = j        scores_ij = B_i . C_j
        y_j = sum_i weights_ij x_i + first read_j                         read_j = enter_j C_j
        last = through first + sum_i x_i write_i^T                        write_i = leave_i dt_i B_i

    Backwards each product is transposed (gadded is what y hands gfirst). Gradients of its factors:

        gweights_ij = x_i . gy_j      gread_j = gy_j first                gwrite_i = x_i glast
        gscores_ij = sum_h between_ij dt_i gweights_ij                    gown_i = gweights_ii

    An exponent's gradient is its decay times the decay's gradient: between_ij scores_ij gweights_ij
    and leave_i B_i . gwrite_i, both times dt_i; enter_j C_j . gread_j; through first . glast. All
    from i, without dt_i, add up to gdt_i; all that span step k, from i < k to j >= k, to grate_k.
    """

    @staticmethod
    def split(tensor, K, Q):
        """(B, L, ...) -> (K, B, Q, ...)"""
        return in_blocks(tensor, K, Q).unflatten(0, (-1, K)).transpose(0, 1)

    @staticmethod
    def join(tensor, length):
        """(K, B, H, Q, ...) -> (B, L, H, ...)"""
        return tensor.movedim((0, 2), (1, 3)).flatten(1, 2)[:, :length]

    def forward(ctx, x, dt, B, C, rate, own, state, reset, lost, every):
        (batch, length, H, P), N = x.shape, B.shape[-1]
        K, Q, blocks = ssd_plan(length, x.device, every)
        piece, lost = every or length, lost[..., None]  # (B, L, 1)
        own = own.masked_fill(lost, math.nan)
        dt, rate = (part.masked_fill(lost, 0.0) for part in (dt, rate))
        B, C = (part.masked_fill(lost[..., None], 0.0) for part in (B, C))
        dt, B, C, rate, own, reset = (  # (K, B, H or 1, Q), but B, C (K, B, G, Q, N)
            SSD.split(tensor, K, Q).transpose(2, 3).contiguous()
            for tensor in (dt, B, C, rate, own, reset[..., None]))
        decays, enter, leave, through = ssd_decays(rate, reset)
        # 1. The inputs of each block and, below them, the state in which it starts: (Q + N, P).
        inputs = x.new_empty(K + 1, batch, H, Q + N, P)
        finite(SSD.split(x, K, Q).transpose(2, 3), out=inputs[:K, ..., :Q, :])
        finite(state.transpose(2, 3), out=inputs[0, ..., Q:, :])
        # 2. What each block alone adds to the state, and the chain of states.
        write = B * (leave * dt)[..., None]  # (K, B, H, Q, N)
        added = write.mT @ inputs[:K, ..., :Q, :]  # (K, B, H, N, P)
        firsts = inputs[..., Q:, :].unbind()
        for plus, decay, first, after in zip(added.unbind(), through.unbind(), firsts, firsts[1:]):
            torch.addcmul(plus, decay, first, out=after)
        # 3. The outputs.
        weights = x.new_empty(K, batch, H, Q + N, Q)
        between = decays[..., 1:, :].mul_(dt[..., None])  # (K, B, H, Q, Q)
        inside = torch.mul(between, B @ C.mT, out=weights[..., :Q, :])
        inside.diagonal(dim1=-2, dim2=-1).copy_(own)
        torch.mul(C.mT, enter[..., None, :], out=weights[..., Q:, :])
        y = weights.mT @ inputs[:K]  # (K, B, H, Q, P)
        ctx.save_for_backward(dt, B, C, rate, own, reset, inputs)
        ctx.length, ctx.piece, ctx.blocks = length, piece, blocks
        states = inputs[blocks::blocks, ..., Q:, :].transpose(0, 1)  # (B, pieces, H, N, P)
        states = states.masked_fill(lost[:, piece - 1::piece, ..., None, None], math.nan)
        return SSD.join(y, length).contiguous(), states.mT

    def backward(ctx, gy, gstates):
        dt, B, C, rate, own, reset, inputs = ctx.saved_tensors
        (K, batch, H, Q), N, P = dt.shape, B.shape[-1], inputs.shape[-1]
        inputs, piece, blocks = inputs[:K], ctx.piece, ctx.blocks
        spoilt = 0 * gy.sum((2, 3))  # (B, L), NaN where a gradient is not finite: gown shows it
        spoilt[:, piece - 1::piece] += 0 * gstates.sum((2, 3, 4))
        gstates = finite(gstates)
        decays, enter, leave, through = ssd_decays(rate, reset)
        between = decays[..., 1:, :]
        # 1. The gradients of a block's outputs and, below them, of the state that it hands on.
        gouts = gy.new_empty(K, batch, H, Q + N, P)
        finite(SSD.split(gy, K, Q).transpose(2, 3), out=gouts[..., :Q, :])
        gouts[-1, ..., Q:, :] = gstates[:, -1].transpose(2, 3)
        # 2. The chain of states, backwards.
        read = C * enter[..., None]  # (K, B, H, Q, N)
        gadded = read.mT @ gouts[..., :Q, :]  # (K, B, H, N, P)
        gadded_k, through_k, glasts = gadded.unbind(), through.unbind(), gouts[..., Q:, :].unbind()
        for k in range(K - 1, 0, -1):
            torch.addcmul(gadded_k[k], through_k[k], glasts[k], out=glasts[k - 1])
            if k % blocks == 0:
                glasts[k - 1].add_(gstates[:, k // blocks - 1].transpose(2, 3))
        gfirst = torch.addcmul(gadded[0], through[0], gouts[0, ..., Q:, :])
        # 3. The gradients of the inputs.
        scores = B @ C.mT  # (K, B, G, Q, Q)
        weights = gy.new_empty(K, batch, H, Q, Q + N)
        inside = torch.mul(between, scores, out=weights[..., :Q]).mul_(dt[..., None])
        inside.diagonal(dim1=-2, dim2=-1).copy_(own)
        torch.mul(B, (leave * dt)[..., None], out=weights[..., Q:])
        gx = weights @ gouts  # (K, B, H, Q, P)
        # 4. The gradients of the weights.
        gweights = inputs @ gouts[..., :Q, :].mT  # (K, B, H, Q + N, Q)
        gread = gweights[..., Q:, :]  # (K, B, H, N, Q)
        gwrite = inputs[..., :Q, :] @ gouts[..., Q:, :].mT  # (K, B, H, Q, N)
        gown = gweights[..., :Q, :].diagonal(dim1=-2, dim2=-1).clone()  # (K, B, H, Q)
        between.mul_(gweights[..., :Q, :]).diagonal(dim1=-2, dim2=-1).zero_()
        gscores = (between * dt[..., None]).sum_to_size(scores.shape)
        # 5. The gradients of the exponents, each where its decay was.
        between.mul_(scores)
        decays[..., 0, :] *= (gread * C.mT).sum(3)
        decays[..., 1:, -1] += (gwrite * B).sum(4) * leave
        decays[..., 0, -1] += (gouts[..., Q:, :] * inputs[..., Q:, :]).sum((3, 4)) * enter[..., -1]
        gdt = between.sum(-1)  # (K, B, H, Q)
        between.mul_(dt[..., None])
        grate = decays.flatten(3) @ ssd_spans(Q, gy.device, gy.dtype)[0].mT  # (K, B, H, Q)
        gB = gscores @ C + (gwrite * (leave * dt)[..., None]).sum_to_size(B.shape)
        gC = gscores.mT @ B + (gread.mT * enter[..., None]).sum_to_size(C.shape)
        gx, gdt, gB, gC, grate, gown = (SSD.join(g, ctx.length)
                                        for g in (gx, gdt, gB, gC, grate, gown))
        return gx, gdt, gB, gC, grate, gown + spoilt[..., None], gfirst.mT, None, None, None


# ---- The layers ----------------------------------------------------------------------------------


class State(NamedTuple):
    """What a layer carries from step to step. It is returned, never changed in place."""
    recent: Tensor  # of the last steps, as they were
    memory: Tensor  # of all steps, as the layer makes it


class RMSNorm(nn.RMSNorm):
    """With the reference's epsilon, in the precision of its gains: mixed types have no kernel."""

    def __init__(self, width):
        super().__init__(width, eps=1e-5)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


@differentiated_by_hand
class GatedNorm(torch.autograd.Function):
    """RMSNorm of y silu(gate): weight x, where x = r y silu(gate) and r = 1 / root mean square."""

    def forward(ctx, y, gate, weight, eps):
        x = F.silu(gate.to(y.dtype)).mul_(y)
        r = (torch.linalg.vector_norm(x, 2, -1, True).square() / len(weight) + eps).rsqrt()
        ctx.save_for_backward(y, gate, weight, r)
        return x.mul_(r).mul_(weight)

    def backward(ctx, g):
        y, gate, weight, r = ctx.saved_tensors
        gate_y = gate.to(y.dtype)
        silu = F.silu(gate_y)
        x = (silu * y).mul_(r)
        gx = g * x
        gweight, mean = gx.flatten(0, -2).sum(0), (gx @ weight)[..., None] / len(weight)
        gx = torch.mul(g, weight, out=gx).addcmul_(x, mean, value=-1).mul_(r)  # of y silu(gate)
        gy = silu.mul_(gx)
        ggate = torch.ops.aten.silu_backward(gx.mul_(y), gate_y)
        return gy, ggate.to(gate.dtype), gweight, None


@differentiated_by_hand
class Taps(torch.autograd.Function):
    """bias + sum_i weight_i seen_{t + i} at steps t; for each i but the last (now), `visible` is 1
    where it counts, else 0 (B, L, 1). seen (B, d_conv - 1 + L, channels), weight (d_conv, channels)
    """

    def forward(ctx, seen, weight, bias, *visible):
        length = seen.shape[1] - len(weight) + 1
        y = torch.addcmul(bias, seen[:, -length:], weight[-1])
        seen = finite(seen) if visible else seen  # or a NaN would show past a reset
        for tap in range(len(weight) - 1):
            part = seen[:, tap:tap + length]
            y.addcmul_(part * visible[tap] if visible else part, weight[tap])
        ctx.save_for_backward(seen, weight, *visible)
        return y

    def backward(ctx, gy):
        seen, weight, *visible = ctx.saved_tensors
        gseen, gweight, length = torch.zeros_like(seen), torch.empty_like(weight), gy.shape[1]
        for tap in range(len(weight)):
            g = gy * visible[tap] if visible[tap:] else gy
            torch.sum(g * seen[:, tap:tap + length], (0, 1), out=gweight[tap])
            gseen[:, tap:tap + length].addcmul_(g, weight[tap])
        return gseen, gweight, gy.sum((0, 1)), *[None] * len(visible)


def causal_conv(x, conv1d, past, reset=None, every=None):
    """Depthwise convolution and SiLU. x (B, L, channels), past (B, channels, d_conv - 1).

    Written as d_conv shifted products: so a tap that reaches back past a reset is easily left out.
    """
    check_sizes(x, every)
    length, reach = x.shape[1], past.shape[2]
    piece, visible = every or length, ()
    seen = torch.cat([past.transpose(1, 2), x], 1)  # (B, d_conv - 1 + L, channels)
    last = seen[:, piece:].unfold(1, reach, piece)  # (B, L / piece, channels, d_conv - 1)
    if reset is not None:  # two steps see each other if as many resets have come before
        segment = F.pad(reset.int(), (reach, 0)).cumsum(1)[..., None]  # (B, d_conv - 1 + L, 1)
        segments = segment[:, piece:].unfold(1, reach, piece)  # of `last`
        last = torch.where(segments == segments[..., -1:], last, 0)
        visible = [(segment[:, tap:tap + length] == segment[:, reach:]).to(seen.dtype)
                   for tap in range(reach)]
    y = Taps.apply(seen, conv1d.weight[:, 0].t().contiguous(), conv1d.bias, *visible)
    return F.silu(y), last if every else last[:, 0]


def causal_conv_step(x_t, conv1d, past, reset=None, every=None):
    """One step of causal_conv. x_t (B, channels)"""
    past = past.transpose(1, 2)  # as it lies in memory
    if reset is not None:
        past = torch.where(reset[:, None, None], 0, past)
    seen, y = torch.cat([past, x_t[:, None]], 1), conv1d.bias  # (B, d_conv, channels)
    for seen_tap, weight in zip(seen.unbind(1), conv1d.weight[:, 0].t().contiguous().unbind()):
        y = torch.addcmul(y, seen_tap, weight)  # (B, channels)
    return F.silu(y), seen[:, 1:].transpose(1, 2)


def initial_step_bias(count):
    """softplus of it is log-uniform in [1e-3, 1e-1]: memories from ten steps to a thousand."""
    dt = torch.empty(count).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def out_projection(width, d_model, layers):
    """The more layers there are, the smaller the weights: so the layers' sum keeps its size."""
    linear = nn.Linear(width, d_model, bias=False)
    linear.weight.data /= math.sqrt(layers)
    return linear


def heads_of(width, head_dim):
    heads, rest = divmod(width, head_dim)
    if rest:
        raise ValueError(f"head_dim {head_dim} does not divide the layer's width {width}")
    return heads


class Mamba(nn.Module):
    """Selective scan S6 behind a convolution, gated. `layers` is how many are stacked.

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
        self.out_proj = out_projection(width, d_model, layers)

    def initial_state(self, batch):
        (channels, _, d_conv), zeros = self.conv1d.weight.shape, self.D.new_zeros
        return State(zeros(batch, channels, d_conv - 1), zeros(batch, *self.A_log.shape))

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state; of one step: without L"""
        conv, scan = (causal_conv, s6) if u.dim() == 3 else (causal_conv_step, s6_step)
        state = self.initial_state(len(u)) if state is None else state
        x, gate = self.in_proj(u).chunk(2, -1)  # (B, L, W)
        x, recent = conv(x, self.conv1d, state.recent, reset, every)  # (B, L, W)
        dt, B, C = self.x_proj(x).split(self.sizes, -1)
        dt = F.softplus(F.linear(dt, self.dt_proj.weight) + self.dt_proj.bias)  # (B, L, W)
        y, memory = scan(x, dt, -self.A_log.exp(), B, C, self.D, state.memory, reset, every)
        return self.out_proj(y * F.silu(gate)), State(recent, memory)

    step = forward


class Mamba2(nn.Module):
    """The same around SSD: all inputs of the scan come from one projection, and the gated output
    is normalised. Raises ValueError if head_dim does not divide the width.

    Source: Dao and Gu (2024), figure 6; parameters as in their reference implementation.
    """

    def __init__(self, d_model, layers=1, *, d_state=16, d_conv=4, expand=2, head_dim=64):
        super().__init__()
        width = expand * d_model
        heads = heads_of(width, head_dim)
        self.head_dim, self.sizes = head_dim, [width, d_state, d_state]  # x B C
        channels = width + 2 * d_state
        self.parts = [width, channels, heads]  # gate, x B C, dt
        self.in_proj = nn.Linear(d_model, sum(self.parts), bias=False)
        self.conv1d = nn.Conv1d(channels, channels, d_conv, groups=channels)
        self.dt_bias = initial_step_bias(heads)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())  # (H)
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(width)
        self.out_proj = out_projection(width, d_model, layers)

    def initial_state(self, batch):
        (channels, _, d_conv), zeros = self.conv1d.weight.shape, self.D.new_zeros
        memory = zeros(batch, len(self.D), self.sizes[1], self.head_dim).mT  # as ssd leaves it
        return State(zeros(batch, channels, d_conv - 1), memory)

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state; of one step: without L"""
        conv, scan = (causal_conv, ssd) if u.dim() == 3 else (causal_conv_step, ssd_step)
        state = self.initial_state(len(u)) if state is None else state
        gate, xBC, dt = self.in_proj(u).split(self.parts, -1)  # (B, L, W) (.., W + 2 N) (.., H)
        xBC, recent = conv(xBC, self.conv1d, state.recent, reset, every)
        x, B, C = xBC.split(self.sizes, -1)
        x, dt = x.unflatten(-1, (-1, self.head_dim)), F.softplus(dt + self.dt_bias)
        y, memory = scan(x, dt, -self.A_log.exp(), B, C, self.D, state.memory, reset, every)
        y = GatedNorm.apply(y.flatten(-2), gate, self.norm.weight, self.norm.eps)  # (B, L, W)
        return self.out_proj(y), State(recent, memory)

    step = forward


def rotate(x, angle, dim=-1):
    """Turn pairs (a, b), which lie along `dim` of x, by angles (..., n)."""
    (a, b), cos, sin = x.unbind(dim), angle.cos(), angle.sin()
    return torch.stack([torch.addcmul(a * cos, b, -sin), torch.addcmul(a * sin, b, cos)], dim)


class Mamba3(nn.Module):
    """SSD by a trapezoidal rule, with B and C that turn, and without a convolution:

        h_t = a_t (h_{t-1} + (1 - s_t) dt_t x_{t-1} B_{t-1}^T) + s_t dt_t x_t B_t^T

    a_t = exp(dt_t A_t), and rates A and shares s come from the sequence, too. B and C, normalised
    and biased head by head, are turned by the running sum of dt_t angle_t. Only differences of
    these sums matter: the memory is kept as seen from its last step. One scan does all: it writes
    an input with s_t dt_t plus what step t + 1 will add of it, before t + 1 fades it. Raises
    ValueError if head_dim does not divide the width.

    Source: arXiv 2603.15569, single input and output; parameters as in their implementation.
    """

    def __init__(self, d_model, layers=1, *, d_state=16, expand=2, head_dim=64):
        super().__init__()
        width = expand * d_model
        heads, angles = heads_of(width, head_dim), d_state // 4  # half of the state turns, in pairs
        self.head_dim, self.sizes = head_dim, [width, width, *[d_state] * 2, *[heads] * 3, angles]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)  # gate x B C dt A s angle
        self.dt_bias = initial_step_bias(heads)
        self.B_norm, self.C_norm = RMSNorm(d_state), RMSNorm(d_state)
        self.B_bias, self.C_bias = (nn.Parameter(torch.ones(heads, 1, d_state)) for _ in range(2))
        self.D = nn.Parameter(torch.ones(heads))
        self.out_proj = out_projection(width, d_model, layers)

    def initial_state(self, batch):
        (_, width, N, *_), zeros = self.sizes, self.D.new_zeros  # recent: the last x and B
        return State(zeros(batch, width + N), zeros(batch, len(self.D), N, self.head_dim).mT)

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state"""
        check_sizes(u, every)
        state = self.initial_state(len(u)) if state is None else state
        gate, x, key, B, C, now, later, rate, turn = self.scan_inputs(u)
        last = slice((every or x.shape[1]) - 1, None, every or x.shape[1])  # of every piece
        (before, memory), recent = state, torch.cat([x.flatten(2)[:, last], key[:, last]], -1)
        own, angle = self.D + now * (B * C).sum(-1), finite(turn).cumsum(1)
        B, C = self.turned(B, angle), self.turned(C, angle)
        if reset is not None:
            before = torch.where(reset[:, :1], 0, before)
        memory = memory + outer(later[:, 0], *self.by_head(*before.split(self.sizes[1:3], -1)))
        later = finite(F.pad(later[:, 1:], (0, 0, 0, 1)))  # the next step's, moved to its input
        y, memory = in_parallel(SSD, x, now + later, B, C, rate, own, state=memory, reset=reset,
                                every=every)
        memory = memory if every else memory[:, None]  # (B, pieces, H, P, N)
        memory = memory - outer(later[:, last], x[:, last], B[:, last])
        memory = self.turned(memory, -angle[:, last, :, None])
        after = State(recent, memory) if every else State(recent[:, 0], memory[:, 0])
        return self.out_proj(y.flatten(2) * F.silu(gate)), after

    def step(self, u_t, state, reset=None):
        """u_t (B, d_model), reset (B) -> y_t (B, d_model), state"""
        gate, x, key, B, C, now, later, rate, turn = self.scan_inputs(u_t)
        before = self.by_head(*state.recent.split(self.sizes[1:3], -1))
        h = state.memory + outer(later, *before)  # (B, H, P, N)
        if reset is not None:
            h = torch.where(reset[:, None, None, None], 0, h)
        h = self.turned(rate.exp()[..., None, None] * h, -turn[:, :, None]) + outer(now, x, B)
        y = torch.addcmul((h * C[:, :, None]).sum(-1), self.D[:, None], x)  # (B, H, P)
        state = State(torch.cat([x.flatten(1), key], -1), h)
        return self.out_proj(y.flatten(1) * F.silu(gate)), state

    def scan_inputs(self, u):
        """-> gate (B, L, W), x (B, L, H, P), key (B, L, N), B, C (B, L, H, N); what a step writes
        of its own input, what of the one before, and its rate (B, L, H); its turn (B, L, H, n)"""
        gate, x, *rest = self.in_proj(u).split(self.sizes, -1)
        x, B, C, dt, A, share, angle = at_least_float32(x, *rest)
        dt, share, key = F.softplus(dt + self.dt_bias), share.sigmoid(), self.B_norm(B)
        A = -(A.clamp(min=0) + 1 / (1 - A.clamp(max=0))).clamp(min=1e-4)  # smooth, and below 0
        C = self.C_norm(C)[..., None, :] + self.C_bias[:, 0]
        turn = dt[..., None] * (math.pi * angle.tanh())[..., None, :]
        turn = turn.fmod(2 * math.pi)  # whole turns would only take digits from their sum
        x, B = self.by_head(x, key)
        return gate, x, key, B, C, share * dt, (1 - share) * dt, dt * A, turn

    def turned(self, B, angle):
        """B (..., N) with its first n pairs of neighbours turned by angles (..., n)."""
        pairs, rest = B.tensor_split([2 * angle.shape[-1]], -1)
        return torch.cat([rotate(pairs.unflatten(-1, (-1, 2)), angle).flatten(-2), rest], -1)

    def by_head(self, x, key):
        return x.unflatten(-1, (-1, self.head_dim)), key[..., None, :] + self.B_bias[:, 0]


def outer(amount, x, B):
    """(..., H), (..., H, P), (..., H, N) -> (..., H, P, N)"""
    return (amount[..., None] * x)[..., None] * B[..., None, :]


def one_step(layer, u_t, state, reset=None):
    """u_t (B, d_model), reset (B) -> y_t (B, d_model), state: a sequence of one step."""
    y, state = layer(u_t[:, None], state, None if reset is None else reset[:, None])
    return y[:, 0], state


class GRU(nn.Module):
    """One state, gated. Only what the inputs bring to the gates is computed for all steps at once.

        r, z = sigmoid(U u_t + V h_{t-1})  n = tanh(U u_t + r V h_{t-1})  h_t = n + z (h_{t-1} - n)

    Source: Cho et al. (2014), with biases in U and V, as in cuDNN and torch.nn.GRU.
    """

    def __init__(self, d_model, layers=1):
        super().__init__()
        self.input, self.hidden = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, 3 * d_model)

    def initial_state(self, batch):
        zeros, width = self.hidden.weight.new_zeros, self.hidden.in_features
        return State(zeros(batch, 0), zeros(batch, width))

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state"""
        check_sizes(u, every)
        _, h = self.initial_state(len(u)) if state is None else state
        resets, y = itertools.repeat(None) if reset is None else reset.unbind(1), []
        for inputs, reset_t in zip(self.input(u).unbind(1), resets):
            if reset_t is not None:
                h = torch.where(reset_t[:, None], 0, h)
            (r, z, n), (r_h, z_h, n_h) = inputs.chunk(3, -1), self.hidden(h).chunk(3, -1)
            n = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
            h = n + torch.sigmoid(z + z_h) * (h - n)  # (B, d_model)
            y.append(h)
        y = torch.stack(y, 1)
        h = y[:, every - 1::every] if every else h
        return y, State(h[..., :0], h)

    step = one_step


class Transformer(nn.Module):
    """Causal attention over `length` steps, with rotary positions, then an MLP. The memory is a
    cache of those steps' keys and values (B, length, 2 d_model), zero before the first step or a
    reset; recent (B) counts the steps since then. A step always costs as much as with a full cache.
    Raises ValueError if head_dim is odd or does not divide d_model.

    Source: Vaswani et al. (2017), with norms in front (Xiong et al., 2020); Su et al. (2021).
    """

    def __init__(self, d_model, layers=1, *, head_dim=64, length=128):
        super().__init__()
        heads_of(d_model, head_dim)  # which raises if it does not divide
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd, but positions turn pairs")
        self.head_dim, self.length = head_dim, length
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=False)  # queries keys values
        self.out_proj = out_projection(d_model, d_model, 2 * layers)
        self.mlp = nn.Sequential(RMSNorm(d_model), nn.Linear(d_model, 4 * d_model), nn.GELU(),
                                 out_projection(4 * d_model, d_model, 2 * layers))

    def initial_state(self, batch):
        zeros, width = self.out_proj.weight.new_zeros, self.out_proj.in_features
        return State(zeros(batch), zeros(batch, self.length, 2 * width))

    def forward(self, u, state=None, reset=None, every=None):
        """u (B, L, d_model), reset (B, L) -> y (B, L, d_model), state"""
        check_sizes(u, every)
        (batch, L, width), length, piece = u.shape, self.length, every or u.shape[1]
        recent, cache = self.initial_state(batch) if state is None else state
        past = 0 if state is None else length
        times = torch.arange(-past, L, device=u.device)
        now, since = times[past:], -recent[:, None].expand(batch, L)
        if reset is not None:
            opened = torch.where(reset, now, -1).cummax(1).values
            since = torch.where(opened < 0, since, opened)  # (B, L): the first step that each sees
        qk, v = at_least_float32(*self.in_proj(u).split([2 * width, width], -1))
        half = self.head_dim // 2
        speed = 1e4 ** (-torch.arange(half, device=u.device) / half)  # radians a step
        angle = (now - since)[..., None, None] * speed  # (B, L, 1, head_dim / 2)
        q, k = rotate(qk.unflatten(-1, (-1, 2, half)), angle, -2).flatten(2).chunk(2, -1)
        seen = torch.cat([k, v], -1)
        seen = torch.cat([cache.to(v.dtype), seen], 1) if past else seen  # (B, S, 2 d_model)
        mask, lost = None, None
        if past or reset is not None or L > length:
            first = torch.maximum(since, now - length + 1)[..., None]
            mask = (first <= times) & (times <= now[:, None])  # (B, L, S): what is visible
            if reset is not None:  # what is not finite must not be multiplied by 0, as in the scans
                lost = (mask & ~seen.sum(-1).isfinite()[:, None]).any(-1, keepdim=True)
            mask = mask[:, None]
        u, *qkv = (part if lost is None else finite(part) for part in (u, q, *seen.chunk(2, -1)))
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in qkv)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        y = y + self.mlp(u + y)
        ends, since = now[piece - 1::piece] + 1, since[:, piece - 1::piece]  # (B, pieces)
        start = past + piece - length  # of the first cache in what was seen
        seen = F.pad(seen, (0, 0, -start, 0)) if start < 0 else seen[:, start:]
        caches = seen.unfold(1, length, piece).mT  # (B, pieces, length, 2 d_model)
        if reset is not None:
            y = y.masked_fill(lost, math.nan)
            behind = torch.arange(-length, 0, device=u.device) + ends[:, None] < since[..., None]
            caches = caches.masked_fill(behind[..., None], 0)
        after = State(ends - since, caches)
        return y, after if every else State(*(part[:, 0] for part in after))

    step = one_step


# To add one: Layer(d_model, layers, ...), given those of d_state, head_dim and length that it
# names, with the same three methods. forward takes whole sequences, a State or None, resets and
# `every` (if given, it returns the State after each piece); step takes one step. A State is two
# tensors (B, ...), zeros at first, returned and never changed in place.
BACKBONES = {"mamba2": Mamba2, "mamba": Mamba, "mamba3": Mamba3, "gru": GRU,
             "transformer": Transformer}


# ---- The sequence model --------------------------------------------------------------------------


class ResidualLayer(nn.Module):
    """u + dropout(mixer(norm(u)))."""

    def __init__(self, d_model, mixer, dropout):
        super().__init__()
        self.norm, self.mixer, self.dropout = RMSNorm(d_model), mixer, nn.Dropout(dropout)

    def forward(self, u, state=None, reset=None, every=None):
        y, state = self.mixer(self.norm(u), state, reset, every)
        return u + self.dropout(y), state

    def step(self, u_t, state, reset=None):
        y_t, state = self.mixer.step(self.norm(u_t), state, reset)
        return u_t + self.dropout(y_t), state


class SequenceModel(nn.Module):
    """Sums up at every step what came so far: a stem, residual layers of one kind, a final norm."""

    def __init__(self, d_input, d_model, *, layers=2, backbone="mamba2", d_state=16, head_dim=64,
                 length=128, dropout=0.1):
        super().__init__()
        self.d_model, layer = d_model, BACKBONES[backbone]
        sizes = dict(d_state=d_state, head_dim=head_dim, length=length)
        sizes = {name: sizes[name] for name in sizes if name in signature(layer).parameters}
        self.stem = nn.Sequential(nn.Linear(d_input, d_model), RMSNorm(d_model),
                                  nn.SiLU(), nn.Dropout(dropout))
        self.layers = nn.ModuleList(ResidualLayer(d_model, layer(d_model, layers, **sizes), dropout)
                                    for _ in range(layers))
        self.norm = RMSNorm(d_model)

    def initial_state(self, batch):
        return tuple(layer.mixer.initial_state(batch) for layer in self.layers)

    def forward(self, inputs, state=None, reset=None, every=None):
        """inputs (B, L, d_input), reset (B, L) -> d (B, L, d_model), a state for each layer: after
        the last step or, if `every` is given, after each piece of so many (B, L / every, ...)."""
        before = itertools.repeat(None) if state is None else state
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


# ---- python scan.py: are the scans right on this machine? ----------------------------------------


def main():
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    randn = functools.partial(torch.randn, device=device)
    for name, scan, loop, channels, rates in (("s6", s6, s6_sequential, (128,), (128, 16)),
                                              ("ssd", ssd, ssd_sequential, (2, 64), (2,))):
        dt, B, C = (randn(2, 300, size) for size in (channels[0], 16, 16))
        inputs = (randn(2, 300, *channels), F.softplus(dt - 4), -randn(rates).exp(), B, C,
                  randn(channels[0]), randn(2, *channels, 16))  # x dt A B C D state
        inputs, reset = [part.requires_grad_() for part in inputs], randn(2, 300) > 2
        both = [function(*inputs, reset) for function in (scan, loop)]
        both = [(y, h, *torch.autograd.grad(y.sum() + h.sum(), inputs)) for y, h in both]
        error = max((a - b).abs().max() / b.abs().max() for a, b in zip(*both)).item()
        print(f"{name:4} on {device} against its loop: the largest relative error, of values and "
              f"gradients, is {error:.1e}")
        assert error < 1e-4, "the parallel scan is wrong on this device"


if __name__ == "__main__":
    main()
