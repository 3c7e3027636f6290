"""`lmoe ls` and `lmoe rm` over the ordinary cache, filled from a Hub on this machine."""

from __future__ import annotations

import pytest

from tests.adapter import made

RECIPE = "name: blend\nbase: acme/base\nexperts:\n  a: {adapter: acme/lora}\n"


@pytest.fixture
def filled(served, environment, lmoe, tmp_path, monkeypatch):
    """A cache with two commits of an adapter, one of another, a base, and a repository that is neither."""
    served.add("acme/lora", made.adapter())
    served.add("acme/other", made.adapter(peft_type="ADALORA"))
    served.add("acme/base", made.base())
    assert lmoe("pull", "acme/lora", "acme/other", "--with-base").code == 0
    served.commit("acme/lora", made.adapter(rank=8))
    assert lmoe("pull", "acme/lora").code == 0
    monkeypatch.chdir(tmp_path)
    return environment


def own(told) -> list[dict]:
    """The adapters that do not come with lmoe."""
    return [item for item in told.data["adapters"] if not item["demo"]]


def test_ls_lists_adapters_with_their_facts_and_no_bases(filled, lmoe, served):
    told = lmoe("ls", "--json")
    assert told.document["schema"] == "lmoe.ls/1"
    head = served.repositories["acme/lora"].refs["main"]
    facts = {(item["ref"], item["rank"]): (item["base"], item["refs"], item["supported"]) for item in own(told)}
    assert facts == {
        ("acme/lora", 4): ("acme/base", [], True),
        ("acme/lora", 8): ("acme/base", ["main"], True),
        ("acme/other", 4): ("acme/base", ["main"], False),
    }
    assert [item["revision"] for item in own(told) if item["rank"] == 8] == [head]
    assert all(item["bytes"] > 2000 for item in own(told))
    told = lmoe("ls")
    assert "acme/lora" in told.out
    assert "cannot run" in told.out
    assert "acme/base  " in told.out


def test_ls_lists_recipes_of_this_folder_and_of_recipes(filled, lmoe, tmp_path):
    made.write(tmp_path, {"recipes/blend.yaml": RECIPE.encode(), "mine.yml": RECIPE.encode(), "other.yaml": b"a: 1"})
    found = lmoe("ls", "--json").data["loadouts"]
    assert [(item["path"], item["name"], item["experts"]) for item in found] == [
        ("mine.yml", "blend", ["a"]),
        ("recipes/blend.yaml", "blend", ["a"]),
    ]


def test_ls_marks_what_comes_with_lmoe(environment, lmoe, tmp_path, monkeypatch):
    monkeypatch.setattr("lmoe_cli.source.DEMO", tmp_path)
    made.write(tmp_path / "mage", made.adapter())
    made.write(tmp_path / "adventurer", made.base())
    found = lmoe("ls", "--json").data["adapters"]
    assert [(item["ref"], item["demo"], item["revision"]) for item in found] == [("demo:mage", True, None)]


def test_ls_shows_a_damaged_adapter_and_what_is_wrong_with_it(filled, lmoe):
    weights = next(filled.cache.glob("models--acme--other/snapshots/*/adapter_model.safetensors")).resolve()
    weights.write_bytes(weights.read_bytes()[:-1])
    told = lmoe("ls", "--json")
    assert {item["ref"]: item["problem"] for item in own(told)} == {"acme/lora": None, "acme/other": "header-truncated"}
    assert told.codes == ["header-truncated"]


def test_ls_of_an_empty_machine_says_what_to_do(environment, lmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lmoe_cli.source.DEMO", tmp_path / "none")
    told = lmoe("ls")
    assert (told.code, "lmoe pull" in told.err) == (0, True)


def test_rm_removes_every_revision_or_the_one_that_is_named(filled, lmoe, served):
    head = served.repositories["acme/lora"].refs["main"]
    told = lmoe("rm", "acme/lora@main", "-y", "--json")
    assert told.data["revisions"] == [{"revision": head, "kind": "adapter", "bytes": 3208}]
    assert [item["rank"] for item in own(lmoe("ls", "--json")) if item["ref"] == "acme/lora"] == [4]
    assert lmoe("rm", "acme/lora", "-y").code == 0
    assert not (filled.cache / "models--acme--lora").exists()
    assert {item["ref"] for item in own(lmoe("ls", "--json"))} == {"acme/other"}
    told = lmoe("rm", "acme/lora", "-y", "--json")
    assert (told.code, told.codes) == (3, ["not-found"])


def test_rm_says_that_a_model_is_a_model(filled, lmoe):
    told = lmoe("rm", "acme/base", "--dry-run")
    assert (told.code, "model" in told.out) == (0, True)
    assert (filled.cache / "models--acme--base").is_dir()
    assert lmoe("rm", "acme/base", "-y", "--json").data["revisions"][0]["kind"] == "model"
    assert not (filled.cache / "models--acme--base").exists()


def test_rm_asks_and_without_a_terminal_refuses(filled, lmoe, monkeypatch):
    told = lmoe("rm", "acme/lora", stdin="y\n")
    assert (told.code, "-y" in told.err) == (2, True)
    monkeypatch.setattr("lmoe_cli.cli.store._can_ask", lambda: True)
    assert lmoe("rm", "acme/lora", stdin="n\n").code == 130
    assert (filled.cache / "models--acme--lora").is_dir()
    assert lmoe("rm", "acme/lora", stdin="y\n").code == 0
    assert not (filled.cache / "models--acme--lora").exists()


def test_rm_refuses_what_it_did_not_bring(filled, lmoe):
    refused = {"demo:mage": 2, "./folder": 2, "a/b/c": 2, "acme/none": 3, "acme/lora@x": 3}
    assert {ref: lmoe("rm", ref, "-y").code for ref in refused} == refused


def test_rm_says_so_when_it_may_not_remove(filled, lmoe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_manager._try_delete_path", lambda path, path_type: None)
    told = lmoe("rm", "acme/lora", "-y")
    assert (told.code, "not-writable" in told.err) == (4, True)


def test_one_damaged_entry_of_the_cache_is_told_and_spoils_no_other(filled, lmoe):
    ref = filled.cache / "models--acme--other" / "refs" / "main"
    ref.write_bytes(b"\xff\xfe")
    told = lmoe("ls", "--json")
    assert (told.code, told.codes) == (0, ["cache-damaged"])
    assert {item["ref"] for item in own(told)} == {"acme/lora"}
    assert "warning[cache-damaged]" in lmoe("ls").err
    assert lmoe("rm", "acme/lora", "-y").code == 0
    assert own(lmoe("ls", "--json")) == []
    assert ref.exists()


def test_a_file_where_the_cache_should_be_is_told(environment, lmoe, tmp_path):
    (tmp_path / "file").write_text("")
    environment.set(HF_HUB_CACHE=str(tmp_path / "file"))
    for words in (("ls",), ("rm", "acme/lora", "-y")):
        told = lmoe(*words, "--json")
        assert (told.code, told.codes) == (2, ["not-a-folder"])
        assert "HF_HUB_CACHE" in told.document["findings"][0]["hint"]
