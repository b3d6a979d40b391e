"""The indefinite article of a name, and prompts that give each name one."""

import re

_ARTICLES = ("a ", "an ", "the ")
# "an": a silent h, and letters that are spelled out (an x-ray, an MRI). "a": "you" and "w" (a unit, a European, a one).
_VOWEL = re.compile(r"(?i:hour|honest|honou?r|heir|[fhlmnrsx]\b|(?:sos|ng)\b)|[AEFHILMNORSX][A-Z]{1,2}\b")
_CONSONANT = re.compile(r"(?i:uni(?![nm])|u[bst][aeiou]|ur[aeiou]|eu|ewe|(?:one|once)\b|u\b)|U[A-Z]{1,2}\b")
_WITH_ARTICLE = re.compile(r"(?:\b(?:a|an|the)|\{a\}) \{\}")
# Adjectives may stand between, as in "the plastic {}"; behind "a photo of" or "a photo showing" a name begins anew.
_DETERMINED = re.compile(
    r"(?:\b(?:a|an|the|my|one|many|this|that)|\{a\}) "
    r"(?:(?!(?:of|in|on|with|from|by|at|near|for|and|\w+ing)\b)[\w-]+ )*\{\}"
)


def article(noun: str) -> str:
    """ "a" or "an", by the noun's sound where a common word's differs from its spelling. ValueError: a blank noun."""
    if not noun.strip():
        raise ValueError(f"{noun!r} is no noun that could have an article; name a class")
    first = noun.split()[0]
    if _CONSONANT.match(first):
        return "a"
    return "an" if _VOWEL.match(first) or first[0].lower() in "aeiou" else "a"


def has_article(noun: str) -> bool:
    """Whether the noun begins with an article of its own."""
    return noun.lower().startswith(_ARTICLES)


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{article(noun)} {noun}"


def filled(template: str, name: str) -> str:
    """The prompt of one class: ``name`` for ``{}`` and its article for ``{a}``. ValueError: a template without ``{}``.

    A name with an article of its own, such as "a beach", is given no second one: it takes the place of the template's,
    or leaves its own where other words stand between, as in "the plastic {}".
    """
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}} for the class name")
    if has_article(name):
        template = _WITH_ARTICLE.sub("{}", template)
        name = name.partition(" ")[2] if _DETERMINED.search(template) else name
    if "{a}" in template:
        template = template.replace("{a}", article(name))
    return template.replace("{}", name)
