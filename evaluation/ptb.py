"""Caption tokens as the COCO caption evaluation has them, without its Java program.

That program is Stanford's Penn Treebank tokenizer, in lower case, and then punctuation dropped.
"""

import re
from collections.abc import Iterator, Sequence

# What the COCO evaluation drops; it lists -LRB- and the like too, which lower case lets through.
DROPPED = {*"' ` . ? ! , : - -- ... ;".split(), '"', "``", "''"}
BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))
WRITTEN = str.maketrans(
    {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": " cents"}
    | {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--"}
)
SPLIT = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
    "'tis": "'t is",
    "'twas": "'t was",
}
ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|ave|blvd|rd|mt|ft|jr|sr|prof|gen|col|capt|lt|sgt|rev|hon|gov|sen|rep|"
    "inc|corp|co|ltd|bros|vs|etc|vol|mo|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec"
)
TOKEN = re.compile(
    rf"""
      (?:https?://|www\.)[^\s"<>]*[^\s"<>.,?!;:)]    # addresses
    | </?[a-z][^<>\s]*>                               # markup
    | (?:{ABBREVIATIONS})\.(?!\w)                     # mr.
    | nos?\.(?=\s*\d)                                 # no. 5
    | (?:[a-z]\.)+(?:[a-z]\b)?                        # u.s.
    | '(?:tis|twas)\b
    | '(?:s|m|d|re|ve|ll)\b                           # the dog 's
    | n't\b                                           # is n't
    | '\d\ds?\b                                       # the '70s
    | 'n'                                             # rock 'n' roll
    | \d+:\d+(?=[ap]m\b)                              # 10:30 am
    | [-+]?\.?\d+(?:[.,:/]\d+)*[^\W_]*(?:-\w+)*       # 1,000  12:30  1/2  1st  4x4
    | [^\W_]+?(?=n't\b)                               # is, of isn't
    | (?:o|d|l|ma)'[a-z]+ | y'(?=all\b)               # o'clock, y' all
    | [^\W_]+(?:[-./&_@][^\W_]+)*                     # red-haired, and/or
    | --+ | \.\.\.+ | [?!]+ | '' | `` | \S
    """,
    re.VERBOSE,
)


Tokens = list[str]


def tokenized(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[tuple[Tokens, list[Tokens]]]:
    """The tokens of each caption and of its picture's references.

    Raises:
        ValueError: a picture without references.
    """
    for caption, others in zip(captions, references, strict=True):
        if not others:
            raise ValueError(f"no reference to score the caption {caption!r} by; leave it out")
        yield tokenize(caption), [tokenize(other) for other in others]


def tokenize(caption: str) -> Tokens:
    """The tokens of a caption: lower case, no punctuation, "isn't" as is n't, brackets by name."""
    found = TOKEN.findall(caption.translate(WRITTEN).lower())
    tokens = [part for token in found for part in SPLIT.get(token, token).split()]
    return [BRACKETS.get(token, token) for token in tokens if token not in DROPPED]
