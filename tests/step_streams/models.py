"""The models and optimizers of loops.py, written out op by op.

torch.optim's optimizers are not used: with several tensors at a time
(`_foreach`) they would hide what a C++ optimizer does, one parameter after
another.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class SGD:
    def __init__(self, parameters, lr=0.01, momentum=0.9, set_to_none=True, weight_decay=0):
        self.parameters = list(parameters)
        self.lr, self.momentum, self.set_to_none, self.weight_decay = lr, momentum, set_to_none, weight_decay
        self.state = {}

    def zero_grad(self):
        for p in self.parameters:
            if p.grad is None:
                continue
            if self.set_to_none:
                p.grad = None
            else:
                p.grad.zero_()

    @torch.no_grad()
    def step(self):
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            update = p.grad
            if self.weight_decay:
                update = update.add(p, alpha=self.weight_decay)
            if self.momentum:
                if i in self.state:
                    self.state[i].mul_(self.momentum).add_(update)
                else:
                    self.state[i] = update.clone()
                update = self.state[i]
            p.add_(update, alpha=-self.lr)


class Adam(SGD):
    def __init__(self, parameters, lr=1e-3, set_to_none=True, weight_decay=0):
        super().__init__(parameters, lr, 0, set_to_none, weight_decay)
        self.steps = 0

    @torch.no_grad()
    def step(self):
        self.steps += 1
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            if i not in self.state:
                self.state[i] = torch.zeros_like(p), torch.zeros_like(p)
            first, second = self.state[i]
            if self.weight_decay:
                p.mul_(1 - self.lr * self.weight_decay)
            first.mul_(0.9).add_(p.grad, alpha=1 - 0.9)
            second.mul_(0.999).addcmul_(p.grad, p.grad, value=1 - 0.999)
            scale = (second.sqrt() / math.sqrt(1 - 0.999**self.steps)).add_(1e-8)
            p.addcdiv_(first, scale, value=-self.lr / (1 - 0.9**self.steps))


@torch.no_grad()
def clip_gradients(parameters):
    gradients = [p.grad for p in parameters]
    norm = torch.stack([g.norm(2) for g in gradients]).norm(2)
    factor = (1.0 / (norm + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(factor)


def mlp(inputs=16, hidden=32, outputs=4):
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class CNN(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(blocks))
        self.head = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = self.first(x)
        for convolution, norm in zip(self.convolutions, self.norms):
            x = x + F.relu(norm(convolution(x)))
        return self.head(self.dropout(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.f1, self.f2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, cache=None):
        h = self.n1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 1), torch.cat([cache[1], v], 1)
            cache[:] = [k, v]
        x = x + self.o(torch.softmax(q @ k.transpose(1, 2) * 0.25, -1) @ v)
        return x + self.f2(F.gelu(self.f1(self.n2(x))))


class GPT(nn.Module):
    def __init__(self, blocks=3, shared=False):
        super().__init__()
        self.e, self.p, self.h = nn.Embedding(20, 16), nn.Embedding(200, 16), nn.Linear(16, 20)
        self.b = nn.ModuleList(Block() for _ in range(1 if shared else blocks))
        self.blocks = blocks

    def forward(self, t, caches=None, position=0):
        x = self.e(t) + self.p(torch.arange(position, position + t.shape[1]))
        for i in range(self.blocks):
            x = self.b[i % len(self.b)](x, caches[i] if caches is not None else None)
        return self.h(x)


class LSTM(nn.Module):
    def __init__(self, width=8, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)]) for _ in range(layers)
        )
        self.out, self.width = nn.Linear(width, 4), width

    def forward(self, x):
        batch = x.shape[1]
        states = [(torch.zeros(batch, self.width), torch.zeros(batch, self.width)) for _ in self.layers]
        outputs = []
        for t in range(x.shape[0]):
            z = x[t]
            for i, (from_input, from_state) in enumerate(self.layers):
                h, c = states[i]
                gate_i, gate_f, gate_g, gate_o = (from_input(z) + from_state(h)).chunk(4, 1)
                c = gate_f.sigmoid() * c + gate_i.sigmoid() * gate_g.tanh()
                h = gate_o.sigmoid() * c.tanh()
                states[i] = h, c
                z = h
            outputs.append(self.out(z))
        return torch.stack(outputs)
