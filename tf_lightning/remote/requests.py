"""Requests to fsspec's file systems, which are repeated while they fail.

No error of fsspec is shown or chained, because its text may quote a URL with its password.
"""

import errno
import random
import time
from collections.abc import Callable
from typing import Any

import fsspec
from lightning.pytorch.utilities import rank_zero_info

from tf_lightning.errors import UserError
from tf_lightning.remote.urls import HIDDEN_QUERY, HTTP, public_url, split_url

ATTEMPTS = 12  # of a request that fails for a reason that may pass
FIRST_DELAY, LONGEST_DELAY = 0.1, 20.0  # seconds before the next attempt; 43 to 86 in all
# The packages that pip installs with tf-lightning[EXTRA], by scheme.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# Errors of requests that are wrong in themselves, such as a name that cannot be one on the hub.
MISTAKES = ValueError, TypeError, LookupError, NotImplementedError
# Errors of the disk that a file is copied to.
DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EROFS


def filesystem(url: str) -> fsspec.AbstractFileSystem:
    """Return fsspec's file system for a URL.

    Raises:
        UserError: there is none for its scheme, its package is not installed, or the URL was
            written without its query.
    """
    scheme, _, _, query = split_url(url)
    if HIDDEN_QUERY.fullmatch(query):
        raise UserError(
            f"{url} has a hash instead of its query, which may hold a secret and is never written; "
            "give the URL with its query"
        )
    options = {"headers": {"Accept-Encoding": "identity"}} if scheme in HTTP else {}
    try:
        return fsspec.filesystem(scheme, use_listings_cache=False, **options)
    except ImportError:
        extra = EXTRAS.get(scheme)
        package = f"'tf-lightning[{extra}]'" if extra else f"the package of fsspec for {scheme}"
        raise UserError(
            f"{public_url(url)} needs a package that is not installed; pip install {package}"
        ) from None
    except ValueError:
        raise UserError(
            f"{public_url(url)} has the unknown scheme {scheme!r}; give a local path, or a URL "
            "that begins with https://, s3://, gs:// or hf://datasets/"
        ) from None


def request(url: str, function: Callable, *arguments, **options) -> Any:
    """Call a function of a file system, and again after a growing pause while it fails.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: access is refused, or every attempt failed.
        OSError: the disk of the copy is full or read-only.
    """
    delay = FIRST_DELAY
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function(*arguments, **options)
        except UserError:
            raise
        except Exception as error:
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            # fsspec raises FileNotFoundError for any failure of HTTP, and OSError for those of S3.
            if isinstance(error, OSError) and isinstance(error.__cause__, Exception):
                error = error.__cause__
            if isinstance(error, FileNotFoundError) or _status(error) in (404, 410):
                raise FileNotFoundError(public_url(url)) from None
            _check_access(url, error)
            if attempt == ATTEMPTS:
                raise UserError(
                    f"{public_url(url)} could not be read in {ATTEMPTS} attempts "
                    f"({_kind(error)}); check the URL and the network, and run it again"
                ) from None
            _tell_once(url, _kind(error))
        time.sleep(delay * random.uniform(0.5, 1))
        delay = min(2 * delay, LONGEST_DELAY)


# The hosts whose failing requests were reported.
_told: set[tuple[str, str]] = set()


def _tell_once(url: str, kind: str) -> None:
    """Print that a request failed and is repeated, once for each host."""
    scheme, host, *_ = split_url(url)
    if (scheme, host) not in _told:
        _told.add((scheme, host))
        rank_zero_info(f"{public_url(url)} cannot be read ({kind}); trying again for a minute.")


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error of any file system."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    names = (error, "status"), (response, "status_code"), (error, "code")  # aiohttp, hub, gcsfs
    values = (getattr(holder, name, None) for holder, name in names)
    return next((int(value) for value in values if str(value).isdigit()), None)


def _kind(error: Exception) -> str:
    """Name an error without its text, which may quote the URL."""
    status = _status(error)
    return f"HTTP status {status}" if status else type(error).__name__


def _check_access(url: str, error: Exception) -> None:
    """Raise UserError if a request that failed with this error would fail again.

    Raises:
        UserError: access is refused, there are no credentials, or the URL is wrong.
    """
    scheme, status, kind = split_url(url)[0], _status(error), type(error).__name__
    if "Credential" in kind:
        raise UserError(
            f"{public_url(url)} needs credentials and there are none; {_how_to_log_in(scheme)}"
        ) from None
    is_forbidden = str(error).startswith("Forbidden")  # as gcsfs says it, without the status
    if isinstance(error, PermissionError) or status in (401, 403) or is_forbidden:
        raise UserError(
            f"access to {public_url(url)} is refused{f' with HTTP status {status}' * bool(status)};"
            f" {_how_to_log_in(scheme)}"
        ) from None
    if "Offline" in kind:
        raise UserError(
            f"{public_url(url)} cannot be read while HF_HUB_OFFLINE is set; unset it"
        ) from None
    refused = status and 400 <= status < 500 and status not in (408, 425, 429)
    if refused or isinstance(error, MISTAKES) or kind == "TooManyRedirects":
        raise UserError(
            f"{public_url(url)} cannot be read ({_kind(error)}); check the URL"
        ) from None


def _how_to_log_in(scheme: str) -> str:
    match EXTRAS.get(scheme, scheme):
        case "s3":
            return (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or FSSPEC_S3_ANON=true for a "
                "public bucket"
            )
        case "gs":
            return (
                "log in with `gcloud auth application-default login`, or set "
                "FSSPEC_GS_TOKEN=anon for a public bucket"
            )
        case "hf":
            return (
                "check the name, accept the data set's terms on the hub if it has any, and log in "
                "with `hf auth login` or HF_TOKEN"
            )
    return "check the URL and the login or signature in it"
