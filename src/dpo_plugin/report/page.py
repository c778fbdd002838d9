"""The parts of a report page that know nothing of runs: style, the PNG button, the template's engine, numbers."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from dpo_plugin.report.charts import DARK, LIGHT


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"{name}:{colour};" for name, colour in colours.items())


STYLE = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme: dark){{:root{{{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;max-width:1180px;padding:16px;background:var(--page);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}}
h1{{font-size:1.35rem;margin:.3em 0}} h2{{font-size:1.1rem;margin:1.8em 0 .6em}} h3{{font-size:.95rem;margin:0}}
p{{margin:.4em 0}} a{{color:inherit}} code,pre{{font:.85em ui-monospace,Menlo,Consolas,monospace}}
pre{{white-space:pre-wrap;margin:0}} small,.quiet,figcaption,th{{color:var(--ink2)}}
.card,figure,details{{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:12px 14px}}
figure{{margin:0}} .card+.card{{margin-top:10px}} .tiles .card,ol.findings .card{{margin:0}}
.sides{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr));gap:4px 24px}}
.said{{white-space:pre-wrap}}
.verdict{{border-left:6px solid var(--good)}} .verdict.error{{border-left-color:var(--mark)}}
.verdict.warning{{border-left-color:var(--warn)}}
.verdict strong{{font-size:1.15rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(118px,1fr));gap:10px;margin:12px 0}}
.tiles small{{display:block;line-height:1.3}}
.tiles b{{display:block;font-size:1.15rem;font-weight:600;white-space:nowrap}}
.about{{display:flex;flex-wrap:wrap;gap:2px 18px;margin:.2em 0 .8em;overflow-wrap:anywhere}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:12px}}
figure{{display:flex;flex-direction:column;gap:4px;scroll-margin-top:8px}}
figure header{{display:flex;justify-content:space-between;align-items:center;gap:8px}}
figure svg{{width:100%;height:auto;display:block}}
figcaption{{font-size:.85rem;line-height:1.4}}
button{{font:inherit;font-size:.75rem;color:var(--ink2);background:none;border:1px solid var(--grid);border-radius:6px;
 padding:2px 8px;cursor:pointer}} button:hover{{color:var(--ink)}}
ol.findings{{list-style:none;padding:0;margin:12px 0;display:grid;gap:10px}}
ol.findings li{{border-left:4px solid var(--warn)}} ol.findings li.error{{border-left-color:var(--mark)}}
.number{{color:var(--mark);font-weight:700;margin-right:.4em}}
.write{{display:block;margin-top:6px;padding:6px 8px;background:var(--page);border-radius:6px}}
details{{margin:12px 0}} summary{{cursor:pointer;font-weight:600}} details>*:not(summary){{margin-top:10px}}
.wide{{overflow-x:auto}} table{{border-collapse:collapse;width:100%;font-size:.88rem}}
th,td{{text-align:left;vertical-align:top;padding:5px 14px 5px 0;border-bottom:1px solid var(--grid)}}
th{{font-weight:500;overflow-wrap:anywhere;min-width:100px}} td{{overflow-wrap:anywhere;min-width:84px}}
td.n{{font-variant-numeric:tabular-nums;white-space:nowrap}}
.answers details{{padding:0;border:0;margin:10px 0 0}}
footer{{margin:24px 0;font-size:.85rem;color:var(--ink2)}}
@media print{{button{{display:none}} figure,li{{break-inside:avoid}}}}
"""

SCRIPT = r"""
for (const button of document.querySelectorAll("figure button")) button.onclick = () => {
  const figure = button.closest("figure"), svg = figure.querySelector("svg"), width = 1200;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
  const [, , w, h] = svg.getAttribute("viewBox").split(" ").map(Number), height = Math.round(width * h / w);
  const text = svg.outerHTML.replace(/var\((--\w+)\)/g, (_, name) => colour(name));
  const image = new Image(), canvas = document.createElement("canvas"), link = document.createElement("a");
  image.onload = () => {
    canvas.width = width; canvas.height = height + 60;
    const draw = canvas.getContext("2d");
    draw.fillStyle = colour("--card"); draw.fillRect(0, 0, canvas.width, canvas.height);
    draw.fillStyle = colour("--ink"); draw.font = "600 28px system-ui, sans-serif";
    draw.fillText(figure.querySelector("h3").textContent, 24, 42);
    draw.drawImage(image, 0, 60, width, height);
    link.href = canvas.toDataURL("image/png"); link.download = figure.id + ".png"; link.click();
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(
    text.replace("<svg ", `<svg width="${width}" height="${height}" font-family="system-ui, sans-serif" `));
};
"""


_SCRIPT_HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
"""The page's own script is the only one that a browser may run."""


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"number": number, "percent": percent, "shown": shown, "prose": prose, "sentence": sentence}
    return environment


def page(**content: Any) -> str:
    """A whole HTML page that needs no network; every value is escaped but `Markup`.

    Args:
        content: What report.html.jinja names.
    """
    constants = {"style": Markup(STYLE), "script": Markup(SCRIPT), "script_hash": _SCRIPT_HASH}
    return _environment().get_template("report.html.jinja").render(**constants, **content) + "\n"


def prose(text: str) -> Markup:
    """A sentence as HTML; what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def number(value: Any) -> str:
    """A number in three digits, whole ones with all of theirs; an empty place for None; other values as they are."""
    if not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if isinstance(value, int) or (math.isfinite(value) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}".replace("-", "−")
    text = f"{value:,.0f}" if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"
    return text.replace("-", "−")


def percent(share: Any) -> str:
    """A share in three digits; what is no number as it is."""
    return f"{100 * share:.3g}%" if isinstance(share, (int, float)) else number(share)


def shown(value: Any, name: str) -> str:
    """A value under its name: accuracies as a share of a hundred, other numbers in three digits, text as it is."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return percent(value) if "accurac" in name else number(value)
    return "–" if value is None else str(value)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as ``a.b`` → text, for tables and comparisons."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
            found |= flat({str(at): entry for at, entry in enumerate(value)}, f"{prefix}{name}.")
        elif value is not None:
            found[f"{prefix}{name}"] = str(value)
    return found
