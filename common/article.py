"""The indefinite article of a name."""

_ARTICLES = ("a ", "an ", "the ")
_SILENT = ("hourglass", "x", "sos", "ng")
_CONSONANT = ("unicorn", "euro", "ewe", "one")


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
