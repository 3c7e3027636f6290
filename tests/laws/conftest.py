"""Every law of a running blend holds on every path that computes it."""

from __future__ import annotations

import pytest

from lmoe_cli.bank import bank, product, shared

LIVE = ("test_blend", "test_mixture", "test_generation")
"""Modules whose laws are about what runs."""


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in LIVE:
        metafunc.fixturenames.append("path")
        metafunc.parametrize("path", ["usual", "quickest", "native"], indirect=True)


@pytest.fixture
def path(request, monkeypatch):
    """The usual kernels and all experts at once; those of large models and only experts that act; or torch's own."""
    if request.param == "native":
        monkeypatch.setattr(bank, "choose_products", lambda _: product.Products(one=product.native))
    if request.param == "quickest":
        monkeypatch.setattr(product, "ENOUGH", 0)
        monkeypatch.setattr(bank, "choose_products", lambda _: product.Products(product.onednn, product.onednn))
        monkeypatch.setattr(shared, "is_worth", lambda *_: True)
