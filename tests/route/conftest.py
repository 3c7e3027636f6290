from __future__ import annotations

import pytest

from route import made


@pytest.fixture(scope="session")
def tinymage(tmp_path_factory):
    """A folder with a recipe for each router, and the weights of its gates."""
    folder = tmp_path_factory.mktemp("routed")
    return folder, made.build(folder)


@pytest.fixture(scope="session")
def folder(tinymage):
    return tinymage[0]


@pytest.fixture(scope="session")
def engines(folder):
    """Router's name → an engine, made once."""
    known = {}

    def engine(name):
        if name not in known:
            known[name] = made.engine_of(folder / f"{name}.yaml")
        return known[name]

    return engine
