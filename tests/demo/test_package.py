"""The embedded demo, as it is shipped."""

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmoe_cli.demo
from demo_model.evaluate import LEAST_GAIN, held_out_rows, mean_nats
from demo_model.tables import CLASSES, read_tables

DEMO = Path(lmoe_cli.demo.__file__).parent
RANKS = {"warrior": 16, "mage": 8, "healer": 4}


def config(name):
    return json.loads((DEMO / name / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(DEMO / "adventurer", dtype=torch.float32)


@pytest.fixture(scope="module")
def rows():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "adventurer")
    return held_out_rows(read_tables(), tokenizer, 20, random.Random(99))


@pytest.fixture(scope="module")
def nats(base, rows):
    """Model to class to mean nats per answer token, by PEFT's own forward."""
    found = {"base": {name: mean_nats(base, rows[name]) for name in CLASSES}}
    model = PeftModel.from_pretrained(base, DEMO / "warrior", adapter_name="warrior")
    for name in CLASSES:
        if name != "warrior":
            model.load_adapter(DEMO / name, adapter_name=name)
        model.set_adapter(name)
        found[name] = {other: mean_nats(model.get_base_model(), rows[other]) for other in CLASSES}
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_each_expert_knows_its_class_better_than_the_base_and_the_others(nats, name):
    assert nats[name][name] <= nats["base"][name] - LEAST_GAIN
    assert all(nats[name][name] < nats[other][name] for other in CLASSES if other != name)


def test_everything_together_is_under_ten_megabytes():
    sizes = [path.stat().st_size for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(sizes) < 10_000_000


def test_the_ranks_differ_and_one_adapter_is_rank_stabilised():
    assert {name: config(name)["r"] for name in CLASSES} == RANKS
    assert [name for name in CLASSES if config(name)["use_rslora"]] == ["healer"]
    assert len({len(config(name)["target_modules"]) for name in CLASSES}) > 1


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_names_its_base_and_holds_factors_of_its_rank(name):
    assert config(name)["base_model_name_or_path"] == "demo:adventurer"
    assert config(name)["task_type"] == "CAUSAL_LM"
    assert config(name)["inference_mode"] is True
    with safe_open(DEMO / name / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
    assert ranks == {RANKS[name]}


def test_the_base_is_a_small_bfloat16_model_with_a_chat_template():
    with safe_open(DEMO / "adventurer" / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(DEMO / "adventurer")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "adventurer")
    assert model.dtype == torch.bfloat16
    assert 2_000_000 <= model.num_parameters() <= 4_000_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "A goblin blocks the bridge."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=96, do_sample=False)
    text = tokenizer.decode(out[0, ids.shape[1] :])
    assert text.endswith("<|im_end|>")
    assert "goblin" in text
