"""What QuPath's import of objects from GeoJSON takes, as a check of a file's content."""

import json
import math
from itertools import pairwise
from typing import Any

_KNOWN = {"objectType", "name", "classification", "measurements", "color", "isLocked", "metadata"}


def check_qupath(text: bytes, size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """The rules by which QuPath parses objects (its GsonTools, PathObjectTypeAdapters and ROI adapters).

    Args:
        text: of the file.
        size: height and width within which all must lie, from QuPath's (0, 0).

    Returns:
        The features.
    """
    content = json.loads(text, parse_constant=_no_json)
    assert content["type"] == "FeatureCollection"
    assert isinstance(content["features"], list)
    assert content["features"]
    for feature in content["features"]:
        assert feature["type"] == "Feature"
        _check_polygon(feature["geometry"], size)
        properties = feature["properties"]
        assert set(properties) <= _KNOWN
        assert properties["objectType"] in ("annotation", "detection", "tile")
        assert isinstance(properties.get("name", ""), str)
        kind = properties["classification"]
        assert isinstance(kind["name"], str)
        assert kind["name"]
        _check_colour(kind["color"])  # without it parsing fails
        if "color" in properties:
            _check_colour(properties["color"])
        measurements = properties.get("measurements", {})
        assert isinstance(measurements, dict)
        assert all(isinstance(value, float) and math.isfinite(value) for value in measurements.values())
    return content["features"]


def _no_json(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _check_polygon(geometry: dict[str, Any], size: tuple[int, int] | None) -> None:
    """Rings that are closed, of points (x, y) in pixels, and that enclose something."""
    assert geometry["type"] == "Polygon"
    assert geometry["coordinates"]
    for ring in geometry["coordinates"]:
        assert len(ring) >= 4
        assert ring[0] == ring[-1]
        for point in ring:
            assert len(point) == 2
            assert all(isinstance(value, int | float) for value in point)
            if size is not None:
                assert 0 <= point[0] <= size[1]
                assert 0 <= point[1] <= size[0]
        assert sum(one[0] * other[1] - other[0] * one[1] for one, other in pairwise(ring)) != 0


def _check_colour(colour: Any) -> None:
    assert len(colour) == 3
    assert all(type(value) is int and 0 <= value <= 255 for value in colour)
