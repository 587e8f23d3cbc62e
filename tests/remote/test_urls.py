"""URLs are shown without passwords and signatures; the place of a copy gives its URL again."""

import pytest

from tf_lightning.errors import UserError
from tf_lightning.remote.cache import cached_path, url_of
from tf_lightning.remote.listing import RemoteFile, find
from tf_lightning.remote.urls import hide_logins, is_remote, public_url


@pytest.mark.parametrize(
    "url, shown",
    [
        ("https://me:secret@host:80/a/b.tar", "https://host:80/a/b.tar"),
        ("https://host/a.tar?X-Amz-Signature=secret&X-Amz-Date=1", "https://host/a.tar"),
        ("HTTPS://host/a.tar?X-Amz-Signature=secret", "https://host/a.tar"),
        ("https://host/a.tar?sig=secret&se=2026", "https://host/a.tar"),
        ("s3://bucket/a?b#c.tar", "s3://bucket/a?b#c.tar"),
        ("s3://bucket/a::b.tar", "s3://bucket/a::b.tar"),
        ("hf://datasets/me/data@main/a.parquet", "hf://datasets/me/data@main/a.parquet"),
    ],
)
def test_a_url_is_shown_without_login_and_signature(url, shown):
    assert public_url(url) == shown == str(RemoteFile(url, 1, "a"))
    assert "secret" not in repr(RemoteFile(url, 1, "a"))
    assert "secret" not in str(cached_path(url))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("--paths https://me:pw@a.org/b.tar", "--paths https://a.org/b.tar"),
        ("--paths=['https://me:pw@a.org/b.tar']", "--paths=['https://a.org/b.tar']"),
        ("[http://me:pw@a/b,http://me:pw@c/d]", "[http://a/b,http://c/d]"),
        ("http://a/{0..9}.tar?sig=pw,pw]", "http://a/{0..9}.tar]"),
        ("is at http://a/b?sha256=0123456789ab;", "is at http://a/b?sha256=0123456789ab;"),
        ("s3://me:pw@a/b.tar, then c://d", "s3://a/b.tar, then c://d"),
        ("https://, s3:// or hf://datasets/", "https://, s3:// or hf://datasets/"),
    ],
)
def test_urls_in_a_text_are_shown_without_login_and_query(text, shown):
    assert hide_logins(text) == shown


def test_the_rest_of_a_query_is_shown_as_its_hash_and_tells_files_apart():
    first, second = (f"https://host/get?file={name}&sig=x" for name in "ab")
    assert public_url(first) != public_url(second)
    assert cached_path(first) != cached_path(second)
    assert "file=" not in public_url(first)
    assert public_url(first) == public_url("https://host/get?sig=other&file=a")


@pytest.mark.parametrize("chain", ["simplecache::", "zip://a.csv::", "tar://*.csv::simplecache::"])
def test_several_schemes_are_refused_without_their_secret(chain):
    url = f"{chain}https://me:secret@host/a.zip?key=secret"
    assert is_remote(url) and "secret" not in public_url(url) and "host/a.zip" in public_url(url)
    with pytest.raises(UserError) as error:
        find(url)
    assert "joins several schemes; give only https://host/a.zip" in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["apikey", "OSSAccessKeyId", "auth", "jwt", "key", "file"])
def test_no_parameter_of_a_query_is_shown_and_its_hash_is_not_read(name):
    url = f"https://host/a.tar?{name}=secret"
    assert name not in public_url(url) and "secret" not in f"{public_url(url)} {cached_path(url)}"
    with pytest.raises(UserError, match=r"\?sha256=.* has a hash instead .* with its query"):
        find(public_url(url))


@pytest.mark.parametrize(
    "url",
    [
        "https://me:secret@host:8000/a%20folder/b.jpg",
        "s3://bucket/a folder/100%25/b?.jpg",
        "hf://datasets/me/data/train/1.parquet",
    ],
)
def test_the_place_of_a_copy_gives_its_url_again(url):
    path = cached_path(url)
    assert url_of(path) == url
    assert url_of(path.parent / "other.jpg") == url.rpartition("/")[0] + "/other.jpg"
    assert url_of(path.parent / ".." / "other.jpg") == url.rsplit("/", 2)[0] + "/other.jpg"


def test_a_path_outside_of_the_cache_has_no_url(tmp_path):
    assert url_of(tmp_path / "a.jpg") is None
    folder = cached_path("s3://bucket/a.jsonl").parent
    for path in (folder / "../other/a.jpg", folder / "../../../../a.jpg"):
        with pytest.raises(ValueError):
            url_of(path)


@pytest.mark.parametrize("url", ["https://host/a/../b", "s3://bucket/../b"])
def test_a_url_with_parent_folders_is_refused(url):
    with pytest.raises(UserError, match="'..' as a folder"):
        cached_path(url)
