"""`lmoe pull` and `lmoe inspect` against a Hub on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lmoe_cli
from lmoe_cli import files
from tests.adapter import made
from tests.hub.loopback import GOOD


def cached(environment) -> dict[str, bytes]:
    """Every file of every commit in the cache."""
    found = environment.cache.glob("models--*/snapshots/*/*")
    return {f"{path.parts[-4].removeprefix('models--')}/{path.name}": path.read_bytes() for path in found}


def whole(name: str, data: dict[str, bytes]) -> dict[str, bytes]:
    return {f"{name.replace('/', '--')}/{file}": content for file, content in data.items()}


def test_inspecting_reads_two_small_ranges_per_weight_file_and_keeps_nothing(served, environment, lmoe):
    served.add("acme/lora", made.adapter() | {"README.md": b"#"})
    served.add("acme/sharded", made.sharded())
    told = lmoe("inspect", "adapter", "acme/lora", "--json")
    assert (told.code, told.data["rank"]["max"], told.data["supported"]) == (0, 4, True)
    assert told.data["revision"] == served.repositories["acme/lora"].refs["main"]
    reads = [item.range for item in served.asked("GET", "adapter_model", "storage")]
    size = len(made.adapter()["adapter_model.safetensors"]) - 1024
    assert reads == ["bytes=0-7", f"bytes=8-{size - 1}"]
    served.requests.clear()
    assert lmoe("inspect", "adapter", "acme/sharded", "--json").data["tensors"] == 8
    assert len(served.asked("GET", "00001-of", "storage")) == len(served.asked("GET", "00002-of", "storage")) == 2
    assert cached(environment) == {}


def test_pull_fetches_only_what_an_adapter_needs_and_ends_with_what_and_where_it_is(served, environment, lmoe):
    files = made.adapter()
    served.add("acme/lora", {**files, "README.md": b"#", "optimizer.pt": b"x" * 1000, "tokenizer.json": b"{}"})
    told = lmoe("pull", "acme/lora")
    assert told.code == 0
    assert cached(environment) == whole("acme/lora", files)
    for word in ("acme/lora", "LORA", "q_proj, v_proj", "acme/base", "snapshots"):
        assert word in told.out
    assert "lmoe pull acme/lora --with-base" in told.err
    assert "\x1b" not in told.out + told.err


def test_pull_tells_programs_what_it_did(served, lmoe):
    served.add("acme/lora", made.adapter())
    for is_cached in (False, True):
        told = lmoe("pull", "acme/lora", "--json")
        size = sum(len(data) for data in made.adapter().values())
        assert told.document["schema"] == "lmoe.pull/1"
        assert told.data["bytes"] == (0 if is_cached else size)
        assert [(file["name"], file["cached"]) for file in told.data["files"]] == [
            ("adapter_config.json", is_cached),
            ("adapter_model.safetensors", is_cached),
        ]
        assert told.data["adapters"] == [
            lmoe("inspect", "adapter", "acme/lora", "--json").data | {"path": told.data["adapters"][0]["path"]}
        ]
        path = told.data["adapters"][0]["path"]
        assert lmoe("inspect", "adapter", path, "--json").data["supported"] is True  # though it is made of links


def test_a_dry_run_lists_sizes_and_fetches_nothing(served, environment, lmoe):
    served.add("acme/lora", made.adapter())
    told = lmoe("pull", "acme/lora", "--dry-run")
    assert "adapter_model.safetensors" in told.out
    assert "2.2 kB to download" in told.err
    assert cached(environment) == {}
    assert lmoe("pull", "acme/lora", "--dry-run", "--json").data["bytes"] == 2176


def test_a_revision_is_pulled_by_option_or_in_the_reference(served, lmoe):
    served.add("acme/lora", made.adapter())
    served.commit("acme/lora", made.adapter(rank=2), branch="small")
    for arguments in (("acme/lora", "--revision", "small"), ("acme/lora@small",)):
        assert lmoe("pull", *arguments, "--json").data["adapters"][0]["rank"]["max"] == 2
    assert lmoe("pull", "acme/lora", "acme/other", "--revision", "small").code == 2


def test_the_base_comes_only_when_asked_for_and_only_from_the_hub(served, environment, lmoe, tmp_path, monkeypatch):
    adapter, base = made.adapter(), made.base()
    served.add("acme/lora", adapter)
    served.add("acme/base", base | {"pytorch_model.bin": b"x", "README.md": b"#"})
    served.add("acme/local", made.adapter(base_model_name_or_path="/home/someone/llama"))
    made.write(tmp_path / "acme/base", made.base(vocabulary=3))
    monkeypatch.chdir(tmp_path)  # a folder of that name is not what the adapter's author meant
    assert lmoe("pull", "acme/lora").code == 0
    assert cached(environment) == whole("acme/lora", adapter)
    told = lmoe("pull", "acme/lora", "--with-base", "--json")
    assert told.data["bases"][0]["vocab_size"] == 16
    assert cached(environment) == whole("acme/lora", adapter) | whole("acme/base", base)
    told = lmoe("pull", "acme/local", "--with-base")
    assert (told.code, "no repository" in told.err) == (2, True)


def test_a_recipe_brings_its_adapters_and_on_request_its_base(served, environment, lmoe, tmp_path):
    served.add("acme/one", made.adapter())
    served.add("acme/two", made.adapter(rank=2))
    served.add("acme/base", made.base())
    made.write(tmp_path / "mine", made.adapter(rank=3))
    recipe = tmp_path / "blend.yaml"
    recipe.write_text(
        "base: acme/base\nexperts:\n  a: {adapter: acme/one}\n  b: {adapter: acme/two}\n  c: {adapter: mine}\n"
    )
    told = lmoe("pull", recipe, "--json")
    assert [item["rank"]["max"] for item in told.data["adapters"]] == [4, 2, 3]
    assert set(cached(environment)) == {*whole("acme/one", made.adapter()), *whole("acme/two", made.adapter())}
    told = lmoe("pull", recipe, "--with-base", "--json")
    assert [item["ref"] for item in told.data["bases"]] == ["acme/base"]
    assert "acme--base/model.safetensors" in cached(environment)
    recipe.write_text("base: acme/base\nexprts: {}\n")
    told = lmoe("pull", recipe)
    assert (told.code, "blend.yaml:2:1" in told.err) == (2, True)


def test_one_part_that_cannot_be_pulled_stops_all_before_the_first_byte(served, environment, lmoe):
    weights = made.adapter()["adapter_model.safetensors"]
    served.add("acme/good", made.adapter())
    served.add("acme/broken", made.adapter() | {"adapter_model.safetensors": weights[:-1]})
    config = {"adapter_config.json": made.adapter()["adapter_config.json"]}
    served.add("acme/empty", config)
    served.add("acme/nothing", config | {"adapter_model.safetensors": b""})
    served.add("acme/pickled", config | {"adapter_model.bin": b"x"})
    told = lmoe("pull", "acme/good", "acme/broken", "acme/none", "acme/empty", "acme/nothing", "acme/pickled", "--json")
    assert told.code == 2
    assert told.codes == [
        "header-truncated",
        "repository-not-found",
        "weights-missing",
        "header-truncated",
        "pickle-only",
    ]
    assert cached(environment) == {}
    assert served.asked("GET", "adapter_model.bin") == []


def test_what_lmoe_cannot_run_is_pulled_and_said_so(served, environment, lmoe):
    served.add("acme/other", made.adapter(peft_type="ADALORA"))
    told = lmoe("pull", "acme/other", "--json")
    assert told.code == 0
    assert told.codes == ["peft-type-unsupported", "pulled-unsupported"]
    assert told.data["adapters"][0]["supported"] is False
    assert set(cached(environment)) == set(whole("acme/other", made.adapter()))


def test_gated_and_private_adapters_need_a_token(served, lmoe):
    served.add("acme/gated", made.adapter(), gated=True)
    served.add("acme/private", made.adapter(), private=True)
    assert lmoe("pull", "acme/gated").code == 4
    assert lmoe("pull", "acme/private").code == 3
    assert lmoe("pull", "acme/gated", "acme/private", "--token", GOOD).code == 0
    assert lmoe("inspect", "adapter", "acme/gated", "--token", "hf_bad").code == 4


def test_a_wrong_byte_is_an_error_and_pulling_again_mends_the_cache(served, environment, lmoe):
    files = made.adapter()
    served.add("acme/lora", files)
    served.misbehave("^GET /adapter_model.* whole$", "flip", times=1)
    told = lmoe("pull", "acme/lora")
    assert told.code == 5
    assert "error[hash-mismatch]: acme/lora/adapter_model.safetensors: arrived as SHA-256" in told.err
    assert "acme--lora/adapter_model.safetensors" not in cached(environment)
    assert lmoe("pull", "acme/lora").code == 0
    weights = next(environment.cache.glob("models--*/snapshots/*/adapter_model.safetensors")).resolve()
    for damage in (weights.read_bytes()[:-1] + b"?", weights.read_bytes()[:100], b""):
        weights.write_bytes(damage)
        told = lmoe("pull", "acme/lora")
        assert (told.code, "damaged" in told.err) == (0, True)
        assert cached(environment) == whole("acme/lora", files)


def test_a_dry_run_tells_of_damage_and_leaves_it(served, environment, lmoe):
    served.add("acme/lora", made.adapter())
    lmoe("pull", "acme/lora")
    weights = next(environment.cache.glob("models--*/snapshots/*/adapter_model.safetensors")).resolve()
    size = weights.stat().st_size
    weights.write_bytes(b"?" * size)
    told = lmoe("pull", "acme/lora", "--dry-run", "--json")
    assert told.code == 0
    assert {file["name"]: file["cached"] for file in told.data["files"]}["adapter_model.safetensors"] is False
    assert told.data["bytes"] == size
    assert weights.read_bytes() == b"?" * size


def test_a_recipe_s_trained_router_is_pulled_too(served, environment, lmoe, tmp_path):
    demo = Path(lmoe_cli.__file__).parent / "demo" / "party"
    gate = {path.name: path.read_bytes() for path in demo.iterdir() if path.name.startswith("router.")}
    served.add("acme/gate", gate)
    served.add("acme/lora", made.adapter())
    recipe = "base: acme/base\nexperts:\n  one: {adapter: acme/lora}\nrouter: {type: gate, artefact: acme/gate}\n"
    (tmp_path / "mix.yaml").write_text(recipe)
    told = lmoe("pull", str(tmp_path / "mix.yaml"), "--json")
    assert told.code == 0
    assert {name: cached(environment)[f"acme--gate/{name}"] for name in gate} == gate


def test_offline_the_cache_serves_and_says_so(served, environment, lmoe):
    served.add("acme/lora", made.adapter())
    assert lmoe("pull", "acme/lora").code == 0
    environment.set(HF_HUB_OFFLINE="1")
    told = lmoe("pull", "acme/lora")
    assert (told.code, "does not answer" in told.err) == (0, True)
    assert lmoe("inspect", "adapter", "acme/lora", "--json").data["supported"] is True
    told = lmoe("pull", "acme/other", "--json")
    assert (told.code, told.codes) == (5, ["offline"])


def test_names_in_a_repository_cannot_lead_out_of_the_cache(served, environment, lmoe, tmp_path):
    index = {"weight_map": dict.fromkeys(made.factors(), "../../../escaped.safetensors")}
    served.add(
        "acme/evil",
        {
            "adapter_config.json": made.adapter()["adapter_config.json"],
            "adapter_model.safetensors.index.json": json.dumps(index).encode(),
            "../../../escaped.safetensors": made.adapter()["adapter_model.safetensors"],
        },
    )
    for verb in (("inspect", "adapter"), ("pull",)):
        told = lmoe(*verb, "acme/evil", "--json")
        assert (told.code, told.codes) == (2, ["path-outside"])
    assert not list(tmp_path.rglob("escaped*"))


def test_a_full_disk_is_said_so(served, environment, lmoe, monkeypatch):
    served.add("acme/lora", made.adapter())
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: type("usage", (), {"total": 200, "free": 100}))
    told = lmoe("pull", "acme/lora")
    assert (told.code, "error[disk-full]" in told.err) == (6, True)
    assert cached(environment) == {}


LIGHT = """
import sys
from lmoe_cli.cli.root import lmoe
for words in ("pull acme/lora --with-base", "inspect adapter acme/lora", "ls", "rm acme/lora -y"):
    lmoe.main(words.split(), standalone_mode=False)
heavy = {"torch", "transformers", "peft", "numpy", "safetensors"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""


def test_pulling_listing_and_removing_load_no_heavy_package(served, environment):
    served.add("acme/lora", made.adapter())
    served.add("acme/base", made.base())
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, env=variables(served))
    assert done.returncode == 0, done.stderr


def variables(served) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": served.url, "TERM": "xterm"}


def command(served, *arguments: str, **options) -> subprocess.Popen:
    """`lmoe` as a process of its own, which reads the same variables."""
    return subprocess.Popen([sys.executable, "-m", "lmoe_cli", *arguments], env=variables(served), **options)


def test_an_interrupt_ends_a_download_with_130_and_leaves_nothing_half_written(served, environment):
    served.add("acme/lora", made.adapter())
    served.misbehave("^GET /adapter_model.* whole$", "mute")
    running = command(served, "pull", "acme/lora", stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while None not in [item.range for item in served.asked("GET", "/", "storage")] and time.monotonic() < until:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err.splitlines()[-1].startswith("error[interrupted]")
    assert "Traceback" not in err
    assert list(environment.cache.rglob("*.incomplete")) == []


def test_a_terminal_shows_bytes_and_speed(served, environment):
    weights = made.safetensors(made.factors(width=1 << 15))
    served.add("acme/lora", made.adapter() | {"adapter_model.safetensors": weights})
    served.misbehave("^GET /adapter_model.* whole$", "slow")
    ours, theirs = pty.openpty()
    running = command(served, "pull", "acme/lora", stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = bytearray()
    with contextlib.suppress(OSError):  # the other end was closed
        while piece := os.read(ours, 1 << 16):
            shown += piece
    os.close(ours)
    assert running.wait(30) == 0
    assert "acme/lora adapter_model.safetensors" in shown.decode()
    assert re.search(r"4\.2/4\.2 MB +\d+\.\d MB/s", shown.decode())
