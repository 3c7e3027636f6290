"""`lmoe pull --allow-pickle`, for folders and for repositories."""

from __future__ import annotations

import io

import pytest
import torch

from tests.adapter import made


@pytest.fixture
def pickled() -> dict[str, bytes]:
    """An adapter whose weights are a pickle."""
    buffer = io.BytesIO()
    torch.save({name: torch.ones(sides) for name, sides in made.factors().items()}, buffer)
    return {"adapter_config.json": made.adapter()["adapter_config.json"], "adapter_model.bin": buffer.getvalue()}


def test_a_pickled_adapter_of_the_hub_is_converted_and_then_like_any_other(served, environment, lmoe, pickled):
    served.add("acme/old", pickled)
    told = lmoe("pull", "acme/old", "--json")
    assert (told.code, told.codes) == (2, ["pickle-only"])
    told = lmoe("pull", "acme/old", "--allow-pickle", "--json")
    (facts,) = told.data["adapters"]
    assert (told.code, told.codes, facts["supported"], facts["format"]) == (0, [], True, "safetensors")
    assert lmoe("inspect", "adapter", "acme/old", "--json").data["tensors"] == 8
    assert lmoe("pull", "acme/old", "--json").code == 0  # it has been converted
    environment.set(HF_HUB_OFFLINE="1")
    assert lmoe("inspect", "adapter", "acme/old", "--json").data["supported"] is True


def test_a_pickled_folder_is_converted_without_touching_it(environment, lmoe, pickled, tmp_path):
    folder = made.write(tmp_path / "old", pickled)
    told = lmoe("inspect", "adapter", folder, "--json")
    assert (told.code, told.codes, told.data["format"]) == (0, ["pickle-only"], "pickle")
    told = lmoe("pull", folder, "--allow-pickle", "--json")
    assert (told.code, told.data["adapters"][0]["supported"]) == (0, True)
    assert sorted(path.name for path in folder.iterdir()) == sorted(pickled)
    (converted,) = (tmp_path / "cache").rglob("adapter_model.safetensors")
    assert lmoe("inspect", "adapter", folder, "--json").data["bytes"] == sum(
        4 * a * b for a, b in made.factors().values()
    )
    (folder / "adapter_model.bin").write_bytes(pickled["adapter_model.bin"] + b"x")  # another pickle altogether
    assert lmoe("inspect", "adapter", folder, "--json").codes == ["pickle-only"]
    assert converted.is_file()


def test_a_pickle_that_is_more_than_tensors_is_refused_and_leaves_nothing(served, lmoe, pickled, tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.nn.Linear(2, 2)}, buffer)
    served.add("acme/evil", pickled | {"adapter_model.bin": buffer.getvalue()})
    told = lmoe("pull", "acme/evil", "--allow-pickle", "--json")
    assert (told.code, told.codes) == (2, ["pickle-refused"])
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    assert list((tmp_path / "hf").rglob("adapter_model.bin")) == []
    assert buffer.getvalue() not in [path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file()]


def test_rm_also_removes_what_was_converted(served, lmoe, pickled, tmp_path):
    served.add("acme/old", pickled)
    lmoe("pull", "acme/old", "--allow-pickle")
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert lmoe("rm", "acme/old", "-y").code == 0
    assert list((tmp_path / "cache" / "lmoe" / "converted").iterdir()) == []
