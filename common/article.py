"""The indefinite article of a name, and prompts that give each name one."""

import re

_ARTICLES = ("a ", "an ", "the ")
_SILENT = ("hourglass", "x", "sos", "ng")
_CONSONANT = ("unicorn", "euro", "ewe", "one")
_WITH_ARTICLE = re.compile(r"(?:\b(?:a|an|the)|\{a\}) \{\}")


def article(noun: str) -> str:
    """ "a" or "an", by the noun's sound where it differs from the spelling."""
    first = noun.split()[0]
    return "an" if first in _SILENT or (noun[0].lower() in "aeiou" and first not in _CONSONANT) else "a"


def has_article(noun: str) -> bool:
    """Whether the noun begins with an article of its own."""
    return noun.lower().startswith(_ARTICLES)


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{article(noun)} {noun}"


def filled(template: str, name: str) -> str:
    """The prompt of one class: ``name`` for ``{}`` and its article for ``{a}``. ValueError: a template without ``{}``.

    A name with an article of its own, such as "a beach", is given no second one: it takes the place of the template's.
    """
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}} for the class name")
    if has_article(name):
        template = _WITH_ARTICLE.sub("{}", template)
        name = name.partition(" ")[2] if "{a}" in template else name  # an adjective stands between, as in "{a} red {}"
    if "{a}" in template:
        template = template.replace("{a}", article(name))
    return template.replace("{}", name)
