"""Without a network, local ways are named within seconds; the network of these tests is a server of their own."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants, hf_hub_download

from common import network


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that answers every question with 404."""

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_hub(monkeypatch):
    """An address that nobody listens at."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_hub_that_says_no_is_there(hub):
    assert network.reachable()


def test_a_hub_that_is_silent_is_given_up(monkeypatch):
    waiting = threading.Event()

    def silent(*arguments, **options):
        waiting.wait()
        raise TimeoutError

    monkeypatch.setattr(network.urllib.request, "urlopen", silent)
    assert not network.reachable(seconds=0.01)
    waiting.set()


def test_without_a_network_the_local_ways_are_named(no_hub):
    sentence = r"the weights cannot be downloaded: http://127.0.0.1:9 does not answer; give a local file"
    with pytest.raises(ValueError, match=sentence), network.downloads("the weights", "give a local file"):
        hf_hub_download("nobody/nothing", "weights.safetensors")
    assert not constants.HF_HUB_OFFLINE


def test_what_is_cached_needs_no_network(no_hub):
    with network.downloads("the weights", "mend"):
        assert constants.HF_HUB_OFFLINE


def test_with_a_network_errors_keep_their_own_words(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(KeyError), network.downloads("the weights", "mend"):
        raise KeyError("x")
