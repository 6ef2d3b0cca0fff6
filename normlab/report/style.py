"""Colours and style sheet of the page: each colour is a CSS variable, light and dark."""

INK, MUTED, LINE = "ink", "muted", "line"

LIGHT = {
    "page": "#fbfbfa",
    "card": "#ffffff",
    INK: "#1c2126",
    MUTED: "#5a646e",
    LINE: "#dfe3e7",
    "link": "#0b5cad",
    "good": "#1a6b3c",
    "bad": "#b3261e",
    "bad-card": "#fdf1ef",
    "wait": "#7a5200",
}
DARK = {
    "page": "#13171b",
    "card": "#1a1f25",
    INK: "#e7eaed",
    MUTED: "#9ba6b1",
    LINE: "#323a43",
    "link": "#7db8f5",
    "good": "#6fcf97",
    "bad": "#ff8a80",
    "bad-card": "#33201f",
    "wait": "#e8b04a",
}
# After Okabe & Ito 2008, "Color universal design": the hues, darkened for a light page and
# lightened for a dark one until each stands out 3:1 (tested). The first is neutral.
_SERIES_LIGHT = ("#4a4f55", "#0072b2", "#c84e00", "#00795c", "#a8438b", "#8a6a00", "#2a8fcb")
_SERIES_DARK = ("#c3c9cf", "#5aaee8", "#ff8f4a", "#3fc7a0", "#e58cc8", "#e3c14c", "#9fd8ff")
NUM_SERIES = len(_SERIES_LIGHT)


def series(index: int) -> str:
    """Returns the colour variable of line `index`; where colours repeat, dashes differ."""
    return f"series-{index % NUM_SERIES}"


LIGHT |= {series(index): colour for index, colour in enumerate(_SERIES_LIGHT)}
DARK |= {series(index): colour for index, colour in enumerate(_SERIES_DARK)}


def style_sheet() -> str:
    """Returns the page's CSS: light, and dark where the reader's system asks for it."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in palette.items())
        for palette in (LIGHT, DARK)
    )
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_RULES}"
        f"@media print{{:root{{{light}--page:#fff;}}.scroll{{overflow:visible}}}}\n"
    )


_RULES = """\
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);line-height:1.5;
 font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;
 font-size:16px;-webkit-text-size-adjust:100%}
main{max-width:76rem;margin:0 auto;padding:2.2rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.2;letter-spacing:-.015em;margin:0 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.6rem 0 .35rem}
h3{font-size:.95rem;margin:0 0 .15rem;overflow-wrap:anywhere}
p{margin:.4rem 0;max-width:46rem;overflow-wrap:anywhere}
a{color:var(--link)}
code{font-family:ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.86em}
.lead{font-size:1.12rem;text-wrap:balance}
.muted,.override{color:var(--muted);font-size:.88rem}
.override{display:block;font-weight:400;font-size:.78rem;white-space:nowrap}
.command{display:block;margin:.9rem 0 0;padding:.6rem .8rem;border:1px solid var(--line);
 border-radius:8px;background:var(--card);overflow-x:auto;white-space:pre}
ul{margin:.5rem 0;padding-left:1.15rem;max-width:52rem}
li{margin:.25rem 0;overflow-wrap:anywhere}
.caveats{margin:1.4rem 0 0;padding:.65rem 1rem;border-left:4px solid var(--bad);
 border-radius:0 8px 8px 0;background:var(--bad-card)}
.caveats h2{margin:0;font-size:1rem}
.verdict{margin:1rem 0;padding:.65rem 1rem;border-left:4px solid var(--wait);
 border-radius:0 8px 8px 0;background:var(--card)}
.verdict h2{margin:0;font-size:1.05rem}
.verdict.reproduced{border-color:var(--good)}
.verdict.not-reproduced{border-color:var(--bad)}
.scroll{overflow-x:auto;margin:.7rem 0;border:1px solid var(--line);border-radius:10px;
 background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.5rem .9rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line);
 white-space:nowrap}
tr:last-child>*{border-bottom:0}
thead th{vertical-align:bottom;color:var(--muted);font-weight:600;font-size:.84rem;
 white-space:normal;line-height:1.3}
th{font-weight:600}
.words{text-align:left}
.runs td:last-child{white-space:normal;min-width:14rem}
.grouped .heading{display:none}
thead button{all:unset;cursor:pointer;padding:.5rem 0;margin:-.5rem 0}
thead button::after{content:"\\2195";margin-left:.3em;opacity:.55}
[aria-sort=ascending] button::after{content:"\\2191";opacity:1}
[aria-sort=descending] button::after{content:"\\2193";opacity:1}
thead button:focus-visible{outline:2px solid var(--link);outline-offset:3px}
th.words:first-child{position:sticky;left:0;background:var(--card)}
.headline td,.headline tbody th{padding-top:.6rem;padding-bottom:.6rem}
.headline .value{font-size:1.08rem;font-weight:600}
.headline thead th{color:var(--ink);font-size:.92rem}
.headline .detail{display:block}
.spread{color:var(--muted);white-space:nowrap}
.detail{color:var(--muted);font-size:.8rem}
.mark{display:block;color:var(--bad);font-size:.8rem;font-weight:600}
.group th{padding-top:1rem;text-align:left;font-size:.84rem;color:var(--muted)}
.group span{position:sticky;left:.6rem}
.diverged,.failed{color:var(--bad);font-weight:600}
.interrupted,.running{color:var(--wait);font-weight:600}
.strong{font-weight:700}
.planned{color:var(--muted)}
.done{color:var(--good)}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;margin:.7rem 0;padding:0;list-style:none;
 max-width:none;font-size:.9rem}
.legend li{display:flex;align-items:center;gap:.45rem;margin:0}
.legend svg{width:40px;height:16px;flex:none}
.choice input{position:absolute;opacity:0}
.choice label{display:inline-flex;align-items:center;justify-content:center;min-width:5.5rem;
 min-height:2.75rem;margin:.3rem .4rem .8rem 0;padding:0 .9rem;border:1px solid var(--line);
 border-radius:8px;background:var(--card);color:var(--ink);font-size:.9rem;cursor:pointer}
.choice input:checked+label{background:var(--ink);border-color:var(--ink);color:var(--page)}
.choice input:focus-visible+label{outline:2px solid var(--link);outline-offset:2px}
#axis-epochs:checked~.panels .epochs,#axis-seconds:checked~.panels .seconds{display:block}
#axis-epochs:checked~.panels .steps,#axis-seconds:checked~.panels .steps{display:none}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));gap:.9rem}
figure{margin:0;padding:.8rem .8rem .5rem;border:1px solid var(--line);border-radius:10px;
 background:var(--card);max-width:38rem}
figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:inherit!important}
.facts th,.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts th{white-space:nowrap;width:1%;padding-right:2rem}
@media (max-width:34rem){
 main{padding:1.3rem .9rem 3rem}
 h1{font-size:1.4rem}
 th,td{padding:.45rem .6rem}
 th.words:first-child{white-space:normal;max-width:11rem;overflow-wrap:break-word}
 figure{padding:.6rem .4rem .3rem}
 .headline .value{font-size:1rem}
}
"""
