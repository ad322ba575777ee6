"""The model card: our blocks between markers, the publisher's text untouched, YAML in place."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from release_guard import blocks, front_matter
from release_guard.errors import ModelError, PolicyError, brief
from release_guard.evidence import Evidence
from release_guard.manifest import EVIDENCE_FOLDER, Manifest
from release_guard.policy import Policy
from release_guard.release import Verdict

FORBIDDEN = ("safe", "immune", "tamper-proof", "certified", "guaranteed", "unbreakable")
TAG = "release-guard"

_BLOCKS = ("facts", "results", "not-tested", "verify", "limits")
_MARKER = re.compile(r"<!-- release-guard:(begin|end) (\S+) -->")
_WORDS = re.compile(rf"\b({'|'.join(FORBIDDEN)})\b", re.IGNORECASE)
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


@dataclass(frozen=True)
class Publication:
    """What a card says beside the evidence.

    Attributes:
        name: Title of a card that has to be begun.
        target: What `verify` is called with: `hf://OWNER/NAME` or a folder.
        fingerprint: Of the public key, if one signs; an identity stands in the policy.
        base_model: Hub id of the undefended model, if it has one.
        license: Licence identifier of the model, if known.
        payload: The files that make up the model; none: the card lists no artefacts.
    """

    name: str
    target: str
    fingerprint: str
    base_model: str | None = None
    license: str | None = None
    payload: Manifest | None = None


def card(
    existing: str | None,
    evidence: Evidence,
    verdict: Verdict,
    policy: Policy,
    publication: Publication,
) -> str:
    """The README.md of a release: `existing` with our blocks and metadata put in, or a new one.

    A README without any of our markers gets the blocks at its end; they may be moved from there.

    Raises:
        ModelError: Markers are missing, doubled or nested, or the front matter cannot be edited.
        PolicyError: A name taken from the policy would make the card say a forbidden word.
    """
    facts = blocks.facts(evidence, verdict, policy)
    if publication.payload is not None:
        files, target = publication.payload, publication.target
        facts += blocks.artefacts(evidence, verdict, policy, files, target)
    written = (
        facts,
        blocks.results(evidence, verdict, policy),
        blocks.not_tested(verdict),
        blocks.verify(verdict, policy, publication.target, publication.fingerprint),
        blocks.limits(verdict, policy),
    )
    texts = dict(zip(_BLOCKS, written, strict=True))
    for block in texts.values():
        lint(block)
    document = _new(publication, texts) if existing is None else _merged(_plain(existing), texts)
    values: dict[str, object] = {
        "release_guard": {
            "policy": f"sha256:{evidence.policy}",
            "verdict": verdict.result.upper(),
            "report": f"{EVIDENCE_FOLDER}/report.html",
        }
    }
    if publication.base_model is not None:
        values["base_model"] = publication.base_model
    if existing is None and publication.license is not None:
        values["license"] = publication.license
    return front_matter.edit(document, values=values, tag=TAG)


def check(folder: Path) -> None:
    """Refuse a README that cannot become the card, before anything is spent.

    Raises:
        ModelError: It is no text, or there is no place in it for our blocks and metadata.
    """
    if (existing := beside(folder)) is not None:
        merged = _merged(_plain(existing), dict.fromkeys(_BLOCKS, ""))
        front_matter.edit(merged, values={"release_guard": {"verdict": "PASS"}}, tag=TAG)


def beside(folder: Path) -> str | None:
    """The card that lies beside a model, if there is one.

    Raises:
        ModelError: It cannot be read as text.
    """
    try:
        return (folder / "README.md").read_bytes().decode()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"README.md: cannot be read as UTF-8 text ({brief(error)}); save it as that"
        ) from None


def lint(text: str) -> None:
    """Refuse words that promise more than was measured; names and commands in code do not count.

    Raises:
        PolicyError: One of `FORBIDDEN` stands in the text.
    """
    if found := _WORDS.search(_CODE.sub("", text)):
        raise PolicyError(
            f"README.md: a card may not say {found.group()!r}, which promises more than was "
            "measured; rename whatever the policy calls so"
        )


def _new(publication: Publication, texts: Mapping[str, str]) -> str:
    """A card in the Hub's order, with nothing said that nobody knows."""
    known = (("Base model", publication.base_model), ("Licence", publication.license))
    details = [f"- {what}: {value}\n" for what, value in known if value is not None]
    parts = [
        f"# {publication.name}\n",
        *(["# Model Details\n", "".join(details)] if details else []),
        "# Bias, Risks, and Limitations\n",
        _marked("limits", texts["limits"]),
        "# Evaluation\n",
        *(_marked(name, text) for name, text in texts.items() if name != "limits"),
    ]
    return "\n".join(parts)


def _plain(existing: str) -> str:
    return existing.removeprefix("\ufeff").replace("\r\n", "\n")


def _merged(document: str, texts: Mapping[str, str]) -> str:
    found = [match.groups() for match in _MARKER.finditer(document)]
    if not found:
        appended = "\n".join(_marked(name, block) for name, block in texts.items())
        return f"{document.rstrip()}\n\n{appended}".lstrip()
    _require_markers(found, texts)
    for name, block in texts.items():
        begin, end = (f"<!-- release-guard:{kind} {name} -->" for kind in ("begin", "end"))
        before, rest = document.split(begin)
        document = f"{before}{_marked(name, block).rstrip()}{rest.split(end)[1]}"
    return document


def _require_markers(found: Sequence[tuple[str, ...]], names: Iterable[str]) -> None:
    wanted = [(kind, name) for name in names for kind in ("begin", "end")]
    for marker in [*wanted, *found]:
        kind, name = marker
        if marker not in wanted:
            raise ModelError(
                f"README.md: the marker `release-guard:{kind} {name}` is of no block; remove it"
            )
        if (times := found.count(marker)) != 1:
            raise ModelError(
                f"README.md: the marker `release-guard:{kind} {name}` stands there {times} times; "
                "it must be there once, or remove all of our markers to begin anew"
            )
    pairs = zip(found[::2], found[1::2], strict=True)
    if any(first != ("begin", last[1]) for first, last in pairs):
        raise ModelError("README.md: markers of release-guard are nested or swapped; mend them")


def _marked(name: str, block: str) -> str:
    return f"<!-- release-guard:begin {name} -->\n{block}<!-- release-guard:end {name} -->\n"
