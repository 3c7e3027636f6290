"""Codes of what is done with a loadout: running, routing, training, baking, judging."""

from __future__ import annotations

from lmoe_cli.codes.code import AGAIN, AUTHOR, error, note, warning

RUN = {
    "module-unknown": error(
        "The model class of this transformers version has no module of that name.", "Use the version it was made with."
    ),
    "weights-not-finite": error("A weight of an adapter is NaN or infinite.", AUTHOR),
    "base-unloadable": error(
        "transformers cannot make a causal language model of the base.", "See the reason it gives."
    ),
    "base-incomplete": error("The checkpoint lacks weights that its model class has.", AGAIN),
    "tokenizer-broken": error("The base's tokenizer cannot be loaded.", AGAIN),
    "device-unknown": error("This machine has no such device.", "`cpu`, `cuda`, `cuda:0`, `mps`."),
    "extra-missing": error("An optional library is needed.", "Install the extra that the hint names."),
    "quantize-unsupported": error(
        "bitsandbytes has no product for these shapes on a CPU.", "Leave `--quantize` out, or use a CUDA device."
    ),
    "compile-unsupported": error(
        "transformers does not compile this architecture as one graph, a router decides per token, or an expert "
        "changes the experts of a mixture.",
        "Leave `--compile` out.",
    ),
    "compile-failed": error(
        "torch's compiler failed on the model.", "Install a C++ compiler on a CPU, or leave `--compile` out."
    ),
    "logits-not-finite": error("The model computes NaN or infinity.", "Turn weights down; download it again."),
    "weights-fixed": error("A static router's weights do not turn.", "Use `router: {type: weighted}`."),
    "weight-invalid": error("Not a finite number.", "A number such as `0.3`."),
    "expert-unknown": error("The loadout has no expert of that name.", "See its names with `/w`."),
    "folded": error("The blend is folded into the base, so its weights do not turn.", "Unfold it first."),
    "fold-quantized": error("A quantised base cannot be folded into.", "`fold: false`, or a weighted router."),
    "fold-unsafe": error(
        "The weights in memory are not those of the base's files, so folding could not be undone.", "`fold: false`."
    ),
    "cache-missing": error("The architecture keeps no keys and values to decode from.", "Measure another base."),
    "prompt-empty": error("There is no text to go on.", "Write something."),
    "context-full": error("The conversation does not fit the model's context.", "Shorten it, or `/clear`."),
    "template-refused": error(
        "The base's chat template refuses the conversation.", "Often it takes no system message."
    ),
    "nothing-said": error("The conversation is empty.", "Write something."),
    "command-unknown": error("The chat has no such command.", "`/help` lists them."),
    "setting-unknown": error("There is no such sampling setting.", "See the hint."),
    "setting-invalid": error("A sampling setting is out of range.", "See the range in the message."),
    "change-unknown": warning(
        "What an expert changes cannot be told: with it the model computes NaN or infinity, or memory is short.",
        "Smaller weights, `--dtype float32`, or a shorter prompt.",
    ),
}

ROUTERS = {
    "no-router": error(
        "There is no trained router in that place.", "Name the folder `router/` in what `lmoe train` wrote."
    ),
    "router-invalid": error("The files of a trained router are damaged, or contradict each other.", AGAIN),
    "router-settings": error(
        "What the recipe sets does not go together with how the gate was trained.",
        "Leave it out, or set it as trained.",
    ),
    "router-experts-differ": error(
        "A trained gate has rows for other experts than the recipe's.", "`lmoe router grow` or `shrink`, or train it."
    ),
    "router-expert-changed": error(
        "An expert of the recipe is not the one of that name that the gate was trained with.", "Name that one."
    ),
    "router-base-differs": error("A trained gate is for another base than the recipe's.", "Name its base."),
    "router-place-missing": error("Experts act where the trained gate knows nothing.", "Train it again with them."),
    "gate-needed": error("Only trained gates grow and shrink.", "Change the experts in the recipe."),
    "expert-taken": error("The recipe has an expert of that name.", "Give the new one another name."),
    "expert-last": error("A gate without experts decides nothing.", "Run the base alone."),
    "router-dynamic": error(
        "The router decides per prompt or token, and fixed weights are asked for.", "`lmoe bake --mean-gates`."
    ),
    "router-broken": error(
        "The code of a plug-in's router cannot be imported, or is not what its settings say.", "Update its package."
    ),
    "routed-in-part": note("Embeddings and whole modules of an expert have no gates of their own: its weight acts."),
    "examples-missing": error(
        "An encoder compares prompts with texts, and an expert has none.",
        "Give it `examples`, `data` or `description`.",
    ),
    "layer-missing": error("The base has no block of that number to embed texts by.", "See the hint."),
    "encoder-missing": error("There is no such sentence-transformers model.", "A folder, or `org/name`."),
    "encoder-tokenizer": error(
        "An encoder embeds prompts by the base, which has no tokenizer.", "Add its files, or name an `encoder`."
    ),
}

DATA = {
    "data-invalid": error("A line of a data file is not what is due there.", "See the line."),
    "data-empty": error("A data file holds no record, or none of the split that is asked for.", "See the hint."),
    "data-role": error("A message's role is none of system, user, assistant and tool.", "Rename it."),
    "data-content": error("What a message or line says is not text, or empty.", "See the line."),
    "data-unanswered": error("The assistant says nothing in a conversation, so nothing can be learned.", "Remove it."),
    "data-too-long": error("A record has more tokens than fit.", "Shorten it, or let it be cut off or left out."),
    "data-cut": warning(
        "Records were cut off at the limit, or left out.",
        "`--max-tokens` and `--too-long`, of a training `max_length` and `too_long`.",
    ),
    "template-no-mask": error(
        "The base's chat template neither marks what the assistant says, nor writes a conversation as its beginning "
        "and what follows.",
        "Mark it with `{% generation %}`.",
    ),
}

TRAIN = {
    "train-config-invalid": error("A training config is not what one may say.", "See the line and the hint."),
    "train-unsupported": error(
        "An expert holds more than plain LoRA on linear layers, which is not trained.",
        "`train: gate` keeps it as it is.",
    ),
    "targets-missing": error("The base has no linear layers of those names.", "See its layers in the hint."),
    "training-unfinished": error("A training was begun there and is not done.", "`--resume`, or `--force`."),
    "nothing-to-resume": error("No training was begun there.", "Leave `--resume` out."),
    "device-index": error(
        "Training takes the first devices that it sees, one per process.", "Choose them with `CUDA_VISIBLE_DEVICES`."
    ),
    "shard-alone": error("A base cannot be spread over a single process.", "Run it under torchrun."),
    "shard-quantized": error("A quantised base cannot be spread over processes.", "Leave `shard` out."),
    "packing-leaks": error("On this base examples in one row would see each other.", "Leave `packing` out."),
    "nothing-held-out": error("`patience` needs something to judge by.", "See `valid` and `fraction`."),
    "resume-differs": error("The config or the data changed since the training began.", "Put back what was changed."),
    "loss-not-finite": error(
        "The loss became NaN or infinite. The last checkpoint is kept.", "A lower learning rate, and `--force`."
    ),
    "routing-collapsed": warning(
        "Nearly all tokens go to one expert.", "Raise `balance`, or train experts longer before the gate."
    ),
    "checkpoint-damaged": warning("A checkpoint was cut short.", "Nothing to do: an earlier one is gone on with."),
}

BAKE = {
    "bake-quantized": error(
        "The base is stored quantised; a blend cannot be written into it.",
        "Of bitsandbytes, `--base-weights dequantized` or `original`; of others, name the unquantised model as base.",
    ),
    "original-differs": error(
        "What `--original` names is not the model that the base was quantised from: its layout or its weights differ.",
        "Name that model, or `--base-weights dequantized`.",
    ),
    "bias-unbakeable": error(
        "The blend needs a bias on a layer that has none in this architecture.", "Run it live instead."
    ),
    "bake-overflow": error("A blended weight is too large for the dtype.", "`--dtype bfloat16`, or smaller weights."),
    "tensor-dropped": error("A tensor of an adapter was not used: a fault of lmoe itself.", "Report it."),
    "adapter-inexpressible": error("One PEFT adapter cannot hold this blend.", "Bake it as a model."),
    "verify-impossible": error("The recipe's method has no live counterpart.", "Leave out `--verify`."),
    "verify-failed": error(
        "The baked files are not the live blend up to one rounding. Nothing was written.", "Report it."
    ),
    "size-invalid": error("Not a size of at least 1MB.", "Such as `5GB`."),
}

EVALUATE = {
    "interval-missing": warning("One record tells nothing of others, so there is no interval.", "More records."),
    "eval-seen": warning("The router was made from what it is judged by.", "`--split valid`, or another file."),
    "eval-unrouted": warning("A router that decides by prompts had no say in texts.", "Records with `messages`."),
    "retrained-size": warning(
        "One LoRA trained anew has more than 5 % more or fewer numbers than the experts together.",
        "Mind it when you compare them: ranks are whole numbers, and it is trained on linear layers alone.",
    ),
    "eval-regressed": error("The recipe's loss is higher than in the baseline.", "See which domain, and why."),
    "baseline-invalid": error("A baseline is not what `lmoe eval --json` printed.", "Write it again."),
    "baseline-differs": error("A baseline was judged by other data.", "The same data, or a new baseline."),
    "task-unknown": error("lm-eval has no task of that name.", "`lm-eval ls tasks`."),
    "fit-unjudged": warning("Nothing was held out to judge the weights by.", "Records with `split: valid`."),
    "fit-no-gain": warning("Weights that were found are no better on held-out records.", "More records."),
}

SIMILARITY = {
    "nothing-to-compare": error(
        "Of an adapter no delta of a matrix is known.", "Name its base with `--base`, or leave it out."
    ),
    "shapes-differ": error(
        "Two adapters change a module of one name in different shapes: they are of different bases.",
        "Compare adapters of one base.",
    ),
    "weights-packed": error(
        "Deltas have the base's weights in them, and these are stored quantised in a way that lmoe does not read.",
        "Name the unquantised model as base, or none.",
    ),
    "bases-differ": warning("The adapters name different bases.", "Compare adapters of one base."),
    "modules-disjoint": warning("Two adapters change no module in common.", "Make sure that they are of one base."),
    "delta-partial": warning(
        "Without the base only the low-rank part s B A of some deltas is compared.", "Name the base with `--base`."
    ),
    "delta-skipped": warning(
        "Without the base some modules are left out: IA3, VeRA and modules saved whole have no delta of their own.",
        "Name the base with `--base`.",
    ),
    "biases-apart": note("An adapter changes biases, too. Only matrices are compared."),
}

USE = {
    "usage": error("Arguments that lmoe does not take, or that do not go together.", "`lmoe COMMAND --help`."),
    "base-needed": error("The adapters name no base, or different ones.", "Name it with `--base`."),
    "refused": error("Findings stop the command.", "See the findings."),
    "interrupted": error("Stopped by the user.", "Nothing half-written is left."),
    "bug": error("A fault of lmoe itself.", "Run it again with `--debug` and report what it prints."),
}
