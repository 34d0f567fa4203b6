"""Caches at a URL: shards that come when they are needed, whole, and never more of them than there is room for."""

import functools
import http.server
import shutil
import threading
import weakref

import pytest
import torch

from raecli.errors import InputError, UsageError
from raecli.store import latent_cache, remote
from raecli.store.latent_cache import open_cache
from raecli.store.remote import is_url, local_folder


@pytest.fixture
def served(cache, tmp_path, monkeypatch):
    """A copy of the cache behind an HTTP server that knows no ranges; its URL, its folder and what was asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    shutil.copytree(cache, tmp_path / "far")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            asked.append(self.path.strip("/"))

    handler = functools.partial(Handler, directory=str(tmp_path / "far"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "far", asked
        server.shutdown()


def test_a_cache_at_a_url_reads_as_the_one_on_disk(cache, served):
    url, _, asked = served
    near, far = open_cache(cache), open_cache(url)
    assert not [name for name in asked if name.startswith("shard")]  # none before it is needed
    assert torch.equal(far.latents([0, 9, 10, 23], [True] * 4), near.latents([0, 9, 10, 23], [True] * 4))
    assert torch.equal(far.latents(range(24)), near.latents(range(24))) and far.keys == near.keys
    open_cache(url).latents(range(24))  # another time, from the local copies
    assert sorted(name for name in asked if name.startswith("shard")) == [f"shard-00000{n}.tar" for n in range(3)]


def test_the_local_copies_stay_within_their_room_and_the_oldest_goes(cache, served):
    url, _, _ = served
    size = max(record.bytes for record in open_cache(cache).manifest.shards)
    far = open_cache(url, remote_cache_gb=2.1 * size / 1e9)
    for index in (0, 10, 20, 0, 15, 23):
        assert torch.equal(far.latents([index]), open_cache(cache).latents([index]))
        assert sum(path.stat().st_size for path in local_folder(url).glob("shard-*.tar")) <= 2.1 * size
    assert len(far.maps) <= 2
    with pytest.raises(UsageError, match="remote_cache_gb"):
        open_cache(url, remote_cache_gb=1e-9 * size / 2).latents([0, 10, 20])


@pytest.fixture
def alive(monkeypatch):
    """The shards mapped now; and into a list how many were at each arrival: a removed file lies on disk until then."""
    maps, counts = weakref.WeakSet(), []

    class Watched(latent_cache.Mapped):
        def __init__(self, *told):
            super().__init__(*told)
            maps.add(self.map)

    def download(url, part):
        counts.append(len(maps) if "shard-" in url else 0)
        fetch(url, part)

    fetch = remote.download
    monkeypatch.setattr(latent_cache, "Mapped", Watched)
    monkeypatch.setattr(remote, "download", download)
    return counts


@pytest.mark.parametrize("room", [1, 2])
def test_no_more_shards_lie_on_the_disk_than_there_is_room_for_within_a_batch(cache, served, alive, room):
    size = max(record.bytes for record in open_cache(cache).manifest.shards)
    far = open_cache(served[0], remote_cache_gb=(room + 0.1) * size / 1e9)
    mixed = [20, 0, 10, 1, 23, 11, 2]
    expected = open_cache(cache).latents(mixed, [True, False] * 3 + [True])
    alive.clear()
    assert torch.equal(far.latents(mixed, [True, False] * 3 + [True]), expected)
    assert alive == list(range(room)) + [room - 1] * (3 - room)  # each came once, into room that was free
    assert len(far.maps) == room


def test_what_arrives_wrong_is_refused_and_a_cut_download_goes_on(cache, served, tmp_path):
    url, far, _ = served
    shard = far / "shard-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512] + b"x" * 512)
    with pytest.raises(InputError, match=r"shard-000001\.tar: not what the manifest tells"):
        open_cache(url).latents([10])
    shard.write_bytes(whole)
    for place in (url, f"file://{far}"):  # a server without ranges begins anew, a file goes on
        folder = local_folder(place)
        (folder / "shard-000001.tar.part").write_bytes(whole[:3000])
        assert torch.equal(open_cache(place).latents([10]), open_cache(cache).latents([10]))


def test_what_is_no_url_or_has_no_package_is_told(tmp_path, monkeypatch, served):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert is_url("s3://bucket/latents") and not is_url("pipe:curl http://x") and not is_url("latents/a")
    with pytest.raises(UsageError, match=r"s3://bucket.* needs a package.*s3fs"):
        open_cache("s3://bucket/latents")
    with pytest.raises(InputError, match="404"):
        open_cache(f"{served[0]}/nowhere")
    with pytest.raises(UsageError, match="nosuch"):
        open_cache("nosuch://x/y")


def test_a_remote_cache_larger_than_its_room_is_not_read_in_global_order(rae, served, tmp_path):
    url, _, asked = served
    environment = {"XDG_CACHE_HOME": str(tmp_path / "home"), "no_proxy": "127.0.0.1"}
    command = ("train-diffusion", "digits/diffusion_fast", f"cache={url}", "remote_cache_gb=1e-5", "--dry-run")
    refused = rae(*command, code=2, **environment)
    assert "set shuffle=block, or remote_cache_gb=0.00" in refused.stderr
    told = rae(*command, "shuffle=block", **environment)
    assert "shuffle: block" in told.stdout and "not there yet" not in told.stderr
    rae(*command[:-2], "--dry-run", **environment)  # all of it fits
    assert not [name for name in asked if name.startswith("shard")]  # a plan fetches tables alone
