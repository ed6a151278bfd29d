"""The HTML of a page that is one file: pictures are in it, and it loads nothing else."""

import base64
import html
import io
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mae.evaluate import pictures

LARGE = 2**21  # bytes of pixels from which a picture is a JPEG file, of a tenth of the size of PNG
STYLE = """
:root { color-scheme: light; --soft: #566370; --line: #dce2e8; --shade: #f4f6f8 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px 16px 56px; color: #1b2530; background: #fff;
  font: 16px/1.5 system-ui, sans-serif }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--line); font-size: 1.2rem }
h3 { margin: 16px 0 4px; font-size: 1rem; font-weight: 600 }
p { margin: 6px 0 12px; max-width: 75ch; color: var(--soft); overflow-wrap: anywhere }
img { display: block; width: 100%; height: auto }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 10px; margin-top: 20px }
.facts div { padding: 10px 14px; border: 1px solid var(--line); border-radius: 8px; color: var(--soft);
  font-size: .85rem }
.facts b { display: block; color: #1b2530; font-size: 1.3rem; font-weight: 600; line-height: 1.3 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 370px), 1fr)); gap: 16px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 20px }
.captioned { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: 16px }
figure { margin: 0 }
figcaption { margin-top: 4px; color: var(--soft); font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere }
.titles { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column; align-items: end; margin-bottom: 4px;
  color: var(--soft); font-size: .75rem; line-height: 1.2; text-align: center }
pre, dl { margin: 0; padding: 10px 14px; border-radius: 8px; background: var(--shade); overflow-wrap: anywhere;
  font: .82rem/1.5 ui-monospace, monospace }
pre { white-space: pre-wrap }
pre span { white-space: nowrap }
pre + dl { margin-top: 8px }
dl { columns: 300px }
dl div { break-inside: avoid; padding-left: 1em; text-indent: -1em }
dt, dd { display: inline; margin: 0 }
dt { color: var(--soft) }
table { border-collapse: collapse; font-size: .9rem }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600 }
.wide { overflow-x: auto }
.verdict { color: #1b2530; font-size: 1.1rem }
summary { margin: 12px 0; cursor: pointer }
"""


def definitions(values: Mapping[str, Any]) -> str:
    """Returns a list of values by name."""
    texts = [
        f"<div><dt>{html.escape(name)}</dt> <dd>{html.escape(str(value))}</dd></div>" for name, value in values.items()
    ]
    return f"<dl>{''.join(texts)}</dl>"


def pair(pixels: np.ndarray, rows: int, titles: Sequence[str], alt: str) -> str:
    """Returns the halves of a picture of `pictures.tile`: side by side on a wide page, one below the other on a narrow.

    Args:
        rows: number of rows of the picture.
        titles: of the columns.
    """
    middle = math.ceil(rows / 2) * (len(pixels) + pictures.GAP) // rows
    heads = "".join(f"<span>{html.escape(title)}</span>" for title in titles)
    halves = [half for half in (pixels[: middle - pictures.GAP], pixels[middle:]) if len(half)]
    texts = [f'<div><div class="titles">{heads}</div>{picture(half, alt)}</div>' for half in halves]
    return f'<div class="pair">{"".join(texts)}</div>'


def picture(pixels: np.ndarray, alt: str) -> str:
    """Returns a picture uint8 (height, width, 1 or 3) as an image of the page."""
    file = io.BytesIO()
    kind = "jpeg" if pixels.nbytes > LARGE else "png"
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, kind, quality=90)
    return image(file.getvalue(), kind, alt)


def captioned(images: Iterable[tuple[str, str]]) -> str:
    """Returns images of the page in a grid, each with a text below it."""
    figures = [f"<figure>{shown}<figcaption>{html.escape(text)}</figcaption></figure>" for shown, text in images]
    return f'<div class="captioned">{"".join(figures)}</div>'


def image(content: bytes, kind: str, alt: str) -> str:
    """Returns the file of an image as an image of the page."""
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{html.escape(alt)}">'


def command(words: Iterable[str]) -> str:
    """Returns a command line. A browser may not break it within a flag."""
    texts = [html.escape(shlex.quote(word)) for word in words]
    shown = [f"<span>{text}</span>" if text.startswith("--") else text for text in texts]
    return f"<pre>{' '.join(shown)}</pre>"


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table of texts. The first column has the names of the rows."""
    header = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    lines = ["".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows]
    return f'<div class="wide"><table><tr>{header}</tr>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def paragraph(text: str, style: str = "") -> str:
    """Returns a paragraph of plain text, without space around it. `style`: a class in STYLE."""
    kind = f' class="{style}"' if style else ""
    return f"<p{kind}>{html.escape(text.strip())}</p>"


def section(title: str, content: str) -> str:
    """Returns a section."""
    return f"<section><h2>{title}</h2>{content}</section>"


def details(title: str, content: str) -> str:
    """Returns a section that is closed until the reader opens it."""
    return f"<details><summary><b>{title}</b></summary>{content}</details>"


def render(title: str, about: str, facts: Mapping[str, str], sections: Iterable[str]) -> str:
    """Returns the page."""
    title = html.escape(title)
    shown = "".join(f"<div><b>{html.escape(value)}</b>{name}</div>" for name, value in facts.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
<h1>{title}</h1>
{paragraph(about)}
<div class="facts">{shown}</div>
{"".join(sections)}
</html>
"""
