"""Render the evaluation as one self-contained HTML page, without scripts and with all text escaped."""

import io
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fintune.metrics import METRICS, number
from fintune.params import Evaluate, flatten

TEMPLATE = Path(__file__).with_name("page.html.jinja")
# Placeholder colours by plot part; the page's colours replace them and follow light and dark mode.
COLORS = {name: f"#00010{k}" for k, name in enumerate(("ink", "soft", "line", "base", "tuned"))}
SIZE = (4.6, 3.2)  # inches; as wide as a phone, so text stays readable there
SAMPLES = 10  # rows shown with all texts
DRAWN_POINTS = 3000  # of a scatter plot; more are rasterized
CANDIDATE_COLUMNS = {
    "prompts": "Questions",
    "accuracy": "Right",
    "stop_rate": "Stop rate",
    "loop_rate": "Loop rate",
    "rouge_1": "ROUGE-1",
    "rouge_l": "ROUGE-L",
    "distinct_2": "distinct-2",
    "length_ratio": "Length",
    "tokens": "Tokens",
}
DIRECTION_MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"

Report = dict[str, Any]
Rows = Sequence[dict[str, Any]]


def render(
    report: Report, table: Rows, curve: Sequence[dict[str, float | None]], params: Evaluate
) -> str:
    """Render the page as HTML.

    Args:
        report: the content of evaluation.json.
        table: the predictions; `report` refers to rows by their index in it.
        curve: the training's `loss` and `validation_loss` by `step`.
        params: the parameter section that the evaluation used.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": number,
        "short": short,
        "visible": visible,
        "percent": percent,
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        metrics={key: metric for key, metric in METRICS.items() if key in report["base"]},
        outcome=outcome,
        candidate_columns=CANDIDATE_COLUMNS,
        plots=plots(report, table, curve),
        samples=table[:SAMPLES],
        extremes={
            "Rows where the loss fell least, or rose": [table[i] for i in report["worst_rows"]],
            "Rows where the loss fell most": [table[i] for i in report["best_rows"]],
        },
        parameters=flatten(params.model_dump()),
    )


def short(value: float | None) -> str:
    """Format with three significant digits, for dense tables."""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def percent(share: float | None) -> str:
    """Format a share as per cent."""
    return number(None if share is None else 100 * share) + " %"


def visible(text: str) -> str:
    """Replace invisible and direction-changing characters by visible ones."""
    return "".join(_visible(c) for c in text)


def _visible(c: str) -> str:
    if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in DIRECTION_MARKS):
        return c
    return chr(0x2400 + ord(c)) if ord(c) < 32 else f"[U+{ord(c):04X}]"


def outcome(name: str, change: dict[str, float | None]) -> str:
    """Classify a change by its interval: better, worse or unclear."""
    low, high = change["low"], change["high"]
    if low is None or high is None:
        return "not a number"
    if name in METRICS and METRICS[name].better == 0:
        return "no direction"
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def plots(
    report: Report, table: Rows, curve: Sequence[dict[str, float | None]]
) -> list[dict[str, Any]]:
    """Draw the page's plots, each with `title`, `alt` text and `svg`."""
    import matplotlib

    matplotlib.use("Agg")
    style: Any = {
        "font.size": 9,
        "svg.fonttype": "none",  # text stays text
        "text.color": COLORS["ink"],
        "axes.edgecolor": COLORS["line"],
        "axes.labelcolor": COLORS["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": COLORS["line"],
        "grid.linewidth": 0.5,
        "axes.axisbelow": True,
        "xtick.color": COLORS["soft"],
        "ytick.color": COLORS["soft"],
        "legend.frameon": False,
    }
    with matplotlib.rc_context(style):
        return [
            _loss_curve(curve),
            _row_losses(table),
            _calibration(report["calibration"]),
            _lengths(report["breakdown"]),
        ]


def _figure(title: str, alt: str) -> tuple[Any, Any, dict[str, Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.add_subplot(), {"title": title, "alt": alt}


def _loss_curve(curve: Sequence[dict[str, float | None]]) -> dict[str, Any]:
    points = {
        key: [(p["step"], p[key]) for p in curve if p.get(key) is not None]
        for key in ("loss", "validation_loss")
    }
    ends = [f"{key.replace('_', ' ')} ends at {number(p[-1][1])}" for key, p in points.items() if p]
    figure, axes, plot = _figure(
        "Training", f"Loss over {len(curve)} training steps: {'; '.join(ends)}."
    )
    for key, title, color, marker in (
        ("loss", "training", "tuned", ""),
        ("validation_loss", "validation", "base", "o"),
    ):
        if points[key]:
            x, y = zip(*points[key], strict=True)
            axes.plot(x, y, color=COLORS[color], marker=marker, markersize=4, label=title)
    axes.set(xlabel="step", ylabel="loss, nats an answer token")
    axes.legend()
    return plot | {"svg": _svg(figure, "curve")}


def _row_losses(table: Rows) -> dict[str, Any]:
    base, tuned = ([row[f"{side}_loss"] for row in table] for side in ("base", "tuned"))
    lower = sum(b > t for b, t in zip(base, tuned, strict=True))
    figure, axes, plot = _figure(
        "Each row's loss, base and tuned",
        f"Of {len(table)} rows, {lower} have a lower loss with the tuned model.",
    )
    axes.scatter(
        base, tuned, s=9, alpha=0.6, color=COLORS["tuned"], linewidths=0,
        rasterized=len(table) > DRAWN_POINTS,
    )  # fmt: skip
    top = max([v for v in (*base, *tuned) if math.isfinite(v)] or [1.0]) * 1.05
    axes.plot([0, top], [0, top], color=COLORS["soft"], linewidth=1, linestyle="--")
    axes.text(0.92 * top, 0.97 * top, "no change", ha="right", va="top", color=COLORS["soft"])
    axes.set(xlabel="base, nats an answer token", ylabel="tuned", xlim=(0, top), ylim=(0, top))
    return plot | {"svg": _svg(figure, "rows")}


def _calibration(curves: dict[str, Any]) -> dict[str, Any]:
    errors = "; ".join(f"{n} {number(curves[n]['calibration_error'])}" for n in ("base", "tuned"))
    figure, axes, plot = _figure(
        "Calibration",
        "How often the most likely token is the right one, by the probability that the model gives "
        f"it. Expected calibration error: {errors}.",
    )
    axes.plot([0, 1], [0, 1], color=COLORS["soft"], linewidth=1, linestyle="--", label="ideal")
    for name in ("base", "tuned"):
        bins = [b for b in curves[name]["bins"] if None not in (b["confidence"], b["accuracy"])]
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.plot(x, y, color=COLORS[name], marker="o", markersize=4, label=name)
    axes.set(xlabel="probability of the most likely token", ylabel="how often it is right")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend()
    return plot | {"svg": _svg(figure, "calibration")}


def _lengths(breakdown: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    parts = [
        (f"{kind}, {part['label']}", part)
        for kind, key in (("question", "question_words"), ("answer", "answer_words"))
        for part in breakdown[key]
    ][::-1]
    figure, axes, plot = _figure(
        "Loss by length",
        "Loss of base and tuned model by length; the tables below have the figures.",
    )
    places = range(len(parts))
    values = {
        name: [float("nan") if v is None else v for v in (p[f"{name}_loss"] for _, p in parts)]
        for name in ("base", "tuned")
    }
    axes.hlines(places, values["tuned"], values["base"], color=COLORS["line"], linewidth=2)
    for name in ("base", "tuned"):
        axes.plot(values[name], places, "o", color=COLORS[name], label=name)
    axes.set_yticks(places, [label for label, _ in parts])
    axes.set(xlabel="nats an answer token")
    axes.set_xlim(left=0)
    figure.legend(loc="outside upper right", ncols=2)
    return plot | {"svg": _svg(figure, "lengths")}


def _svg(figure: Any, name: str) -> str:
    """Convert a figure to an SVG element in the page's colours, with ids unique within the page."""
    import matplotlib
    from markupsafe import Markup

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg
    )
    wanted = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in wanted else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg).replace("xlink:href", "href")
    for part, color in COLORS.items():
        svg = svg.replace(color, f"var(--{part})")
    return Markup(svg)  # contains no model output
