"""Decides whether notation that has no value here is well formed, as H2O or an equation modulo 3 is."""

from __future__ import annotations

import re

from dapo.reward.expressions import GREEK, MARKS
from dapo.reward.tokens import FUNCTIONS, WRAPPERS

_MAX_LENGTH = 300  # characters
# commands that a ground truth may have, beside functions, marks, Greek letters and wrappers
_COMMANDS = """
    gcd lcm max min sup inf lim sum prod int det dim ker deg arg mod bmod pmod equiv cong mid nmid
    parallel perp angle triangle circ degree subset subseteq supset supseteq setminus cap cup in notin to
    rightarrow Rightarrow longrightarrow implies iff leftrightarrow mapsto land lor wedge vee neg lnot
    forall exists sim approx propto ldots cdots dots prime partial nabla quad qquad left right begin end
    operatorname displaystyle textstyle overset underset frac dfrac tfrac cfrac sqrt binom dbinom tbinom
    choose cdot times ast div pm mp le leq leqslant ge geq geqslant ne neq lt gt infty pi emptyset
    varnothing lvert rvert vert langle rangle lbrace rbrace lfloor rfloor lceil rceil colon hbar mathring
"""
_KNOWN = (frozenset(_COMMANDS.split()) | FUNCTIONS | GREEK | MARKS | frozenset(WRAPPERS)) - {"boxed", "fbox"}
# a character that mathematics has not, a URL, or a sign at an end that wants something beyond it
_DAMAGED = re.compile(
    r"[^\w\s+\-−*/^'′″,;:.=<>≤≥≠≡∈∉∪∩∞°%$€£|&~()\[\]{}\\!×·√→⇒±]|//|^[*/^=<>,;:&.]|[-+*/^_=<>,;:&\\]$"
)


def is_notation(text: str) -> bool:
    r"""True if the same text may equal `text`: H2O, 3 hours 20 minutes, \gcd(m,n), \begin{cases}…"""
    text = re.sub(r"\\?\{(\\begin\{.*)\\right\.?$", r"\1", text, flags=re.DOTALL)  # of a system of equations
    num_open, num_closed = (len(re.findall(brackets, text)) for brackets in (r"[(\[]", r"[)\]]"))
    return (
        len(text) <= _MAX_LENGTH
        and bool(re.search(r"[^\W\d_]", text))
        and not _DAMAGED.search(text)
        and set(re.findall(r"\\([a-zA-Z]+)", text)) <= _KNOWN
        and num_open == num_closed
        and text.count("{") == text.count("}")
        and text.count(r"\begin{") == text.count(r"\end{")
        and text.count("$") % 2 == 0
    )
