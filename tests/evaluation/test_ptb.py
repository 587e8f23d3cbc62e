"""Tokens equal the output of the COCO evaluation's Java program (pycocoevalcap 1.2).

The table holds the program's output for unusual captions, with punctuation removed.
"""

import pytest

from evaluation.ptb import tokenize

THEIRS = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "Two dogs, one cat; and a bird!": "two dogs one cat and a bird",
    "It's a dog's life, isn't it?": "it 's a dog 's life is n't it",
    "They're on the U.S. coast in Mr. Smith's boat.": (
        "they 're on the u.s. coast in mr. smith 's boat"
    ),
    'A red-haired woman -- with a "quoted" word.': "a red-haired woman with a quoted word",
    "He can't, won't, shouldn't've gone.": "he ca n't wo n't should n't 've gone",
    "The man (in a hat) is walking.": "the man -lrb- in a hat -rrb- is walking",
    "A sign that says 'stop' on it": "a sign that says stop on it",
    "I'm you'll we've he'd she's": "i 'm you 'll we 've he 'd she 's",
    "A $5.00 bill, 10% off, #1 & more": "a $ 5.00 bill 10 % off # 1 & more",
    "3 o'clock at 12:30 p.m. on 1/2 street": "3 o'clock at 12:30 p.m. on 1/2 street",
    "A black/white cat and/or dog": "a black/white cat and/or dog",
    "wow... really?? yes!!!": "wow really ?? yes !!!",
    "cannot gonna wanna gotta": "can not gon na wan na got ta",
    "the dogs' bowls": "the dogs bowls",
    "A 4x4 truck with 1,000 pounds.": "a 4x4 truck with 1,000 pounds",
    "Photo of St. Louis, Mo.": "photo of st. louis mo.",
    "a cat [sitting] {here}": "a cat -lsb- sitting -rsb- -lcb- here -rcb-",
    "http://www.example.com is a site": "http://www.example.com is a site",
    "A woman with “I ♥ NY” t-shirt": "a woman with i ♥ ny t-shirt",
    "the dog’s café": "the dog 's café",
    "a 1980's style van in the '70s": "a 1980 's style van in the '70s",
    "she'll've d'you y'all ma'am": "she 'll 've d'you y' all ma'am",
    "rock 'n' roll, 'tis": "rock 'n' roll 't is",
    "a man – en dash — em dash": "a man en dash em dash",
    "a ½ eaten donut for 50¢": "a 1/2 eaten donut for 50 cents",
    "the no. 5 bus says no.": "the no. 5 bus says no",
    "a mother-in-law's house at 10:30am": "a mother-in-law 's house at 10:30 am",
    "A 12\" pizza for a 6' tall man": "a 12 pizza for a 6 tall man",
    "wi-fi w/o salt+pepper at 5th ave.": "wi-fi w/o salt + pepper at 5th ave.",
}


@pytest.mark.parametrize("caption", THEIRS)
def test_equals_the_java_program(caption):
    assert " ".join(tokenize(caption)) == THEIRS[caption]


@pytest.mark.parametrize("caption", ["", "   ", ".", "?!, -- ..."])
def test_captions_without_words_have_no_word_tokens(caption):
    assert [token for token in tokenize(caption) if token.isalnum()] == []


def test_line_breaks_and_spaces_separate_tokens():
    assert tokenize("a  cat\n on\ta mat ") == ["a", "cat", "on", "a", "mat"]
