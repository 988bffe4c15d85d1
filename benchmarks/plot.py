"""The plot of a results file: tokens per second and peak memory against the length, both axes logarithmic.

Law: the figures of the tables. Only lengths are drawn, the mix is not one; systems without a figure are not drawn.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

COLOURS = {
    "ours": ("#08519c", "#3182bd", "#6baed6", "#08306b", "#41b6c4"),
    "onnxruntime": ("#d94801", "#fd8d3c", "#7f2704", "#fdd0a2"),
    "openvino": ("#238b45", "#74c476", "#00441b", "#c7e9c0"),
    "bert": ("#6a51a3",),
    "dense": ("#a50f15", "#fb6a4a"),
    "ceiling": ("#737373", "#bdbdbd"),
}
"""Of each kind, in the order of its systems."""
MARKERS = "osD^v<>PX*"


def _styles(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> colour, marker and line of its curve; systems of a kind are of one family of colours."""
    styles: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for name, system in results["systems"].items():
        number = counts.get(system["kind"], 0)
        counts[system["kind"]] = number + 1
        colours = COLOURS.get(system["kind"], ("#000000",))
        ceiling = system["kind"] == "ceiling"
        styles[name] = {
            "color": colours[number % len(colours)],
            "marker": "" if ceiling else MARKERS[number % len(MARKERS)],
            "linestyle": "--" if ceiling else "-",
            "linewidth": 2.4 if name == results["settings"]["reference"] else 1.4,
            "markersize": 4,
        }
    return styles


def _curve(results: dict[str, Any], name: str, figure: Callable) -> tuple[list[int], list[float]]:
    """Lengths and figures of a system, where it has one above 0."""
    records = (x for x in results["records"] if x["system"] == name and x["status"] == "ok")
    fixed = [(x["length"], figure(x)) for x in records if isinstance(x["length"], int)]
    points = sorted((length, value) for length, value in fixed if value)
    return [length for length, _ in points], [value for _, value in points]


def write_plot(path: Path, results: dict[str, Any]):
    """Writes a PNG.

    Args:
        path: Of the image.
        results: The document of `results.py`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
    except ImportError as error:
        raise ImportError("benchmarks.plot needs: pip install -e '.[benchmarks]'") from error
    from .report import MIB, peak_bytes, tokens_per_second

    figure = Figure(figsize=(13, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    panels = {
        "tokens per second": tokens_per_second,
        "peak memory of a call above loading, MiB": lambda record: (peak_bytes(record) or 0) / MIB,
    }
    styles, lines = _styles(results), {}
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        lengths: set[int] = set()
        for name, style in styles.items():
            if axis is axes[1] and results["systems"][name]["kind"] == "ceiling":
                continue  # the memory of bare products says nothing
            x, y = _curve(results, name, value)
            if x:
                lines[name] = axis.plot(x, y, label=name, **style)[0]
                lengths.update(x)
        axis.set(xscale="log", yscale="log", xlabel="tokens a sequence", title=title)
        axis.set_xticks(sorted(lengths), [str(length) for length in sorted(lengths)])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    settings = results["settings"]
    figure.suptitle(f"{settings['shape']['name']} on {settings['device']}, {settings['threads']} threads", fontsize=11)
    if lines:
        figure.legend(lines.values(), lines.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
