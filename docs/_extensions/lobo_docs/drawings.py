"""The drawings: boxes, arrows and words, written as SVG when the site is built."""

from __future__ import annotations

from html import escape
from pathlib import Path

__all__ = ["Drawing", "pages"]

INK, GREY, BLUE, ORANGE, GREEN, RED = "#222", "#777", "#2563eb", "#d97706", "#15803d", "#b91c1c"
PALE = {INK: "#f4f4f5", GREY: "#f4f4f5", BLUE: "#dbeafe", ORANGE: "#fef3c7", GREEN: "#dcfce7", RED: "#fee2e2"}


class Drawing:
    """A picture of a fixed size, filled from back to front."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, text: str, colour: str = INK) -> None:
        """A box with lines of text in its middle; the first line is the larger."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{PALE[colour]}" stroke="{colour}"/>'
        )
        lines = text.split("\n")
        top = y + height / 2 - 8 * (len(lines) - 1)
        for index, line in enumerate(lines):
            self.words(x + width / 2, top + 16 * index + 4, line, INK, 13 if index == 0 else 11)

    def words(self, x: float, y: float, text: str, colour: str = GREY, size: int = 12, anchor: str = "middle") -> None:
        """A line of text at its baseline."""
        self.parts.append(
            f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = GREY, wide: float = 1.5, head: bool = True) -> None:
        """A line through points, with a head at the last."""
        path = " ".join(f"{x},{y}" for x, y in points)
        end = f' marker-end="url(#{colour[1:]})"' if head else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{wide}"{end}/>')

    def dashed(self, *points: tuple[float, float], colour: str = RED) -> None:
        """A dashed line through points."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="6 5"/>'
        )

    def svg(self) -> str:
        """The file."""
        heads = "".join(
            f'<marker id="{c[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="10" markerHeight="10" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 8 4 0 8z" fill="{c}"/></marker>'
            for c in PALE
        )
        inner = "\n".join(self.parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="system-ui, sans-serif"><title>{escape(self.title)}</title><defs>{heads}</defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="8" fill="white"/>\n{inner}\n</svg>\n'
        )


def pages(docs: Path) -> dict[str, str]:
    """All drawings, by file name."""
    made = {"pipeline": pipeline, "residual": residual, "attention": attention, "placement": placement}
    return {f"{name}.svg": draw().svg() for name, draw in {**made, "refitting": refitting}.items()}


def pipeline() -> Drawing:
    """From a model to a file that was measured."""
    drawing = Drawing(760, 190, "A model is traced, rewritten pass by pass, checked, exported, compared and measured")
    steps = [("your model\nnn.Module", INK), ("trace\ntorch.export", BLUE), ("pass\nrewrites the graph", ORANGE)]
    steps += [("verify\nshapes, promise", GREEN), ("export\nONNX", BLUE), ("compare\nthen measure", GREEN)]
    for index, (text, colour) in enumerate(steps):
        drawing.box(14 + 124 * index, 60, 112, 54, text, colour)
        if index:
            drawing.arrow((14 + 124 * index - 12, 87), (14 + 124 * index - 1, 87))
    drawing.arrow((442, 114), (442, 146), (318, 146), (318, 116), colour=ORANGE)
    drawing.words(380, 164, "the next pass")
    drawing.arrow((442, 60), (442, 34), colour=RED)
    drawing.words(442, 24, "a broken promise: an error, and no file", RED)
    drawing.words(690, 140, "a file that disagrees")
    drawing.words(690, 156, "is not left behind")
    return drawing


def residual() -> Drawing:
    """Two axes of a residual block."""
    drawing = Drawing(720, 230, "Two axes run through a residual block: its width, and the width inside of it")
    drawing.arrow((20, 120), (128, 120), colour=BLUE, wide=4)
    drawing.arrow((60, 120), (60, 40), (560, 40), (560, 101), colour=BLUE, wide=4)
    drawing.box(130, 92, 150, 56, "conv1.weight\n[hidden, width, 3, 3]")
    drawing.arrow((280, 120), (368, 120), colour=ORANGE, wide=4)
    drawing.box(370, 92, 150, 56, "conv2.weight\n[width, hidden, 3, 3]")
    drawing.arrow((520, 120), (543, 120), colour=BLUE, wide=4)
    drawing.box(545, 104, 32, 32, "+")
    drawing.arrow((577, 120), (700, 120), colour=BLUE, wide=4)
    drawing.words(310, 32, "the skip connection adds: both operands have the same axis", BLUE)
    drawing.words(
        20, 186, "width: one axis through all that is added. Half of it goes everywhere at once.", BLUE, 13, "start"
    )
    drawing.words(20, 210, "hidden: an axis of this block alone. It may have any other width.", ORANGE, 13, "start")
    return drawing


def attention() -> Drawing:
    """Axes of attention: one dimension that is a product of two."""
    drawing = Drawing(760, 260, "In attention the outputs of q, k and v are a product of two axes, heads and head_dim")
    for index, name in enumerate(("q", "k", "v")):
        top = 20 + 58 * index
        drawing.arrow((20, 101), (60, 101), (60, top + 22), (98, top + 22), colour=BLUE, wide=3)
        drawing.box(100, top, 170, 44, f"{name}.weight\n[heads · head_dim, width]")
        drawing.arrow((270, top + 19), (368, top + 19), colour=ORANGE, wide=3)
        drawing.arrow((270, top + 26), (368, top + 26), colour=GREEN, wide=3)
    drawing.box(370, 20, 130, 160, "attention\nheads · head_dim")
    drawing.arrow((500, 96), (568, 96), colour=ORANGE, wide=3)
    drawing.arrow((500, 103), (568, 103), colour=GREEN, wide=3)
    drawing.box(570, 72, 150, 56, "out.weight\n[width, heads · head_dim]")
    drawing.arrow((720, 100), (750, 100), colour=BLUE, wide=3)
    drawing.words(20, 210, "width: what enters and leaves", BLUE, 13, "start")
    drawing.words(240, 210, "heads: a whole head goes from q, k, v and out", ORANGE, 13, "start")
    drawing.words(
        20, 236, "head_dim: of every head alike; q and k share theirs, v and out share another", GREEN, 13, "start"
    )
    return drawing


def placement() -> Drawing:
    """Where integers run, as a minimum cut."""
    drawing = Drawing(740, 300, "Integers or float: the cheapest way to cut a network in two")
    drawing.box(20, 20, 700, 34, "integers", GREEN)
    drawing.box(20, 226, 700, 34, "float", BLUE)
    costs = [("conv", 9, 3), ("conv", 8, 3), ("SiLU", 1, 6), ("softmax", 2, 11), ("linear", 7, 2)]
    for index, (name, floating, integer) in enumerate(costs):
        x = 40 + 138 * index
        drawing.box(x, 118, 84, 44, name)
        drawing.arrow((x + 42, 118), (x + 42, 56), colour=BLUE)
        drawing.words(x + 48, 92, f"as float {floating}", BLUE, 12, "start")
        drawing.arrow((x + 42, 162), (x + 42, 224), colour=GREEN)
        drawing.words(x + 48, 200, f"as integers {integer}", GREEN, 12, "start")
        if index:
            drawing.arrow((x - 54, 140), (x - 2, 140))
            drawing.words(x - 28, 134, "convert 1", GREY, 10)
    drawing.dashed((20, 182), (284, 182), (284, 76), (560, 76), (560, 182), (720, 182))
    drawing.words(
        370, 284, "The dashed line cuts 3 + 3 + 1 + 1 + 2 + 1 + 2 = 13 (all float 27, all integers 25)", RED, 13
    )
    return drawing


def refitting() -> Drawing:
    """What least squares gives a layer back."""
    drawing = Drawing(740, 260, "A layer whose inputs were cut is fitted to what it gave in the original")
    drawing.words(20, 30, "original", GREY, 13, "start")
    drawing.box(110, 20, 120, 44, "inputs X\n64 wide")
    drawing.arrow((230, 42), (298, 42))
    drawing.box(300, 20, 120, 44, "layer\nW, b")
    drawing.arrow((420, 42), (488, 42))
    drawing.box(490, 20, 130, 44, "outputs Y", BLUE)
    drawing.words(20, 150, "pruned", GREY, 13, "start")
    drawing.box(110, 140, 120, 44, "inputs X'\n32 wide", ORANGE)
    drawing.arrow((230, 162), (298, 162))
    drawing.box(300, 140, 120, 44, "layer\nW', b'", GREEN)
    drawing.arrow((420, 162), (488, 162))
    drawing.box(490, 140, 130, 44, "X' W' + b'")
    drawing.arrow((555, 140), (555, 66), colour=RED)
    drawing.words(568, 106, "least squares", RED, 13, "start")
    drawing.words(
        20,
        216,
        "Layer by layer, on what the pruned network itself computes: errors made before are made up for too.",
        INK,
        13,
        "start",
    )
    drawing.words(
        20, 240, "A share of the rows is held out: a layer moves only as far as those gain.", INK, 13, "start"
    )
    return drawing
