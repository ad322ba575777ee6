"""A second verifier of releases, written from docs/attestation-format.md alone: no release_guard.

python tests/independent_verifier.py FOLDER PUBLIC_KEY [POLICY_SHA256]
Says `intact` and exits 0, or says what is wrong and exits 4. It does not judge again.
"""

import base64
import hashlib
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

KIND = b"application/vnd.in-toto+json"
MEDIA = "application/vnd.dev.sigstore.bundle.v0.3+json"
MODEL = "https://model_signing/signature/v1.0"
CLAIMS = {
    "resistance": "https://release-guard.dev/attestations/resistance/v0.1",
    "test-result": "https://in-toto.io/attestation/test-result/v0.1",
    "svr": "https://in-toto.io/attestation/svr/v0.2",
}
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".npz",
)
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg")


class WrongError(Exception):
    """Not what it claims to be."""


def require(holds, what):
    if not holds:
        raise WrongError(what)


def bundle(payload, signature, public):
    """The one way to write it down: what else stood there would be signed by nobody."""
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    written = {
        "mediaType": MEDIA,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(pem).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": KIND.decode(),
            "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
        },
    }
    return json.dumps(written, sort_keys=True, separators=(",", ":")).encode()


def statement(path, public):
    """Verify a bundle and give the statement in it."""
    source = path.read_bytes()
    envelope = json.loads(source)["dsseEnvelope"]
    (signature,) = envelope["signatures"]
    payload = base64.b64decode(envelope["payload"], validate=True)
    require(source == bundle(payload, base64.b64decode(signature["sig"]), public), path.name)
    signed = b" ".join([b"DSSEv1", b"%d" % len(KIND), KIND, b"%d" % len(payload), payload])
    try:
        public.verify(base64.b64decode(signature["sig"]), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise WrongError(f"{path.name}: signature") from None
    found = json.loads(payload)
    require(found["_type"] == "https://in-toto.io/Statement/v1", f"{path.name}: statement type")
    return found


def files(folder):
    """SHA-256 of every file, by name, without what no release holds."""
    found = {}
    for here, folders, names in os.walk(folder):
        top = Path(here) == folder
        folders[:] = [name for name in folders if not (top and name in {".git", ".github"})]
        for name in names:
            path = Path(here, name)
            require(not path.is_symlink(), f"{path}: a link")
            if not (top and name in {".gitignore", ".gitattributes", "model.sig"}):
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(folder).as_posix()] = digest
    return found


def decides_behaviour(name):
    """Weights and configuration: all but evidence and documents."""
    base = name.rpartition("/")[2]
    document = base.endswith((".md", *IMAGES)) or base.startswith(("LICENSE", "NOTICE"))
    return not document and not name.startswith(".release-guard/")


def root(digests):
    """SHA-256 over raw digests in the order of names."""
    return hashlib.sha256(
        b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))
    ).hexdigest()


def verify(folder, key, policy=None, now=None):
    """Raise WrongError unless the release is intact."""
    public = serialization.load_pem_public_key(Path(key).read_bytes())
    model = statement(folder / "model.sig", public)
    require(model["predicateType"] == MODEL, "model.sig: predicate type")
    serialized = model["predicate"]["serialization"]
    require(
        (serialized["method"], serialized["hash_type"]) == ("files", "sha256"), "model.sig: method"
    )
    resources = model["predicate"]["resources"]
    signed = {resource["name"]: resource["digest"] for resource in resources}
    require(len(signed) == len(resources), "model.sig: doubled names")
    require(model["subject"][0]["digest"]["sha256"] == root(signed), "model.sig: root")
    found = files(folder)
    for name in sorted(found.keys() | signed.keys()):
        require(found.get(name) == signed.get(name), f"{name}: changed, missing or added")
    payload = {name: digest for name, digest in found.items() if decides_behaviour(name)}
    subjects = [("model", root(payload)), *sorted(payload.items())]
    predicates = {}
    for kind, predicate_type in CLAIMS.items():
        claim = statement(folder / ".release-guard" / f"{kind}.sigstore.json", public)
        require(claim["predicateType"] == predicate_type, f"{kind}: predicate type")
        about = [(subject["name"], subject["digest"]["sha256"]) for subject in claim["subject"]]
        require(about == subjects, f"{kind}: subjects")
        predicates[kind] = claim["predicate"]
    check_claims(folder, predicates, found, policy, now or datetime.now(UTC))


def check_claims(folder, predicates, found, policy, now):
    """Raise WrongError unless the three agree, on these files, and still hold."""
    resistance, result = predicates["resistance"], predicates["test-result"]
    policies = {resistance["policy"]["digest"]["sha256"], found[".release-guard/policy.toml"]}
    policies |= {entry["digest"]["sha256"] for entry in result["configuration"]}
    require(policies == {policy or found[".release-guard/policy.toml"]}, "policy")
    report = resistance["report"]["digest"]["sha256"]
    require(report == found[".release-guard/evidence.jsonl"], "evidence")
    first = (folder / ".release-guard/evidence.jsonl").read_bytes().split(b"\n", 1)[0]
    header = json.loads(first)["header"]
    require(header["policy"] in policies, "evidence: of another policy")
    payload = {name: digest for name, digest in found.items() if decides_behaviour(name)}
    artefacts = resistance.get("artefacts")
    if header["schema_version"] < 3:  # one set of weights, whatever it was rounded to
        require(not artefacts and header["immunized"] == root(payload), "evidence: other weights")
    else:
        check_artefacts(artefacts, header["artefacts"], payload)
        fp32 = header["artefacts"].get("fp32", header["immunized"])
        require(fp32 == header["immunized"], "evidence: other weights in fp32")
    until = datetime.fromisoformat(resistance["validUntil"])
    require(now < until, "expired")
    require((resistance["verdict"], result["result"]) == ("PASS", "PASSED"), "verdict")
    require(predicates["svr"]["properties"], "svr: no property")


def check_artefacts(artefacts, attacked, payload):
    """Raise WrongError unless the payload is exactly what was attacked at each precision."""
    prefixes = {
        each["precision"]: each["folder"] + "/" * bool(each["folder"]) for each in artefacts
    }
    require(sum(prefix == "" for prefix in prefixes.values()) == 1, "artefacts: not one at the top")
    require(len(prefixes) == len(artefacts), "artefacts: doubled precisions")
    for each in artefacts:
        prefix = prefixes[each["precision"]]
        others = tuple(other for other in prefixes.values() if other and other != prefix)
        mine = {
            name: digest
            for name, digest in payload.items()
            if name.startswith(prefix) and not (prefix == "" and name.startswith(others))
        }
        where = each["folder"] or "top"
        require(mine and root(mine) == each["digest"]["sha256"], f"{where}: other weights")
        require(root(mine) == attacked[each["precision"]], f"{where}: not what was attacked")


def main():
    try:
        verify(Path(sys.argv[1]), *sys.argv[2:4])
    except (WrongError, KeyError, TypeError, ValueError, OSError) as error:
        sys.stdout.write(f"not intact: {error}\n")
        return 4
    sys.stdout.write("intact\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
