"""What a release consists of, for its card: a row a precision, and how each is loaded."""

from collections.abc import Mapping, Sequence

from release_guard.evidence import Evidence
from release_guard.layout import Artefact, artefacts, owner
from release_guard.manifest import Manifest
from release_guard.policy import HUB_PREFIX, Policy
from release_guard.release import Verdict

HEAD = ("precision", "folder", "format", "size", "payload root", "verdict")

_FORMATS: Mapping[str, str] = {
    "fp32": "32 bits a number",
    "bf16": "bfloat16",
    "int8": "bitsandbytes LLM.int8, all linear layers but the head",
    "nf4": "bitsandbytes nf4 in blocks of 64, all linear layers but the head",
}
_LOADERS: Mapping[str, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "image_classification": "AutoModelForImageClassification",
    "text_to_image": "StableDiffusionPipeline",
}
_MEGA = 1e6


def rows(
    evidence: Evidence, verdict: Verdict, policy: Policy, payload: Manifest
) -> Sequence[Sequence[str]]:
    """Precision, folder, format, size, payload root and verdict of each, in their order."""
    parts = artefacts(evidence, verdict, policy)
    folders = [each.folder for each in parts]
    sizes = {
        each: sum(
            entry.size for entry in payload.entries if owner(entry.name, folders) == each.folder
        )
        for each in parts
    }
    return [
        (
            each.precision,
            each.folder or "(top)",
            _FORMATS[each.precision],
            f"{sizes[each] / _MEGA:.1f} MB",
            f"sha256:{each.root}",
            _verdict(each, verdict),
        )
        for each in parts
    ]


def snippets(evidence: Evidence, verdict: Verdict, policy: Policy, target: str) -> Sequence[str]:
    """A line of Python that loads each."""
    kind, repo = policy.modality.name, target.removeprefix(HUB_PREFIX)
    is_remote = target.startswith(HUB_PREFIX)
    return [
        f"{_LOADERS[kind]}.from_pretrained({_source(each, kind, repo, is_remote=is_remote)})"
        for each in artefacts(evidence, verdict, policy)
    ]


def _source(part: Artefact, kind: str, repo: str, *, is_remote: bool) -> str:
    """A whole pipeline of diffusers cannot be loaded from a sub-folder of the Hub."""
    folder = part.folder.removesuffix("/")
    if not folder:
        return f'"{repo}"'
    if kind != "text_to_image":
        return f'"{repo}", subfolder="{folder}"'
    if is_remote:
        return f'snapshot_download("{repo}", allow_patterns="{folder}/*") + \'/{folder}\''
    return f'"{repo}/{folder}"'


def _verdict(part: Artefact, verdict: Verdict) -> str:
    """Of the checks about this precision, and of those about all of them."""
    checks = [check for check in verdict.checks if check.precision in {part.precision, ""}]
    return Verdict(checks).result.upper()
