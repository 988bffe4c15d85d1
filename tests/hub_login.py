"""A local Hub that this process is logged in to, for the tests of what reads from and writes to the Hub."""

import pytest
from huggingface_hub import close_session, constants
from local_hub import serve
from transformers.utils import logging as transformers_logging

WRITE, READ, OTHER = ("hf_" + letter * 34 for letter in "wro")  # me, me with a token to read, and somebody else


@pytest.fixture(name="hub")
def logged_in_hub(monkeypatch, tmp_path, capfd, caplog):
    """A Hub that this process is logged in to; no test may show a token or ask for a page that there is not."""
    with serve({WRITE: ("me", True), READ: ("me", False), OTHER: ("other", True)}) as (endpoint, hub):
        # huggingface_hub reads these from the environment when it is imported.
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", WRITE)
        verbosity = transformers_logging.get_verbosity()
        yield hub
        close_session()
        transformers_logging.set_verbosity(verbosity)  # which the command turns down
        transformers_logging.enable_progress_bar()
        output = "".join(capfd.readouterr()) + caplog.text
        assert not any(token in output for token in (WRITE, READ, OTHER))
        assert hub.unknown == []
