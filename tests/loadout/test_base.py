"""What goes along with a base's weights."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from laws.cases import case

from lmoe_cli.bake.model import bake_model
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.base import read_base
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.source import Folder


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(case("llama", "lora").base, tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "name",
    ["sentencepiece.bpe.model", "spiece.model", "tokenizer.model.v3", "vocab.txt", "qwen.tiktoken", "tekken.json",
     "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "preprocessor_config.json", "LICENSE.txt",
     "LICENCE", "license.md", "MODEL_LICENSE", "COPYING", "Notice.txt", "USE_POLICY.md"],
)  # fmt: skip
def test_tokenizers_templates_and_licences_go_along(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("…")
    base = read_base(Folder("base", folder))
    assert name in base.side_files
    assert name in base.files


@pytest.mark.parametrize(
    "name", ["README.md", "training_args.bin", "pytorch_model.bin", "train.py", "runs/vocab.txt", "adapter_config.json"]
)
def test_other_files_stay_behind(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("…")
    assert name not in read_base(Folder("base", folder)).files


def test_a_template_in_a_folder_of_its_own_is_baked(folder, tmp_path):
    template = folder / "additional_chat_templates" / "tool_use.jinja"
    template.parent.mkdir()
    template.write_text("{{ messages }}")
    loadout = resolve(Recipe.model_validate({"base": str(folder), "experts": {}}), "a test")
    bake_model(loadout, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


def test_a_tokenizer_may_name_code_of_its_own(folder):
    (folder / "tokenization_mine.py").write_text("raise SystemExit")
    settings = {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "tokenization_mine.py" in read_base(Folder("base", folder)).files


def test_a_baked_model_brings_the_code_that_its_config_names(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": names}))
    (folder / "configuration_mine.py").write_text(
        "from transformers import LlamaConfig\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
        "class MineModel(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    experts = {"one": {"adapter": str(case("llama", "lora").one)}}
    loadout = resolve(Recipe.model_validate({"base": str(folder), "experts": experts}), "a test")
    bake_model(loadout, tmp_path / "out")
    live = start(loadout, device="cpu", dtype="float32", trust_remote_code=True).logits(tiny.tokens())
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(baked.eval()(tiny.tokens()).logits, live, rtol=1e-4, atol=1e-4)
