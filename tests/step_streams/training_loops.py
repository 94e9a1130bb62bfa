"""Training loops that mark no step, for record.py.

Models are tiny: only the order of ops and the identity of storages count.
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

from loops import loop, randint, randn
from models import CNN, GPT, LSTM, SGD, Adam, clip_gradients, mlp


@loop
def mlp_sgd(r, build=None):
    """A running sum of the loss, read every 50 iterations."""
    model = build() if build else r.host(mlp)
    optimizer, total = SGD(model.parameters()), r.host(torch.zeros, ())
    for i in range(200):
        r.iteration()
        optimizer.zero_grad()
        x, y = randn(r, 8, 16), randint(r, 4, 8)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            total += loss.detach()
        if i % 50 == 49:
            total.item()


@loop
def mlp_built_on_device(r):
    mlp_sgd(r, mlp)


@loop
def mlp_prefetch(r):
    """The next batch is copied before the step that uses the last one."""
    model = r.host(mlp)
    optimizer = Adam(model.parameters())
    batch = randn(r, 8, 16), randint(r, 4, 8)
    for _ in range(200):
        r.iteration()
        x, y = batch
        batch = randn(r, 8, 16), randint(r, 4, 8)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@loop
def mlp_read(r):
    """The loss is read before the backward pass every 50; data made on the device."""
    model = r.host(mlp)
    optimizer = SGD(model.parameters(), weight_decay=0.01)
    for i in range(200):
        r.iteration()
        x, y = torch.randn(8, 16), torch.randn(8, 4)
        loss = F.mse_loss(model(x), y)
        if i % 50 == 49:
            loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@loop
def cnn_eval(r):
    model = r.host(CNN)
    optimizer = Adam(model.parameters())
    for i in range(120):
        r.iteration()
        optimizer.zero_grad()
        x, y = randn(r, 4, 1, 6, 6), randint(r, 4, 4)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if i % 20 == 19:
            model.eval()
            total = 0
            with torch.no_grad():
                for _ in range(5):
                    r.iteration()
                    x, y = randn(r, 4, 1, 6, 6), randint(r, 4, 4)
                    total = total + (model(x).argmax(1) == y).sum()
            total.item()
            model.train()


def train_gpt(r, shared, blocks, set_to_none, iterations):
    model = r.host(GPT, blocks, shared)
    parameters = list(model.parameters())
    optimizer = Adam(parameters, set_to_none=set_to_none, weight_decay=0.01)
    for _ in range(iterations):
        r.iteration()
        optimizer.zero_grad()
        t = randint(r, 20, 2, 6)
        loss = F.cross_entropy(model(t[:, :-1]).reshape(-1, 20), t[:, 1:].reshape(-1))
        loss.backward()
        clip_gradients(parameters)
        optimizer.step()


@loop
def gpt_zero(r):
    train_gpt(r, shared=False, blocks=3, set_to_none=False, iterations=30)


@loop
def albert(r):
    train_gpt(r, shared=True, blocks=4, set_to_none=True, iterations=30)


@loop
def ckpt(r):
    """Gradient checkpointing by hand: blocks run without grad, and again in the backward pass."""
    model = r.host(GPT, 4)
    optimizer = SGD(model.parameters())
    for _ in range(30):
        r.iteration()
        t = randint(r, 20, 2, 6)
        optimizer.zero_grad()
        first = model.e(t) + model.p(torch.arange(6))
        x, inputs = first.detach(), []
        with torch.no_grad():
            for block in model.b:
                inputs.append(x)
                x = block(x)
        x = x.detach().requires_grad_()
        F.cross_entropy(model.h(x).view(-1, 20), t.view(-1)).backward()
        gradient = x.grad
        for block, x in zip(reversed(model.b), reversed(inputs)):
            x = x.detach().requires_grad_()
            block(x).backward(gradient)
            gradient = x.grad
        first.backward(gradient)
        optimizer.step()
        del x, gradient, first, inputs


@loop
def accum(r):
    model = r.host(mlp)
    optimizer = Adam(model.parameters())
    for i in range(400):
        if i % 4 == 0:
            r.iteration()
        x, y = randn(r, 8, 16), randint(r, 4, 8)
        (F.cross_entropy(model(x), y) / 4).backward()
        if i % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


@loop
def ema_clip(r):
    """A moving average of the weights, a static input buffer, gradients zeroed in place, a read every 30."""
    model = r.host(CNN, 2)
    parameters = list(model.parameters())
    optimizer = Adam(parameters, set_to_none=False, weight_decay=0.1)
    averages = [p.detach().clone() for p in parameters]
    x, y = torch.zeros(4, 1, 6, 6), randint(r, 4, 4)
    for i in range(100):
        r.iteration()
        x.copy_(randn(r, 4, 1, 6, 6))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if i % 30 == 7:
            loss.item()
        clip_gradients(parameters)
        optimizer.step()
        with torch.no_grad():
            for average, p in zip(averages, parameters):
                average.mul_(0.99).add_(p, alpha=1 - 0.99)


@loop
def phases(r):
    """A frozen trunk, then all is trained, then inference; twice."""
    model = r.host(CNN, 3)
    parameters = list(model.parameters())
    for _ in range(2):
        for trained, iterations in (parameters[-2:], 40), (parameters, 60):
            for p in parameters:
                p.requires_grad_(any(p is q for q in trained))
            optimizer = SGD(trained)
            for _ in range(iterations):
                r.iteration()
                optimizer.zero_grad()
                x = torch.randn(4, 1, 6, 6)
                F.mse_loss(model(x), torch.zeros(4, 4)).backward()
                optimizer.step()
        model.eval()
        kept = []
        with torch.no_grad():
            for _ in range(60):
                r.iteration()
                kept.append(model(torch.randn(4, 1, 6, 6)))
        model.train()


@loop
def gan(r):
    generator, critic = r.host(mlp, 4, 16, 16), r.host(mlp, 16, 16, 1)
    train_generator, train_critic = Adam(generator.parameters()), Adam(critic.parameters())
    error = F.binary_cross_entropy_with_logits
    for _ in range(100):
        r.iteration()
        train_critic.zero_grad()
        x, label = randn(r, 8, 16), torch.empty(8, 1).uniform_(0.8, 1.0)
        error(critic(x), label).backward()
        fake = generator(torch.randn(8, 4))
        error(critic(fake.detach()), torch.zeros(8, 1)).backward()
        train_critic.step()
        train_generator.zero_grad()
        error(critic(fake), torch.ones(8, 1)).backward()
        train_generator.step()


@loop
def wgan(r):
    """Five steps of the critic with clamped weights, then one of the generator."""
    generator, critic = r.host(mlp, 4, 16, 16), r.host(mlp, 16, 16, 1)
    train_generator, train_critic = SGD(generator.parameters(), momentum=0), SGD(critic.parameters(), momentum=0)
    for _ in range(50):
        for _ in range(5):
            r.iteration()
            x = randn(r, 8, 16)
            train_critic.zero_grad()
            with torch.no_grad():
                fake = generator(torch.randn(8, 4))
            (critic(fake).mean() - critic(x).mean()).backward()
            train_critic.step()
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-0.1, 0.1)
        r.iteration()
        train_generator.zero_grad()
        (-critic(generator(torch.randn(8, 4))).mean()).backward()
        train_generator.step()


# -- reinforcement learning


@loop
def ppo(r):
    """16 steps of an environment on the device, then 3 epochs of 2 minibatches; no reads."""
    policy, value = r.host(mlp, 4, 16, 2), r.host(mlp, 4, 16, 1)
    optimizer = Adam([*policy.parameters(), *value.parameters()])
    state, dynamics = randn(r, 8, 4), randn(r, 4, 4)
    for _ in range(20):
        r.iteration()
        rows = []
        with torch.no_grad():
            for _ in range(16):
                log_p = F.log_softmax(policy(state), 1)
                action = torch.multinomial(log_p.exp(), 1)
                before, state = state, (state @ dynamics).tanh() + action * 0.1
                rows.append((before, action, log_p.gather(1, action), state.sum(1, keepdim=True)))
            states, actions, log_ps, rewards = map(torch.cat, zip(*rows))
            del rows
        for _ in range(3):
            order = torch.randperm(128)
            for k in range(2):
                r.iteration()
                index = order[k * 64 : k * 64 + 64]
                s = states[index]
                advantage = rewards[index] - value(s)
                ratio = (F.log_softmax(policy(s), 1).gather(1, actions[index]) - log_ps[index]).exp()
                gain = torch.min(ratio * advantage.detach(), ratio.clamp(0.8, 1.2) * advantage.detach())
                loss = -gain.mean() + advantage.pow(2).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


@loop
def rl(r):
    """REINFORCE: every action is read, episode lengths vary."""
    lengths = random.Random(2)
    policy = r.host(mlp, 4, 16, 2)
    optimizer = Adam(policy.parameters())
    for _ in range(60):
        steps, log_ps = lengths.randint(4, 14), []
        r.iteration()
        for _ in range(steps):
            log_p = F.log_softmax(policy(randn(r, 1, 4)), 1)
            action = torch.multinomial(log_p.exp(), 1).item()
            log_ps.append(log_p[0, action])
        loss = -(torch.stack(log_ps) * randn(r, steps)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# -- unrolled recurrent networks


def train_lstm(r, lengths, iterations):
    choose = random.Random(1)
    model = r.host(LSTM)
    optimizer = SGD(model.parameters(), momentum=0)
    for _ in range(iterations):
        length = choose.choice(lengths)
        r.iteration()
        x, y = randn(r, length, 2, 8), randn(r, length, 2, 4)
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()


@loop
def lstm(r):
    train_lstm(r, [12], 30)


@loop
def lstm40(r):
    train_lstm(r, [40], 14)


@loop
def lstm_var(r):
    train_lstm(r, [6, 8, 10, 12], 40)


@loop
def seq2seq(r):
    """Lengths vary; every tenth iteration a batch is decoded greedily."""
    choose = random.Random(3)
    embed, encode, decode, project = (
        r.host(make, *sizes)
        for make, *sizes in ((nn.Embedding, 20, 8), (nn.Linear, 16, 8), (nn.Linear, 24, 8), (nn.Linear, 8, 20))
    )
    optimizer = Adam([p for m in (embed, encode, decode, project) for p in m.parameters()])

    def encoded(x):
        h, states = torch.zeros(2, 8), []
        for t in range(x.shape[1]):
            h = encode(torch.cat([embed(x[:, t]), h], 1)).tanh()
            states.append(h)
        return torch.stack(states, 1), h

    def decoded(y, h, states):
        attention = torch.softmax(states @ h.unsqueeze(2), 1)
        return decode(torch.cat([embed(y), h, (attention * states).sum(1)], 1)).tanh()

    for i in range(40):
        r.iteration()
        length = choose.choice([5, 6, 8])
        x, y = randint(r, 20, 2, length), randint(r, 20, 2, length)
        states, h = encoded(x)
        loss = 0
        for t in range(length - 1):
            h = decoded(y[:, t], h, states)
            loss = loss + F.cross_entropy(project(h), y[:, t + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 10 == 9:
            with torch.no_grad():
                r.iteration()
                x = randint(r, 20, 2, 6)
                states, h = encoded(x)
                t, out = x[:, 0], []
                for _ in range(12):
                    h = decoded(t, h, states)
                    t = project(h).argmax(1)
                    out.append(t)
