"""Token views as a self-contained HTML page, and for a terminal."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from fused_kd.objectives import Objective
from fused_kd.training.evaluation.token_view import SentenceView, TokenView, gamma_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_LEVELS = 100
# parts of matplotlib's magma on which one text colour stays legible: easy to hard on a white and on a black page
_MAGMA = {"light": (1.0, 0.6), "dark": (0.06, 0.5)}
_TICKS = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


def render_html(views: Sequence[SentenceView], *, teacher: str = "", scale_max: float | None = None) -> str:
    """One self-contained page: a legend, a line of means a checkpoint, and each sentence once a checkpoint.

    Args:
        views: of any number of checkpoints, in the order in which they shall appear.
        teacher: named in the page's head.
        scale_max: difficulty in nats that gets the last colour; None (default) takes the 98th percentile, at least
            1. Colours are proportional to the square root of the difficulty up to there.

    Raises:
        ValueError: no views, a ``scale_max`` that is not positive.
    """
    top, summary = _scale_max(views, scale_max), _by_checkpoint(views)
    facts = [("objective", repr(views[0].objective)), ("teacher", teacher), ("hard tokens", _rule(views[0].objective))]
    lines = [
        "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts if v) + "</dl>",
        _legend(views, top),
    ]
    lines.append("<table><tr><th>checkpoint<th>tokens<th>mean difficulty<th>hard</tr>")
    for name, tokens, difficulty, hard in summary:
        lines.append(f"<tr><td>{escape(name)}<td>{tokens}<td>{difficulty:.3f} nats<td>{hard:.1%}</tr>")
    lines.append("</table>")
    for index, group in _by_sentence(views):
        lines.append(f'<section><h2>{index + 1}</h2><p class="source" dir="auto">{escape(group[0].title)}</p>')
        for view in group:
            lines.append(
                f'<div class="row"><div class="label"><b>{escape(view.checkpoint)}</b><br>{_figures(view)}</div>'
                f'<p class="tokens" dir="auto">{"".join(_token_html(token, top) for token in view.tokens)}</p></div>'
            )
        lines.append("</section>")
    return _PAGE.substitute(light=_palette_css("light"), dark=_palette_css("dark"), body="\n".join(lines))


def render_terminal(views: Sequence[SentenceView], *, scale_max: float | None = None) -> Group:
    """The same for ``rich.console.Console.print``: colours, and hard tokens in brackets, so that it reads without.

    Arguments and errors are those of `render_html`.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    top = _scale_max(views, scale_max)
    legend = Text("difficulty, nats: ")
    for tick in _ticks(top):
        legend.append(f" {tick:g} ", _style(tick, top))
    legend.append(f"   [hard]: {_rule(views[0].objective)}")
    means = Table("checkpoint", "tokens", "mean difficulty", "hard")
    for name, tokens, difficulty, hard in _by_checkpoint(views):
        means.add_row(Text(name), f"{tokens}", f"{difficulty:.3f}", f"{hard:.1%}")
    parts: list[Any] = [legend, means]
    for index, group in _by_sentence(views):
        grid = Table.grid(padding=(0, 2), expand=False)
        for view in group:
            shown = Text(overflow="fold")
            for token in view.tokens:
                shown.append_text(_token_text(token, top))
            grid.add_row(Text(f"{view.checkpoint}\n{_figures(view)}", "dim"), shown)
        parts += [Text(f"\n{index + 1}. {group[0].title}", "bold"), grid]
    return Group(*parts)


def _by_sentence(views: Sequence[SentenceView]) -> Iterable[tuple[int, list[SentenceView]]]:
    ordered = sorted(views, key=lambda view: view.index)  # stable: checkpoints keep their order
    return ((index, list(group)) for index, group in groupby(ordered, key=lambda view: view.index))


def _by_checkpoint(views: Sequence[SentenceView]) -> list[tuple[str, int, float, float]]:
    rows = []
    for name in dict.fromkeys(view.checkpoint for view in views):
        tokens = [token for view in views if view.checkpoint == name for token in view.tokens]
        whole = SentenceView(name, 0, "", views[0].objective, tuple(tokens))
        rows.append((name, len(tokens), whole.mean_difficulty, whole.hard_fraction))
    return rows


def _scale_max(views: Sequence[SentenceView], given: float | None) -> float:
    if not views:
        raise ValueError("views is empty: expected at least one sentence")
    if given is not None:
        if not 0 < given < math.inf:
            raise ValueError(f"scale_max={given!r}: expected a positive number of nats")
        return float(given)
    found = sorted(token.difficulty for view in views for token in view.tokens)
    return max(1.0, found[math.ceil(0.98 * (len(found) - 1))] if found else 0.0)


def _share(difficulty: float, top: float) -> float:
    return math.sqrt(min(max(difficulty, 0.0), top) / top)


def _ticks(top: float) -> list[float]:
    inner = [tick for tick in _TICKS if _share(tick, top) < 0.93]
    return [*inner, float(f"{top:.2g}")]


def _rule(objective: Objective) -> str:
    if objective.spec.ranked:
        return f"the {objective.fraction:.0%} with the largest difficulty"  # type: ignore[attr-defined]
    note = "" if objective.spec.gated else " (counted so; this objective treats all tokens alike)"
    return f"difficulty above Γ = {gamma_of(objective):g}{note}"


def _figures(view: SentenceView) -> str:
    return f"{view.mean_difficulty:.2f} nats, {view.hard_fraction:.0%} hard"


def _colour(share: float, page: str) -> str:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    easy, hard = _MAGMA[page]
    return to_hex(colormaps["magma"](easy + (hard - easy) * share))


def _visible(token: TokenView) -> str:
    """The span's text on its first token, a dot on the others; what has no shape of its own gets one."""
    if token.part > 1:
        return "·"
    named = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
    shown = "".join(c if c.isprintable() else named.get(c, f"‹{ord(c):X}›") for c in token.text)
    return shown if shown else "·"


def _top(pieces: tuple[tuple[str, float], ...]) -> str:
    return ", ".join(f"{piece!r} {value:.2g}" for piece, value in pieces)


def _token_html(token: TokenView, top: float) -> str:
    whole = f" (part {token.part} of {token.parts} of {token.text!r})" if token.parts > 1 else ""
    tip = (
        f"{token.piece!r}{whole}: {'hard' if token.is_hard else 'easy'}\ndifficulty {token.difficulty:.3f} nats\n"
        f"q_y {token.q_y:.2g}, p_y {token.p_y:.2g}\nstudent: {_top(token.student_top)}\n"
        f"teacher: {_top(token.teacher_top)}"
    )
    level = round(_LEVELS * _share(token.difficulty, top))
    hard = " hard" if token.is_hard else ""
    return f'<span class="t c{level}{hard}" title="{escape(tip)}">{escape(_visible(token))}</span>'


def _token_text(token: TokenView, top: float) -> Text:
    from rich.text import Text

    shown = _visible(token)
    space = " " * (len(shown) - len(shown.lstrip(" ")))
    word = shown[len(space) :]
    body = f"[{word or '␣'}]" if token.is_hard else word
    return Text(space).append(body, _style(token.difficulty, top) + (" bold" if token.is_hard else ""))


def _style(difficulty: float, top: float) -> str:
    return f"#000000 on {_colour(_share(difficulty, top), 'light')}"


def _palette_css(page: str) -> str:
    stops = ", ".join(_colour(step / 16, page) for step in range(17))
    levels = "".join(f".c{level}{{background:{_colour(level / _LEVELS, page)}}}" for level in range(_LEVELS + 1))
    return f".bar{{background:linear-gradient(90deg, {stops})}}{levels}"


def _legend(views: Sequence[SentenceView], top: float) -> str:
    marks = "".join(f'<i style="left:{_share(tick, top):.1%}">{tick:g}</i>' for tick in _ticks(top))
    objective = views[0].objective
    if not objective.spec.ranked and gamma_of(objective) < top:
        marks += f'<i class="gamma" style="left:{_share(gamma_of(objective), top):.1%}">Γ</i>'
    return (
        f'<div class="legend"><div class="bar">{marks}</div><span>difficulty KL(ỹ‖q), nats (the last colour: '
        f'{top:.2g} and more)</span><span><span class="t hard c{_LEVELS // 2}">hard</span> underlined, '
        f'<span class="t c{_LEVELS // 8}">easy</span> not; · a further part of the character before it</span></div>'
    )


_PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token difficulty</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1f; --soft: #65656d; --page: #fff; --line: #dcdce2; --mark: #1b1b1f }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 76rem;
  margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.4rem } h2 { font-size: 1rem; display: inline; margin-right: .6rem; color: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem } dt { color: var(--soft) } dd { margin: 0 }
table { border-collapse: collapse; margin: 1.2rem 0 } th { font-weight: 600; text-align: left }
th, td { padding: .2rem 1.4rem .2rem 0; border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums }
section { border-top: 1px solid var(--line); padding: .9rem 0 } .source { display: inline; white-space: pre-wrap }
.row { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; margin-top: .6rem }
.label { font-size: .8rem; line-height: 1.35; color: var(--soft); overflow-wrap: anywhere }
.label b { color: var(--ink) }
.tokens { margin: 0; white-space: pre-wrap; line-height: 2.1; font-size: 1.05rem; overflow-wrap: anywhere }
.t { padding: .12em .1em; margin-right: 2px; border-radius: 3px; border-bottom: 3px solid transparent; color: #000 }
.hard { border-bottom-color: var(--mark) } .tokens .t:hover { outline: 2px solid var(--soft) }
.legend { display: grid; gap: .5rem; margin: 2.2rem 0 1rem; font-size: .85rem; color: var(--soft); max-width: 36rem }
.bar { position: relative; height: 1.1rem; border-radius: 3px; margin-bottom: 1.3rem; border: 1px solid var(--line) }
.bar i { position: absolute; top: 1.2rem; transform: translateX(-50%); font-style: normal }
.bar i.gamma { top: -1.5rem; font-weight: 600; color: var(--ink) }
.bar i.gamma::after { content: ""; position: absolute; left: 50%; top: 1.4rem; height: 1.2rem;
  border-left: 2px solid var(--ink) }
#tip { position: fixed; display: none; white-space: pre-wrap; max-width: 30rem; padding: .5rem .7rem; z-index: 1;
  border-radius: 6px; font: 13px/1.45 ui-monospace, monospace; background: var(--ink); color: var(--page);
  pointer-events: none }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr; gap: .1rem } }
$light
@media (prefers-color-scheme: dark) {
:root { --ink: #ececf0; --soft: #a0a0aa; --page: #0c0c10; --line: #33333b; --mark: #ececf0 }
.t { color: #fff }
$dark
}
</style></head><body><h1>Token difficulty</h1>
$body
<div id="tip"></div>
<script>
// titles work without this; it shows them at once, and on a touch screen
const tip = document.getElementById("tip");
document.addEventListener("pointerover", event => {
  const token = event.target.closest(".tokens .t");
  tip.style.display = token ? "block" : "none";
  if (!token) return;
  if (token.title) { token.dataset.tip = token.title; token.removeAttribute("title"); }
  tip.textContent = token.dataset.tip;
  const box = token.getBoundingClientRect(), below = box.bottom + 6;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (below + tip.offsetHeight < innerHeight ? below : box.top - tip.offsetHeight - 6) + "px";
});
</script></body></html>
""")
