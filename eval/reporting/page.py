"""Pages of HTML that need nothing but themselves: no network, no other file."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from torch import Tensor

from ebm_defense.eval.reporting.figures.pictures import pixels

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """Fill a template; whatever comes from a run is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def png(image: Tensor) -> str:
    """Return an image `[C, H, W]` in [0, 1] as a data URI, a pixel for a pixel."""
    from PIL import Image

    shown = (pixels(image) * 255).round().astype("uint8")
    file = io.BytesIO()
    Image.fromarray(shown).save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "image/png")


def data_uri(content: bytes, kind: str) -> str:
    """Return a file's content as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
