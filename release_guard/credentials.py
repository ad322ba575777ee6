"""Which variables of the environment are secrets: by their looks, since nobody can list them all.

What works on models gets none of them. A variable too few is a nuisance, one too many a leak.
"""

import os
import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from urllib.parse import quote

_HOLDS = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASS|CREDENTIAL|APIKEY|NETRC|KUBECONFIG|WEBHOOK|COOKIE|BEARER|KEY$|"
    r"(?:^|_)(?:KEYS?|PATS?|PWD|AUTH|JWT|DSN|SAS|ID_?RSA)(?:_|$)"
)
_OPENS = re.compile(
    r"OIDC|IDENTITY|OAUTH|^(?:RELEASE_GUARD|ACTIONS|GITHUB|GITLAB|CI_JOB|GIT|SSH|GPG|AWS|AZURE|ARM|GCP|GOOGLE|VAULT|"
    r"DOCKER|TWINE|UV_PUBLISH|SIGSTORE|COSIGN|BOTO|PG|MYSQL|REDIS)_"
)
_HARMLESS = frozenset(  # two folders, and the door of the cluster that workers are part of
    {"PWD", "OLDPWD", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
)
_SHORTEST = 8  # characters; what is shorter stands in any text
_VALUE = re.compile(
    r"-----BEGIN |"  # a key
    r"\b[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]*@|"  # a name and a password in an address
    r"\b(?:hf_|api_org_|gh[opsur]_|github_pat_|glpat-|sk-|xox[abprs]-|AKIA|ASIA|pypi-)"
    r"[A-Za-z0-9_-]{12}|"  # what the tokens of well-known services begin with
    r"\beyJ[A-Za-z0-9_-]{8,}\.eyJ",  # an OIDC token
    re.IGNORECASE,
)


def is_secret(name: str, value: str) -> bool:
    """Whether a variable looks like a credential, leads to one, or gives power over a workflow."""
    if name in _HARMLESS:
        return False
    return _holds_one(name, value) or bool(_OPENS.search(name.upper()))


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are none."""
    return {name: value for name, value in environment.items() if not is_secret(name, value)}


def masked(text: str, environment: Mapping[str, str]) -> str:
    """The text with the name of a variable instead of a secret it holds.

    For what others said: a server may repeat the token that it was sent, a library an address with
    a password in it, as they are, percent-encoded or in base64.
    """
    for name, value in environment.items():
        if name not in _HARMLESS and _holds_one(name, value) and not os.path.exists(value):  # noqa: PTH110
            for spelling in _spellings(value):
                text = text.replace(spelling, f"<{name}>")
    return text


def _holds_one(name: str, value: str) -> bool:
    return bool(_HOLDS.search(name.upper()) or _VALUE.search(value))


def _spellings(value: str) -> Iterator[str]:
    """How a secret may be written; of a key in several lines, each."""
    for part in (value, *value.splitlines()):
        if len(part) >= _SHORTEST and not part.startswith("-----"):
            yield part
            yield quote(part, safe="")
            yield b64encode(os.fsencode(part)).decode().rstrip("=")
