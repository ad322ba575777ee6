"""What can be wrong with a policy beyond its form: plug-in options, files that are not there."""

import importlib.util
import os
from collections.abc import Iterator, Sequence

from release_guard.errors import PolicyError, printable
from release_guard.hubs import Hub
from release_guard.plugins import Plugin, Spec, advise
from release_guard.policy import HUB_PREFIX, Policy
from release_guard.signers import Signer
from release_guard.sources import named_in


def problems(policy: Policy) -> list[str]:
    """One line a problem; options of models, stages and attacks are seen only `with_torch()`."""
    wrong = [*_wrong_options(policy)]
    return [*(wrong or _wrong_kinds(policy)), *_wrong_names(policy), *_missing_files(policy)]


def with_torch() -> bool:
    """Whether plug-ins that need torch can be looked at (the extra `immunize` is installed)."""
    return importlib.util.find_spec("torch") is not None


def _wrong_options(policy: Policy) -> Iterator[str]:
    for contract, spec, where in [*_light(policy), *(_heavy(policy) if with_torch() else ())]:
        try:
            contract.build(spec, where=where)
        except PolicyError as error:
            yield from str(error).splitlines()


def _wrong_kinds(policy: Policy) -> Iterator[str]:
    if with_torch():
        from release_guard.stages import misplaced  # noqa: PLC0415  it imports torch

        yield from misplaced(policy)


def _light(policy: Policy) -> Sequence[tuple[type[Plugin], Spec, str]]:
    return ((Signer, policy.signer, "signer"), (Hub, policy.hub, "hub"))


def _heavy(policy: Policy) -> Iterator[tuple[type[Plugin], Spec, str]]:
    from release_guard.attacks import Attack  # noqa: PLC0415  these import torch
    from release_guard.modalities import Modality  # noqa: PLC0415
    from release_guard.stages import Stage  # noqa: PLC0415

    yield Modality, policy.modality, "modality"
    yield from ((Stage, spec, f"stages[{place}]") for place, spec in enumerate(policy.stages))
    yield from ((Attack, spec, f"attacks[{place}]") for place, spec in enumerate(policy.attacks))


def _wrong_names(policy: Policy) -> Iterator[str]:
    """Attacks and stages that are only named: a slip would show when all is spent."""
    if not with_torch():
        return
    from release_guard.attacks import Attack  # noqa: PLC0415  these import torch
    from release_guard.stages import Stage  # noqa: PLC0415

    red_team = policy.red_team
    listed = {spec.family for spec in policy.attacks}
    for place, family in enumerate(policy.gate.mandatory):
        where = f"gate.mandatory[{place}]"
        if unknown := [name for name in family.split(" > ") if name not in Attack.available()]:
            yield f"{where}: {unknown[0]!r} is no attack; {advise(unknown[0], Attack.available())}"
        elif family not in listed and policy.concepts and not (red_team.drawn or red_team.searched):
            yield f"{where}: {family} must be tried and is not among the attacks; add it there"
    for place, spec in enumerate(policy.attacks):
        name = spec.options.get("stage")
        if isinstance(name, str) and name not in Stage.available():
            yield f"attacks[{place}].stage: {name!r} is no stage; {advise(name, Stage.available())}"


def _missing_files(policy: Policy) -> Iterator[str]:
    for key, source in named_in(policy):
        if not source.startswith(HUB_PREFIX) and not os.path.exists(source):  # noqa: PTH110
            where = printable(source)  # Path.exists raises where a name is too long to be one
            yield f"{key}: {where} is not there; give a file, a folder or {HUB_PREFIX}..."
