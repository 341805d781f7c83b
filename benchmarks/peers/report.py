"""Results → Markdown tables and a plot."""

from collections.abc import Sequence
from pathlib import Path

from .cells import SIDES, Cell, Measured, Results, groups, operations, read_bytes
from .models import PEER_OF

NAMES = {"bf16": "bf16", "8bit": "8-bit weights: ours FP8 (128 × 128 blocks), llama.cpp Q8_0"}


def markdown(results: Results, exactness: dict[str, str]) -> str:
    """Every table. `exactness`: by model, the table of exactness.py."""
    blocks = [f"{results.machine}, {results.threads} threads."]
    for (model, weights), cells in groups(m.cell for m in results.cells.values()).items():
        found = [results.cells[cell.id] for cell in cells]
        blocks.append(f"### {model}, {NAMES[weights]}\n\nPeers run {PEER_OF[model]}.")
        blocks.append(_table(found))
        rows = _decode_alone(found)
        if rows:
            blocks.append("\n".join(rows))
        blocks += _footnotes(found)
    for model, table in exactness.items():
        blocks.append(
            f"### The cost of exactness, {model}\n\nLoad {results.exactness_load:.1f}.\n\n{table}"
        )
    return "\n\n".join(blocks) + "\n"


def _table(found: Sequence[Measured]) -> str:
    sides = [side for side in SIDES if any(side in m.sides for m in found)]
    header = ["tokens/s", *sides, "ours / best peer", "read", "arithmetic", "rounds", "load"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for m in found:
        rates = [_rate(m, side) for side in sides]
        rounds = "/".join(str(len(m.seconds.get(side, ()))) for side in sides)
        low, high = min(m.loads), max(m.loads)
        cells = [_label(m.cell), *rates, _ratio(m), *_shares(m), rounds, f"{low:.1f}–{high:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _label(cell: Cell) -> str:
    if cell.is_prefill:
        many = f"{cell.concurrent} × " if cell.concurrent > 1 else ""
        return f"prefill {many}{cell.prompt}"
    context = f", context {cell.prompt}" if cell.prompt != 128 else ""
    return f"{cell.concurrent} at once{context}"


def _rate(m: Measured, side: str) -> str:
    rate = m.rate(side)
    return "–" if rate is None else f"{rate:.0f}" if rate >= 20 else f"{rate:.1f}"


def _ratio(m: Measured) -> str:
    ours = m.rate("everstep")
    peers = [r for s in m.sides if s != "everstep" and (r := m.rate(s)) is not None]
    return f"{ours / max(peers):.2f}" if ours and peers else "–"


def _shares(m: Measured) -> tuple[str, str]:
    """Of the read bandwidth and of the arithmetic peak that were measured beside it: ours."""
    rate = m.rate("everstep")
    if rate is None or not m.read_gb_s:
        return "–", "–"
    seconds = m.cell.tokens / rate
    return (
        f"{read_bytes(m.cell) / seconds / (m.read_gb_s * 1e9):.0%}",
        f"{operations(m.cell) / seconds / (m.peak_gf_s * 1e9):.0%}",
    )


def _decode_alone(found: Sequence[Measured]) -> list[str]:
    """For prompts that were also run to their first token: the rate of the tokens after it."""
    by_cell = {m.cell: m for m in found}
    rows = []
    for m in found:
        first = by_cell.get(Cell(m.cell.model, m.cell.weights, m.cell.concurrent, m.cell.prompt, 1))
        if m.cell.is_prefill or first is None:
            continue
        rates = []
        for side in m.sides:
            whole, prefill = m.rate(side), first.rate(side)
            if whole is None or prefill is None:
                continue
            seconds = m.cell.tokens / whole - first.cell.tokens / prefill
            tokens = m.cell.concurrent * (m.cell.new - 1)
            if seconds > 0:
                rates.append(f"{side} {tokens / seconds:.0f}")
        if rates:
            rows.append(f"Decode alone, {_label(m.cell)}, tokens/s: {', '.join(rates)}.")
    return rows


def _footnotes(found: Sequence[Measured]) -> list[str]:
    last = found[-1]
    said = [
        f"{side}: {words['version']}, {words['path']}"
        for side in last.sides
        if (words := last.said.get(side))
    ]
    reads = sorted(m.read_gb_s for m in found)
    peaks = sorted(m.peak_gf_s for m in found)
    notes = [
        f"Limits measured beside the cells: read {reads[0]:.1f}–{reads[-1]:.1f} GB/s, "
        f"multiply-add {peaks[0]:.0f}–{peaks[-1]:.0f} GF/s. "
        f"{'; '.join(said)}. Commit {last.commit}, {last.when}."
    ]
    failed = [f"- {_label(m.cell)}, {side}: {why}" for m in found for side, why in m.failed.items()]
    return [*notes, "\n".join(failed)] if failed else notes


def plot(results: Results, path: Path) -> bool:
    """Tokens/s over concurrency, a panel per group, as SVG. False without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("svg")
    import matplotlib.pyplot as plt

    chosen = {
        group: [
            results.cells[cell.id] for cell in cells if not cell.is_prefill and cell.prompt == 128
        ]
        for group, cells in groups(m.cell for m in results.cells.values()).items()
    }
    chosen = {group: found for group, found in chosen.items() if found}
    if not chosen:
        return False
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(4.2 * len(chosen), 3.6), squeeze=False, sharey=True
    )
    colours = dict(zip(SIDES, ("C3", "C0", "C9", "C2", "C7", "C5"), strict=True))
    for axis, ((model, weights), found) in zip(axes[0], chosen.items(), strict=True):
        for side in found[0].sides:
            points = [(m.cell.concurrent, m.rate(side)) for m in found]
            known = [(n, rate) for n, rate in points if rate is not None]
            if known:
                axis.plot(*zip(*known, strict=True), "o-", color=colours[side], label=side)
        axis.set(xscale="log", yscale="log", title=f"{model}, {weights}", xlabel="concurrent")
        numbers = sorted({m.cell.concurrent for m in found})
        axis.set_xticks(numbers, [str(n) for n in numbers], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("generated tokens/s")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return True
