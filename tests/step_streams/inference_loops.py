"""Inference, sampling and decoding loops that mark no step, for record.py.

Models are tiny: only the order of ops and the identity of storages count.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from loops import loop, randint, randn
from models import CNN, GPT, LSTM, mlp


@loop
@torch.no_grad()
def lstm_inf(r):
    model, kept = r.host(LSTM), []
    for _ in range(80):
        r.iteration()
        kept.append(model(torch.randn(12, 2, 8)))


@loop
@torch.no_grad()
def rnn64_inf(r):
    """64 steps of an unrolled layer; the output of each is kept."""
    w_in, w_state, kept = r.host(nn.Linear, 8, 8), r.host(nn.Linear, 8, 8), []
    for _ in range(60):
        r.iteration()
        x, h = randn(r, 64, 2, 8), torch.zeros(2, 8)
        for t in range(64):
            h = (w_in(x[t]) + w_state(h)).tanh()
            kept.append(h)


@torch.no_grad()
def infer_cnn(r, frozen):
    model, kept = r.host(CNN, 5).eval(), []
    model.requires_grad_(not frozen)
    for _ in range(200):
        r.iteration()
        kept.append(model(randn(r, 4, 1, 6, 6)).softmax(1))


@loop
def cnn_inf(r):
    infer_cnn(r, frozen=False)


@loop
def cnn_inf_frozen(r):
    infer_cnn(r, frozen=True)


@loop
@torch.no_grad()
def albert_inf(r, frozen=False):
    model = r.host(GPT, 4, True).eval()
    model.requires_grad_(not frozen)
    for _ in range(100):
        r.iteration()
        model(randint(r, 20, 2, 6))


@loop
def albert_inf_frozen(r):
    albert_inf(r, frozen=True)


@loop
@torch.no_grad()
def albert12_inf(r):
    """12 blocks with the same weights; three outputs kept."""
    model, kept = r.host(GPT, 12, True).eval(), []
    for _ in range(60):
        r.iteration()
        logits = model(randint(r, 20, 2, 6))
        kept.append((logits, logits.argmax(-1), logits.logsumexp(-1)))


# -- sampling and decoding


@torch.no_grad()
def sample(r, scale):
    first, second, kept = r.host(mlp, 17, 32, 16), r.host(CNN, 4).eval(), []
    for _ in range(20):
        x = torch.randn(4, 16)
        for t in range(20):
            r.iteration()
            noise = first(torch.cat([x, torch.full((4, 1), t / 20.0)], 1))
            noise = noise + second(noise.view(4, 1, 4, 4)).mean()
            x = (x - scale(noise, t)) / (1.0 + t * 0.01) + torch.randn_like(x) * (0.01 * t)
        kept.append(x)


@loop
def diff(r):
    """Diffusion: 20 steps a sample; what depends on the step is a float."""
    sample(r, lambda noise, t: noise * (0.1 * t))


@loop
def diff_int(r):
    """The step number itself meets a tensor: an integer constant, new each step."""
    sample(r, lambda noise, t: noise * 0.1 * t)


@loop
@torch.no_grad()
def decode(r):
    """The key and value cache grows by concatenation: geometry is new each step."""
    model = r.host(GPT, 3).eval()
    for _ in range(4):
        caches = [[] for _ in range(3)]
        r.iteration()
        t = model(randint(r, 20, 2, 5), caches)[:, -1].argmax(-1, keepdim=True)
        out = [t]
        for k in range(40):
            r.iteration()
            t = model(t, caches, 5 + k)[:, -1].argmax(-1, keepdim=True)
            out.append(t)
        torch.cat(out, 1).sum().item()


@loop
@torch.no_grad()
def decode_static(r):
    """A static cache, written in place at a position that lives on the device."""
    model = r.host(GPT, 3).eval()
    keys, values = ([torch.zeros(2, 48, 16) for _ in range(3)] for _ in range(2))
    for _ in range(5):
        t, position = randint(r, 20, 2, 1), torch.zeros(1, dtype=torch.long)
        for _ in range(40):
            r.iteration()
            x = model.e(t) + model.p(position)
            for block, key, value in zip(model.b, keys, values):
                h = block.n1(x)
                q = block.q(h)
                key.index_copy_(1, position, block.k(h))
                value.index_copy_(1, position, block.v(h))
                scores = (q @ key.transpose(1, 2) * 0.25).masked_fill(torch.arange(48) > position, -math.inf)
                x = x + block.o(torch.softmax(scores, -1) @ value)
                x = x + block.f2(F.gelu(block.f1(block.n2(x))))
            t = model.h(x)[:, -1].argmax(-1, keepdim=True)
            position.add_(1)
