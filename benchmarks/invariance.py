"""Which torch operations keep a row's bits on this machine, and which do not.

    python benchmarks/invariance.py

Prints the table that docs/explain/numerics.md quotes. Bits, not speed: the load does not matter.
"""

import platform
from collections.abc import Callable

import torch

SHAPES = [(576, 960), (576, 576), (576, 1536), (1536, 576), (2048, 512), (64, 96), (40, 8)]
ROWS = (1, 2, 4, 8, 16, 64, 128, 256)
TOTAL = 256
ELEMENTWISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "log": lambda x: torch.log(x.abs() + 1e-3),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 1e-3),
    "cos": torch.cos,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "1/(1+exp(-x))": lambda x: 1.0 / (1.0 + torch.exp(-x)),
}
REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "mean of squares": lambda x: x.pow(2).mean(-1),
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "cumsum": lambda x: x.cumsum(-1),
}


def products(dtype: torch.dtype) -> None:
    """x wᵀ by M rows at a time, against 16 at a time."""
    cells = {rows: [0, 0] for rows in ROWS}
    for inner, columns in SHAPES:
        w = torch.randn(columns, inner).to(dtype)
        x = torch.randn(TOTAL, inner).to(dtype)
        order = torch.randperm(TOTAL)

        def by(rows: int, x: torch.Tensor, w: torch.Tensor = w) -> torch.Tensor:
            parts = [torch.mm(x[i : i + rows], w.t()) for i in range(0, TOTAL, rows)]
            return torch.cat(parts)

        reference = by(16, x)
        for rows, cell in cells.items():
            cell[0] += torch.equal(by(rows, x), reference)
            cell[1] += torch.equal(by(rows, x[order].contiguous()), by(rows, x)[order])
    name = str(dtype).removeprefix("torch.")
    print(f"x @ w.T, {name}: M rows at a time, of {len(SHAPES)} shapes")
    print("  M                     " + "".join(f"{rows:>5}" for rows in ROWS))
    print("  equals M = 16         " + "".join(f"{cells[r][0]:>5}" for r in ROWS))
    print("  place does not matter " + "".join(f"{cells[r][1]:>5}" for r in ROWS))


def elementwise() -> None:
    """f of a slice against the slice of f."""
    print("elementwise, float32: slices of every offset and length against the whole")
    x = torch.randn(100003) * 5
    for name, function in ELEMENTWISE.items():
        whole, differing = function(x), 0
        for offset in (0, 1, 3, 7, 16):
            for length in (1, 2, 5, 15, 16, 17, 64, 1000):
                part = slice(offset, offset + length)
                differing += not torch.equal(function(x[part].clone()), whole[part])
        print(
            f"  {name:<15} {'holds' if not differing else f'differs in {differing} of 40 slices'}"
        )


def reductions() -> None:
    """f of some rows against the rows of f."""
    print("reductions over 576 and 49152, float32: M rows against 128")
    for name, function in REDUCTIONS.items():
        differing = []
        for width in (576, 49152):
            x = torch.randn(128, width)
            whole = function(x)
            differing += [
                f"M={rows} of {width}"
                for rows in (1, 2, 3, 7, 32, 127)
                if not torch.equal(function(x[:rows].clone()), whole[:rows])
            ]
        print(f"  {name:<15} {'holds' if not differing else 'differs: ' + ', '.join(differing)}")


def main() -> None:
    torch.manual_seed(0)
    with open("/proc/cpuinfo") as lines:
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "?")
    print(
        f"{model}, {platform.machine()}, torch {torch.__version__}, "
        f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )
    products(torch.float32)
    products(torch.bfloat16)
    elementwise()
    reductions()


if __name__ == "__main__":
    main()
