"""What goes along with a base's weights."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import tiny_tokenizer
import torch
from laws.cases import case
from safetensors.torch import load_file, save_file

from lmoe_cli.bake.model import bake_model
from lmoe_cli.bake.verify import verify
from lmoe_cli.engine.build import start
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.loadout.base import read_base, summary
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


@pytest.mark.parametrize("text", ["", "{", '{"a": 1, "a": 2}', "[]", "\xff"])
def test_generation_settings_that_are_no_json_are_refused(folder, text):
    (folder / "generation_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidFileError, match="generation_config"):
        read_base(Folder("base", folder))


def test_a_huge_side_file_is_refused_before_it_is_read(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(20 << 30)  # takes no room on the disk
    with pytest.raises(InvalidFileError, match=r"tokenizer\.json: 21,474,836,480 bytes"):
        read_base(Folder("base", folder))


def test_an_embedding_without_a_shape_and_numbers_that_are_none_are_told_as_unknown(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": float("nan"), "vocab_size": "many"}))
    tensors = load_file(folder / "model.safetensors") | {"model.embed_tokens.weight": torch.tensor(1.0)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = summary(read_base(Folder("base", folder)))
    assert told["layers"] is None
    assert told["vocab_size"] is None


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
    tiny_tokenizer.save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | own))
    (folder / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
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
    engine = start(loadout, device="cpu", dtype="float32", trust_remote_code=True)
    live = engine.logits(tiny.tokens())
    assert type(engine.tokenizer).__name__ == "MineTokenizer"
    assert verify(loadout, tmp_path / "out", trust_remote_code=True).ok
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(baked.eval()(tiny.tokens()).logits, live, rtol=1e-4, atol=1e-4)
