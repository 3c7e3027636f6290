import pytest


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    """Verification compares answers of a few tokens, each of which runs the model; of all where commands are tried."""
    monkeypatch.setattr("lmoe_cli.bake.verify.GREEDY_TOKENS", 6)
