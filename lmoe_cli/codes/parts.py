"""Codes of what a loadout is made of: files, the Hub, adapters, recipes, bases, and whether they fit."""

from __future__ import annotations

from lmoe_cli.codes.code import AGAIN, AUTHOR, error, note, warning

FILES = {
    "not-found": error("A file that was named is not there.", "Check the spelling and the folder."),
    "not-a-file": error("A folder, device or socket stands where a file is due.", "Name a file."),
    "not-a-folder": error("A file was named where a folder is due.", "Name the folder it is in."),
    "unreadable": error("There is no permission to read it.", "Change its permissions."),
    "not-writable": error("There is no permission to write there.", "Choose another place."),
    "bad-path": error("The operating system refuses the path.", "Choose another name."),
    "path-outside": error(
        "A file name or a link leads out of its folder. Followed, it would read what nobody named.",
        "Copy the file into the folder.",
    ),
    "file-too-large": error("A config is larger than any honest one.", AUTHOR),
    "too-many-files": error("The folder holds more files than an adapter or model can.", "Name its own folder."),
    "output-exists": error("What should be written exists.", "Choose another name, or replace it with `--force`."),
    "output-busy": error(
        "Another process of lmoe works on what should be written.", "Wait, or choose another `--out`."
    ),
    "output-not-ours": error("A folder that lmoe did not write stands there.", "Choose another `--out`."),
    "output-is-input": error("What is to be written would replace what is read from.", "Choose another `--out`."),
    "disk-full": error("There is no room. Nothing half-written is left.", "Free some space."),
    "out-of-memory": error("There is not enough memory.", "Use a smaller base, `--quantize`, or another machine."),
    "json-invalid": error("Not JSON, a key twice, nested too deep, or a number that is none.", AGAIN),
    "lfs-pointer": error("A Git LFS pointer stands where the file should be.", "Run `git lfs pull` there."),
    "header-truncated": error("The safetensors file ends too early.", AGAIN),
    "header-too-large": error("The header is longer than any honest one, or this is no safetensors file.", AGAIN),
    "header-invalid": error("The header names impossible dtypes, shapes or places.", AGAIN),
    "index-invalid": error("The index of a sharded checkpoint and its shards contradict each other.", AGAIN),
    "shard-missing": error("The index names a shard that is not there.", AGAIN),
}

HUB = {
    "bad-reference": error(
        "It can be no folder, repository or demo.", "Write `org/name[@revision]`, a folder, or `demo:NAME`."
    ),
    "repository-not-found": error(
        "The Hub knows no such repository, or it is private.", "Check the spelling; `hf auth login` or `--token`."
    ),
    "revision-not-found": error("The repository has no such branch, tag or commit.", "Look at its history."),
    "gated": error("Its terms must be accepted first.", "Accept them on its page, then `hf auth login`."),
    "not-authorised": error("The Hub does not accept the token.", "`hf auth whoami`, `hf auth login`."),
    "offline": error("It is not in the local cache, and there is no network to get it.", "Pull it while online."),
    "unreachable": error("The Hub cannot be reached, or a download broke off.", "Check the network and try again."),
    "cache-damaged": warning("A repository in the cache of the Hub cannot be listed.", "Remove its folder."),
    "hub-busy": error("The Hub refuses for now.", "Try again in a while."),
    "hub-answer": error("What answers is not a Hub.", "Check `HF_ENDPOINT`."),
    "hash-mismatch": error("A file arrived that is not the one the Hub announced. It was not kept.", "Pull it again."),
}

ADAPTERS = {
    "no-adapter": error("There is neither a config nor weights of an adapter.", "Name the adapter's own folder."),
    "foreign-adapter": error("An adapter in the layout of MLX, ollama or AdapterHub.", "Convert it to PEFT's."),
    "config-missing": error("Weights without `adapter_config.json`: nobody knows their scaling.", AUTHOR),
    "config-invalid": error("A key of `adapter_config.json` has an impossible value.", AUTHOR),
    "config-assumed-lora": note("An old config without `peft_type`; its keys are those of LoRA."),
    "weights-missing": error("A config without weights.", AGAIN),
    "pickle-only": error(
        "The weights are a pickle, which can run code when it is read.", "`lmoe pull REF --allow-pickle` converts it."
    ),
    "pickle-refused": error("The pickle names something else than tensors.", "Do not open it. " + AUTHOR),
    "pulled-unsupported": warning("It was pulled as asked, but lmoe cannot run it.", "The other findings say why."),
    "peft-type-unsupported": error("lmoe cannot run this PEFT type exactly.", "Convert it to LoRA with PEFT."),
    "setting-unsupported": error("A setting makes it more than a fixed delta on the weights.", "Run it with PEFT."),
    "task-unsupported": error("It was not trained for a causal language model.", "Use the library of its task."),
    "projections-missing": error("VeRA's shared projections were not saved.", "Save it with `save_projection=True`."),
    "init-changes-base": error(
        "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and KaSA change the base before training. On the original base the "
        "adapter is a different function.",
        "Use the version that PEFT converts with `path_initial_model_for_weight_conversion`.",
    ),
    "no-op": warning(
        "Every B is zero, or alpha is: the adapter changes nothing.", "It may have been saved before training."
    ),
    "full-model-beside": note("A whole model lies in the same folder. Only the adapter is read."),
    "tensor-unplaced": error(
        "A stored tensor belongs to no module. Dropping it would change the adapter.", "Check the PEFT type. " + AUTHOR
    ),
    "tensor-missing": error("A tensor lacks its partner, such as A without B.", AGAIN),
    "no-tensors": error("The weight file is empty.", AGAIN),
    "shape-contradiction": error("Tensors contradict each other or the config.", AUTHOR),
}

RECIPES = {
    "yaml-invalid": error(
        "Not YAML, or more than a recipe may use: anchors, tags, merge keys, keys twice, excessive size.",
        "Mend the line it names.",
    ),
    "recipe-invalid": error("A key is unknown, missing, or has a value of the wrong kind.", "Mend the line it names."),
}

BASES = {
    "no-base": error("There is no model in that place.", "Name a folder or repository with `config.json`."),
    "base-invalid": error("Its `config.json` does not describe a model.", AGAIN),
    "base-weights-missing": error("There is a config but no safetensors.", "Save it as safetensors first."),
    "base-quantized": note(
        "The base is stored quantised. It runs under a blend, but a blend cannot be folded or written into it.",
        "Bake it with `--base-weights original` or `dequantized`.",
    ),
    "packing-invalid": error("The parts of a quantised matrix are missing or contradict each other.", AGAIN),
    "base-dtype-unsupported": error(
        "Experts change weights that are stored as no float16, bfloat16, float32 or float64.",
        "Name the model's unquantised weights as base.",
    ),
    "remote-code": error("The base asks to run code of its own.", "Read that code, then `--trust-remote-code`."),
    "tokenizer-missing": warning("The base has no tokenizer, so it cannot chat.", "Add its tokenizer files."),
    "template-missing": note("The base has no chat template: text is continued as it is."),
}

FIT = {
    "base-mismatch": error(
        "The adapter was trained on another base. Equal shapes do not make it the same function.",
        "Use its own base, or accept it by name with `accept_base`.",
    ),
    "base-accepted": note("The adapter was trained on another base, which the recipe accepts by name."),
    "base-unconfirmed": warning("Names cannot tell whether this is the adapter's base.", "Make sure that it is."),
    "base-was-quantized": note("The adapter was trained on a quantised copy of the base."),
    "module-missing": error("The base lacks modules that the adapter changes.", "It belongs to another base."),
    "shape-mismatch": error("Shapes of adapter and base contradict each other.", "It belongs to another base."),
    "vocabulary-resized": error(
        "The adapter brings an embedding or head of another vocabulary.", "Resize the base first, or leave it out."
    ),
    "rank-excessive": warning("The rank exceeds what the matrix can have.", "It works, and wastes memory."),
    "scaling-extreme": warning("Alpha over rank is far from what adapters have.", "Turn its weight down."),
    "experts-unsupported": error(
        "The architecture runs the fused experts of a mixture in a way of its own, which lmoe cannot blend.",
        "Train on its other modules, or run the adapter with PEFT.",
    ),
    "module-uncalled": error(
        "The model class computes with a module's weights and never calls it, so an expert on it would not act.",
        "Train on other modules.",
    ),
    "module-unsupported": error(
        "The model class does more with a module than its kind does, so an expert on it would be computed wrongly.",
        "Train on other modules, or run the adapter with PEFT.",
    ),
    "saved-missing": warning(
        "An adapter's config says that a module was trained whole, and its files hold none.", AGAIN
    ),
    "weight-unmatched": error("A rule of a weight list matches no module of the adapter.", "Mend its pattern."),
    "weight-default": note(
        "Some modules are matched by no rule and keep weight 1.", 'End with `{match: "*", value: …}`.'
    ),
    "weight-zero": note("The rules give every module weight 0."),
    "saved-conflict": error(
        "Several experts bring a whole module of their own in place of the base's.",
        "Say `modules_to_save: blend` or `modules_to_save: {take: NAME}`.",
    ),
    "saved-unread": note(
        "An adapter brings a module that its config does not list in `modules_to_save`. Whether it is more than a copy "
        "of the base's shows once both are on this machine.",
        "`lmoe pull` both to see it earlier.",
    ),
    "tokenizer-differs": warning("The adapter brings a tokenizer that is not the base's.", "Check its vocabulary."),
    "template-differs": note("The adapter was trained with a chat template that is not the base's."),
    "memory-short": warning("The loadout needs more memory than this machine has.", "A GPU, or `--quantize`."),
}
