"""Which matrices of the base are compared, and what of each adapter's delta there can be known. No tensor is read.

Without a base modules are matched by name, as far as names agree between classes and versions, and only the low-rank
part of a delta is known. With a base they are matched by where they act in it, and every delta is known whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from lmoe_cli.adapter.contents import Part
from lmoe_cli.adapter.names import layer_of, natural
from lmoe_cli.adapter.soundness import inspect_adapter
from lmoe_cli.check import check
from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.findings import Finding, RefusedError, errors, finding, from_error
from lmoe_cli.hub import Progress
from lmoe_cli.loadout.dequantized import METHOD
from lmoe_cli.loadout.identity import canonical, same
from lmoe_cli.loadout.layout import Assignment, Target
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.recipe import ExpertEntry
from lmoe_cli.readable import named
from lmoe_cli.similarity.names import Left, key_of, left_of
from lmoe_cli.source import open_source

NEEDS_WEIGHTS = {"magnitude", "ia3", "saved_weight"}
"""Roles whose delta has the base's own matrix in it."""
BIASES = {"lora_B_bias", "saved_bias"}
ABOUT_RUNNING = {
    "tokenizer-missing", "tokenizer-differs", "template-missing", "template-differs", "memory-short", "base-quantized",
    "task-unsupported", "experts-unsupported", "weight-unmatched", "weight-default", "weight-zero",
}  # fmt: skip
"""Findings of a check that say nothing about deltas."""


@dataclass(frozen=True)
class Changed:
    """One matrix of the base that adapters change."""

    module: str
    """With a base as its checkpoint calls it; without one less the wrappers in front."""
    d_out: int
    d_in: int
    items: tuple[tuple[int, Assignment], ...]
    """Number of each expert that changes it, and how, in the order of the experts."""

    @property
    def layer(self) -> int | None:
        """None for what lies in no layer, such as embeddings."""
        return layer_of(self.module)

    @property
    def kind(self) -> str:
        """What modules of its kind are called in every layer, ``q_proj``."""
        return self.module.rpartition(".")[2]

    @property
    def size(self) -> int:
        """Bytes of the adapters' tensors that are read for it."""
        return sum(
            tensor.info.size // item.part.experts for _, item in self.items for tensor in item.part.tensors.values()
        )


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    experts: tuple[Expert, ...]
    matrices: tuple[Changed, ...]
    loadout: Loadout | None
    """The experts on their base, where one was given."""
    findings: tuple[Finding, ...]
    """What cannot be compared, and what to know about the adapters."""

    @property
    def needs_weights(self) -> bool:
        """Whether some delta has the base's own matrix in it."""
        return self.loadout is not None and any(
            item.part.tensors.keys() & NEEDS_WEIGHTS for changed in self.matrices for _, item in changed.items
        )

    def fetched(self, progress: Progress | None = None) -> Plan:
        """The same plan with every file that it needs on this machine.

        Copies of the base's own modules, which show only there, are no longer in it.

        Raises:
            NotFoundError, AccessError, NetworkError, ResourceError: Something cannot be brought.
            InvalidFileError: The base is packed in a way that contradicts itself.
        """
        if self.loadout is None:
            for expert in self.experts:
                expert.adapter.source.fetch(expert.adapter.files, progress)
            return self
        self.loadout.fetch(progress, with_base=self.needs_weights)
        found = on_base(self.loadout)
        if not found.needs_weights:
            return found
        ready = self.loadout.dequantized  # the same base, so what was checked holds
        return replace(found, loadout=ready, matrices=_on_base(ready))


def read_experts(refs: Mapping[str, str], token: str | None = None) -> tuple[Expert, ...]:
    """Read adapters from headers alone, for a comparison without a base.

    Args:
        refs: Name → reference.
        token: For the Hub.

    Raises:
        RefusedError: Some cannot be read; its findings tell all. Its exit code is that of the first.
    """
    experts: list[Expert] = []
    problems: list[tuple[Finding, int]] = []
    for name, ref in refs.items():
        try:
            experts.append(Expert(name, inspect_adapter(open_source(ref, token=token)), ExpertEntry(adapter=ref)))
        except LmoeError as error:
            found = from_error(error)
            told = Finding(found.code, "error", name, f"{name}: {found.message}", found.hint)
            problems.append((told, error.exit_code))
    if problems:
        message = f"{len(problems)} of {len(refs)} adapters cannot be read"
        raise RefusedError(message, [found for found, _ in problems], exit_code=problems[0][1])
    return tuple(experts)


def by_name(experts: Sequence[Expert]) -> Plan:
    """Plan a comparison without a base.

    Raises:
        RefusedError: An adapter cannot be used, nothing of it can be compared without its base, or two adapters change
            a module of one name in different shapes. Exit code 1.
    """
    own = [item for expert in experts for item in expert.adapter.findings if item.code not in ABOUT_RUNNING]
    _refuse(errors(own), own)
    placed: dict[str, list[tuple[int, Assignment]]] = {}
    findings = list(own)
    for number, expert in enumerate(experts):
        left = left_of(expert.adapter.parts.values())
        findings += _about_left(expert, left)
        for item in _assigned(left.parts):
            placed.setdefault(item.target.module, []).append((number, item))
    shapes = list(_shapes_differ(experts, placed))
    _refuse([*errors(findings), *shapes], [*findings, *shapes])
    matrices = tuple(
        Changed(module, items[0][1].target.d_out, items[0][1].target.d_in, tuple(items))
        for module, items in sorted(placed.items(), key=lambda pair: natural(pair[0]))
    )
    told = [*findings, *_bases_differ(experts), *_disjoint(experts, matrices)]
    return Plan(tuple(experts), matrices, None, tuple(told))


def on_base(loadout: Loadout) -> Plan:
    """Plan a comparison with a base at hand, whatever weights the recipe gives its experts.

    Raises:
        RefusedError: The parts do not fit, or an adapter changes no matrix. Exit code 1.
        UsageError: A delta has a matrix in it that is stored quantised in a way that lmoe does not read.
    """
    recipe = loadout.recipe.model_copy(update={"modules_to_save": "blend"})  # nothing has to be joined here
    loadout = replace(loadout, recipe=recipe)
    report = check(loadout, trust_remote_code=True)
    findings = [item for item in report.findings if item.code not in ABOUT_RUNNING]
    _refuse(errors(findings), findings)
    matrices = _on_base(loadout)
    for number, expert in enumerate(loadout.experts):
        if not any(number == other for changed in matrices for other, _ in changed.items):
            message = f"{expert.name}: changes no matrix of {loadout.base.ref}"
            findings.append(finding("nothing-to-compare", expert.name, message, "leave it out"))
        findings += _biases(expert)
    _refuse(errors(findings), findings)
    plan = Plan(loadout.experts, matrices, loadout, (*findings, *_disjoint(loadout.experts, matrices)))
    if plan.needs_weights and loadout.base.quantization not in (None, METHOD):
        message = f"{loadout.base.ref}: deltas need its weights, which are stored by {loadout.base.quantization}"
        hint = "name the unquantised model as base, or none to compare the low-rank parts"
        raise UsageError("weights-packed", message, hint=hint, where=loadout.base.ref)
    return plan


def _on_base(loadout: Loadout) -> tuple[Changed, ...]:
    """The matrices that experts change, in the order of the layers."""
    found: list[Changed] = []
    for target, every in loadout.by_target.items():
        if items := tuple((number, item) for number, item in every if item.part.tensors.keys() - BIASES):
            found.append(Changed(target.module, target.d_out, target.d_in, items))
    return tuple(sorted(found, key=lambda changed: natural(changed.module)))


def _refuse(found: Sequence[Finding], told: Sequence[Finding]) -> None:
    if found:
        raise RefusedError("the adapters cannot be compared", told)


def _assigned(parts: Sequence[Part]) -> Iterator[Assignment]:
    """The matrices that parts mean, by names alone; of stacked experts one each."""
    names = key_of(parts)
    for part in parts:
        assert part.shape is not None, "what is left without a base tells its shape"
        for number in range(part.experts):
            name = names[part.module]
            if part.experts > 1:
                parent, _, leaf = name.rpartition(".")
                name = f"{parent}.{number}.{leaf}"
            yield Assignment(part, Target(name, "", *part.shape), number)


def _about_left(expert: Expert, left: Left) -> Iterator[Finding]:
    """What of an adapter is not compared without its base."""
    name, count = expert.name, len(expert.adapter.parts)
    hint = "name the base with --base to compare all of it"
    if not left.parts:
        message = f"{name}: none of its {count} modules has a delta that is known without the base"
        yield finding("nothing-to-compare", name, message, hint)
    elif left.skipped:
        message = f"{name}: {len(left.skipped)} of {count} modules are left out: {named(left.skipped)}"
        yield finding("delta-skipped", name, message, hint)
    if left.cut:
        message = f"{name}: of {len(left.cut)} modules only s B A is compared: {named(left.cut)}"
        yield finding("delta-partial", name, message, hint)
    yield from _biases(expert)


def _biases(expert: Expert) -> Iterator[Finding]:
    with_bias = [part.module for part in expert.adapter.parts.values() if part.tensors.keys() & BIASES]
    if with_bias:
        message = f"{expert.name}: changes of {len(with_bias)} biases are not compared: {named(with_bias)}"
        yield finding("biases-apart", expert.name, message)


def _shapes_differ(
    experts: Sequence[Expert], placed: Mapping[str, Sequence[tuple[int, Assignment]]]
) -> Iterator[Finding]:
    shapes: list[dict[str, tuple[int, int]]] = [{} for _ in experts]
    for module, items in placed.items():
        for number, item in items:
            shapes[number][module] = (item.target.d_out, item.target.d_in)
    for one, two in combinations(range(len(experts)), 2):
        both = [module for module in shapes[one] if module in shapes[two]]
        wrong = [module for module in both if shapes[one][module] != shapes[two][module]]
        if wrong:
            first, second = experts[one].name, experts[two].name
            seen = f"{wrong[0]} is {shapes[one][wrong[0]]} and {shapes[two][wrong[0]]}"
            message = f"{first} and {second} are of different bases: {len(wrong)} of {len(both)} shapes differ, {seen}"
            claims = [_claim(experts[number]) or "none" for number in (one, two)]
            hint = f"compare adapters of one base; these name {claims[0]} and {claims[1]}"
            yield finding("shapes-differ", f"{first}, {second}", message, hint)


def _bases_differ(experts: Sequence[Expert]) -> Iterator[Finding]:
    """Adapters that name other bases than the first that names one."""
    named = [(expert.name, claim) for expert in experts if (claim := _claim(expert))]
    for name, claim in named[1:]:
        if not same(canonical(claim), canonical(named[0][1])):
            message = f"{name} names {claim} as its base, {named[0][0]} names {named[0][1]}"
            hint = "deltas of different bases say little about each other, even where shapes agree"
            yield finding("bases-differ", name, message, hint)


def _disjoint(experts: Sequence[Expert], matrices: Sequence[Changed]) -> Iterator[Finding]:
    owned: list[set[str]] = [set() for _ in experts]
    for changed in matrices:
        for number, _ in changed.items:
            owned[number].add(changed.module)
    for one, two in combinations(range(len(experts)), 2):
        if not owned[one] & owned[two]:
            first, second = experts[one].name, experts[two].name
            seen = " and ".join(min(owned[number], key=natural) for number in (one, two))
            message = f"{first} and {second} share no module, such as {seen}"
            yield finding("modules-disjoint", f"{first}, {second}", message, "are they of one base?")


def _claim(expert: Expert) -> str | None:
    return expert.adapter.config.base if expert.adapter.config else None
