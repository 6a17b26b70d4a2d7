"""Several values: sets, lists without brackets, intervals and inequalities; words and choices."""

from __future__ import annotations

import random

from benchmarks.spelling.ways import Family, Values, lines


def _three(rng: random.Random) -> Values:
    a, b, c = sorted(rng.sample(range(2, 60), 3))
    return {"a": str(a), "b": str(b), "c": str(c), "d": str(c + rng.randint(1, 9))}


SET = Family(
    sample=_three,
    truths=(r"\{<a>, <b>, <c>\}", r"\left\{<a>,<b>,<c>\right\}"),
    same=lines(
        r"""
        \{<a>, <b>, <c>\}
        \{<a>,<b>,<c>\}
        \{<c>, <a>, <b>\}
        \{<b>,<a>,<c>\}
        \left\{<a>, <b>, <c>\right\}
        \left\{ <c>, <b>, <a> \right\}
        \big\{<a>, <b>, <c>\big\}
        \lbrace <a>, <b>, <c> \rbrace
        \{<a>,\, <b>,\, <c>\}
        \{\,<a>, <b>, <c>\,\}
        \{ <a>,\ <b>,\ <c> \}
        \{<a>.0, <b>, <c>\}
        \{<a>, <b>, <b>, <c>\}
        \{{<a>}, {<b>}, {<c>}\}
        {\{<a>, <b>, <c>\}}
        S = \{<a>, <b>, <c>\}
        x \in \{<a>, <b>, <c>\}
        A=\{<c>,<b>,<a>\}
        $\{<a>, <b>, <c>\}$
        \{<a>, <b>, <c>\}.
        \mathbf{\{<a>, <b>, <c>\}}
        \displaystyle\{<a>, <b>, <c>\}
        <a>, <b>, <c>
        <c>, <b>, <a>
        """
    ),
    near=lines(
        r"""
        \{<a>, <b>\}
        \{<a>, <b>, <d>\}
        \{<a>, <b>, <c>, <d>\}
        (<a>, <b>, <c>)
        \{<a>, -<b>, <c>\}
        \{<a><b>, <c>\}
        \{(<a>, <b>), <c>\}
        [<a>, <c>]
        \{<a> + <b>, <c>\}
        \{<a>\}
        """
    ),
)

LIST = Family(
    sample=_three,
    truths=("<a>, <b>, <c>", "<a>,<b>,<c>", r"<a>, <b>, \text{ and } <c>"),
    same=lines(
        r"""
        <a>, <b>, <c>
        <a>,<b>,<c>
        <c>, <a>, <b>
        <b>,<c>,<a>
        <a>,\, <b>,\, <c>
        <a>,\ <b>,\ <c>
        <a>, <b>, \text{ and } <c>
        <a>, <b> \text{ and } <c>
        <a>,<b>\text{, and }<c>
        <a> \text{ and } <b> \text{ and } <c>
        <a>, <b>, \text{ or } <c>
        <a>, <b> \text{ or } <c>
        <a>, <b>, and <c>
        \text{<a>, <b>, and <c>}
        \text{<a>, <b>, <c>}
        \{<a>, <b>, <c>\}
        \left\{<c>, <b>, <a>\right\}
        x = <a>, <b>, <c>
        x = <a>, x = <b>, x = <c>
        x=<a>, <b>, \text{ or } <c>
        x = <a> \text{ or } x = <b> \text{ or } x = <c>
        x_1 = <a>, x_2 = <b>, x_3 = <c>
        x \in \{<a>, <b>, <c>\}
        <a>; <b>; <c>
        <a>, \quad <b>, \quad <c>
        <a>,~<b>,~<c>
        {<a>}, {<b>}, {<c>}
        \mathbf{<a>, <b>, <c>}
        $<a>$, $<b>$, $<c>$
        \boxed{<a>, <b>, <c>
        <a>, <b>, <c>.
        <a>.0, <b>.0, <c>.0
        """
    ),
    near=lines(
        r"""
        <a>, <b>
        <a>, <b>, <d>
        <a>, <b>, <c>, <d>
        <a>, -<b>, <c>
        <a><b>, <c>
        <a><b><c>
        <a> + <b> + <c>
        <a>
        x = <a>, y = <b>, z = <d>
        <a>, <a>, <b>
        (<a>, <b>), <c>
        <a>, <b>, \ldots, <c>
        """
    ),
)


def _interval(rng: random.Random) -> Values:
    a, b = rng.sample(range(2, 40), 2)
    return {"a": str(a), "b": str(b), "anext": str(a + 41), "v": rng.choice("xtya")}


INTERVAL = Family(
    sample=_interval,
    truths=("(-<a>, <b>]", "(-<a>,<b>]", r"\left(-<a>, <b>\right]"),
    same=lines(
        r"""
        (-<a>, <b>]
        (-<a>,<b>]
        \left(-<a>, <b>\right]
        \left( -<a>,<b> \right]
        \left(-<a>,<b>\right]
        \bigl(-<a>, <b>\bigr]
        \Big(-<a>, <b>\Big]
        (-<a>,\, <b>]
        (-<a>,\ <b>]
        (-<a>.0, <b>]
        (−<a>, <b>]
        ({-<a>}, {<b>}]
        (-<a>, +<b>]
        \lparen -<a>, <b> \rbrack
        x \in (-<a>, <b>]
        x\in\left(-<a>,<b>\right]
        t \in (-<a>, <b>]
        x ∈ (-<a>, <b>]
        I = (-<a>, <b>]
        D = (-<a>, <b>]
        $(-<a>, <b>]$
        \text{(-<a>, <b>]}
        (-<a>, <b>].
        {(-<a>, <b>]}
        \mathbf{(-<a>, <b>]}
        \displaystyle(-<a>, <b>]
        -<a> < <v> \le <b>
        -<a> < <v> \leq <b>
        -<a> < <v> ≤ <b>
        -<a> < <v> <= <b>
        -<a> < <v> \leqslant <b>
        -<a>\lt <v>\le <b>
        <b> \ge <v> > -<a>
        <b> \geq <v> \gt -<a>
        \{<v> : -<a> < <v> \le <b>\}
        \{<v> \mid -<a> < <v> \leq <b>\}
        \boxed{(-<a>, <b>]
        \boxed{\boxed{(-<a>,<b>]}}
        (-\frac{<a>}{1}, <b>]
        <v> > -<a> \text{ and } <v> \le <b>
        """
    ),
    near=lines(
        r"""
        (-<a>, <b>)
        [-<a>, <b>]
        [-<a>, <b>)
        (<a>, <b>]
        (-<anext>, <b>]
        (-<a>, \infty)
        (-\infty, <b>]
        -<a>, <b>
        \{-<a>, <b>\}
        -<a> \le <v> \le <b>
        -<a> < <v> < <b>
        -<a> \le <v> < <b>
        <v> > -<a>
        <v> \le <b>
        (-<a>, <b>] \cup (100, 101]
        <b> < <v> \le -<a>
        """
    ),
)

UNION = Family(
    sample=_interval,
    truths=(r"(-\infty, -<a>) \cup [<b>, \infty)",),
    same=lines(
        r"""
        (-\infty, -<a>) \cup [<b>, \infty)
        (-\infty,-<a>)\cup[<b>,\infty)
        \left(-\infty, -<a>\right) \cup \left[<b>, \infty\right)
        (-\infty, -<a>) ∪ [<b>, \infty)
        (-∞, -<a>) ∪ [<b>, ∞)
        (-\infty, -<a>) \cup [<b>, +\infty)
        [<b>, \infty) \cup (-\infty, -<a>)
        x \in (-\infty, -<a>) \cup [<b>, \infty)
        (-\infty, -<a>) \bigcup [<b>, \infty)
        (-\infty,\,-<a>)\,\cup\,[<b>,\,\infty)
        """
    ),
    near=lines(
        r"""
        (-\infty, -<a>] \cup [<b>, \infty)
        (-\infty, -<a>) \cap [<b>, \infty)
        (-\infty, -<a>)
        (-\infty, <a>) \cup [<b>, \infty)
        (-\infty, -<a>) \cup [<b>, 1000)
        (-\infty, \infty)
        """
    ),
)


def _letter(rng: random.Random) -> Values:
    letter, other = rng.sample("ABCDE", 2)
    return {"c": letter, "o": other}


CHOICE = Family(
    sample=_letter,
    truths=(r"\text{(<c>)}", r"\text{<c>}", "<c>"),
    same=lines(
        r"""
        <c>
        (<c>)
        \text{<c>}
        \text{(<c>)}
        (\text{<c>})
        \textbf{<c>}
        \textbf{(<c>)}
        (\textbf{<c>})
        \mathbf{<c>}
        \mathbf{(<c>)}
        (\mathbf{<c>})
        \mathrm{<c>}
        \mathrm{(<c>)}
        \textrm{(<c>)}
        \mbox{(<c>)}
        {<c>}
        \left(\text{<c>}\right)
        \text{<c>.}
        <c>.
        \text{<c>)}
        \text{Option <c>}
        \text{Choice } <c>
        \text{Answer: <c>}
        \text{The answer is (<c>)}
        $<c>$
        \boxed{<c>
        \boxed{\text{<c>}
        \boxed{\textbf{(<c>)}}
        """
    ),
    near=lines(
        r"""
        <o>
        \text{<o>}
        (<o>)
        \textbf{(<o>)}
        <c>, <o>
        \text{<c> or <o>}
        <c><o>
        \text{<c> and <o>}
        \text{not <c>}
        <c> + 1
        -<c>
        <c>^2
        """
    ),
)

_NAMES = (
    "Evelyn",
    "Tuesday",
    "Navin",
    "August",
    "Saturday",
    "parabola",
    "ellipse",
    "even",
    "neither",
)


def _name(rng: random.Random) -> Values:
    word, other = rng.sample(_NAMES, 2)
    return {"w": word, "o": other, "lower": word.lower(), "upper": word.upper()}


NAME = Family(
    sample=_name,
    truths=(r"\text{<w>}", r"\mbox{<w>}"),
    same=lines(
        r"""
        \text{<w>}
        <w>
        \text{ <w> }
        \text{<w>.}
        \textbf{<w>}
        \mathrm{<w>}
        \textit{<w>}
        \textsf{<w>}
        \mathbf{<w>}
        \mathsf{<w>}
        \mbox{<w>}
        \operatorname{<w>}
        \text{<lower>}
        \text{<upper>}
        \textrm{<w>}
        $\text{<w>}$
        \text{The answer is <w>}
        \text{"<w>"}
        \boxed{\text{<w>}
        """
    ),
    near=lines(
        r"""
        \text{<o>}
        <o>
        \text{not <w>}
        \text{<w> and <o>}
        \text{<w> or <o>}
        \text{<w>, <o>}
        <o>.
        \text{<w>}^2
        \text{<w>}, 2
        """
    ),
)
