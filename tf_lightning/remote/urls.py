"""URLs, and their public form without secrets.

A URL may contain a password, a signature or another secret. `public_url` has none of them;
messages, folders and stored files have only this form.
"""

import hashlib
import re
from urllib.parse import parse_qsl, urlencode

from tf_lightning.errors import UserError

HTTP = ("http", "https")
# Parameters of a query that sign a URL. They differ each time the same file is signed.
SIGNATURE_PREFIXES = ("x-amz-", "x-goog-")
SIGNATURES = (
    "awsaccesskeyid", "googleaccessid", "signature", "expires", "policy",
    "key-pair-id", "token", "access_token", "sig", "se", "sp", "sv", "sr", "st", "spr", "sks",
    "skv", "ske", "skt", "skoid", "sktid",
)  # fmt: skip
HIDDEN_QUERY = re.compile("sha256=[0-9a-f]{12}")  # what `public_url` writes for a query

CHAIN = re.compile(r"::[\w+.-]+://")  # of several schemes, as in zip://a.csv::https://host/b.zip


def is_remote(path: object) -> bool:
    """Return whether a path is a URL."""
    return isinstance(path, str) and "://" in path


def split_url(url: str) -> tuple[str, str, str, str]:
    """Split a URL into scheme, host with login and port, path without leading "/", and query.

    Raises:
        UserError: it has several schemes.
    """
    if CHAIN.search(url):
        last = public_url(url.rpartition("::")[2])
        raise UserError(f"{public_url(url)} joins several schemes; give only {last}")
    scheme, _, rest = url.partition("://")
    scheme = scheme.lower()
    host, _, path = rest.partition("/")
    query = ""
    if scheme in HTTP:  # "?" and "#" are characters of the names in object stores
        path, _, query = path.partition("#")[0].partition("?")
    return scheme, host, path, query


def public_url(url: str) -> str:
    """Return a URL without login and query.

    A hash stands for the query without its signature. Any parameter may hold a secret, so none is
    shown.
    """
    if CHAIN.search(url):
        parts = url.split("::")
        return "::".join(public_url(part) if is_remote(part) else part for part in parts)
    scheme, host, path, query = split_url(url)
    rest = query_hash(query)
    return f"{scheme}://{host.rpartition('@')[2]}/{path}" + (f"?sha256={rest}" if rest else "")


# A URL in a text such as a command; the next one may follow after a comma.
URL = re.compile(r"""[A-Za-z][\w+.-]*://(?:(?!,\s*[A-Za-z][\w+.-]*://)[^\s'"])+""")


def hide_logins(text: str) -> str:
    """Replace the URLs in a text, such as a command, by their `public_url`."""

    def hide(found: re.Match) -> str:
        url = found[0].rstrip("]}")  # of a list or a dict
        is_public = "@" not in url and ("?" not in url or "?sha256=" in url)
        return (url if is_public else public_url(url)) + found[0][len(url) :]

    return URL.sub(hide, text)


def query_hash(query: str) -> str:
    """Hash the parameters of a query that do not sign the URL; "" if there are none."""
    items = sorted(parse_qsl(query, keep_blank_values=True))
    rest = [(key, value) for key, value in items if not _signs(key.lower())]
    return hashlib.sha256(urlencode(rest).encode()).hexdigest()[:12] if rest else ""


def _signs(key: str) -> bool:
    return key in SIGNATURES or key.startswith(SIGNATURE_PREFIXES)
