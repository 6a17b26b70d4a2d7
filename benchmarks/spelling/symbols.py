"""Expressions: roots, pi and i, polynomials with and without a name, points and matrices."""

from __future__ import annotations

import random

from benchmarks.spelling.ways import Family, Values, lines

_SQUARE_FREE = (2, 3, 5, 6, 7, 10, 11, 13)


def _radical(rng: random.Random) -> Values:
    r = rng.choice(_SQUARE_FREE)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return {
        "a": str(a),
        "b": str(b),
        "r": str(r),
        "inside": str(b * b * r),
        "anext": str(a + 1),
        "bnext": str(b + 1),
        "rnext": str(r + 1),
        "twoa": str(2 * a),
        "twob": str(2 * b),
        "br": str(b * r),
    }


RADICAL = Family(
    sample=_radical,
    truths=(r"<a> + <b>\sqrt{<r>}", r"<a>+<b>\sqrt<r>", r"<a> + <b> \sqrt{<r>}"),
    same=lines(
        r"""
        <a> + <b>\sqrt{<r>}
        <a>+<b>\sqrt{<r>}
        <b>\sqrt{<r>} + <a>
        <a> + <b> \sqrt <r>
        <a> + <b>\cdot\sqrt{<r>}
        <a> + <b> \times \sqrt{<r>}
        <a> + <b>*\sqrt{<r>}
        <a> + \sqrt{<r>}\cdot <b>
        <a> + \sqrt{<inside>}
        \sqrt{<inside>} + <a>
        <a> + <b>√<r>
        <a> + <b>√{<r>}
        <a> + <b>√(<r>)
        <a> + <b>\sqrt[2]{<r>}
        <a> + <b>\sqrt{{<r>}}
        <a> + <b>{\sqrt{<r>}}
        <a> + <b>\,\sqrt{<r>}
        <a> + <b>\sqrt{\,<r>\,}
        <a>\;+\;<b>\sqrt{<r>}
        <a> + <b>(\sqrt{<r>})
        <a> + (<b>\sqrt{<r>})
        (<a> + <b>\sqrt{<r>})
        \left(<a> + <b>\sqrt{<r>}\right)
        <a> + <b> <r>^{1/2}
        <a> + <b>\cdot <r>^{\frac{1}{2}}
        <a> + <b>sqrt(<r>)
        <a> + <b>*sqrt(<r>)
        <a> - (-<b>\sqrt{<r>})
        \frac{<twoa> + <twob>\sqrt{<r>}}{2}
        \dfrac{<twoa>+<twob>\sqrt{<r>}}{2}
        \frac{<twoa>}{2} + <b>\sqrt{<r>}
        <a> + \frac{<twob>\sqrt{<r>}}{2}
        <a> + \frac{<br>}{\sqrt{<r>}}
        x = <a> + <b>\sqrt{<r>}
        d=<b>\sqrt{<r>}+<a>
        = <a> + <b>\sqrt{<r>}
        $<a> + <b>\sqrt{<r>}$
        \displaystyle <a> + <b>\sqrt{<r>}
        \mathbf{<a> + <b>\sqrt{<r>}}
        <a> + <b>\sqrt{<r>}.
        <a> + <b>\sqrt{<r>} \text{ cm}
        <a> + <b>\sqrt{<r>}\text{ square units}
        \boxed{<a> + <b>\sqrt{<r>}
        \boxed{\boxed{<b>\sqrt{<r>}+<a>}}
        +<a> + <b>\sqrt{<r>}
        """
    ),
    near=lines(
        r"""
        <a> - <b>\sqrt{<r>}
        -<a> + <b>\sqrt{<r>}
        <a> + <bnext>\sqrt{<r>}
        <anext> + <b>\sqrt{<r>}
        <a> + <b>\sqrt{<rnext>}
        <a> + \sqrt{<b><r>}
        <a> + <b><r>
        <a> \pm <b>\sqrt{<r>}
        <a><b>\sqrt{<r>}
        <a> + <b>\sqrt[3]{<r>}
        \sqrt{<a> + <b><r>}
        (<a>, <b>\sqrt{<r>})
        <a>, <b>\sqrt{<r>}
        \frac{<a> + <b>\sqrt{<r>}}{2}
        <b> + <a>x\sqrt{<r>}
        <a> + \frac{<b>}{\sqrt{<r>}}
        <a> + <b>i\sqrt{<r>}
        <a> + <b>\sqrt{<r>}\pi
        """
    ),
)


def _pi(rng: random.Random) -> Values:
    p, q = rng.choice(((2, 3), (3, 4), (5, 6), (5, 3), (7, 4), (4, 9)))
    return {"p": str(p), "q": str(q), "twop": str(2 * p), "twoq": str(2 * q), "pnext": str(p + 1)}


PI = Family(
    sample=_pi,
    truths=(r"\frac{<p>\pi}{<q>}", r"\frac{<p>}{<q>}\pi"),
    same=lines(
        r"""
        \frac{<p>\pi}{<q>}
        \frac{<p> \pi}{<q>}
        \dfrac{<p>\pi}{<q>}
        \frac{<p>}{<q>}\pi
        \frac{<p>}{<q>} \pi
        \frac{<p>}{<q>}\cdot\pi
        <p>\pi/<q>
        <p>π/<q>
        \frac{<p>π}{<q>}
        (<p>/<q>)\pi
        \pi\cdot\frac{<p>}{<q>}
        \frac{\pi \cdot <p>}{<q>}
        \frac{<twop>\pi}{<twoq>}
        <p>\frac{\pi}{<q>}
        \theta = \frac{<p>\pi}{<q>}
        \frac{<p>{\pi}}{<q>}
        \frac{<p>\pi}{<q>} \text{ radians}
        <p>*pi/<q>
        """
    ),
    near=lines(
        r"""
        \frac{<p>}{<q>}
        \frac{<p>}{<q>\pi}
        \frac{<q>\pi}{<p>}
        -\frac{<p>\pi}{<q>}
        \frac{<pnext>\pi}{<q>}
        \frac{<p>\pi^2}{<q>}
        \frac{<p> + \pi}{<q>}
        \frac{<p>\pi}{<q>}, \frac{<pnext>\pi}{<q>}
        """
    ),
)


def _polynomial(rng: random.Random) -> Values:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 9)
    a += a == b
    return {
        "a": str(a),
        "b": str(b),
        "c": str(c),
        "bnext": str(b + 1),
        "cnext": str(c + 1),
        "f": rng.choice(("y", "f(x)", "p(x)")),
    }


POLYNOMIAL = Family(
    sample=_polynomial,
    truths=("<a>x^2 - <b>x + <c>", "<a>x^2-<b>x+<c>", "<a>x^{2} - <b>x + <c>"),
    same=lines(
        r"""
        <a>x^2 - <b>x + <c>
        <a>x^{2}-<b>x+<c>
        <a> x^2 - <b> x + <c>
        <a>x^{{2}} - <b>x + <c>
        <a>{x}^2 - <b>x + <c>
        <a>{x}^{2} - <b>{x} + <c>
        <a>x² - <b>x + <c>
        <a>x**2 - <b>x + <c>
        <a>*x^2 - <b>*x + <c>
        <a>\cdot x^2 - <b>\cdot x + <c>
        <a> \times x^2 - <b> \times x + <c>
        <c> - <b>x + <a>x^2
        <a>x^2 + <c> - <b>x
        -<b>x + <a>x^2 + <c>
        <a>x^2 + (-<b>x) + <c>
        <a>x^2 + (-<b>)x + <c>
        <a>x^2 - (<b>x - <c>)
        (<a>x^2 - <b>x + <c>)
        \left(<a>x^2 - <b>x + <c>\right)
        <a>x^2 − <b>x + <c>
        <a>x^2 – <b>x + <c>
        <a>\,x^2 - <b>\,x + <c>
        <a>\!x^2 - <b>x + <c>
        <f> = <a>x^2 - <b>x + <c>
        y=<a>x^2-<b>x+<c>
        g(x) = <c> - <b>x + <a>x^2
        P(x)=<a>x^{2}-<b>x+<c>
        f^{-1}(x) = <a>x^2 - <b>x + <c>
        = <a>x^2 - <b>x + <c>
        $<a>x^2 - <b>x + <c>$
        $y = <a>x^2 - <b>x + <c>$
        \(<a>x^2 - <b>x + <c>\)
        \displaystyle <a>x^2 - <b>x + <c>
        \mathbf{<a>x^2 - <b>x + <c>}
        {<a>x^2 - <b>x + <c>}
        <a>x^2 - <b>x + <c>.
        <a>x\cdot x - <b>x + <c>
        <a>xx - <b>x + <c>
        +<a>x^2 - <b>x + <c>
        <a>x^2 - <b>x^1 + <c>
        <a>x^2 - \frac{<b>x}{1} + <c>
        <a>\mathrm{x}^2 - <b>\mathrm{x} + <c>
        <a>\mathit{x}^2 - <b>x + <c>
        \text{The answer is } <a>x^2 - <b>x + <c>
        \boxed{<a>x^2 - <b>x + <c>
        \boxed{\boxed{<a>x^2-<b>x+<c>}}
        """
    ),
    near=lines(
        r"""
        <a>x^2 + <b>x + <c>
        <a>x^2 - <b>x - <c>
        -<a>x^2 - <b>x + <c>
        <a>x^2 - <b>x
        <a>x^2 - <bnext>x + <c>
        <a>x^2 - <b>x + <cnext>
        <b>x^2 - <a>x + <c>
        <a>x^3 - <b>x + <c>
        <a>x_2 - <b>x + <c>
        <a>x2 - <b>x + <c>
        <a>x^{2 - <b>x + <c>}
        <a>(x^2 - <b>x + <c>)
        <a>y^2 - <b>y + <c>
        <a>X^2 - <b>X + <c>
        <a>x^2 - <b>x + <c> = 0
        <a>x^2 - <b>x < <c>
        \frac{<a>x^2 - <b>x + <c>}{2}
        <a>x^2, <b>x, <c>
        <a>x^2 - <b>(x + <c>)
        \sqrt{<a>x^2 - <b>x + <c>}
        """
    ),
)


def _point(rng: random.Random) -> Values:
    a, b = rng.sample(range(1, 30), 2)
    q = rng.choice((2, 4, 5))
    p = 2 * q + 1
    return {
        "a": str(a),
        "b": str(b),
        "anext": str(a + 30),
        "p": str(p),
        "q": str(q),
        "decimal": str(p / q),
        "minus": str(-b),
    }


POINT = Family(
    sample=_point,
    truths=(r"\left( <a>, -<b>, \frac{<p>}{<q>} \right)", r"(<a>,-<b>,\frac{<p>}{<q>})"),
    same=lines(
        r"""
        (<a>, -<b>, \frac{<p>}{<q>})
        (<a>,-<b>,\frac{<p>}{<q>})
        \left(<a>, -<b>, \frac{<p>}{<q>}\right)
        \left( <a>,-<b>,\dfrac{<p>}{<q>} \right)
        \bigl(<a>, -<b>, \tfrac{<p>}{<q>}\bigr)
        \Big( <a>, -<b>, \frac{<p>}{<q>} \Big)
        \big(<a>, -<b>, \frac{<p>}{<q>}\big)
        \left (<a>, -<b>, \frac{<p>}{<q>}\right )
        \lparen <a>, -<b>, \frac{<p>}{<q>} \rparen
        (<a>, -<b>, <p>/<q>)
        (<a>, -<b>, <decimal>)
        (<a>,\, -<b>,\, \frac{<p>}{<q>})
        (<a>,\ -<b>,\ \frac{<p>}{<q>})
        (<a>,\;-<b>,\;\frac{<p>}{<q>})
        (<a>.0, -<b>, \frac{<p>}{<q>})
        (<a>, −<b>, \frac{<p>}{<q>})
        (<a>, {-<b>}, \frac{<p>}{<q>})
        ({<a>}, -<b>, {\frac{<p>}{<q>}})
        (<a>, (-<b>), \frac{<p>}{<q>})
        (+<a>, -<b>, +\frac{<p>}{<q>})
        (x, y, z) = (<a>, -<b>, \frac{<p>}{<q>})
        (x,y,z)=\left(<a>,-<b>,<p>/<q>\right)
        (a, b, c) = (<a>, -<b>, \frac{<p>}{<q>})
        P = (<a>, -<b>, \frac{<p>}{<q>})
        \mathbf{v} = (<a>, -<b>, \frac{<p>}{<q>})
        $(<a>, -<b>, \frac{<p>}{<q>})$
        \text{(<a>, -<b>, <p>/<q>)}
        (<a>, -<b>, \frac{<p>}{<q>}).
        \mathbf{(<a>, -<b>, \frac{<p>}{<q>})}
        \boxed{(<a>, -<b>, \frac{<p>}{<q>})
        """
    ),
    near=lines(
        r"""
        (-<b>, <a>, \frac{<p>}{<q>})
        (<a>, <b>, \frac{<p>}{<q>})
        (<a>, -<b>)
        (<a>, -<b>, \frac{<p>}{<q>}, 0)
        (<anext>, -<b>, \frac{<p>}{<q>})
        \{<a>, -<b>, \frac{<p>}{<q>}\}
        [<a>, -<b>, \frac{<q>}{<p>}]
        (<a>, -<b>, \frac{<q>}{<p>})
        (\frac{<p>}{<q>}, -<b>, <a>)
        (<a> - <b>, \frac{<p>}{<q>})
        <a>
        (<a>, x, \frac{<p>}{<q>})
        """
    ),
)

MATRIX = Family(
    sample=_point,
    truths=(r"\begin{pmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}",),
    same=lines(
        r"""
        \begin{pmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix}<a>&-<b>\\0&\frac{<p>}{<q>}\end{pmatrix}
        \begin{pmatrix} <a> & -<b> \\ 0 & \dfrac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <a> & -<b> \\[1ex] 0 & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \\ \end{pmatrix}
        \begin{pmatrix} <a> & -<b> \cr 0 & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <a> & -<b> \\ 0 & <p>/<q> \end{pmatrix}
        \begin{pmatrix} <a> & -<b> \\ 0 & <decimal> \end{pmatrix}
        \begin{pmatrix} <a> & <minus> \\ 0 & {\frac{<p>}{<q>}} \end{pmatrix}
        \begin{bmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{bmatrix}
        \begin{bmatrix}<a>&-<b>\\0&\frac{<p>}{<q>}\end{bmatrix}
        \left(\begin{array}{cc} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{array}\right)
        \left[\begin{array}{rr} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{array}\right]
        \left(\begin{matrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{matrix}\right)
        \begin{psmallmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{psmallmatrix}
        A = \begin{pmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}
        \mathbf{M} = \begin{pmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}
        \displaystyle\begin{pmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}
        """
    ),
    near=lines(
        r"""
        \begin{pmatrix} <a> & 0 \\ -<b> & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <a> & <b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <a> & -<b> \\ 0 & \frac{<q>}{<p>} \end{pmatrix}
        \begin{pmatrix} <a> & -<b> & 0 & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <a> \\ -<b> \\ 0 \\ \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} <anext> & -<b> \\ 0 & \frac{<p>}{<q>} \end{pmatrix}
        \begin{pmatrix} 0 & \frac{<p>}{<q>} \\ <a> & -<b> \end{pmatrix}
        \begin{vmatrix} <a> & -<b> \\ 0 & \frac{<p>}{<q>} \end{vmatrix}
        (<a>, -<b>, 0, \frac{<p>}{<q>})
        """
    ),
)
