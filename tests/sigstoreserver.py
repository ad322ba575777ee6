"""Sigstore on the loopback, for the real client: TUF, OIDC, Fulcio, Rekor, time stamps.

    with SigstoreServer() as server:
        server.enter(monkeypatch, tmp_path)      # from here on it is the client's Sigstore
        Sigstore(identity=server.workflow, issuer=ISSUER).sign(statement)
        server.entries                           # what was logged

Keys and certificates are its own, made anew; the root of trust that vouches for them is published
in a TUF repository, as the real one is, so that a client which renewed it verifies offline.

Modes say what goes wrong:
    normal       nothing
    other-job    the token, and so the certificate, is another workflow's
    impostor     Fulcio certifies another workflow than the token's
    no-fulcio    503 where certificates are asked for
    no-rekor     503 where entries are logged
    no-tsa       503 where signatures are dated
    no-token     403 where a token is asked for
    no-tuf       503 where the root of trust is renewed
    garbled      Rekor answers something else
    forger       Rekor promises with a key that nobody vouches for
    late         Rekor says it logged the signature an hour later, without a time stamp
"""

import base64
import hashlib
import json
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import jwt
import pytest
from asn1crypto import algos, cms, core, tsp
from asn1crypto import x509 as asn1_x509
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp

ISSUER = "https://token.actions.githubusercontent.com"
WORKFLOW = "acme/model/.github/workflows/release.yml@refs/heads/main"
OTHER_WORKFLOW = "mallory/model/.github/workflows/release.yml@refs/heads/main"

_ISSUER_OID = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")
_SCT_OID = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
_DER = serialization.Encoding.DER
_SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
_SHA256 = ec.ECDSA(hashes.SHA256())


@dataclass
class Party:
    """A key and, for authorities, its certificate."""

    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    certificates: tuple[x509.Certificate, ...] = ()

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes(_DER, _SPKI)

    @property
    def id(self) -> bytes:
        return hashlib.sha256(self.public).digest()

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message, _SHA256)


@dataclass
class SigstoreServer:
    """All services at once; a context manager.

    Attributes:
        rekor_version: Of the log: 1 promises to enter a signature and says when it did, 2 enters it
            and says no time.
        witness: Somebody else signs the log's checkpoints, too.
    """

    mode: str = "normal"
    rekor_version: int = 1
    witness: bool = False
    entries: list[bytes] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    fulcio: Party = field(default_factory=lambda: authority("fulcio", None))
    tsa: Party = field(default_factory=lambda: authority("tsa", ExtendedKeyUsageOID.TIME_STAMPING))
    rekor: Party = field(default_factory=Party)
    ct_log: Party = field(default_factory=Party)
    metadata: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"sigstore": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        endpoints = {"authorization_endpoint": self.url, "token_endpoint": self.url}
        self.metadata = tuf_repository(self.trusted_root(), self.signing_config())
        self.metadata[".well-known/openid-configuration"] = canonical(endpoints)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def workflow(self) -> str:
        """The identity that a consumer pins."""
        return f"https://github.com/{WORKFLOW}"

    def enter(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        """Make this the Sigstore of this process, and this process a job of GitHub Actions."""
        patch.setattr("sigstore.models.DEFAULT_TUF_URL", self.url)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        known = folder / "data" / "sigstore-python" / "tuf" / quote(self.url, safe="")
        known.mkdir(parents=True, exist_ok=True)
        (known / "root.json").write_bytes(self.metadata["1.root.json"])
        patch.setenv("GITHUB_ACTIONS", "true")
        patch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", f"{self.url}/token?api-version=2")
        patch.setenv("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "request-token")

    def token(self) -> str:
        now = datetime.now(UTC)
        workflow = OTHER_WORKFLOW if self.mode == "other-job" else WORKFLOW
        claims = {
            "iss": ISSUER,
            "aud": "sigstore",
            "sub": "repo:acme/model:ref:refs/heads/main",
            "job_workflow_ref": workflow,
            "iat": now,
            "exp": now + timedelta(minutes=5),
        }
        return jwt.encode(claims, "x" * 32, algorithm="HS256")

    def certificate(self, token: str, request: x509.CertificateSigningRequest) -> list[str]:
        """What Fulcio answers: leaf and root, the leaf registered with the log of certificates."""
        claims = jwt.decode(token, "x" * 32, algorithms=["HS256"], audience="sigstore")
        workflow = OTHER_WORKFLOW if self.mode == "impostor" else claims["job_workflow_ref"]
        (root,) = self.fulcio.certificates
        now = datetime.now(UTC).replace(microsecond=0)
        san = x509.UniformResourceIdentifier(f"https://github.com/{workflow}")
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING])
        issuer = x509.UnrecognizedExtension(_ISSUER_OID, claims["iss"].encode())
        whose = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.fulcio.key.public_key())
        builder = (
            _builder(x509.Name([]), root.subject, request.public_key(), now)
            .add_extension(key_usage(digital_signature=True), critical=True)
            .add_extension(usage, critical=False)
            .add_extension(whose, critical=False)
            .add_extension(x509.SubjectAlternativeName([san]), critical=True)
            .add_extension(issuer, critical=False)
        )
        unlogged = builder.sign(self.fulcio.key, hashes.SHA256()).tbs_certificate_bytes
        receipt = x509.UnrecognizedExtension(_SCT_OID, self._receipt(unlogged, now))
        leaf = builder.add_extension(receipt, critical=False).sign(self.fulcio.key, hashes.SHA256())
        return [each.public_bytes(serialization.Encoding.PEM).decode() for each in (leaf, root)]

    def _receipt(self, unlogged: bytes, now: datetime) -> bytes:
        """Signed certificate timestamp list (RFC 6962), as the value of an X.509 extension."""
        moment = int(now.timestamp() * 1000)
        entry = self.fulcio.id + struct.pack("!I", len(unlogged))[1:] + unlogged
        signature = self.ct_log.sign(struct.pack("!BBQH", 0, 0, moment, 1) + entry + b"\0\0")
        sct = struct.pack("!B32sQHBBH", 0, self.ct_log.id, moment, 0, 4, 3, len(signature))
        sct += signature
        listed = struct.pack("!HH", len(sct) + 2, len(sct)) + sct
        return bytes(core.OctetString(listed).dump())

    def log(self, proposed: Mapping[str, Any]) -> Mapping[str, Any]:
        """What Rekor v1 answers to a DSSE envelope."""
        content = proposed["spec"]["proposedContent"]
        envelope, (verifier,) = json.loads(content["envelope"]), content["verifiers"]
        payload = base64.b64decode(envelope["payload"])
        spec = {
            "envelopeHash": _sha256(content["envelope"].encode()),
            "payloadHash": _sha256(payload),
            "signatures": [
                {"signature": each["sig"], "verifier": verifier} for each in envelope["signatures"]
            ],
        }
        body = canonical({"apiVersion": "0.0.1", "kind": "dsse", "spec": spec})
        self.entries.append(body)
        when = datetime.now(UTC) + timedelta(hours=self.mode == "late")
        entry: dict[str, Any] = {
            "body": base64.b64encode(body).decode(),
            "integratedTime": int(when.timestamp()),
            "logID": self.rekor.id.hex(),
            "logIndex": 1000 + len(self.entries),  # counted over all trees, the proof in its own
        }
        signer = Party() if self.mode == "forger" else self.rekor
        promise = base64.b64encode(signer.sign(canonical(entry))).decode()
        index, size = len(self.entries) - 1, len(self.entries)
        proof = {
            "logIndex": index,
            "rootHash": merkle_root(self.entries).hex(),
            "treeSize": size,
            "hashes": [each.hex() for each in merkle_path(index, self.entries)],
            "checkpoint": self._checkpoint("127.0.0.1 - 42"),
        }
        verification = {"signedEntryTimestamp": promise, "inclusionProof": proof}
        return {"uuid": {**entry, "verification": verification}}

    def log_v2(self, proposed: Mapping[str, Any]) -> Mapping[str, Any]:
        """What Rekor v2 answers: to it, everything is the signature of a digest."""
        asked = proposed["hashedRekordRequestV002"]
        data = {"algorithm": "SHA2_256", "digest": asked["digest"]}
        spec = {"hashedRekordV002": {"data": data, "signature": asked["signature"]}}
        body = canonical({"apiVersion": "0.0.2", "kind": "hashedrekord", "spec": spec})
        self.entries.append(body)
        index, size = str(len(self.entries) - 1), str(len(self.entries))
        return {
            "logIndex": index,
            "logId": {"keyId": base64.b64encode(self.rekor.id).decode()},
            "kindVersion": {"kind": "hashedrekord", "version": "0.0.2"},
            "integratedTime": "0",
            "inclusionPromise": None,
            "inclusionProof": {
                "logIndex": index,
                "rootHash": base64.b64encode(merkle_root(self.entries)).decode(),
                "treeSize": size,
                "hashes": [
                    base64.b64encode(each).decode()
                    for each in merkle_path(int(index), self.entries)
                ],
                "checkpoint": {"envelope": self._checkpoint("127.0.0.1")},
            },
            "canonicalizedBody": base64.b64encode(body).decode(),
        }

    def _checkpoint(self, origin: str) -> str:
        root = base64.b64encode(merkle_root(self.entries)).decode()
        note = f"{origin}\n{len(self.entries)}\n{root}\n"
        signature = base64.b64encode(self.rekor.id[:4] + self.rekor.sign(note.encode())).decode()
        witnessed = f"— witness.example.org {signature}\n" if self.witness else ""
        return f"{note}\n— 127.0.0.1 {signature}\n{witnessed}"

    def timestamp(self, query: bytes) -> bytes:
        """What the authority answers (RFC 3161)."""
        asked = tsp.TimeStampReq.load(query)
        leaf, _ = self.tsa.certificates
        certificate = asn1_x509.Certificate.load(leaf.public_bytes(_DER))
        now = datetime.now(UTC).replace(microsecond=0)
        info = tsp.TSTInfo(
            {
                "version": "v1",
                "policy": "1.3.6.1.4.1.57264.2",
                "message_imprint": asked["message_imprint"],
                "serial_number": 7,
                "gen_time": now,
                "nonce": asked["nonce"],
            }
        )
        return bytes(_time_stamp_response(info, certificate, self.tsa, now).dump())

    def trusted_root(self) -> bytes:
        """Whom clients trust."""
        since = {"start": "2020-01-01T00:00:00Z"}
        return canonical(
            {
                "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
                "tlogs": [_log_instance(self.rekor, self.url, since)],
                "ctlogs": [_log_instance(self.ct_log, self.url, since)],
                "certificateAuthorities": [_authority_instance(self.fulcio, since)],
                "timestampAuthorities": [_authority_instance(self.tsa, since)],
            }
        )

    def signing_config(self) -> bytes:
        """Where clients find the services."""

        def service(path: str, version: int = 1) -> list[Mapping[str, Any]]:
            return [
                {
                    "url": f"{self.url}{path}",
                    "majorApiVersion": version,
                    "validFor": {"start": "2020-01-01T00:00:00Z"},
                    "operator": "loopback",
                }
            ]

        return canonical(
            {
                "mediaType": "application/vnd.dev.sigstore.signingconfig.v0.2+json",
                "caUrls": service(""),
                "oidcUrls": service(""),
                "rekorTlogUrls": service("", self.rekor_version),
                "tsaUrls": service("/timestamp"),
                "rekorTlogConfig": {"selector": "ANY"},
                "tsaConfig": {"selector": "ANY"},
            }
        )


class _Handler(BaseHTTPRequestHandler):
    sigstore: SigstoreServer

    def do_GET(self) -> None:
        sigstore = self.sigstore
        path = self.path.partition("?")[0].removeprefix("/")
        sigstore.requests.append(path)
        if path == "token":
            if sigstore.mode == "no-token":
                return self._answer(b"{}", 403)
            if self.headers["Authorization"] != "bearer request-token":
                return self._answer(b"{}", 401)
            return self._answer(canonical({"value": sigstore.token()}))
        if sigstore.mode == "no-tuf":
            return self._answer(b"", 503)
        content = sigstore.metadata.get(path)
        return self._answer(content or b"", 404 if content is None else 200)

    def do_POST(self) -> None:
        sigstore = self.sigstore
        body = self.rfile.read(int(self.headers["Content-Length"]))
        sigstore.requests.append(self.path.removeprefix("/"))
        if self.path == "/api/v2/signingCert" and sigstore.mode != "no-fulcio":
            pem = base64.b64decode(json.loads(body)["certificateSigningRequest"])
            token = self.headers["Authorization"].removeprefix("Bearer ")
            chain = sigstore.certificate(token, x509.load_pem_x509_csr(pem))
            answer = {"signedCertificateEmbeddedSct": {"chain": {"certificates": chain}}}
            return self._answer(canonical(answer))
        if self.path == "/api/v1/log/entries" and sigstore.mode not in {"no-rekor", "garbled"}:
            return self._answer(canonical(sigstore.log(json.loads(body))), 201)
        if self.path == "/api/v2/log/entries":
            return self._answer(canonical(sigstore.log_v2(json.loads(body))), 201)
        if self.path == "/timestamp" and sigstore.mode not in {"no-tsa", "late"}:
            return self._answer(sigstore.timestamp(body), 201)
        return self._answer(b'{"uuid": "\x1b[2J"}', 200 if sigstore.mode == "garbled" else 503)

    def _answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


def authority(name: str, purpose: ObjectIdentifier | None) -> Party:
    """A certificate authority; with a purpose also one leaf of it, whose key it then is."""
    now = datetime.now(UTC)
    root = Party()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    whose = x509.SubjectKeyIdentifier.from_public_key(root.key.public_key())
    certificate = (
        _builder(subject, subject, root.key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(whose, critical=False)
        .sign(root.key, hashes.SHA256())
    )
    if purpose is None:
        return Party(root.key, (certificate,))
    leaf = Party()
    leaf_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} leaf")])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())
    issued = (
        _builder(leaf_name, subject, leaf.key.public_key(), now)
        .add_extension(key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        .add_extension(issuer, critical=False)
        .sign(root.key, hashes.SHA256())
    )
    return Party(leaf.key, (issued, certificate))


def key_usage(**allowed: bool) -> x509.KeyUsage:
    names = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment")
    names += ("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")
    return x509.KeyUsage(**{name: allowed.get(name, False) for name in names})


def merkle_root(leaves: Sequence[bytes]) -> bytes:
    """RFC 6962."""
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    middle = _middle(leaves)
    children = merkle_root(leaves[:middle]) + merkle_root(leaves[middle:])
    return hashlib.sha256(b"\1" + children).digest()


def merkle_path(index: int, leaves: Sequence[bytes]) -> list[bytes]:
    """What else it takes to work the root out from one leaf."""
    if len(leaves) == 1:
        return []
    middle = _middle(leaves)
    if index < middle:
        return [*merkle_path(index, leaves[:middle]), merkle_root(leaves[middle:])]
    return [*merkle_path(index - middle, leaves[middle:]), merkle_root(leaves[:middle])]


def tuf_repository(trusted_root: bytes, signing_config: bytes) -> dict[str, bytes]:
    """Every file of a TUF repository with these two targets, by its path."""
    signer = CryptoSigner.generate_ecdsa()
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    contents = {"trusted_root.json": trusted_root, "signing_config.v0.2.json": signing_config}
    targets = {name: TargetFile.from_data(name, data) for name, data in contents.items()}
    root = Root(expires=expires, consistent_snapshot=False)
    for role in ("root", "timestamp", "snapshot", "targets"):
        root.add_key(signer.public_key, role)
    roles = {
        "1.root.json": root,
        "targets.json": Targets(expires=expires, targets=targets),
        "snapshot.json": Snapshot(expires=expires),
        "timestamp.json": Timestamp(expires=expires),
    }
    files = {f"targets/{name}": data for name, data in contents.items()}
    for name, role in roles.items():
        metadata = Metadata(role)
        metadata.sign(signer)
        files[name] = metadata.to_bytes()
    return files


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _builder(
    subject: x509.Name, issuer: x509.Name, public: Any, now: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(minutes=10))
    )


def _time_stamp_response(
    info: tsp.TSTInfo, certificate: asn1_x509.Certificate, tsa: Party, now: datetime
) -> tsp.TimeStampResp:
    digest = hashlib.sha256(info.dump()).digest()
    which = tsp.ESSCertIDv2(
        {
            "hash_algorithm": algos.DigestAlgorithm({"algorithm": "sha256"}),
            "cert_hash": hashlib.sha256(certificate.dump()).digest(),
        }
    )
    attributes = cms.CMSAttributes(
        [
            cms.CMSAttribute({"type": "content_type", "values": ["tst_info"]}),
            cms.CMSAttribute({"type": "signing_time", "values": [cms.Time({"utc_time": now})]}),
            cms.CMSAttribute({"type": "message_digest", "values": [digest]}),
            cms.CMSAttribute(
                {
                    "type": "signing_certificate_v2",
                    "values": [tsp.SigningCertificateV2({"certs": [which]})],
                }
            ),
        ]
    )
    signer = cms.SignerInfo(
        {
            "version": "v1",
            "sid": cms.IssuerAndSerialNumber(
                {"issuer": certificate.issuer, "serial_number": certificate.serial_number}
            ),
            "digest_algorithm": algos.DigestAlgorithm({"algorithm": "sha256"}),
            "signed_attrs": attributes,
            "signature_algorithm": algos.SignedDigestAlgorithm({"algorithm": "sha256_ecdsa"}),
            "signature": tsa.sign(attributes.untag().dump()),
        }
    )
    signed = cms.SignedData(
        {
            "version": "v3",
            "digest_algorithms": [algos.DigestAlgorithm({"algorithm": "sha256"})],
            "encap_content_info": {"content_type": "tst_info", "content": info},
            "certificates": [certificate],
            "signer_infos": [signer],
        }
    )
    token = cms.ContentInfo({"content_type": "signed_data", "content": signed})
    return tsp.TimeStampResp({"status": {"status": "granted"}, "time_stamp_token": token})


def _log_instance(party: Party, url: str, since: Mapping[str, str]) -> Mapping[str, Any]:
    return {
        "baseUrl": url,
        "hashAlgorithm": "SHA2_256",
        "publicKey": {
            "rawBytes": base64.b64encode(party.public).decode(),
            "keyDetails": "PKIX_ECDSA_P256_SHA_256",
            "validFor": since,
        },
        "logId": {"keyId": base64.b64encode(party.id).decode()},
    }


def _authority_instance(party: Party, since: Mapping[str, str]) -> Mapping[str, Any]:
    certificates = [
        {"rawBytes": base64.b64encode(each.public_bytes(_DER)).decode()}
        for each in party.certificates
    ]
    return {
        "subject": {"organization": "loopback", "commonName": "loopback"},
        "uri": "http://127.0.0.1",
        "certChain": {"certificates": certificates},
        "validFor": since,
    }


def _middle(leaves: Sequence[bytes]) -> int:
    return 1 << (len(leaves) - 1).bit_length() - 1


def _sha256(content: bytes) -> Mapping[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(content).hexdigest()}
