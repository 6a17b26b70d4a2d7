"""Numbers: whole ones, fractions, mixed numbers, decimals, powers of ten, quantities."""

from __future__ import annotations

import random
from math import gcd

from benchmarks.spelling.ways import Family, Values, lines


def _grouped(n: int, mark: str) -> str:
    return f"{n:,}".replace(",", mark)


def _whole(rng: random.Random) -> Values:
    n = rng.choice((rng.randint(1000, 99_999), rng.randint(1_000_000, 99_999_999)))
    return {
        "n": str(n),
        "comma": f"{n:,}",
        "braced": _grouped(n, "{,}"),
        "thin": _grouped(n, "\\,"),
        "negthin": _grouped(n, ",\\!"),
        "space": _grouped(n, " "),
        "next": str(n + 1),
        "twice": str(2 * n),
        "swapped": str(n)[:-2] + str((n // 10 + 3) % 10) + str(n)[-1],
    }


WHOLE = Family(
    sample=_whole,
    truths=("<n>", "<comma>", "<negthin>"),
    same=lines(
        r"""
        <n>
        <comma>
        <braced>
        <thin>
        <negthin>
        <space>
        <n>.
        <n>.0
        <comma>.00
        +<n>
        $<n>$
        $<comma>$
        $$<n>$$
        \(<n>\)
        \[ <comma> \]
        \text{<n>}
        \text{<comma>}
        \mathrm{<n>}
        \mathbf{<n>}
        \textbf{<comma>}
        {\bf <n>}
        \boldsymbol{<n>}
        {<n>}
        {{<braced>}}
        (<n>)
        \left(<n>\right)
        = <n>
        x = <n>
        N=<comma>
        n = <thin>
        a_n = <n>
        \displaystyle <n>
        \,<n>\,
        ~<n>~
        \fbox{<n>}
        \boxed{\boxed{<n>}}
        First \boxed{17}, which is not it: \boxed{<n>}
        \boxed{<n>
        \boxed{<n>}}
        \boxed <n>
        \boxed{ <n> }
        <n> \text{ ways}
        <comma>\text{ units}
        <n>\ \mathrm{students}
        \frac{<twice>}{2}
        \text{The answer is } <n>
        \text{Answer: } <n>
        \underline{<n>}
        \textcolor{red}{<n>}
        \text{Total} = <n>
        """
    ),
    near=lines(
        r"""
        <next>
        -<n>
        <n>0
        <swapped>
        <n>x
        <n>, <next>
        <n> \text{ or } <next>
        <n>^2
        \sqrt{<n>}
        <n>.5
        \frac{<n>}{2}
        \frac{1}{<n>}
        <n> \pm 1
        <n>_{12}
        \text{at least } <n>
        x > <n>
        <n>i
        <n>\pi
        <n> \text{ million}
        (<n>, 0)
        \{<n>, 0\}
        First \boxed{<n>}, and after that \boxed{<next>}
        \log <n>
        """
    ),
)


def _fraction(rng: random.Random) -> Values:
    # Denominators with another prime than 2 and 5, so that no decimal means the same.
    q = rng.choice((3, 7, 9, 11, 13, 21, 33))
    p = next(p for p in iter(lambda: rng.randint(2, 90), 0) if gcd(p, q) == 1)
    return {
        "p": str(p),
        "q": str(q),
        "twop": str(2 * p),
        "twoq": str(2 * q),
        "sevenp": str(7 * p),
        "sevenq": str(7 * q),
        "pnext": str(p + 1),
        "qnext": str(q + 1),
        "decimal": f"{p / q:.4f}",
    }


FRACTION = Family(
    sample=_fraction,
    truths=(r"-\frac{<p>}{<q>}", r"-\dfrac{<p>}{<q>}", "-<p>/<q>"),
    same=lines(
        r"""
        -\frac{<p>}{<q>}
        -\dfrac{<p>}{<q>}
        -\tfrac{<p>}{<q>}
        -\cfrac{<p>}{<q>}
        -<p>/<q>
        - <p> / <q>
        \frac{-<p>}{<q>}
        \frac{<p>}{-<q>}
        -\left(\frac{<p>}{<q>}\right)
        \left(-\frac{<p>}{<q>}\right)
        -(<p>/<q>)
        (-<p>)/<q>
        <p>/(-<q>)
        -{<p> \over <q>}
        {-<p> \over <q>}
        -\frac{<twop>}{<twoq>}
        -<sevenp>/<sevenq>
        -\frac {<p>} {<q>}
        - \frac{ <p> }{ <q> }
        -\dfrac {<p>}{<q>}
        $-\frac{<p>}{<q>}$
        \(-\frac{<p>}{<q>}\)
        x = -\frac{<p>}{<q>}
        x=-<p>/<q>
        f(2) = -\frac{<p>}{<q>}
        y = \frac{-<p>}{<q>}
        \text{slope} = -\frac{<p>}{<q>}
        −\frac{<p>}{<q>}
        −<p>/<q>
        –<p>/<q>
        -\frac{{<p>}}{{<q>}}
        {-\frac{<p>}{<q>}}
        -\displaystyle\frac{<p>}{<q>}
        \displaystyle -\frac{<p>}{<q>}
        \mathbf{-\frac{<p>}{<q>}}
        \boldsymbol{-\frac{<p>}{<q>}}
        -\frac{<p>}{<q>}.
        \boxed{-\frac{<p>}{<q>}
        \fbox{$-\frac{<p>}{<q>}$}
        \boxed{\boxed{-<p>/<q>}}
        -\frac{<p>.0}{<q>}
        -<p>⁄<q>
        -<p> \div <q>
        -\text{<p>/<q>}
        \text{-<p>/<q>}
        -1 \cdot \frac{<p>}{<q>}
        -\frac{<p>}{<q>}\text{ units}
        = -\frac{<p>}{<q>}
        """
    ),
    near=lines(
        r"""
        \frac{<p>}{<q>}
        <p>/<q>
        \frac{-<p>}{-<q>}
        -\frac{<q>}{<p>}
        -\frac{<pnext>}{<q>}
        -\frac{<p>}{<qnext>}
        -<decimal>
        -\frac{<p>}{<q>}x
        -<p>, <q>
        (-<p>, <q>)
        -\frac{<p>}{<q>}\pi
        -\sqrt{\frac{<p>}{<q>}}
        \pm\frac{<p>}{<q>}
        -\frac{<p>}{<q>} + 1
        -<p><q>
        -\frac{<p>}{<q>}, 0
        -<p>
        \left(-\frac{<p>}{<q>}\right)^2
        -\binom{<p>}{<q>}
        """
    ),
)


def _mixed(rng: random.Random) -> Values:
    q = rng.choice((3, 4, 5, 7, 8))
    p = next(p for p in iter(lambda: rng.randint(1, q - 1), 0) if gcd(p, q) == 1)
    w = rng.randint(2, 40)
    return {
        "w": str(w),
        "p": str(p),
        "q": str(q),
        "all": str(w * q + p),
        "less": str(w * q - p),
        "product": str(w * p),
        "twop": str(2 * p),
        "twoq": str(2 * q),
        "twoall": str(2 * (w * q + p)),
        "joined": str(int(f"{w}{p}")),
        "wnext": str(w + 1),
    }


MIXED = Family(
    sample=_mixed,
    truths=(r"<w>\frac{<p>}{<q>}", r"<w> \frac{<p>}{<q>}", r"\frac{<all>}{<q>}", "<all>/<q>"),
    same=lines(
        r"""
        <w>\frac{<p>}{<q>}
        <w>\dfrac{<p>}{<q>}
        <w>\tfrac{<p>}{<q>}
        <w> \frac{<p>}{<q>}
        <w>\,\frac{<p>}{<q>}
        <w>\ \frac{<p>}{<q>}
        <w>\;\dfrac{<p>}{<q>}
        <w>~\frac{<p>}{<q>}
        <w> <p>/<q>
        <w>\ <p>/<q>
        <w>\,<p>/<q>
        <w>~<p>/<q>
        <w>\frac<p><q>
        <w>\frac <p><q>
        <w>\frac <p> <q>
        <w>\frac{<p>}<q>
        <w>\frac<p>{<q>}
        <w> + \frac{<p>}{<q>}
        <w>+<p>/<q>
        \frac{<all>}{<q>}
        \dfrac{<all>}{<q>}
        <all>/<q>
        <all> / <q>
        \frac{<twoall>}{<twoq>}
        <w>\frac{<twop>}{<twoq>}
        {<w>}\frac{<p>}{<q>}
        <w>{\frac{<p>}{<q>}}
        \left(<w>\frac{<p>}{<q>}\right)
        $<w>\frac{<p>}{<q>}$
        \text{<w> <p>/<q>}
        \text{<w>}\frac{<p>}{<q>}
        \mathbf{<w>\frac{<p>}{<q>}}
        x = <w>\frac{<p>}{<q>}
        x=<w> <p>/<q>
        t = \frac{<all>}{<q>}
        <w>\frac{<p>}{<q>}\text{ miles}
        <w>\frac{<p>}{<q>} \text{ hours}
        <w> <p>/<q>\text{ cups}
        <w>\frac{<p>}{<q>}.
        +<w>\frac{<p>}{<q>}
        = <w>\frac{<p>}{<q>}
        \boxed{<w>\frac{<p>}{<q>}
        \boxed{\boxed{<w>\frac{<p>}{<q>}}}
        \displaystyle <w>\frac{<p>}{<q>}
        <w>{<p> \over <q>}
        \text{The answer is } <w>\frac{<p>}{<q>}
        """
    ),
    near=lines(
        r"""
        -<w>\frac{<p>}{<q>}
        <wnext>\frac{<p>}{<q>}
        <w>
        \frac{<p>}{<q>}
        <w> \cdot \frac{<p>}{<q>}
        <w> \times \frac{<p>}{<q>}
        \frac{<product>}{<q>}
        \frac{<less>}{<q>}
        <w> - \frac{<p>}{<q>}
        <joined>/<q>
        \frac{<joined>}{<q>}
        <w>\frac{<q>}{<p>}
        <w>, \frac{<p>}{<q>}
        (<w>, \frac{<p>}{<q>})
        <w>(\frac{<p>}{<q>})
        <w>x\frac{<p>}{<q>}
        <w>^{\frac{<p>}{<q>}}
        <w>_{\frac{<p>}{<q>}}
        \frac{<q>}{<all>}
        """
    ),
)


def _decimal(rng: random.Random) -> Values:
    tenths = rng.choice((rng.randint(11, 99), rng.randint(101, 999)))
    tenths += tenths % 10 == 0
    return {
        "i": str(tenths // 10),
        "d": str(tenths % 10),
        "x": f"{tenths // 10}.{tenths % 10}",
        "hundredths": f"0.0{tenths}" if tenths < 100 else f"0.{tenths}",
        "tenths": str(tenths),
        "twotenths": str(2 * tenths),
        "more": f"{(tenths + 1) / 10}",
        "tenfold": f"{tenths}",
        "neighbour": f"{tenths // 10}.0{tenths % 10}",
    }


PERCENT = Family(
    sample=_decimal,
    truths=(r"<x>\%", "<x>%"),
    same=lines(
        r"""
        <x>\%
        <x>%
        <x> \%
        <x>\,\%
        <x>~\%
        <x>\ \%
        <x>
        <x>0\%
        $<x>\%$
        \(<x>\%\)
        <x>\text{\%}
        <x>\text{ percent}
        <x> \text{ percent}
        <x>\text{ per cent}
        <x> percent
        \text{<x>\%}
        \text{<x> percent}
        \mathbf{<x>\%}
        x = <x>\%
        p=<x>
        \frac{<tenths>}{10}\%
        \frac{<tenths>}{10}
        <hundredths>
        \boxed{<x>\%
        """
    ),
    near=lines(
        r"""
        <more>\%
        -<x>\%
        <tenfold>\%
        <hundredths>\%
        <neighbour>\%
        <x>\%, <more>\%
        <x>x
        <i>\%
        <tenfold>
        <x>\text{ percent or } <more>\text{ percent}
        """
    ),
)

MONEY = Family(
    sample=_decimal,
    truths=(r"\$<x>0", "<x>", r"<x>0\text{ dollars}", "$<x>0"),
    same=lines(
        r"""
        \$<x>0
        \$<x>
        $<x>0
        \$ <x>0
        \$\,<x>0
        $\$<x>0$
        \text{\$<x>0}
        \text{\$}<x>0
        \mathrm{\$}<x>
        \textdollar <x>0
        \mathbf{\$<x>0}
        <x>0
        <x>00
        <x>\text{ dollars}
        <x>0 \text{ dollars}
        <x>0\ \text{USD}
        <x>0 dollars
        x = \$<x>0
        x = <x>
        \frac{<tenths>}{10}
        \frac{<twotenths>}{20}
        +\$<x>0
        \$<x>0.
        """
    ),
    near=lines(
        r"""
        \$<more>0
        -\$<x>0
        \$-<x>0
        \$<tenfold>
        \$<neighbour>
        \$<i>
        \$<x>0 \text{ or } \$<more>0
        <i>\text{ cents}
        \$<x>0\text{ million}
        \$<x>x
        """
    ),
)


def _scientific(rng: random.Random) -> Values:
    # Not 10: then e^10 would be 10^e.
    a, e = rng.randint(11, 99), rng.choice((6, 8, 9, 12, 15, 19, 23, 30))
    a += a % 10 == 0
    return {
        "m": f"{a // 10}.{a % 10}",
        "tenm": str(a),
        "e": str(e),
        "less": str(e - 1),
        "more": str(e + 1),
        "small": f"0.{a}",
        "other": f"{a // 10}.{(a + 1) % 10}",
        "written": str(a * 10 ** (e - 1)),
        "comma": f"{a * 10 ** (e - 1):,}",
        "superscript": str(e).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")),
    }


SCIENTIFIC = Family(
    sample=_scientific,
    truths=("<m>e<e>", r"<m> \times 10^{<e>}"),
    same=lines(
        r"""
        <m>e<e>
        <m>e+<e>
        <m>E<e>
        <m>E+<e>
        <m> \times 10^{<e>}
        <m>\times10^{<e>}
        <m> \cdot 10^{<e>}
        <m>\cdot10^{<e>}
        <m> \times 10^{+<e>}
        <m> × 10^{<e>}
        <m> × 10^<e>
        <m>·10^{<e>}
        <m> * 10^{<e>}
        <m>*10^{<e>}
        <m>*10**<e>
        <m> x 10^{<e>}
        <m>\times 10^<e>
        <m>×10<superscript>
        <m> \times 10^{{<e>}}
        <m> \times {10}^{<e>}
        <m> \times 10 ^ {<e>}
        <m>\,\times\,10^{<e>}
        <m>\ \times\ 10^{<e>}
        (<m> \times 10^{<e>})
        \left(<m>\right) \times 10^{<e>}
        <m> \times (10^{<e>})
        <m>0 \times 10^{<e>}
        <tenm> \times 10^{<less>}
        <tenm>e<less>
        <small> \times 10^{<more>}
        <written>
        <comma>
        $<m> \times 10^{<e>}$
        \text{<m>e<e>}
        \text{<m> × 10}^{<e>}
        <m> \times 10^{\text{<e>}}
        \mathbf{<m> \times 10^{<e>}}
        x = <m> \times 10^{<e>}
        E = <m>\cdot 10^{<e>}
        \approx <m> \times 10^{<e>}
        \sim <m> \times 10^{<e>}
        <m> \times 10^{<e>} \text{ m}
        <m>\times 10^{<e>}\ \mathrm{erg\,s^{-1}}
        <m> \times 10^{<e>}\,\text{kg}
        <m>e<e> \text{ J}
        10^{<e>} \times <m>
        \boxed{<m> \times 10^{<e>}
        <m> \bullet 10^{<e>}
        """
    ),
    near=lines(
        r"""
        <m>e-<e>
        <m> \times 10^{-<e>}
        <m> \times 10^{<more>}
        <m> \times 10^{<less>}
        -<m> \times 10^{<e>}
        <other> \times 10^{<e>}
        <other>e<e>
        <m>e<more>
        <m>
        <m> + 10^{<e>}
        <m> \times 10
        <m> \times 2^{<e>}
        <m> \times <e>^{10}
        <m> \times 10<e>
        10^{<e>}
        <m> \times 10^{<e>}x
        <m>, 10^{<e>}
        <tenm> \times 10^{<e>}
        <written>0
        """
    ),
)


_UNITS = {
    # One unit: its short sign, its word, and a short sign of another size.
    "cm": ("centimeters", "mm"),
    "km": ("kilometers", "cm"),
    "kg": ("kilograms", "mg"),
    "ft": ("feet", "in"),
    "min": ("minutes", "h"),
    "ml": ("milliliters", "l"),
}


def _quantity(rng: random.Random) -> Values:
    unit = rng.choice(sorted(_UNITS))
    n = rng.randint(11, 98)
    word, other = _UNITS[unit]
    return {"n": str(n), "next": str(n + 1), "u": unit, "word": word, "other": other}


QUANTITY = Family(
    sample=_quantity,
    truths=(r"<n> \text{ <u>}", r"<n>\text{ <word>}", r"<n>\mbox{ <u>}"),
    same=lines(
        r"""
        <n> \text{ <u>}
        <n>\text{ <u>}
        <n>\text{<u>}
        <n>\,\text{<u>}
        <n>\ \text{<u>}
        <n>~\text{<u>}
        <n>\;\text{<u>}
        <n>\quad\text{<u>}
        <n>\mathrm{<u>}
        <n>\,\mathrm{<u>}
        <n>\ \mathrm{ <u> }
        <n>\mbox{ <u>}
        <n>\textrm{ <u>}
        <n>\textnormal{ <u>}
        <n>\operatorname{<u>}
        <n> \textit{ <u>}
        <n>\textbf{ <u>}
        {<n>}\text{ <u>}
        <n>{\text{ <u>}}
        <n> <u>
        <n><u>
        <n>\text{ <word>}
        <n> \text{ <word>}
        <n>\ \text{<word>}
        <n> <word>
        <n>\,<word>
        \text{<n> <u>}
        \text{<n> <word>}
        \mathrm{<n>\,<u>}
        \textbf{<n> <u>}
        \text{<n>}\text{ <u>}
        <n>
        <n>.0 \text{ <u>}
        <n>.0
        x = <n>\text{ <u>}
        d = <n> \text{ <word>}
        \text{length} = <n>\text{ <u>}
        <n>\text{ <u>.}
        <n>\text{ <word>}.
        (<n> \text{ <u>})
        \approx <n>\text{ <u>}
        $<n>$ \text{ <u>}
        \mathbf{<n>}\text{ <u>}
        \boxed{<n>} <u>
        \boxed{<n>\text{ <u>}
        """
    ),
    near=lines(
        r"""
        <n>\text{ <other>}
        <n> <other>
        <n>\,\mathrm{<other>}
        <next>\text{ <u>}
        -<n>\text{ <u>}
        <n>0\text{ <u>}
        <n>\text{ <u>}^2
        <n>\text{ <u>}^3
        <n>\text{ square <word>}
        <n>\text{ <u>}^{-1}
        <n>\text{ <u> or } <next>\text{ <u>}
        \text{less than } <n>\text{ <u>}
        <n>\text{ million <word>}
        <n>\text{ <u>}, <next>\text{ <u>}
        \frac{1}{<n>}\text{ <u>}
        \text{<u>}
        <n> x \text{ <u>}
        <n>-<next>\text{ <u>}
        """
    ),
)
