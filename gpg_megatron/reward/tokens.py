"""The tokens of an answer: LaTeX, or what models write in its place, without typesetting.

A token is a string: a number ("12.5", "4e33", "0.\\overline{3}"), a letter, a name of capitals
("AB"), a word in small letters behind a quotation mark ('"cm'), a command ("\\pi") or a sign.
Linear in the text.
"""

from __future__ import annotations

import re
import unicodedata

from gpg_megatron.reward import letters
from gpg_megatron.reward import vocabulary as v

_THIN = r"(?:\\[!,;:>\ ]|~|[\u00a0\u2006\u2009\u202f])"
_TOKEN = re.compile(
    rf"""
    (?P<mixed>(?P<whole>\d{{1,9}})(?:\s|{_THIN})+(?P<above>\d{{1,9}})\s*/\s*(?P<below>\d{{1,9}})
        (?![\d.]))
  | (?P<repeating>\d*\.\d*\\(?:overline|bar)\s*\{{\d+\}})
  | (?P<number>(?:\d{{1,3}}(?:(?:\{{,\}}(?:\\!)?|,\\!\s?|{_THIN}|[ ])\d{{3}})+(?!\d)(?:\.\d+)?
        |\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+(?![\d.A-Za-z]))?)
  | (?P<ordinal>\^\s*(?:\{{\s*)?(?:\\(?:text|mathrm|textrm)\s*\{{\s*)?(?:st|nd|rd|th)\b[}}\s]*)
  | (?P<degrees>\^\s*(?:\{{\s*)?(?:\\circ|∘|o)(?![A-Za-z])(?:\s*\}})?)
  | \\(?P<edge>begin|end)\s*\{{\s*(?P<environment>[A-Za-z]+)\*?\s*\}}(?:\s*\{{[clr|@\s]*\}})?
  | \\mathbb\s*\{{?\s*(?P<board>[A-Z])\s*\}}?
  | (?P<row>\\\\(?:\s*\[[-\d.\s]*[a-z]{{2}}\])?)
  | (?P<none>\\(?:left|right)\s*\.|\\\s|[\s\u00a0\u2000-\u200b\u202f\u3000]+|~)
  | (?P<command>\\[A-Za-z]+\*?|\\.)
  | (?P<noon>(?P<half>[aApP])\.\s?[mM]\.?(?![A-Za-z]))
  | (?P<letters>[A-Za-zÀ-ÖØ-öø-ɏЀ-ӿ一-鿿]+)
  | (?P<raised>[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+)
  | (?P<lowered>[₀₁₂₃₄₅₆₇₈₉]+)
  | (?P<sign>\+/-|\.\.\.|\*\*|<=|>=|!=|==|=<|=>|.)
    """,
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_WHOLE = re.compile(r"\d+(?=[-+*^()\]}=_|]|\Z)", re.ASCII)
"""A number that ends where no other number goes on."""
_SIGNS = frozenset("()[]{}-,|/:;")
"""Outside of text these are nothing but themselves."""
_COMMAS = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?", re.ASCII)
_MARKS = re.compile(rf"[{{}},]|{_THIN}|\s")
_SPACES = frozenset(("\\,", "\\;", "\\:", "\\quad", "\\qquad"))
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_BOARDS = frozenset("RZQNC")
_MATRICES = v.words("matrix pmatrix bmatrix array smallmatrix psmallmatrix bsmallmatrix")
_FRAMES = v.words("equation align aligned gather gathered split math displaymath center cases")
_OPENING = frozenset(("(", "[", "\\{", "\\langle"))
_CLOSING = frozenset((")", "]", "\\}", "\\rangle"))
_REST = 40
"""Characters behind a run of letters that may decide what it is."""


class Lexer:
    """One pass over a text, whose result is in `tokens`; tokenize is the way to use it."""

    def __init__(self, text: str, commas_group: bool) -> None:
        self.text = text
        self.commas_group = commas_group and "," in text
        self.tokens: list[str] = []
        self.brackets = 0
        self.framed = False
        """Whether & and \\\\ align lines and make no matrix."""
        self.spaced = False
        """Whether a space stands in front of what comes next."""

    def read(self, at: int, end: int, in_text: bool) -> None:
        """Append the tokens of text[at:end]."""
        while at < end:
            char = self.text[at]
            if char in _SIGNS and not in_text:
                self._add_sign(char)
                at, self.spaced = at + 1, False
                continue
            whole = _WHOLE.match(self.text, at, end)
            if whole:
                self.tokens.append(whole[0])
                at, self.spaced = whole.end(), False
                continue
            if self.commas_group and not self.brackets and char.isdecimal():
                grouped = _COMMAS.match(self.text, at, end)
                if grouped:
                    self.tokens.append(grouped[0].replace(",", ""))
                    at = grouped.end()
                    continue
            match = _TOKEN.match(self.text, at, end)
            assert match is not None, "the last alternative takes any character"
            if match.lastgroup == "none":
                at, self.spaced = match.end(), True
            else:
                at = self._take(match, end, in_text)
                self.spaced = match[0] in _SPACES

    def _take(self, match: re.Match[str], end: int, in_text: bool) -> int:
        """Append what a match stands for; where to go on."""
        kind, found, add = match.lastgroup, match[0], self.tokens.append
        if kind == "number":
            add(found if found.isdecimal() else _MARKS.sub("", found).replace("E", "e"))
        elif kind == "letters":
            self._letters(found, match.end(), end, in_text)
        elif kind == "command":
            return self._command(found, match.end(), end, in_text)
        elif kind == "sign":
            self._sign(found, in_text, self.text[match.end() : match.end() + 1])
        elif kind == "mixed":
            self._mixed(match)
        elif kind == "environment":
            self._environment(match["edge"], match["environment"])
        elif kind == "board":
            add(f"\\{match['board']}" if match["board"] in _BOARDS else match["board"])
        elif kind == "repeating":
            add("".join(found.replace("\\bar", "\\overline").split()))
        elif kind == "degrees":
            add("\\deg")
        elif kind == "ordinal":
            add('"th')
        elif kind == "row":
            add("\\\\")
        elif kind == "noon":
            add(f'"{match["half"].casefold()}m')
        elif kind in ("raised", "lowered"):
            self._script("^" if kind == "raised" else "_", found.translate(_RAISED))
        return match.end()

    def _letters(self, run: str, at: int, end: int, in_text: bool) -> None:
        before = [token for token in self.tokens[-10:] if token not in "{}"]
        if in_text:
            self.tokens += letters.in_text(run, before)
        else:
            rest = self.text[at : min(end, at + _REST)]
            self.tokens += letters.in_mathematics(run, before, self.spaced, rest)

    def _command(self, found: str, at: int, end: int, in_text: bool) -> int:
        if found in v.DROPPED or found in v.STYLES:
            return at
        if found in v.TEXT_STYLES or found in v.SWALLOWED:
            start, stop, after = _argument(self.text, at, end)
            if found in v.TEXT_STYLES and not in_text:
                # A brace of its own: x_\text{max} has all of the text below.
                self.tokens.append("{")
                self.read(start, stop, True)
                self.tokens.append("}")
            elif found in v.TEXT_STYLES:
                return at
            return after
        self._add_sign(v.SIGNS.get(found, found))
        return at

    def _sign(self, found: str, in_text: bool, following: str) -> None:
        if found == "\\" or (found == "&" and self.framed):
            return  # A command without a name at the very end, or an aligned line.
        if found in v.DROPPED or (found in '"`“”„«»*#_' and (in_text or found not in "*#_")):
            return
        if in_text and found in "-'’" and following.isalpha() and self._is_after_word():
            return  # right-angled
        sign = v.SIGNS.get(found, found)
        if len(sign) == 1 and not sign.isascii():
            plain = unicodedata.normalize("NFKC", sign)
            # Digits of other scripts; the rest stays what it is.
            sign = plain if plain.replace("\N{FRACTION SLASH}", "").isdecimal() else sign
            above, slash, below = sign.partition("\N{FRACTION SLASH}")
            if slash:  # One half as one character.
                self.tokens += ["\\frac", "{", above, "}", "{", below, "}"]
                return
        self._add_sign(sign)

    def _is_after_word(self) -> bool:
        return bool(self.tokens) and self.tokens[-1].startswith('"')

    def _add_sign(self, sign: str) -> None:
        if sign in _OPENING:
            self.brackets += 1
        elif sign in _CLOSING and self.brackets:
            self.brackets -= 1
        self.tokens.append(sign)

    def _mixed(self, match: re.Match[str]) -> None:
        whole, above, below = match["whole"], match["above"], match["below"]
        if 0 < int(above) < int(below):
            self.tokens += [whole, "\\frac", "{", above, "}", "{", below, "}"]
        else:
            self.tokens += [whole, above, "/", below]

    def _environment(self, edge: str, name: str) -> None:
        if name in _FRAMES:
            self.framed = edge == "begin"
        else:
            name = "matrix" if name in _MATRICES else name
            self.tokens.append(f"\\{edge}{{{name}}}")

    def _script(self, sign: str, content: str) -> None:
        self.tokens += [sign, "{", *re.findall(r"\d+|.", content), "}"]


def tokenize(text: str, *, commas_group: bool = True) -> list[str]:
    """The tokens of an answer.

    Args:
        text: any string; a character that is no known token is a sign of its own.
        commas_group: outside of brackets, 1,234 is one number and not two.
    """
    lexer = Lexer(text, commas_group)
    lexer.read(0, len(text), in_text=False)
    return lexer.tokens


def _argument(text: str, at: int, end: int) -> tuple[int, int, int]:
    """Where the argument behind `at` begins and ends, and where to go on."""
    while at < end and text[at].isspace():
        at += 1
    if text[at : at + 1] != "{":
        return at, min(at + 1, end), min(at + 1, end)
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at, end):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return at + 1, brace.start(), brace.end()
    return at + 1, end, end
