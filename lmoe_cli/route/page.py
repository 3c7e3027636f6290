"""A routing as one HTML page of its own: nothing is loaded from anywhere, and its one script is allowed by its hash.

Without the script tokens have their colours and letters, and a tooltip with their gates.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template
from typing import Any

from lmoe_cli.engine.legend import NOBODY, leader
from lmoe_cli.html_page import text
from lmoe_cli.route.report import share_of

COLOURS = (
    (0, 140, 186), (200, 80, 160), (190, 140, 0), (40, 150, 70), (90, 90, 220), (210, 70, 50),
    (0, 160, 150), (140, 60, 180), (130, 110, 60), (110, 150, 0), (60, 110, 160), (230, 110, 90),
)  # fmt: skip
"""Red, green and blue; neither light nor dark."""
FAINTEST, STRONGEST = 0.1, 0.65
"""How much of its colour a token has whose expert has no say, and all of it."""
DIGITS = 3
"""Decimals of the gates that the page holds."""

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src '$hash'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<h1>$title</h1>
<p>$about</p>
<table class="shares"><tbody>
$shares
</tbody></table>
<p class="controls"><label>Coloured by
<select id="layer"><option value="-1">all layers</option>$options</select></label>
<span class="hint">Hover a token, or click it and use ← and →.</span></p>
<div id="text" tabindex="0">$tokens</div>
<div id="panel" aria-live="polite"></div>
$without
<h2>Mean gates by layer</h2>
<div class="wide"><table><thead><tr><th>layer</th>$heads<th>shares</th></tr></thead><tbody>
$layers
</tbody></table></div>
<script type="application/json" id="data">$data</script>
<script>$script</script>
</body>
</html>
""")


def page(data: Mapping[str, Any], name: str = "") -> str:
    """The page.

    Args:
        data: From `report.report`, by layer.
        name: Of the loadout.
    """
    experts = data["experts"]
    colours = {expert["name"]: COLOURS[number % len(COLOURS)] for number, expert in enumerate(experts)}
    letters = {expert["name"]: expert["letter"] for expert in experts}
    script = _beside("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return PAGE.substitute(
        title=text(f"Routing of {name}" if name else "Routing"),
        hash=f"sha256-{digest}",
        style=_beside("page.css"),
        about=text(_about(data)),
        shares="\n".join(_share(expert, colours) for expert in experts) + _rest(data["rest"]),
        options="".join(
            f'<option value="{number}">{text(_label(layer))}</option>' for number, layer in enumerate(data["layers"])
        ),
        tokens="".join(_token(token, number, letters, colours) for number, token in enumerate(data["tokens"])),
        without=_without(data["without"]),
        heads="".join(f"<th>{text(expert['letter'])} {text(expert['name'])}</th>" for expert in experts),
        layers="\n".join(_layer(layer, colours) for layer in data["layers"]),
        data=_json(_compact(data, colours)),
        script=script,
    )


def _beside(name: str) -> str:
    return (files("lmoe_cli.route") / name).read_text(encoding="utf-8")


def _about(data: Mapping[str, Any]) -> str:
    router = f"Router {data['router']}"
    match data["scope"]:
        case "fixed":
            return f"{router}: the gates are the same for every token."
        case "prompt":
            return f"{router}: one blend for the whole prompt."
    return (
        f"{router}: the gates with which each token is read, averaged over places. The letter is that of the expert "
        f"with most say, a capital for more than half; {NOBODY} where no expert has most."
    )


def _label(layer: Mapping[str, Any]) -> str:
    return layer["label"] if layer["layer"] is None else f"layer {layer['layer']}"


def _share(expert: Mapping[str, Any], colours: Mapping[str, tuple[int, int, int]]) -> str:
    share, colour = expert["share"], colours[expert["name"]]
    bar = f'<i style="width:{share * 20:.2f}rem;background:rgb{colour}"></i>'
    return f"<tr><th>{text(expert['letter'])} {text(expert['name'])}</th><td>{share:.1%}</td><td>{bar}</td></tr>"


def _rest(rest: float) -> str:
    return f"\n<tr><th>{NOBODY} the base alone</th><td>{rest:.1%}</td><td></td></tr>" if rest > 0.0005 else ""


def _token(
    token: Mapping[str, Any], number: int, letters: Mapping[str, str], colours: Mapping[str, tuple[int, int, int]]
) -> str:
    shares = share_of(token["gates"])
    best = leader(shares)
    mark, style = NOBODY, ""
    if best is not None:
        mark = letters[best] if shares[best] > 0.5 else letters[best].lower()
        style = f' style="background:rgba{(*colours[best], _strength(shares[best]))}"'
    gates = ", ".join(f"{name} {gate:.3f}" for name, gate in token["gates"].items())
    shown = token["text"].replace("\t", "⇥").replace("\n", "↵") or "◌"
    after = "<br>" * token["text"].count("\n")
    return (
        f'<ruby class="{token["part"]}" data-n="{number}" title="{text(gates)}"{style}>{text(shown)}'
        f"<rt>{text(mark)}</rt></ruby>{after}"
    )


def _strength(share: float) -> float:
    return round(FAINTEST + (STRONGEST - FAINTEST) * share, 3)


def _layer(layer: Mapping[str, Any], colours: Mapping[str, tuple[int, int, int]]) -> str:
    cells = "".join(f"<td>{gate:.3f}</td>" for gate in layer["gates"].values())
    bar = "".join(
        f'<i style="width:{share * 16:.2f}rem;background:rgb{colours[name]}"></i>'
        for name, share in layer["shares"].items()
    )
    return f'<tr><th>{text(_label(layer))}</th>{cells}<td class="bar">{bar}</td></tr>'


def _without(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return ""
    mean = "–" if told["mean_change"] is None else f"{told['mean_change']:+.4f}"
    words = (
        f"Log-probabilities with all experts, less those without {told['expert']}: {mean} nats per token of the "
        f"{told['of']}, {told['total_change']:+.4f} over its {told['tokens']} tokens. Green lines stand over tokens "
        "that it makes likelier by 0.1 or more, red ones under those that it makes less likely."
    )
    return f"<p>{text(words)}</p>"


def _compact(data: Mapping[str, Any], colours: Mapping[str, tuple[int, int, int]]) -> dict[str, Any]:
    """What the script needs, as lists in the order of the experts."""

    def row(gates: Mapping[str, float]) -> list[float]:
        return [round(gate, DIGITS) for gate in gates.values()]

    return {
        "names": [expert["name"] for expert in data["experts"]],
        "letters": [expert["letter"] for expert in data["experts"]],
        "colours": list(colours.values()),
        "strength": [FAINTEST, STRONGEST],
        "nobody": NOBODY,
        "layers": [_label(layer) for layer in data["layers"]],
        "tokens": [
            {
                "id": token["id"],
                "text": token["text"],
                "gates": row(token["gates"]),
                "layers": [row(gates) for gates in token["layers"].values()],
                **{key: token[key] for key in ("logprob", "logprob_without", "change") if key in token},
            }
            for token in data["tokens"]
        ],
    }


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
