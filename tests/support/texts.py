"""Texts on which two tokenizers are compared: many scripts, spaces, controls, and what byte-pair encodings stumble over."""

import random

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, 1,234.5 times (or so).",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "いろはにほへと ちりぬるを。日本語のテキスト、カタカナ。",
    "我能吞下玻璃而不伤身体。",
    "키스의 고유조건은 입술끼리 만나야 하고",
    "صِف خَلقَ خَودٍ كَمِثلِ الشَمسِ إِذ بَزَغَت",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "def f(self, x: int) -> str:\n\treturn f'{x:>8}'  # a comment\n\n",
    '{"key": [1, 2.5e-3, null], "nested": {"a": "b"}}\r\n',
]
ODD = [
    "",
    " ",
    "   ",
    " a",
    "  two spaces",
    "a ",
    "\n",
    "\t\t x",
    "a\r\nb",
    "\0",
    "\x01\x1b[31m\x7f",
    "\u00a0\u2003\u3000",
    "\ufeffmark",
    "e\u0301 \u00e9",
    "\U0001f469\u200d\U0001f467 \U0001f600",
    "\U0010ffff\ue000",
    "\u2585",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "aaaaaaa aaa aa a",
    "abababababab",
    "........----",
    "1234567890",
]


def texts(count: int = 300) -> list[str]:
    """The texts above, pieces of them, and mixtures; the same each time. None has U+2581 or the name of a control token."""
    draw = random.Random(0)
    everything = [*SENTENCES, *ODD]
    while len(everything) < count:
        parts = draw.choices(SENTENCES + ODD, k=draw.randint(1, 4))
        start = draw.randint(0, 10)
        joined = draw.choice(["", " ", "  ", "\n"]).join(part[draw.randint(0, 8) :] for part in parts)
        everything.append(joined[start : start + draw.randint(1, 120)])
        everything.append("".join(draw.choices("ab _é日\n0", k=draw.randint(1, 40))))
    return everything
