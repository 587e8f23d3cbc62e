"""Caption tokens as in the COCO caption evaluation, without its Java program.

That program is Stanford's Penn Treebank tokenizer; its output is lower-cased and punctuation is
removed.
"""

import re
from collections.abc import Iterator, Sequence

# Tokens that the COCO evaluation removes. It also lists -LRB- and the like, but compares them with
# lower-case tokens, so they remain.
PUNCTUATION = {*"' ` . ? ! , : - -- ... ;".split(), '"', "``", "''"}
BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split(), strict=True))
REPLACED_CHARACTERS = str.maketrans(
    {"½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3", "¢": " cents"}
    | {"’": "'", "‘": "'", "“": '"', "”": '"', "–": "--", "—": "--"}
)
SPLIT_WORDS = {
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
      (?:https?://|www\.)[^\s"<>]*[^\s"<>.,?!;:)]    # URLs
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
    | [^\W_]+?(?=n't\b)                               # is in isn't
    | (?:o|d|l|ma)'[a-z]+ | y'(?=all\b)               # o'clock, y' all
    | [^\W_]+(?:[-./&_@][^\W_]+)*                     # red-haired, and/or
    | --+ | \.\.\.+ | [?!]+ | '' | `` | \S
    """,
    re.VERBOSE,
)


Tokens = list[str]


def tokenize_all(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> Iterator[tuple[Tokens, list[Tokens]]]:
    """Tokenize each caption and the references of its image.

    Raises:
        ValueError: a caption has no references.
    """
    for caption, others in zip(captions, references, strict=True):
        if not others:
            raise ValueError(f"the caption {caption!r} has no reference; leave it out")
        yield tokenize(caption), [tokenize(other) for other in others]


def tokenize(caption: str) -> Tokens:
    """Split a caption into lower-case tokens: "isn't" becomes is n't, and "(" becomes -lrb-."""
    found = TOKEN.findall(caption.translate(REPLACED_CHARACTERS).lower())
    tokens = [part for token in found for part in SPLIT_WORDS.get(token, token).split()]
    return [BRACKETS.get(token, token) for token in tokens if token not in PUNCTUATION]
