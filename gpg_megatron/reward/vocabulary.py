"""Words and signs of mathematical answers, and the one spelling that stands for each."""

from __future__ import annotations

from collections.abc import Mapping


def _table(text: str) -> dict[str, str]:
    """Lines of "spelling: other spellings" as other spelling -> spelling."""
    result = {}
    for line in text.strip().splitlines():
        spelling, _, others = line.strip().partition(" : ")
        result.update(dict.fromkeys(others.split(), spelling))
    return result


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


def _numbered(text: str, start: int, step: int = 1) -> dict[str, str]:
    """Each word of a text with its number."""
    return {word: str(start + step * i) for i, word in enumerate(text.split())}


SIGNS: Mapping[str, str] = _table(
    r"""
    \frac : \dfrac \tfrac \cfrac \nicefrac \sfrac
    \binom : \dbinom \tbinom
    \sqrt : √
    * : \times \cdot \ast \star \bullet × · ⋅ ∗ • ∙ ✕
    / : \div ÷ ⁄ ∕ \slash
    - : − – — ﹣ － ‐ ‑ \minus
    + : ＋ \plus
    ^ : **
    \le : \leq \leqslant \leqq <= ≤ ⩽ =<
    \ge : \geq \geqslant \geqq >= ≥ ⩾ =>
    < : \lt ＜ &lt;
    > : \gt ＞ &gt;
    = : ＝ == \equals
    \ne : \neq ≠ != \not=
    \approx : ≈ \simeq \cong \sim ≅ ∼ \thickapprox \doteq
    \pm : ± +/- +-
    \mp : ∓
    \infty : ∞
    \pi : π 𝜋
    \theta : θ
    \alpha : α
    \beta : β
    \gamma : γ
    \delta : δ
    \lambda : λ
    \mu : μ
    \sigma : σ
    \omega : ω
    \rho : ρ
    \phi : φ ϕ \varphi
    \epsilon : ε \varepsilon ϵ
    \tau : τ
    \hbar : ℏ
    \dots : \ldots \cdots \dotsc \dotsb \dotsm \dotsi … ⋯ ...
    \cup : \bigcup ∪
    \cap : \bigcap ∩
    \in : ∈
    \emptyset : \varnothing ∅ \O
    \setminus : \backslash ∖ \smallsetminus
    \{ : \lbrace \lgroup ｛
    \} : \rbrace \rgroup ｝
    [ : \lbrack
    ] : \rbrack
    ( : \lparen （
    ) : \rparen ）
    \langle : ⟨ 〈
    \rangle : ⟩ 〉
    | : \vert \lvert \rvert \mid ∣
    \| : \Vert \lVert \rVert ∥
    , : ， \comma
    : : \colon ：
    ; : ；
    ' : \prime ′ ’
    \to : \rightarrow → ⟶ \longrightarrow
    \Rightarrow : \implies ⇒ ⟹
    \or : \lor \vee ∨
    \and : \land \wedge ∧
    \R : ℝ \Reals \reals
    \Z : ℤ
    \Q : ℚ
    \N : ℕ
    \C : ℂ
    % : \% ％
    \deg : ° \degree \degrees º ˚
    \dollar : \$ \textdollar \pounds £ \euro \texteuro € ¥
    \triangle : △
    \angle : ∠ \measuredangle
    \perp : ⊥
    \parallel : \|\|
    \arcsin : \asin
    \arccos : \acos
    \arctan : \atan
    \ln : \Ln
    \\ : \cr \newline \tabularnewline
    \overline : \bar
    """
)
"""Another spelling -> the sign. A currency sign is \\dollar: answers do not change currencies."""

DROPPED = words(r"""
    \left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl
    \Biggr \bigm \Bigm \biggm \Biggm \displaystyle \textstyle \scriptstyle \scriptscriptstyle
    \limits \nolimits \quad \qquad \enspace \thinspace \medspace \thickspace \negthinspace \space
    \mathstrut \strut \hfill \hfil \noindent \allowbreak \nobreak \bf \rm \it \sf \tt \bfseries
    \large \Large \LARGE \huge \Huge \small \normalsize \! \, \; \: \> \/ \- \( \) \[ \] $ ~
    \ensuremath \mathopen \mathclose \mathord \therefore \because \checkmark \blacksquare
    \square \displaylimits \break \par \hline \cdotp
    """)
"""Typesetting: no part of the answer."""

STYLES = words(r"""
    \mathbf \mathit \mathsf \mathtt \mathcal \mathscr \mathfrak \boldsymbol \bm \pmb \boxed \fbox
    \underline \vec \hat \widehat \overrightarrow \num \mathnormal \smash \ensuremath \emph
    \cancel \mathop \mathbin \mathrel \bold \Bold \textstyle
    """)
"""Commands whose argument stands for itself, in mathematics."""

TEXT_STYLES = words(r"""
    \text \textbf \textrm \textit \textsf \texttt \textnormal \textsc \textup \textmd \textsl
    \mathrm \mbox \hbox \operatorname \operatorname* \unit \si \rom \mathregular \texttip
    """)
"""Commands whose argument is text."""

SWALLOWED = words(
    r"\phantom \hphantom \vphantom \hspace \hspace* \vspace \label \tag \color \textcolor \kern"
)
"""Commands that vanish together with their argument."""

ARGUMENTS: Mapping[str, int] = {
    **dict.fromkeys(words(r"\sqrt \overline \widetilde \tilde \dot \ddot ^ _"), 1),
    **dict.fromkeys(words(r"\frac \binom"), 2),
}
"""Commands and signs that have arguments, and how many."""

FUNCTIONS = words(r"""
    \sin \cos \tan \cot \sec \csc \arcsin \arccos \arctan \sinh \cosh \tanh \log \ln \lg \exp
    \max \min \gcd \lcm \det \dim \ker \arg
    """)
BARE_COMMANDS: Mapping[str, str] = {
    **{name[1:]: name for name in FUNCTIONS},
    **_table(
        r"""
        \sqrt : sqrt
        \pi : pi Pi
        \infty : infinity inf infty Infinity
        \theta : theta
        \alpha : alpha
        \beta : beta
        \lambda : lambda
        \arcsin : asin
        \arccos : acos
        \arctan : atan
        \cup : union
        """
    ),
}
"""Runs of letters that mean a command though their backslash is missing."""

NUMBER_WORDS: Mapping[str, str] = {
    **_numbered(
        """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
        fifteen sixteen seventeen eighteen nineteen""",
        0,
    ),
    **_numbered("twenty thirty forty fifty sixty seventy eighty ninety", 20, 10),
}
ORDINALS: Mapping[str, str] = _numbered(
    """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth
    thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth""",
    1,
)
SCALES: Mapping[str, int] = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}

UNITS: Mapping[str, str] = _table(
    """
    mm : mm millimeter millimetre
    cm : cm cms centimeter centimetre
    dm : dm decimeter
    m : m meter metre
    km : km kms kilometer kilometre
    nm : nm nanometer
    in : in inch inche
    ft : ft foot feet
    yd : yd yard
    mi : mi mile
    mg : mg milligram
    g : g gm gram
    kg : kg kgs kilogram kilo
    lb : lb lbs pound
    oz : oz ounce
    s : s sec secs second
    ms : ms millisecond
    min : min mins minute
    h : h hr hrs hour
    day : day
    week : week wk
    month : month
    year : year yr yrs
    ml : ml milliliter millilitre cc
    l : l liter litre
    gal : gal gallon
    hz : hz hertz
    khz : khz
    mhz : mhz
    j : j joule
    kj : kj
    n : n newton
    kn : kn
    w : w watt
    kw : kw
    mw : mw
    v : v volt
    a : a ampere amp
    k : k kelvin
    pa : pa pascal
    kpa : kpa
    atm : atm
    ev : ev
    kev : kev
    mev : mev
    gev : gev
    mol : mol mole
    rad : rad radian
    sr : sr steradian
    \\deg : deg degree
    \\dollar : dollar buck usd euro eur
    cent : cent
    unit : unit
    sq : sq square squared
    cu : cu cubic cubed
    erg : erg
    dyne : dyne
    ohm : ohm
    pc : pc parsec
    kpc : kpc
    mpc : mpc
    au : au
    ly : ly
    yd : yd
    angstrom : angstrom
    """
)
"""Word for a unit, in the singular and in small letters -> its sign."""

BARE_UNITS = words(
    """mm cm km nm ft mi mg kg lb lbs oz sec min mins hr hrs ml mph kph Hz kHz MHz kJ kN kW Pa kPa
    atm eV keV MeV GeV mol rad deg cc inch inches feet foot yards yard miles mile meters meter
    metres kilometers kilometer centimeters centimeter millimeters grams gram kilograms kilogram
    pounds pound ounces seconds second minutes minute hours hour days day weeks week months years
    year liters litres liter gallons dollars dollar cents cent degrees degree radians units unit
    percent square sq cubic people students ways points in gal milliliters erg ergs joules Newtons
    newtons watts volts million billion thousand hundred dozen mL km/h m/s USD am pm AM PM"""
)
"""Runs of letters that are words after a number, though no command says so."""

BARE_WORDS = words(
    """and or no yes true false none not solution solutions undefined even odd both neither all
    real numbers does exist answer the is option choice odd than least most between"""
)
"""Runs of small letters that are words anywhere."""

CONNECTIVES = frozenset(("and", "or"))
FILLERS = words(
    """the a an answer answers final is are equals equal to option choice of so thus hence therefore
    value values i.e that gives get we have solution solutions exactly approximately about
    roughly result correct"""
)
"""Words in front of an answer, or in a text, that add nothing to it."""
QUALIFIERS = words(
    """not least most more less than between greater fewer over under above below except without
    at up before after until larger smaller never negative minus"""
)
"""Words that make another answer of a value."""
NOTHING = "\\emptyset"
PHRASES: Mapping[str, str] = {
    "no solution": NOTHING,
    "no solutions": NOTHING,
    "no real solution": NOTHING,
    "no real solutions": NOTHING,
    "empty set": NOTHING,
    "the empty set": NOTHING,
    "empty": NOTHING,
    "all real numbers": "\\R",
    "all reals": "\\R",
    "all real number": "\\R",
    "dne": "dne",
    "does not exist": "dne",
    "do not exist": "dne",
    "not exist": "dne",
    "doe not exist": "dne",
}
"""Whole texts with a sign or a short word of their own."""
