"""The dataset registry: order of the places, checksums, one download, and what a failure says."""

import dataclasses
import hashlib
import http.server
import os
import threading
from pathlib import Path

import pytest

from diffpost.data import shipped
from diffpost.io import datasets
from diffpost.io.datasets import ChecksumMismatch, Dataset, DatasetUnavailable, fetch

CONTENT = b"photons, as they came" * 1000


def _dataset(address: str | None) -> Dataset:
    return Dataset(
        name="mine",
        path="folder/mine.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        licence="CC0",
        credit="nobody",
        address=address,
        assembly="made of nothing",
    )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFPOST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIFFPOST_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def upstream(tmp_path):
    path = tmp_path / "upstream.bin"
    path.write_bytes(CONTENT)
    return path


def test_downloads_once_and_hits_the_cache_after(cache, upstream):
    wanted = _dataset(upstream.as_uri())
    path = fetch(wanted)
    assert path == cache / "folder" / "mine.bin"
    assert path.read_bytes() == CONTENT
    upstream.unlink()  # a second download would fail
    assert fetch(wanted) == path
    path.write_bytes(b"damaged")
    with pytest.raises(DatasetUnavailable):  # a damaged copy is not used
        fetch(wanted)


def test_a_damaged_cache_is_replaced(cache, upstream):
    path = fetch(_dataset(upstream.as_uri()))
    path.write_bytes(b"damaged")
    assert fetch(_dataset(upstream.as_uri())).read_bytes() == CONTENT


def test_wrong_checksum_names_both_sums_and_leaves_nothing(cache, upstream):
    upstream.write_bytes(b"something else")
    wanted = _dataset(upstream.as_uri())
    with pytest.raises(ChecksumMismatch) as caught:
        fetch(wanted)
    assert wanted.sha256 in str(caught.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(caught.value)
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_the_folder_of_the_environment_comes_first(cache, upstream, tmp_path, monkeypatch):
    wanted = _dataset(upstream.as_uri())
    fetch(wanted)
    own = tmp_path / "own"
    monkeypatch.setenv("DIFFPOST_DATA", str(own))
    assert fetch(wanted).is_relative_to(cache)  # not there: the cache serves
    (own / "folder").mkdir(parents=True)
    (own / "folder" / "mine.bin").write_bytes(CONTENT)
    assert fetch(wanted) == own / "folder" / "mine.bin"
    (own / "folder" / "mine.bin").write_bytes(b"another file")
    with pytest.raises(ChecksumMismatch, match=r"mine\.bin"):
        fetch(wanted)


def test_over_http_and_when_the_server_is_gone(cache, upstream):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(upstream.parent))

        def log_message(self, form, *values):
            requests.append(values)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        wanted = _dataset(f"{base}/upstream.bin")
        assert fetch(wanted).read_bytes() == CONTENT
        fetch(wanted)
        assert len(requests) == 1
        missing = dataclasses.replace(wanted, path="other.bin", address=f"{base}/absent.bin")
        with pytest.raises(DatasetUnavailable, match="404"):
            fetch(missing)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    gone = dataclasses.replace(wanted, path="other.bin")
    with pytest.raises(DatasetUnavailable, match="DIFFPOST_DATA"):
        fetch(gone)


def test_no_address_says_how_to_make_it(cache):
    with pytest.raises(DatasetUnavailable, match="made of nothing"):
        fetch(_dataset(None))


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'nonsense'.*efigi"):
        fetch("nonsense")


def test_the_registry_is_frozen_and_complete():
    entries = datasets.registry()
    assert {"efigi", "gz2", "ceers", "hst-image", "hsc-psf"} <= set(datasets.names())
    with pytest.raises(TypeError):
        entries["mine"] = _dataset(None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        entries["efigi"].sha256 = ""
    assert len({e.path for e in entries.values()}) == len(entries)
    for entry in entries.values():
        assert len(entry.sha256) == 64 and entry.size > 0
        assert entry.licence and entry.credit
        assert not Path(entry.path).is_absolute() and ".." not in entry.path
        assert (entry.address or "").startswith("https://") or entry.assembly


@pytest.mark.data
@pytest.mark.skipif("DIFFPOST_DATA" not in os.environ, reason="DIFFPOST_DATA is not set")
def test_registry_data_is_what_the_registry_says():
    for name in datasets.names():
        assert fetch(name).stat().st_size == datasets.registry()[name].size


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFPOST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / "diffpost"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / ".cache" / "diffpost"


def test_shipped_files():
    assert shipped("hst_petrofit").is_dir()
    assert shipped("hst_petrofit/LICENSE.rst").is_file()
    for wrong in ("absent.fits", "", "../__init__.py"):
        with pytest.raises(ValueError, match="f105w_psf"):
            shipped(wrong)
