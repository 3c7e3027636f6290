"""What is kept between two tokens never changes what is computed."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lmoe_cli.engine.build import start
from lmoe_cli.engine.cache import KeyValues
from lmoe_cli.engine.generate import Generation
from lmoe_cli.engine.sampling import Sampling
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

RECURRENT = {
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "recurrent_gemma": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8,
        "lru_width": 32, "attention_window_size": 8,
    },
}  # fmt: skip
HYBRID = {
    "jamba": {
        **tiny.LLAMA, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False,
    },
    "lfm2": {**tiny.LLAMA, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip
TARGETS = {"mamba": ["in_proj", "x_proj"], "rwkv": ["key", "value"]}


def made(arch):
    torch.manual_seed(0)
    config = AutoConfig.for_model(arch, **{**tiny.COMMON, **(RECURRENT | HYBRID)[arch]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("arch", [*RECURRENT, *HYBRID])
@torch.inference_mode()
def test_a_conversation_that_grows_shrinks_and_turns_gives_the_logits_of_the_whole_text(arch):
    model = made(arch)
    values = KeyValues(model)
    text = tiny.tokens(rows=1, length=40)[0].tolist()
    for tokens in (text[:10], text[:20], text[:21], text[:15], [*text[:12], 7, 8], text):
        whole = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        torch.testing.assert_close(values.logits(tokens, "blend"), whole, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_attention_keeps_is_used_and_a_single_token_goes_on_from_a_state():
    text = tiny.tokens(rows=1, length=30)[0].tolist()
    for model, reused in ((tiny.model("llama"), [0, 10, 20]), (made("jamba"), [0, 0, 20])):
        values = KeyValues(model)
        found = []
        for length in (10, 20, 21):
            values.logits(text[:length], "blend")
            found.append(values.reused)
        assert found == reused


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@torch.inference_mode()
def test_the_head_gets_the_last_state_with_the_strides_of_a_vector_of_its_own(arch):
    """In bfloat16 a slice with the strides of the whole prompt takes a product that is 50 times slower."""
    model = tiny.model(arch).bfloat16()
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    text = tiny.tokens(rows=1, length=7)[0].tolist()
    logits = KeyValues(model).logits(text, "blend")
    assert seen[0].stride() == torch.empty(seen[0].shape).stride()
    assert torch.equal(logits, model(input_ids=torch.tensor([text]), logits_to_keep=1).logits[0, -1])


@pytest.mark.parametrize("arch", list(TARGETS))
def test_a_model_without_keys_and_values_answers_as_peft_and_transformers_do(arch, tmp_path):
    made(arch).save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=TARGETS[arch], init_lora_weights=False, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    experts = {"one": {"adapter": str(tmp_path / "adapter")}}
    recipe = Recipe.model_validate({"base": str(tmp_path / "base"), "experts": experts})
    engine = start(resolve(recipe, "a test"), device="cpu")
    prompt = tiny.tokens(rows=1)[0].tolist()
    sampling = Sampling(temperature=0, max_new_tokens=12)
    ours = Generation(engine.key_values(), prompt, sampling, engine.still, lambda tokens: "", frozenset(), 64)
    for _ in ours:
        pass
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert ours.new == expected[0, len(prompt) :].tolist()
