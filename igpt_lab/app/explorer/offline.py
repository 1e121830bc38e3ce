"""The explorer as one HTML file that works without a kernel and without a network."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping

# What the file may load is nothing: a name in it is a stranger's, and would not get out.
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
:root {{ color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
body {{ margin: 12px; background: var(--jp-layout-color0, #fff); }} {css}</style></head>
<body><main id="explorer"></main>
<script type="application/json" id="sent">{sent}</script>
<script type="module">{script}
const sent = JSON.parse(document.getElementById("sent").textContent);
render({{ model: offlineModel(sent.values, sent.arrays), el: document.getElementById("explorer") }});
</script></body></html>
"""
DARK = {  # the colours of JupyterLab's dark theme
    "layout-color0": "#111", "layout-color1": "#212121", "layout-color2": "#424242", "ui-font-color1": "#fff",
    "border-color1": "#616161", "border-color2": "#424242",
}  # fmt: skip


def offline_page(title: str, values: Mapping, arrays: Mapping[str, bytes], *, script: str, css: str) -> str:
    """The page of what was sent to the browser; `values` are those that json can hold, and ValueError for NaN."""
    packed = {name: base64.b64encode(array).decode() for name, array in arrays.items()}
    sent = json.dumps({"values": dict(values), "arrays": packed}, allow_nan=False)
    dark = " ".join(f"--jp-{name}: {colour};" for name, colour in DARK.items())
    sent = sent.replace("<", "\\u003c")  # ends no element
    return PAGE.format(title=html.escape(title), css=css, dark=dark, sent=sent, script=script)
