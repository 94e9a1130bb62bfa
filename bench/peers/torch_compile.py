#!/usr/bin/env python3
"""Times Python's torch.compile against Python's eager on what bench_models times from C++.

    torch_compile.py --device cuda:0 --out FILE.json [--modes MODE...] [--rows GLOB...] [--warm N]

The rows are those of bench/workloads.cpp: models, sizes, steps and, drawn from the same seed,
numbers. A training step is compiled as Python's users have it: the forward pass with the
loss, and the optimizer's step, since torch.compile breaks its graph at `backward`. Gradients
that a simulation needs are taken by torch.func, which it traces in one graph.

Each row of FILE, which is written again after each, has
  eager_ms                   median step, with Adam as Python has it by default
  eager_single_tensor_ms     the same with Adam as C++ has it; training, on a GPU
  MODE_ms, MODE_speedup      the compiled step, in turns with eager, and the median of the ratios
  eager_throughput_ms, MODE_throughput_ms    of steps queued on a GPU without waiting for each
  first_step_s               by mode: the first step, with its compile
  cold_first_step_s          the same in the processes of --warm, beside each other; first_step_s
                             is then that of a process that finds the compiler's cache filled
  max_rel_diff               by mode: of the outputs or losses of the first steps against eager's
  graphs, graph_breaks, cudagraph_skips      by mode, as torch.compile counts them
  error                      first line of what went wrong, in which mode
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import fnmatch
import gc
import json
import math
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Callable, Optional

import torch
import torch._dynamo.utils
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], Tensor]

MODES = ("default", "reduce-overhead")
PATHS = 1 << 20
COMPARED_STEPS = 3
SETTLING_STEPS = 5  # CUDA graphs are recorded in the second step of a kind
SHORTEST_TURN_S = 20e-3
FEWEST_PAIRS = 10
QUEUED_S = 50e-3
QUEUES = 5


@dataclasses.dataclass(frozen=True)
class Way:
    """How and where a row runs."""

    device: torch.device
    mode: Optional[str] = None  # torch.compile's; None is eager
    batch: Optional[int] = None
    foreach: Optional[bool] = None  # Adam's

    @property
    def cuda_graphs(self) -> bool:
        return self.mode == "reduce-overhead"

    def compiled(self, function):
        if self.mode is None:
            return function
        # Sizes never change; left to guess, it takes a second optimizer for one whose sizes do.
        return torch.compile(function, mode=self.mode, dynamic=False)

    def adam(self, model: nn.Module, **options) -> torch.optim.Adam:
        capturable = self.mode is not None and self.device.type == "cuda"
        return torch.optim.Adam(
            model.parameters(), capturable=capturable, foreach=self.foreach, **options)

    def gradients(self, function, arguments):
        """Gradients of the first that `function` returns, then both that it returns."""
        if self.mode is not None:
            numbers = tuple(range(len(arguments)))
            transformed = torch.func.grad_and_value(function, argnums=numbers, has_aux=True)
            gradients, (value, rest) = transformed(*arguments)
            return gradients, value, rest
        with torch.enable_grad():
            leaves = [a if a.requires_grad else a.detach().requires_grad_() for a in arguments]
            value, rest = function(*leaves)
            return torch.autograd.grad(value, leaves), value.detach(), rest.detach()


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = convolution(inputs, outputs, 3, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs, 3, 1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(convolution(inputs, outputs, 1, stride))
            self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x):
        residual = torch.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, width: int = 16, blocks_per_stage: int = 3):
        super().__init__()
        self.stem = convolution(3, width, 3, 1)
        self.stem_norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential()
        channels = width
        for stage in range(3):
            for block in range(blocks_per_stage):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(ResidualBlock(channels, width << stage, stride))
                channels = width << stage
        self.classifier = nn.Linear(channels, 10)

    def forward(self, images):
        features = self.blocks(torch.relu(self.stem_norm(self.stem(images))))
        return self.classifier(features.mean((2, 3)))


class LstmLm(nn.Module):
    """One layer whose cells are written out, a time step after another."""

    def __init__(self, vocabulary: int = 96, embedding: int = 128, hidden: int = 128):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.input_gates = nn.Linear(embedding, 4 * hidden)
        self.hidden_gates = nn.Linear(hidden, 4 * hidden, bias=False)
        self.decoder = nn.Linear(hidden, vocabulary)

    def forward(self, tokens):
        embedded = self.embedding(tokens)
        hidden = cell = embedded.new_zeros(embedded.size(0), self.hidden_gates.in_features)
        outputs = []
        for moment in range(embedded.size(1)):
            x = embedded.select(1, moment)
            gates = (self.input_gates(x) + self.hidden_gates(hidden)).chunk(4, dim=1)
            entering, forget, out = (torch.sigmoid(gates[i]) for i in (0, 1, 3))
            cell = forget * cell + entering * torch.tanh(gates[2])
            hidden = out * torch.tanh(cell)
            outputs.append(hidden)
        return self.decoder(torch.stack(outputs, dim=1))


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """GPT-2's weights and those of DCGAN: both take the same deviation."""
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d, nn.ConvTranspose2d)):
        module.weight.normal_(0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        module.weight.normal_(1.0, 0.02)
    if isinstance(module, nn.Linear):
        module.bias.zero_()


class TransformerBlock(nn.Module):
    def __init__(self, fused: bool, context: int, width: int, heads: int = 4):
        super().__init__()
        self.fused, self.heads = fused, heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.register_buffer("future", torch.ones(context, context, dtype=torch.bool).triu(1))
        self.feed_forward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.0)

    def attend(self, query, key, value):
        if self.fused:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        length = query.size(-2)
        scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.size(-1)))
        scores = scores.masked_fill(self.future[:length, :length], -math.inf)
        return torch.softmax(scores, dim=-1) @ value

    def attention(self, x):
        split = (x.size(0), x.size(1), self.heads, x.size(2) // self.heads)
        channels = self.query_key_value(x).chunk(3, dim=-1)
        mixed = self.attend(*(c.view(split).transpose(1, 2) for c in channels))
        return self.projection(mixed.transpose(1, 2).reshape(x.shape))

    def forward(self, x):
        attended = x + self.dropout(self.attention(self.attention_norm(x)))
        hidden = F.gelu(self.expand(self.feed_forward_norm(attended)))
        return attended + self.dropout(self.contract(hidden))


class Gpt(nn.Module):
    def __init__(self, fused: bool, vocabulary: int = 96, context: int = 64, width: int = 128):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(fused, context, width) for _ in range(4)))
        self.norm = nn.LayerNorm(width)
        self.apply(initialize)

    def forward(self, tokens):
        positions = torch.arange(tokens.size(1), device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return F.linear(self.norm(self.blocks(x)), self.token_embedding.weight)


def generator() -> nn.Module:
    """[batch, 64, 1, 1] -> images [batch, 1, 32, 32]."""
    layers = [nn.ConvTranspose2d(64, 64, 4, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for channels in (64, 32):
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(channels // 2), nn.ReLU()]
    layers += [nn.ConvTranspose2d(16, 1, 4, 2, 1, bias=False), nn.Tanh()]
    return nn.Sequential(*layers).apply(initialize)


def discriminator() -> nn.Module:
    """Images [batch, 1, 32, 32] -> logits [batch]."""
    layers = [nn.Conv2d(1, 16, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    for channels in (16, 32):
        layers.append(nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False))
        layers += [nn.BatchNorm2d(2 * channels), nn.LeakyReLU(0.2)]
    layers += [nn.Conv2d(64, 1, 4, bias=False), nn.Flatten(0)]
    return nn.Sequential(*layers).apply(initialize)


class Argon(nn.Module):
    """256 atoms in double precision; what the numbers are is in cpp_models/argon.h."""

    ATOMS, CELLS, CUTOFF, TIME_STEP, TEMPERATURE = 256, 4, 2.5, 0.005, 1.444
    BOX_EDGE = (256 / 0.8442) ** (1 / 3)
    ENERGY_AT_CUTOFF = 4.0 * (CUTOFF**-12 - CUTOFF**-6)
    SLOPE_AT_CUTOFF = 4.0 * (-12.0 * CUTOFF**-13 + 6.0 * CUTOFF**-7)

    def __init__(self):
        super().__init__()
        self.register_buffer("self_pairs", torch.eye(self.ATOMS, dtype=torch.bool))

    def initial_state(self) -> tuple[Tensor, Tensor]:
        """A lattice at rest as a whole, with velocities from Maxwell's distribution."""
        corner = torch.arange(self.CELLS, dtype=torch.double)
        basis = torch.tensor([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]).double()
        corners = torch.cartesian_prod(corner, corner, corner)
        sites = (corners.unsqueeze(1) + basis).reshape(self.ATOMS, 3).t()
        velocities = torch.randn(3, self.ATOMS, dtype=torch.double)
        velocities -= velocities.mean(dim=1, keepdim=True)
        temperature = velocities.square().sum() / (3.0 * (self.ATOMS - 1))
        velocities *= torch.sqrt(self.TEMPERATURE / temperature)
        return (sites * (self.BOX_EDGE / self.CELLS)).contiguous(), velocities

    def potential_energy(self, positions):
        separation = positions.unsqueeze(2) - positions.unsqueeze(1)
        separation = separation - self.BOX_EDGE * torch.round(separation / self.BOX_EDGE)
        squared = separation.square().sum(dim=0)
        squared = squared.masked_fill(self.self_pairs, 4.0 * self.CUTOFF**2)
        attraction = squared.pow(-3)
        energy = 4.0 * (attraction * attraction - attraction) - self.ENERGY_AT_CUTOFF
        energy = energy - self.SLOPE_AT_CUTOFF * (squared.sqrt() - self.CUTOFF)
        return 0.5 * torch.where(squared < self.CUTOFF**2, energy, 0.0).sum()

    def forces(self, positions, way: Way):
        def twice(leaf):
            energy = self.potential_energy(leaf)
            return energy, energy

        (gradient,), energy, _ = way.gradients(twice, [positions])
        return -gradient, energy

    def advance(self, positions, velocities, forces, way: Way):
        halfway = velocities + 0.5 * self.TIME_STEP * forces
        positions = torch.remainder(positions + self.TIME_STEP * halfway, self.BOX_EDGE)
        forces, energy = self.forces(positions, way)
        return positions, halfway + 0.5 * self.TIME_STEP * forces, forces, energy


class OptionPricer(nn.Module):
    """A European call, whose market is in 0-dim parameters."""

    def __init__(self, dates: int = 1):
        super().__init__()
        self.dates = dates
        market = {"spot": 100.0, "strike": 105.0, "rate": 0.03, "volatility": 0.2, "maturity": 1.0}
        for name, value in market.items():
            self.register_parameter(name, nn.Parameter(torch.full((), value)))

    def payoffs(self, spot, volatility, rate, maturity, normals):
        interval = maturity / self.dates
        drift = (rate - 0.5 * volatility * volatility) * interval
        log_returns = drift + volatility * torch.sqrt(interval) * normals
        underlying = spot * torch.exp(log_returns.sum(dim=0))
        return torch.exp(-rate * maturity) * torch.relu(underlying - self.strike)

    def forward(self, normals):
        return self.payoffs(self.spot, self.volatility, self.rate, self.maturity, normals).mean()

    def value(self, normals, way: Way):
        def priced(*market):
            payoffs = self.payoffs(*market, normals)
            return payoffs.mean(), payoffs

        market = [self.spot, self.volatility, self.rate, self.maturity]
        (delta, vega, rho, decay), price, payoffs = way.gradients(priced, market)
        error = payoffs.std() / math.sqrt(payoffs.numel())
        return torch.stack([price, error, delta, vega, rho, -decay])


def forward_step(model: nn.Module, function, example: Tensor, way: Way) -> Step:
    model.to(way.device).eval()
    on_device = example.to(way.device)
    compute = way.compiled(function)

    @torch.no_grad()
    def step():
        return compute(on_device)

    return step


def inference(model: nn.Module, example: tuple[Tensor, Tensor], way: Way) -> Step:
    return forward_step(model, lambda x: model(x), example[0], way)


def training(model: nn.Module, example: tuple[Tensor, Tensor], way: Way) -> Step:
    model.to(way.device)
    inputs, target = (tensor.to(way.device) for tensor in example)
    optimizer = way.adam(model)
    loss_of = way.compiled(lambda x, y: F.cross_entropy(model(x).flatten(0, -2), y))
    update = way.compiled(lambda: optimizer.step())

    def step():
        loss = loss_of(inputs, target)
        optimizer.zero_grad()
        loss.backward()
        update()
        return loss.detach()

    return step


def random_text(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(96, (batch, length)), torch.randint(96, (batch * length,))


CLASSIFICATIONS = {  # a model, its usual batch, and an example from a batch
    "mlp": (mlp, 32, lambda n: (torch.randn(n, 64), torch.randint(10, (n,)))),
    "resnet": (ResNet, 16, lambda n: (torch.randn(n, 3, 32, 32), torch.randint(10, (n,)))),
    "lstm": (LstmLm, 16, lambda n: random_text(n, 32)),
    "gpt": (lambda: Gpt(fused=False), 4, lambda n: random_text(n, 64)),
    "gpt_fused": (lambda: Gpt(fused=True), 4, lambda n: random_text(n, 64)),
}


def classification(name: str, make_step, way: Way) -> Step:
    model, usual_batch, example = CLASSIFICATIONS[name]
    return make_step(model(), example(way.batch or usual_batch), way)


def dcgan_forward(way: Way) -> Step:
    model = generator()
    noise = torch.randn(way.batch or 16, 64)
    return forward_step(model, lambda x: model(x[:, :, None, None]), noise, way)


def dcgan_train(way: Way) -> Step:
    """A step of the discriminator on real and generated images, then one of the generator."""
    make, judge = generator().to(way.device), discriminator().to(way.device)
    batch = way.batch or 16
    noise = torch.randn(batch, 64).to(way.device)
    images = torch.rand(batch, 1, 32, 32).to(way.device)
    make_optimizer, judge_optimizer = (way.adam(m, betas=(0.5, 0.999)) for m in (make, judge))

    def verdict_loss(logits, real):
        wanted = torch.ones_like(logits) if real else torch.zeros_like(logits)
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def loss_of_both(real, generated):
        return verdict_loss(judge(real), True) + verdict_loss(judge(generated), False)

    generate = way.compiled(lambda x: make(x[:, :, None, None]))
    judge_loss = way.compiled(loss_of_both)
    make_loss = way.compiled(lambda generated: verdict_loss(judge(generated), True))
    update_judge = way.compiled(lambda: judge_optimizer.step())
    update_make = way.compiled(lambda: make_optimizer.step())

    def step():
        generated = generate(noise)
        judge_optimizer.zero_grad()
        loss_of_judge = judge_loss(images, generated.detach())
        loss_of_judge.backward()
        update_judge()
        make_optimizer.zero_grad()
        loss_of_make = make_loss(generated)
        loss_of_make.backward()
        update_make()
        return torch.stack([loss_of_judge.detach(), loss_of_make.detach()])

    return step


def argon_forward(way: Way) -> Step:
    model = Argon()
    positions, _ = model.initial_state()
    return forward_step(model, lambda x: model.potential_energy(x), positions, way)


def argon_step(way: Way) -> Step:
    model = Argon().to(way.device)
    positions, velocities = (tensor.to(way.device) for tensor in model.initial_state())
    forces, _ = model.forces(positions, Way(way.device))
    state = [positions, velocities, forces]
    advance = way.compiled(lambda x, v, f: model.advance(x, v, f, way))

    @torch.no_grad()
    def step():
        *next_state, energy = advance(*state)
        # The next replay of a CUDA graph overwrites what this one has returned.
        state[:] = [t.clone() for t in next_state] if way.cuda_graphs else next_state
        return energy

    return step


def option_pricer_forward(way: Way) -> Step:
    model = OptionPricer()
    return forward_step(model, lambda x: model(x), torch.randn(1, PATHS), way)


def option_pricer_greeks(way: Way) -> Step:
    model = OptionPricer()
    return forward_step(model, lambda x: model.value(x, way), torch.randn(1, PATHS), way)


ROWS: dict[str, Callable[[Way], Step]] = {
    **{f"{name}/{kind}": lambda way, name=name, make=make: classification(name, make, way)
       for name in CLASSIFICATIONS for kind, make in (("forward", inference), ("train", training))},
    "dcgan/forward": dcgan_forward,
    "dcgan/train": dcgan_train,
    "argon/forward": argon_forward,
    "argon/step": argon_step,
    "option_pricer/forward": option_pricer_forward,
    "option_pricer/greeks": option_pricer_greeks,
}  # fmt: skip


def make_step(name: str, way: Way) -> Step:
    """The step of a row, from the same numbers whatever the way."""
    torch.manual_seed(0)
    step = ROWS[name](way)
    if not way.cuda_graphs:
        return step

    def marked() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return marked


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(steps: int, step: Step, device: torch.device) -> float:
    begin = time.perf_counter()
    for _ in range(steps):
        step()
        wait_for(device)
    return time.perf_counter() - begin


def time_in_pairs(
    eager: Step, compiled: Step, device: torch.device, seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds a step in turns of the one and of the other, as in bench/paired_timing.cpp."""
    ways = (eager, compiled)
    shortest = min(seconds_of(1, way, device) for _ in range(3) for way in ways)
    steps = math.ceil(SHORTEST_TURN_S / min(shortest, SHORTEST_TURN_S))
    turns: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(turns[0]) < FEWEST_PAIRS or time.perf_counter() < end:
        for way, times in zip(ways, turns):
            times.append(seconds_of(steps, way, device) / steps)
    return turns


def throughput_ms(step: Step, usual_s: float, device: torch.device) -> float:
    """Milliseconds a step where the GPU has the next ones in its queue."""
    steps = max(10, math.ceil(QUEUED_S / usual_s))
    times = []
    for _ in range(QUEUES):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait_for(device)
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / steps)
    return statistics.median(times)


def numbers_of(step: Step) -> Tensor:
    """What a step returns, copied before the next one overwrites it."""
    return step().detach().to("cpu", torch.double, copy=True)


def relative_difference(expected: Tensor, actual: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def first_step(name: str, way: Way) -> tuple[Step, Tensor, float]:
    """A step that has run once, what it returned and the seconds that it took."""
    torch._dynamo.reset()
    step = make_step(name, way)
    wait_for(way.device)
    begin = time.perf_counter()
    output = numbers_of(step)
    return step, output, time.perf_counter() - begin


def measure(name: str, way: Way, seconds: float, row: dict) -> None:
    """Adds a mode's results to those of a row, and eager's where none are there yet."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled, output, first_s = first_step(name, way)
    eager = make_step(name, dataclasses.replace(way, mode=None))
    outputs = [output, *(numbers_of(compiled) for _ in range(COMPARED_STEPS - 1))]
    differences = [relative_difference(numbers_of(eager), actual) for actual in outputs]
    for _ in range(SETTLING_STEPS):
        compiled()
    eager_s, compiled_s = time_in_pairs(eager, compiled, way.device, seconds)
    row.setdefault("eager_ms", 1e3 * statistics.median(eager_s))
    row[f"{way.mode}_ms"] = 1e3 * statistics.median(compiled_s)
    row[f"{way.mode}_speedup"] = statistics.median(e / c for e, c in zip(eager_s, compiled_s))
    if way.device.type == "cuda":
        row.setdefault("eager_throughput_ms", throughput_ms(eager, min(eager_s), way.device))
        row[f"{way.mode}_throughput_ms"] = throughput_ms(compiled, min(compiled_s), way.device)
    of_mode = {
        "first_step_s": first_s,
        # No number for nan and the infinities, which JSON has no word for.
        "max_rel_diff": max(differences) if all(map(math.isfinite, differences)) else None,
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }
    for key, value in of_mode.items():
        row.setdefault(key, {})[way.mode] = value


def measure_single_tensor(name: str, way: Way, row: dict) -> None:
    step = make_step(name, dataclasses.replace(way, mode=None, foreach=False))
    times, _ = time_in_pairs(step, step, way.device, seconds=0.0)
    row["eager_single_tensor_ms"] = 1e3 * statistics.median(times)


def attempt(row: dict, label: str, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as failure:  # whatever it was, the other rows can be measured
        line = next(iter(str(failure).splitlines()), "")
        errors = [row["error"]] if "error" in row else []
        row["error"] = "; ".join([*errors, f"{label}: {type(failure).__name__}: {line}"])
    gc.collect()
    torch.cuda.empty_cache()


def prepare(device: torch.device, threads: int, compile_threads: Optional[int] = None) -> None:
    """Loads the compiler, so that no first step has to."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if compile_threads is not None:
        torch._inductor.config.compile_threads = compile_threads
    torch.compile(torch.relu)(torch.ones(8, device=device))


def compile_in_worker(name: str, way: Way, threads: int, compile_threads: int) -> float:
    """Leaves what a row needs in the cache; returns the seconds of its first step."""
    prepare(way.device, threads, compile_threads)
    step, _, seconds = first_step(name, way)
    for _ in range(COMPARED_STEPS - 1):
        step()
    wait_for(way.device)
    return seconds


def warm(names: list[str], ways: list[Way], processes: int, threads: int, rows: dict) -> None:
    """Compiles all rows in worker processes, training steps first since they take longest."""
    jobs = [(name, way) for name in sorted(names, key=lambda n: "/train" not in n) for way in ways]
    compile_threads = max(1, (os.cpu_count() or 1) // processes)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        futures = {
            pool.submit(compile_in_worker, name, way, threads, compile_threads): (name, way.mode)
            for name, way in jobs
        }
        for future in concurrent.futures.as_completed(futures):
            name, mode = futures[future]
            failure = future.exception()
            if failure is None:
                rows[name].setdefault("cold_first_step_s", {})[mode] = future.result()
            outcome = f"{future.result():.1f} s" if failure is None else f"failed: {failure}"
            print(f"warm {name} {mode}: {outcome.splitlines()[0]}", flush=True)


def write(path: pathlib.Path, report: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def summary(name: str, row: dict) -> str:
    """The numbers of a row that are not by mode, and what went wrong."""
    numbers = (f"{key} {value:.3g}" for key, value in row.items() if isinstance(value, float))
    failure = [f"FAILED in {row['error']}"] if "error" in row else []
    return f"{name:22}" + ", ".join([*numbers, *failure])


def machine(device: torch.device, arguments: argparse.Namespace) -> dict:
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": arguments.threads,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "date": datetime.date.today().isoformat(),
    }


def parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default="cuda:0")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the JSON file to write")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rows", nargs="+", metavar="GLOB", default=["*"])
    parser.add_argument("--batch", type=int, help="of the models that have batches")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing, a row and mode")
    parser.add_argument("--threads", type=int, default=1, help="threads that an op may use")
    parser.add_argument(
        "--warm", type=int, default=0, metavar="N",
        help="first compile all rows in N processes, whose cache the timed ones find")
    return parser.parse_args()


def main() -> None:
    arguments = parsed_arguments()
    device = arguments.device
    # Without a GPU there are no CUDA graphs to reduce the overhead.
    modes = [m for m in arguments.modes if device.type == "cuda" or m == "default"]
    names = [n for n in ROWS if any(fnmatch.fnmatch(n, glob) for glob in arguments.rows)]
    ways = [Way(device, mode, arguments.batch) for mode in modes]
    rows: dict[str, dict] = {name: {} for name in names}
    report = {"machine": machine(device, arguments), "rows": rows}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # of no run before; workers inherit it
        if arguments.warm:
            warm(names, ways, arguments.warm, arguments.threads, rows)
        prepare(device, arguments.threads)
        for name, row in rows.items():
            for way in ways:
                attempt(row, way.mode, lambda: measure(name, way, arguments.seconds, row))
            if device.type == "cuda" and name.endswith("/train"):
                attempt(row, "single tensor", lambda: measure_single_tensor(name, ways[0], row))
            print(summary(name, row), flush=True)
            write(arguments.out, report)
    failed = [name for name, row in rows.items() if "error" in row]
    if failed:
        sys.exit("torch_compile: rows that failed: " + ", ".join(failed))


if __name__ == "__main__":
    main()
