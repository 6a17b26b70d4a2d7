"""Answers to GSM8K: what a model may write after the mark, and what is no number there."""

from __future__ import annotations

import random

from benchmarks.spelling.ways import Family, Values, lines


def _number(rng: random.Random) -> Values:
    n = rng.choice((rng.randint(12, 98), rng.randint(1000, 99_999)))
    return {
        "n": str(n),
        "comma": f"{n:,}",
        "spaced": f"{n * 1000 + 234:,}".replace(",", " "),
        "next": str(n + 1),
        "twice": str(2 * n),
        "tenfold": str(10 * n),
        "thousandfold": str(1000 * n + 234),
    }


NUMBER = Family(
    sample=_number,
    truths=("<n>", "<comma>", "<n>.0"),
    same=lines(
        r"""
        #### <n>
        ####<n>
        #### <comma>
        #### <n>.
        #### <n>.0
        #### <n>.00
        #### +<n>
        #### $<n>
        #### \$<n>
        #### $<comma>.00
        #### <n>$
        #### $<n>$
        #### \(<n>\)
        #### \[<n>\]
        #### $$<n>$$
        #### (<n>)
        #### [<n>]
        ####: <n>
        #### : <n>
        #### *<n>*
        #### **<n>**
        #### __<n>__
        #### `<n>`
        #### "<n>"
        #### \boxed{<n>}
        #### $\boxed{<n>}$
        #### \boxed{\$<n>}
        #### **$<n>**
        #### ** <n> **
        ####  <n>
        #### <n> dollars
        #### <n>kg
        #### <n> square feet
        #### <n>-year-olds
        #### <n> clips.
        #### **<n>** apples
        #### **<n> apples**
        #### <n> \text{ apples}
        #### \text{<n>}
        #### <n>%
        #### <n>\%
        #### €<n>
        #### <n> €
        #### = <n>
        #### Answer: <n>
        #### The answer is <n>
        #### <n>, as was asked
        #### <n> miles/hour
        #### <n> (dollars)
        #### 17 and then #### <n>
        #### <n> ####
        """
    ),
    near=lines(
        r"""
        #### <next>
        #### -<n>
        #### <tenfold>
        #### <n> or <next>
        #### <n> 1/2
        #### <n>, <next>
        #### <n> <next>
        #### <spaced>
        #### <n>!
        #### <n>x
        #### <n> x 3 = 36
        #### <n> to <next>
        #### <n>-<next>
        #### <n> #### unknown
        #### <n> ÷ 1
        #### <n>/1
        #### <n> / 2
        #### <n> + 0 = <next>
        #### <n>:30
        #### <n>^2
        #### <n>e3
        #### <n> thousand
        #### <n>k
        #### <n> million dollars
        #### <n> and a half
        #### <n> dozen
        #### <n> or so, not sure
        #### x
        #### <n>.5
        #### <n> dollars and 50 cents
        #### 1/<n>
        #### 2 * <n>
        #### x = <next>
        #### <n>\pi
        #### \frac{<n>}{2}
        #### <n> × 2
        #### <n>x + 1
        #### more than <n>
        #### <n>..<next>
        #### <n>, wait, no
        ### <n>
        it is <n>
        """
    ),
)
