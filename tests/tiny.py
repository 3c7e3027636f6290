"""Tiny random models of many architectures, and adapters of every kind on them, made by transformers and PEFT."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path

import torch

VOCAB = 96
COMMON = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {**LLAMA, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}

ARCHITECTURES = {
    "llama": {**LLAMA, "attention_bias": True, "tie_word_embeddings": False},
    "qwen2": {**LLAMA, "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "head_dim": 8, "tie_word_embeddings": True},
    "mistral": {**LLAMA, "sliding_window": 16},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "phi3": {**LLAMA},
    "gpt2": {**COMMON, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {
        **{key: value for key, value in LLAMA.items() if key != "num_key_value_heads"},
        "tie_word_embeddings": False,
    },
    "falcon": {
        **COMMON,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "new_decoder_architecture": False,
    },
    "opt": {
        **COMMON,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
    },
    "olmo2": {**LLAMA, "tie_word_embeddings": False},
    "qwen3_moe": {**MOE, "head_dim": 8, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "mixtral": {**MOE},
}
"""model_type → a config small enough to run in milliseconds."""

ATTENTION = {
    "phi3": ["qkv_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "falcon": ["query_key_value", "dense"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
MLP = {
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt2": ["c_fc"],
    "gpt_neox": ["dense_h_to_4h", "dense_4h_to_h"],
    "falcon": ["dense_h_to_4h", "dense_4h_to_h"],
    "opt": ["fc1", "fc2"],
    "qwen3_moe": [],
    "mixtral": [],
}
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in", "falcon": "word_embeddings"}


def attention(arch: str) -> list[str]:
    return ATTENTION.get(arch, ["q_proj", "k_proj", "v_proj", "o_proj"])


def linears(arch: str) -> list[str]:
    return attention(arch) + MLP.get(arch, ["gate_proj", "up_proj", "down_proj"])


def embedding(arch: str) -> str:
    return EMBEDDING.get(arch, "embed_tokens")


def model(arch: str, seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model of an architecture, float32, with weights large enough that adapters matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(arch, **{**ARCHITECTURES[arch], **changes})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.2
            noise = scale * torch.randn(parameter.shape)
            parameter.copy_(1 + noise if parameter.dim() == 1 and name.endswith("weight") else noise)
    return made.eval()


def save_base(arch: str, folder: Path, seed: int = 0, **changes: object) -> Path:
    model(arch, seed, **changes).save_pretrained(folder)
    return folder


def peft_config(arch: str, variant: str, rank: int = 4):
    """The PEFT config of a kind of adapter; None where the architecture has no such thing."""
    import peft

    lora = functools.partial(
        peft.LoraConfig,
        r=rank,
        lora_alpha=6,
        target_modules=linears(arch),
        init_lora_weights=False,
        fan_in_fan_out=arch == "gpt2",
        task_type="CAUSAL_LM",
    )
    small = {"r": rank, "alpha": 6, "target_modules": linears(arch), "init_weights": False, "task_type": "CAUSAL_LM"}
    moe = arch in ("qwen3_moe", "mixtral")
    first, last = linears(arch)[0], linears(arch)[-1]
    match variant:
        case "lora":
            return lora()
        case "rslora":
            return lora(use_rslora=True)
        case "dora":
            return lora(use_dora=True)
        case "lora_bias":
            return lora(lora_bias=True)
        case "patterns":
            return lora(rank_pattern={first: 2, f"1.*{last}": 6}, alpha_pattern={f".*0.*{first}": 3})
        case "bias":
            return lora(bias="all")
        case "embedding":
            return lora(target_modules=[*attention(arch), embedding(arch)])
        case "embedding_dora":
            return lora(target_modules=[*attention(arch), embedding(arch)], use_dora=True)
        case "head":
            return lora(target_modules=[*attention(arch), "lm_head"])
        case "saved":
            return lora(target_modules=attention(arch), modules_to_save=[embedding(arch), "lm_head"])
        case "saved_norm":
            return lora(
                target_modules=attention(arch), modules_to_save=["input_layernorm", "ln_1", "self_attn_layer_norm"]
            )
        case "experts":
            names = ["experts.gate_up_proj", "experts.down_proj"]
            return lora(target_modules=attention(arch), target_parameters=names) if moe else None
        case "gate":
            return lora(target_modules=attention(arch), target_parameters=["mlp.gate.weight"]) if moe else None
        case "ia3":
            targets = linears(arch)
            return peft.IA3Config(
                target_modules=targets, feedforward_modules=[last], fan_in_fan_out=arch == "gpt2", task_type="CAUSAL_LM"
            )
        case "loha" if arch != "gpt2":
            return peft.LoHaConfig(**small)
        case "lokr" if arch != "gpt2":
            return peft.LoKrConfig(**small)
        case "vera":
            return peft.VeraConfig(
                r=rank, target_modules=[last], init_weights=False, fan_in_fan_out=arch == "gpt2", task_type="CAUSAL_LM"
            )
    return None


VARIANTS = (
    "lora", "rslora", "dora", "lora_bias", "patterns", "bias", "embedding", "embedding_dora", "head", "saved",
    "saved_norm", "experts", "gate", "ia3", "loha", "lokr", "vera",
)  # fmt: skip


def save_adapter(base: Path, variant: str, folder: Path, seed: int = 1, rank: int = 4) -> Path | None:
    """Make an adapter with PEFT, fill it with random numbers, and save it as PEFT does."""
    import peft
    from transformers import AutoModelForCausalLM

    arch = json.loads((base / "config.json").read_text())["model_type"]
    config = peft_config(arch, variant, rank)
    if config is None:
        return None
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                    positive = "magnitude" in name
                    noise = torch.randn(parameter.shape) * 0.2
                    parameter.copy_((parameter * (1 + noise)).abs() if positive else noise)
                elif any(mark in name for mark in ("ia3_", "vera_lambda")):
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
                elif parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape) * 0.05)
        wrapped.create_or_update_model_card = lambda _: None  # nobody reads one
        wrapped.save_pretrained(folder)
    return folder


def peft_model(base: Path, adapter: Path) -> torch.nn.Module:
    """The oracle: one adapter on its base, as PEFT runs it."""
    from transformers import AutoModelForCausalLM

    return peft_on(AutoModelForCausalLM.from_pretrained(base), adapter)


def peft_on(loaded: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """The same on a base that is loaded already, which is changed."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(loaded, adapter).eval()


def tokens(rows: int = 2, length: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def load(folder: Path) -> torch.nn.Module:
    """A model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
