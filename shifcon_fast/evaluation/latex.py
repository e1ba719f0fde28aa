"""LaTeX as models write it in answers, as plain text: ``\\dfrac{3}{4}`` is 3/4, ``1{,}234\\text{ cm}`` is 1,234 cm.

Only what occurs around numbers is translated; any other command becomes a space. ``\\boxed{…}`` becomes
:data:`BOX` … :data:`BOX_END`.
"""

from __future__ import annotations

import re

BOX, BOX_END = "\x02", "\x03"

_SYMBOLS = {
    **dict.fromkeys(("!", "left", "right", "big", "Big", "displaystyle", "limits", "phantom"), ""),
    **dict.fromkeys((",", ";", ":", "thinspace", " "), "\u2009"),  # they group digits: 1\,234
    **{escaped: escaped for escaped in "%$#&_"},
    **dict.fromkeys(("times", "cdot", "ast"), "×"),
    **{
        "div": "÷",
        "pm": "±",
        "approx": "≈",
        "circ": "°",
        "degree": "°",
        "pi": "π",
        "infty": "∞",
        "sqrt": "√",
    },
    **{"dots": "…", "ldots": "…", "cdots": "…", "newline": "\n", "\\": "\n", "euro": "€", "pounds": "£"},
}
_FONTS = r"text\w*|math(?:rm|bf|it|sf|tt|bb|cal|normal)|mbox|hbox|operatorname|emph|underline|bm|boldsymbol"
_FONT = re.compile(rf"\\(?:{_FONTS})\s*\{{([^{{}}]*)\}}")
_FRACTION = re.compile(r"([0-9]\s*)?\\[dtc]?frac\s*(?:\{([^{}\\]*)\}|([0-9]))\s*(?:\{([^{}\\]*)\}|([0-9]))")
_COMMAND = re.compile(rf"\\([A-Za-z]+|[^{BOX}{BOX_END}]|)")
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*(\{?)|\\[{}]|[{}]")
_DEEPEST = 8  # fonts and fractions inside one another


def to_plain(text: str) -> str:
    """The text with its LaTeX translated and boxes marked; text without a backslash stays as it is."""
    text = text.replace(BOX, "").replace(BOX_END, "")
    if "\\" not in text:
        return text
    text = _mark_boxes(text)
    for _ in range(_DEEPEST):
        simpler = _FRACTION.sub(_plain_fraction, _FONT.sub(r"\1", text))
        if simpler == text:
            break
        text = simpler
    text = _COMMAND.sub(lambda command: _SYMBOLS.get(command.group(1), " "), text)
    return text.replace("{", "").replace("}", "")


def _mark_boxes(text: str) -> str:
    """``\\boxed{…}`` and ``\\boxed 18``; a box that the text leaves open goes on to its end."""
    pieces: list[str] = []
    open_braces: list[bool] = []  # and whether each opened a box
    position = 0
    for brace in _BRACES.finditer(text):
        if brace.start() < position:
            continue  # inside the 18 of \boxed 18
        pieces.append(text[position : brace.start()])
        position = brace.end()
        if brace.group() in ("{", "}"):
            closes_box = brace.group() == "}" and bool(open_braces) and open_braces.pop()
            pieces.append(BOX_END if closes_box else brace.group())
            if brace.group() == "{":
                open_braces.append(False)
        elif brace.group(1):
            pieces.append(BOX)
            open_braces.append(True)
        elif brace.group(1) == "" and (bare := re.compile(r"[^\s{}$\\]+").match(text, position)):
            pieces += [BOX, bare.group(), BOX_END]
            position = bare.end()
    pieces += [text[position:], *(BOX_END for is_box in open_braces if is_box)]
    return "".join(pieces)


def _plain_fraction(found: re.Match[str]) -> str:
    whole, above, digit_above, below, digit_below = found.groups()
    above, below = (above or digit_above).strip(), (below or digit_below).strip()
    return f"{whole.strip() + ' ' if whole else ''}{above}/{below}"
