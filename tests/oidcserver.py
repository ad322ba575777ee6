"""A Hub with a trusted publisher: no token but the one it gives for an identity of the CI is taken.

with TrustedHub(trusts="acme/model") as hub:
    runner = Runner(..., identity=hub.identity, variables={"HF_ENDPOINT": hub.url})
"""

import re
import secrets
from typing import Any

from hubserver import NO_REPOSITORY, Answer, HubServer, Request, problem
from sigstoreserver import SigstoreServer

_GRANT = "urn:ietf:params:oauth:grant-type:token-exchange"
_ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"  # noqa: S105  its type


class TrustedHub(HubServer):
    """It plays the CI's issuer of identity tokens as well.

    Attributes:
        trusts: The repository whose publisher trusts this CI; no other is given a token.
        sigstore: Gives the identities for Sigstore, if there is one.
        exchanges: Resources that tokens were asked for.
        given: Tokens it gave.
        arrived: What came as authorization at any other route.
    """

    def __init__(self, *, trusts: str, **options: Any) -> None:
        super().__init__(**options)
        self.trusts = trusts
        self.sigstore: SigstoreServer | None = None
        self.request_token = secrets.token_hex(16)
        self.identities: dict[str, str] = {}
        self.exchanges: list[str] = []
        self.given: list[str] = []
        self.arrived: list[str | None] = []
        self.routes = [
            ("GET", r"/identity", _identity),
            ("POST", r"/oauth/token", _exchange),
            *self.routes,
        ]

    @property
    def identity(self) -> dict[str, str]:
        """What the CI puts into the environment of a job that may ask for an identity."""
        return {
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/identity?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.request_token,
        }

    def admit(self, request: Request) -> Answer | None:
        if request.path in {"/identity", "/oauth/token"} or request.path.startswith("/lfs/"):
            return None
        self.arrived.append(request.headers["authorization"])
        known = {f"Bearer {token}" for token in self.given}
        return None if self.arrived[-1] in known else problem(401, "Invalid credentials")


def _identity(request: Request, _: "re.Match[str]") -> Answer:
    server = _trusted(request)
    scheme, _, token = request.headers["authorization"].partition(" ")
    if (scheme.lower(), token) != ("bearer", server.request_token):
        return problem(401, "who is asking?")
    audience = request.query["audience"][0]
    if audience == "sigstore":
        return Answer({"value": server.sigstore.token()}) if server.sigstore else NO_REPOSITORY
    token = f"identity-{secrets.token_hex(16)}"
    server.identities[token] = audience
    return Answer({"value": token})


def _exchange(request: Request, _: "re.Match[str]") -> Answer:
    server, asked = _trusted(request), request.json
    server.exchanges.append(asked["resource"])
    trusted = (
        asked["grant_type"] == _GRANT
        and asked["subject_token_type"] == _ID_TOKEN
        and server.identities.get(asked["subject_token"]) == server.url
        and asked["resource"] == server.trusts
    )
    if not trusted:
        return Answer({"error": "invalid_grant", "error_description": "no such publisher"}, 400)
    server.given.append(f"hf_jwt_{secrets.token_hex(16)}")
    return Answer({"access_token": server.given[-1], "token_type": "bearer", "expires_in": 3600})


def _trusted(request: Request) -> TrustedHub:
    assert isinstance(request.server, TrustedHub)
    return request.server
