"""Every code an error or a finding can carry, with its severity, its meaning and what to do about it.

The page on findings is made from this table. Codes are stable: scripts may rely on them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Code(NamedTuple):
    """What a code stands for."""

    severity: Severity
    meaning: str
    remedy: str


def _error(meaning: str, remedy: str) -> Code:
    return Code("error", meaning, remedy)


def _warning(meaning: str, remedy: str) -> Code:
    return Code("warning", meaning, remedy)


def _note(meaning: str, remedy: str = "Nothing to do.") -> Code:
    return Code("note", meaning, remedy)


AGAIN = "Download or save it again."
AUTHOR = "Ask its author for a sound version."

FILES = {
    "not-found": _error("A file that was named is not there.", "Check the spelling and the folder."),
    "not-a-file": _error("A folder, device or socket stands where a file is due.", "Name a file."),
    "not-a-folder": _error("A file was named where a folder is due.", "Name the folder it is in."),
    "unreadable": _error("There is no permission to read it.", "Change its permissions."),
    "not-writable": _error("There is no permission to write there.", "Choose another place."),
    "bad-path": _error("The operating system refuses the path.", "Choose another name."),
    "path-outside": _error(
        "A file name or a link leads out of its folder. Followed, it would read what nobody named.",
        "Copy the file into the folder.",
    ),
    "file-too-large": _error("A config is larger than any honest one.", AUTHOR),
    "too-many-files": _error("The folder holds more files than an adapter or model can.", "Name its own folder."),
    "output-exists": _error("What should be written exists.", "Choose another name, or replace it with `--force`."),
    "output-not-ours": _error("`--force` would replace a folder that lmoe did not bake.", "Choose another `--out`."),
    "output-is-input": _error("A bake would replace a folder of its own loadout.", "Choose another `--out`."),
    "disk-full": _error("There is no room. Nothing half-written is left.", "Free some space."),
    "out-of-memory": _error("There is not enough memory.", "Use a smaller base, `--quantize`, or another machine."),
    "json-invalid": _error("Not JSON, a key twice, nested too deep, or a number that is none.", AGAIN),
    "lfs-pointer": _error("A Git LFS pointer stands where the file should be.", "Run `git lfs pull` there."),
    "header-truncated": _error("The safetensors file ends too early.", AGAIN),
    "header-too-large": _error("The header is longer than any honest one, or this is no safetensors file.", AGAIN),
    "header-invalid": _error("The header names impossible dtypes, shapes or places.", AGAIN),
    "index-invalid": _error("The index of a sharded checkpoint and its shards contradict each other.", AGAIN),
    "shard-missing": _error("The index names a shard that is not there.", AGAIN),
}

HUB = {
    "bad-reference": _error(
        "It can be no folder, repository or demo.", "Write `org/name[@revision]`, a folder, or `demo:NAME`."
    ),
    "repository-not-found": _error(
        "The Hub knows no such repository, or it is private.", "Check the spelling; `hf auth login` or `--token`."
    ),
    "revision-not-found": _error("The repository has no such branch, tag or commit.", "Look at its history."),
    "gated": _error("Its terms must be accepted first.", "Accept them on its page, then `hf auth login`."),
    "not-authorised": _error("The Hub does not accept the token.", "`hf auth whoami`, `hf auth login`."),
    "offline": _error("It is not in the local cache, and there is no network to get it.", "Pull it while online."),
    "unreachable": _error("The Hub cannot be reached, or a download broke off.", "Check the network and try again."),
    "cache-damaged": _warning("A repository in the cache of the Hub cannot be listed.", "Remove its folder."),
    "hub-busy": _error("The Hub refuses for now.", "Try again in a while."),
    "hub-answer": _error("What answers is not a Hub.", "Check `HF_ENDPOINT`."),
    "hash-mismatch": _error("A file arrived that is not the one the Hub announced. It was not kept.", "Pull it again."),
}

ADAPTERS = {
    "no-adapter": _error("There is neither a config nor weights of an adapter.", "Name the adapter's own folder."),
    "foreign-adapter": _error("An adapter in the layout of MLX, ollama or AdapterHub.", "Convert it to PEFT's."),
    "config-missing": _error("Weights without `adapter_config.json`: nobody knows their scaling.", AUTHOR),
    "config-invalid": _error("A key of `adapter_config.json` has an impossible value.", AUTHOR),
    "config-assumed-lora": _note("An old config without `peft_type`; its keys are those of LoRA."),
    "weights-missing": _error("A config without weights.", AGAIN),
    "pickle-only": _error(
        "The weights are a pickle, which can run code when it is read.", "`lmoe pull REF --allow-pickle` converts it."
    ),
    "pickle-refused": _error("The pickle names something else than tensors.", "Do not open it. " + AUTHOR),
    "pulled-unsupported": _warning("It was pulled as asked, but lmoe cannot run it.", "The other findings say why."),
    "peft-type-unsupported": _error("lmoe cannot run this PEFT type exactly.", "Convert it to LoRA with PEFT."),
    "setting-unsupported": _error("A setting makes it more than a fixed delta on the weights.", "Run it with PEFT."),
    "task-unsupported": _error("It was not trained for a causal language model.", "Use the library of its task."),
    "projections-missing": _error("VeRA's shared projections were not saved.", "Save it with `save_projection=True`."),
    "init-changes-base": _error(
        "PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and KaSA change the base before training. On the original base the "
        "adapter is a different function.",
        "Use the version that PEFT converts with `path_initial_model_for_weight_conversion`.",
    ),
    "no-op": _warning(
        "Every B is zero, or alpha is: the adapter changes nothing.", "It may have been saved before training."
    ),
    "full-model-beside": _note("A whole model lies in the same folder. Only the adapter is read."),
    "tensor-unplaced": _error(
        "A stored tensor belongs to no module. Dropping it would change the adapter.", "Check the PEFT type. " + AUTHOR
    ),
    "tensor-missing": _error("A tensor lacks its partner, such as A without B.", AGAIN),
    "no-tensors": _error("The weight file is empty.", AGAIN),
    "shape-contradiction": _error("Tensors contradict each other or the config.", AUTHOR),
}

RECIPES = {
    "yaml-invalid": _error(
        "Not YAML, or more than a recipe may use: anchors, tags, merge keys, keys twice, excessive size.",
        "Mend the line it names.",
    ),
    "recipe-invalid": _error("A key is unknown, missing, or has a value of the wrong kind.", "Mend the line it names."),
}

BASES = {
    "no-base": _error("There is no model in that place.", "Name a folder or repository with `config.json`."),
    "base-invalid": _error("Its `config.json` does not describe a model.", AGAIN),
    "base-weights-missing": _error("There is a config but no safetensors.", "Save it as safetensors first."),
    "base-quantized": _note(
        "The base is stored quantised. It runs under a blend, but a blend cannot be folded or written into it.",
        "Bake it with `--base-weights original` or `dequantized`.",
    ),
    "packing-invalid": _error("The parts of a quantised matrix are missing or contradict each other.", AGAIN),
    "base-dtype-unsupported": _error(
        "Experts change weights that are stored as no float16, bfloat16, float32 or float64.",
        "Name the model's unquantised weights as base.",
    ),
    "remote-code": _error("The base asks to run code of its own.", "Read that code, then `--trust-remote-code`."),
    "tokenizer-missing": _warning("The base has no tokenizer, so it cannot chat.", "Add its tokenizer files."),
    "template-missing": _note("The base has no chat template: text is continued as it is."),
}

FIT = {
    "base-mismatch": _error(
        "The adapter was trained on another base. Equal shapes do not make it the same function.",
        "Use its own base, or accept it by name with `accept_base`.",
    ),
    "base-accepted": _note("The adapter was trained on another base, which the recipe accepts by name."),
    "base-unconfirmed": _warning("Names cannot tell whether this is the adapter's base.", "Make sure that it is."),
    "base-was-quantized": _note("The adapter was trained on a quantised copy of the base."),
    "module-missing": _error("The base lacks modules that the adapter changes.", "It belongs to another base."),
    "shape-mismatch": _error("Shapes of adapter and base contradict each other.", "It belongs to another base."),
    "vocabulary-resized": _error(
        "The adapter brings an embedding or head of another vocabulary.", "Resize the base first, or leave it out."
    ),
    "rank-excessive": _warning("The rank exceeds what the matrix can have.", "It works, and wastes memory."),
    "scaling-extreme": _warning("Alpha over rank is far from what adapters have.", "Turn its weight down."),
    "experts-unsupported": _error(
        "The architecture runs the fused experts of a mixture in a way of its own, which lmoe cannot blend.",
        "Train on its other modules, or run the adapter with PEFT.",
    ),
    "weight-unmatched": _error("A rule of a weight list matches no module of the adapter.", "Mend its pattern."),
    "weight-default": _note(
        "Some modules are matched by no rule and keep weight 1.", 'End with `{match: "*", value: …}`.'
    ),
    "weight-zero": _note("The rules give every module weight 0."),
    "saved-conflict": _error(
        "Several experts bring a whole module of their own in place of the base's.",
        "Say `modules_to_save: blend` or `modules_to_save: {take: NAME}`.",
    ),
    "saved-unread": _note(
        "An adapter brings a module that its config does not list in `modules_to_save`. Whether it is more than a copy "
        "of the base's shows once both are on this machine.",
        "`lmoe pull` both to see it earlier.",
    ),
    "tokenizer-differs": _warning("The adapter brings a tokenizer that is not the base's.", "Check its vocabulary."),
    "template-differs": _note("The adapter was trained with a chat template that is not the base's."),
    "memory-short": _warning("The loadout needs more memory than this machine has.", "A GPU, or `--quantize`."),
}

RUN = {
    "module-unknown": _error(
        "The model class of this transformers version has no module of that name.", "Use the version it was made with."
    ),
    "weights-not-finite": _error("A weight of an adapter is NaN or infinite.", AUTHOR),
    "base-unloadable": _error(
        "transformers cannot make a causal language model of the base.", "See the reason it gives."
    ),
    "base-incomplete": _error("The checkpoint lacks weights that its model class has.", AGAIN),
    "tokenizer-broken": _error("The base's tokenizer cannot be loaded.", AGAIN),
    "device-unknown": _error("This machine has no such device.", "`cpu`, `cuda`, `cuda:0`, `mps`."),
    "extra-missing": _error("An optional library is needed.", "Install the extra that the hint names."),
    "quantize-unsupported": _error(
        "bitsandbytes has no product for these shapes on a CPU.", "Leave `--quantize` out, or use a CUDA device."
    ),
    "compile-unsupported": _error(
        "transformers does not compile this architecture as one graph.", "Leave `--compile` out."
    ),
    "compile-failed": _error(
        "torch's compiler failed on the model.", "Install a C++ compiler on a CPU, or leave `--compile` out."
    ),
    "logits-not-finite": _error("The model computes NaN or infinity.", "Turn weights down; download it again."),
    "weights-fixed": _error("A static router's weights do not turn.", "Use `router: {type: weighted}`."),
    "weight-invalid": _error("Not a finite number.", "A number such as `0.3`."),
    "expert-unknown": _error("The loadout has no expert of that name.", "See its names with `/w`."),
    "folded": _error("The blend is folded into the base, so its weights do not turn.", "Unfold it first."),
    "fold-quantized": _error("A quantised base cannot be folded into.", "`fold: false`, or a weighted router."),
    "fold-unsafe": _error(
        "The weights in memory are not those of the base's files, so folding could not be undone.", "`fold: false`."
    ),
    "cache-missing": _error("The architecture keeps no keys and values to decode from.", "Measure another base."),
    "prompt-empty": _error("There is no text to go on.", "Write something."),
    "context-full": _error("The conversation does not fit the model's context.", "Shorten it, or `/clear`."),
    "template-refused": _error(
        "The base's chat template refuses the conversation.", "Often it takes no system message."
    ),
    "nothing-said": _error("The conversation is empty.", "Write something."),
    "command-unknown": _error("The chat has no such command.", "`/help` lists them."),
    "setting-unknown": _error("There is no such sampling setting.", "See the hint."),
    "setting-invalid": _error("A sampling setting is out of range.", "See the range in the message."),
}

ROUTERS = {
    "no-router": _error("There is no trained router in that place.", "Name the folder that `lmoe train` wrote."),
    "router-invalid": _error("The files of a trained router are damaged, or contradict each other.", AGAIN),
    "router-settings": _error("What the recipe sets does not go together with how the gate was trained.", "See it."),
    "router-experts-differ": _error(
        "A trained gate has rows for other experts than the recipe's.", "`lmoe router grow` or `shrink`, or train it."
    ),
    "router-expert-changed": _error(
        "An expert of the recipe is not the one of that name that the gate was trained with.", "Name that one."
    ),
    "router-base-differs": _error("A trained gate is for another base than the recipe's.", "Name its base."),
    "router-place-missing": _error("Experts act where the trained gate knows nothing.", "Train it again with them."),
    "gate-needed": _error("Only trained gates grow and shrink.", "Change the experts in the recipe."),
    "expert-taken": _error("The recipe has an expert of that name.", "Give the new one another name."),
    "expert-last": _error("A gate without experts decides nothing.", "Run the base alone."),
    "router-dynamic": _error(
        "The router decides per prompt or token, and fixed weights are asked for.", "`lmoe bake --mean-gates`."
    ),
    "router-broken": _error(
        "The code of a plug-in's router cannot be imported, or is not what its settings say.", "Update its package."
    ),
    "routed-in-part": _note("Embeddings and whole modules of an expert have no gates of their own: its weight acts."),
    "examples-missing": _error(
        "An encoder compares prompts with texts, and an expert has none.",
        "Give it `examples`, `data` or `description`.",
    ),
    "layer-missing": _error("The base has no block of that number to embed texts by.", "See the hint."),
    "encoder-missing": _error("There is no such sentence-transformers model.", "A folder, or `org/name`."),
    "encoder-tokenizer": _error(
        "An encoder embeds prompts by the base, which has no tokenizer.", "Add its files, or name an `encoder`."
    ),
}

DATA = {
    "data-invalid": _error("A line of a data file is not what is due there.", "See the line."),
    "data-empty": _error("A data file holds no record, or none of the split that is asked for.", "See the hint."),
    "data-role": _error("A message's role is none of system, user, assistant and tool.", "Rename it."),
    "data-content": _error("What a message or line says is not text, or empty.", "See the line."),
    "data-unanswered": _error("The assistant says nothing in a conversation, so nothing can be learned.", "Remove it."),
    "data-too-long": _error("A record has more tokens than fit.", "Shorten it, or let it be cut off or left out."),
    "template-no-mask": _error(
        "The base's chat template neither marks what the assistant says, nor writes a conversation as its beginning "
        "and what follows.",
        "Mark it with `{% generation %}`.",
    ),
}

TRAIN = {
    "train-config-invalid": _error("A training config is not what one may say.", "See the line and the hint."),
    "train-unsupported": _error(
        "An expert holds more than plain LoRA on linear layers, which is not trained.",
        "`train: gate` keeps it as it is.",
    ),
    "targets-missing": _error("The base has no linear layers of those names.", "See its layers in the hint."),
    "training-unfinished": _error("A training was begun there and is not done.", "`--resume`, or `--force`."),
    "nothing-to-resume": _error("No training was begun there.", "Leave `--resume` out."),
    "resume-differs": _error("The config or the data changed since the training began.", "Put back what was changed."),
    "loss-not-finite": _error(
        "The loss became NaN or infinite. The last checkpoint is kept.", "A lower learning rate, then `--resume`."
    ),
    "routing-collapsed": _warning(
        "Nearly all tokens go to one expert.", "Raise `balance`, or train experts longer before the gate."
    ),
    "checkpoint-damaged": _warning("A checkpoint was cut short.", "Nothing to do: an earlier one is gone on with."),
    "data-cut": _note("Records were longer than `max_length`."),
}

BAKE = {
    "bake-quantized": _error(
        "The base is stored quantised; a blend cannot be written into it.",
        "Of bitsandbytes, `--base-weights dequantized` or `original`; of others, name the unquantised model as base.",
    ),
    "original-differs": _error(
        "What `--original` names is not the model that the base was quantised from: its layout or its weights differ.",
        "Name that model, or `--base-weights dequantized`.",
    ),
    "bias-unbakeable": _error(
        "The blend needs a bias on a layer that has none in this architecture.", "Run it live instead."
    ),
    "bake-overflow": _error("A blended weight is too large for the dtype.", "`--dtype bfloat16`, or smaller weights."),
    "tensor-dropped": _error("A tensor of an adapter was not used: a fault of lmoe itself.", "Report it."),
    "adapter-inexpressible": _error("One PEFT adapter cannot hold this blend.", "Bake it as a model."),
    "verify-impossible": _error("The recipe's method has no live counterpart.", "Leave out `--verify`."),
    "verify-failed": _error(
        "The baked files are not the live blend up to one rounding. Nothing was written.", "Report it."
    ),
    "size-invalid": _error("Not a size of at least 1MB.", "Such as `5GB`."),
}

EVALUATE = {
    "data-cut": _warning("Records were cut off at the limit, or left out.", "`--max-tokens` and `--too-long`."),
    "interval-missing": _warning("One record tells nothing of others, so there is no interval.", "More records."),
    "eval-seen": _warning(
        "The recipe's gate was trained on what it is judged by.", "`--split valid`, or another file."
    ),
    "eval-regressed": _error("The recipe's loss is higher than in the baseline.", "See which domain, and why."),
    "baseline-invalid": _error("A baseline is not what `lmoe eval --json` printed.", "Write it again."),
    "baseline-differs": _error("A baseline was judged by other data.", "The same data, or a new baseline."),
    "task-unknown": _error("lm-eval has no task of that name.", "`lm-eval ls tasks`."),
    "fit-unjudged": _warning("Nothing was held out to judge the weights by.", "Records with `split: valid`."),
    "fit-no-gain": _warning("Weights that were found are no better on held-out records.", "More records."),
}

SIMILARITY = {
    "nothing-to-compare": _error(
        "Of an adapter no delta of a matrix is known.", "Name its base with `--base`, or leave it out."
    ),
    "shapes-differ": _error(
        "Two adapters change a module of one name in different shapes: they are of different bases.",
        "Compare adapters of one base.",
    ),
    "weights-packed": _error(
        "Deltas have the base's weights in them, and these are stored quantised in a way that lmoe does not read.",
        "Name the unquantised model as base, or none.",
    ),
    "bases-differ": _warning("The adapters name different bases.", "Compare adapters of one base."),
    "modules-disjoint": _warning("Two adapters change no module in common.", "Make sure that they are of one base."),
    "delta-partial": _warning(
        "Without the base only the low-rank part s B A of some deltas is compared.", "Name the base with `--base`."
    ),
    "delta-skipped": _warning(
        "Without the base some modules are left out: IA3, VeRA and modules saved whole have no delta of their own.",
        "Name the base with `--base`.",
    ),
    "biases-apart": _note("An adapter changes biases, too. Only matrices are compared."),
}

USE = {
    "usage": _error("Arguments that lmoe does not take, or that do not go together.", "`lmoe COMMAND --help`."),
    "base-needed": _error("The adapters name no base, or different ones.", "Name it with `--base`."),
    "refused": _error("Findings stop the command.", "See the findings."),
    "interrupted": _error("Stopped by the user.", "Nothing half-written is left."),
    "bug": _error("A fault of lmoe itself.", "Run it again with `--debug` and report what it prints."),
}

CODES: dict[str, Code] = (
    FILES | HUB | ADAPTERS | RECIPES | BASES | FIT | RUN | ROUTERS | TRAIN | DATA | EVALUATE | BAKE | SIMILARITY | USE
)
