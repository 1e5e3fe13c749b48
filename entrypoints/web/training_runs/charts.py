"""Curves over each other as a Vega-Lite specification; Streamlit draws it in the colors of its theme, light or dark."""

from collections.abc import Mapping
from typing import Any

MAX_POINTS = 1000  # of one curve
COLORS = ("#3b82f6", "#f28e2b", "#14a38b", "#e15759", "#a07be0", "#8c8c8c", "#c0a000", "#d6569a")  # on light and dark

Curve = Mapping[int, float]  # step to value


def chart(curves: Mapping[str, Curve], marked: Mapping[str, int], step_label: str) -> dict[str, Any]:
    """A line for each name; `marked` has the step of the points that are drawn larger, as the best checkpoint is."""
    lines = [_point(name, *pair) for name, curve in curves.items() for pair in thin_out(curve)]
    single = [_point(name, *pair) for name, curve in curves.items() if len(curve) == 1 for pair in curve.items()]
    large = [_point(name, step, curves[name][step]) for name, step in marked.items() if step in curves.get(name, {})]
    legend = {"orient": "top", "columns": 2, "labelLimit": 150} if len(curves) > 1 else None
    scale = {"domain": list(curves), "range": list(COLORS)}
    color = {"field": "name", "type": "nominal", "title": None, "scale": scale, "legend": legend}
    encoding = {
        "x": {"field": "step", "type": "quantitative", "title": step_label, "axis": {"tickMinStep": 1, "grid": False}},
        "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
        "color": color,
        "tooltip": [{"field": "name"}, {"field": "step"}, {"field": "value", "format": ".5~g"}],
    }
    layers = [
        _layer(lines, {"type": "line"}, encoding),
        _layer(single, {"type": "point", "filled": True}, encoding),
        _layer(large, {"type": "point", "filled": True, "size": 120, "shape": "diamond"}, encoding),
    ]
    return {"layer": [layer for layer in layers if layer["data"]["values"]]}


def thin_out(curve: Curve) -> list[tuple[int, float]]:
    """The points by step; of a long curve the lowest and the highest of each of MAX_POINTS / 2 parts."""
    points = sorted(curve.items())
    if len(points) <= MAX_POINTS:
        return points
    size = -(-len(points) // (MAX_POINTS // 2))
    kept = set()
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)


def _point(name: str, step: int, value: float) -> dict[str, Any]:
    return {"name": name, "step": step, "value": value}


def _layer(values: list[dict[str, Any]], mark: dict[str, Any], encoding: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"values": values}, "mark": mark, "encoding": encoding}
