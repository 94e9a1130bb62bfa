"""Writes programs of torch.export and of AOTInductor, and what Python gets from them.

    python exported_models.py FOLDER

Each `NAME.pt2` has a `NAME.numbers` beside it: a dict of tensors and lists of them, saved by
`torch.save`. tests/package_test.cpp reads both, and is not told more.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

STEPS = 20


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).split(width, dim=2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(17, 32), nn.Embedding(24, 32)
        self.layers = nn.ModuleList([Layer(32, 4), Layer(32, 4)])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 17, bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.tokens(text) + self.places(torch.arange(text.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Features(nn.Module):
    """What a graph can have beside ops on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("table", torch.arange(12.0).view(2, 6), persistent=False)

    def forward(self, x: torch.Tensor, options: dict[str, torch.Tensor], factor: float) -> Any:
        self.count.add_(1)
        with torch.no_grad():
            still = self.linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.linear(x)
        chosen = torch.cond(options["sign"].sum() > 0, lambda x: (x + 1,), lambda x: (x * 2,), (x,))[0]
        first, rest = x.split([2, 4], dim=1)
        n = x.shape[0]
        padded = F.pad(first, (0, 0, 0, n // 2 + 1)).view(-1, 2)[: n + 1]
        picked = self.table[torch.arange(n) % 2] * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
        normal = self.dropout(self.norm(x))
        return {
            "still": still, "low": low, "chosen": chosen,
            "parts": [rest * factor, padded, picked, torch.zeros(n, 3) + torch.full((3,), 2.0)],
            "normal": normal, "count": self.count + 0, "n": n * 2, "nothing": None,
        }


def flat(result: Any) -> list[torch.Tensor]:
    """As tensors: a number has none of its dimensions, None is empty."""
    leaves = [torch.empty(0) if each is None else each for each in torch.utils._pytree.tree_leaves(result)]
    return [each.detach().clone() if isinstance(each, torch.Tensor) else torch.tensor(each) for each in leaves]


def train(program: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    losses = []
    for step in range(STEPS):
        x, y = batches[step % len(batches)]
        loss = F.cross_entropy(program(x).flatten(0, -2), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses



def resnet(folder: Path) -> None:
    model = ResNet().train()
    batches = [(torch.randn(n, 3, 12, 12), torch.randint(10, (n,))) for n in (8, 5, 8, 11)]
    program = torch.export.export(
        model, (batches[0][0],), dynamic_shapes=({0: Dim("batch", min=2, max=64)},)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=False)
    torch.export.save(program, folder / "resnet.pt2")  # before the weights change
    losses = train(model, optimizer, batches)
    torch.save(
        {"inputs": [x for x, _ in batches], "targets": [y for _, y in batches], "losses": losses,
         "buffers": [model.blocks[1].bn2.running_var.clone()]},
        folder / "resnet.numbers",
    )


def gpt(folder: Path) -> None:
    model = Gpt()
    batches = [(torch.randint(17, (n, t)), torch.randint(17, (n * t,))) for n, t in ((4, 16), (3, 24), (6, 9))]
    program = torch.export.export(
        model, (batches[0][0],),
        dynamic_shapes=({0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=24)},),
    )
    torch.export.save(program, folder / "gpt.pt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    losses = train(model, optimizer, batches)
    torch.save(
        {"inputs": [x for x, _ in batches], "targets": [y for _, y in batches], "losses": losses},
        folder / "gpt.numbers",
    )


def features(folder: Path) -> None:
    model = Features().eval()
    inputs = [(torch.randn(n, 6), {"sign": torch.full((2,), sign)}) for n, sign in ((4, 1.0), (7, -1.0))]
    x, options = inputs[0]
    program = torch.export.export(
        model, (x, options, 1.5), dynamic_shapes=({0: Dim("n", min=2, max=32)}, {"sign": None}, None)
    )
    outputs = []
    for name, which in (("features", program), ("decomposed", program.run_decompositions())):
        torch.export.save(which, folder / f"{name}.pt2")
    for x, options in inputs:
        outputs.append(flat(model(x, options, 1.5)))
    model.train()
    trained = model.norm(inputs[1][0]).detach()
    torch.save(
        {"inputs": [x for x, _ in inputs], "signs": [options["sign"] for _, options in inputs],
         "outputs": outputs[0] + outputs[1], "trained": [trained], "mean": [model.norm.running_mean.clone()]},
        folder / "features.numbers",
    )


def compiled(folder: Path) -> None:
    """A package of AOTInductor, made the way that its documentation says."""
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)).eval()
    x = torch.randn(5, 6)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", min=2, max=64)},))
    torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "compiled.pt2"))
    y = torch.randn(9, 6)
    with torch.no_grad():
        outputs = [model(x), model(y)]
        model[2].weight.mul_(2)
        outputs.append(model(x))
    torch.save({"inputs": [x, y], "outputs": outputs}, folder / "compiled.numbers")


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand_like(x)


class Positive(nn.Module):
    """How much it returns hangs on the values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0] * 2


class Halves(nn.Module):
    """Parts of one tensor, the argument again, nothing, and one of the parts once more."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, second = (x * 2).chunk(2)
        return first, second, x, None, first


class Gap(nn.Module):
    """Nothing between two results."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return x * 2, None, x.sum(1)


def compiled_and_special(folder: Path) -> None:
    for model in (Noisy(), Positive(), Halves(), Gap()):
        program = torch.export.export(model, (torch.randn(4, 6),))
        name = type(model).__name__.lower() + ".pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / name))


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    resnet(folder)
    gpt(folder)
    features(folder)
    compiled(folder)
    compiled_and_special(folder)


if __name__ == "__main__":
    main()
