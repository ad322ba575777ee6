"""A second verifier of releases, written from docs/attestation-format.md alone: no release_guard.

python tests/independent_verifier.py FOLDER PUBLIC_KEY [POLICY_SHA256]
Says `intact` and exits 0, or says what is wrong and exits 4. It does not judge again.
"""

import base64
import hashlib
import json
import stat
import sys
import unicodedata
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
HASHES = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg")
OUTSIDE = {".git", ".gitattributes", ".github", ".gitignore", "model.sig"}  # at the top
SUITE = "2"  # major version
LARGEST = 16 << 20  # bytes of a bundle
WEIGHTS = ["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "onnx", "h5", "msgpack", "npz"]


class WrongError(Exception):
    """Not what it claims to be."""


FAULTS = (WrongError, KeyError, TypeError, ValueError, AttributeError, OSError, RecursionError)


def require(holds, what):
    if not holds:
        raise WrongError(what)


def read(source):
    """JSON that means the same to everyone."""

    def unique(pairs):
        require(len({key for key, _ in pairs}) == len(pairs), "a key stands there twice")
        return dict(pairs)

    def refuse(number):
        raise WrongError(f"{number} is no number")

    require(len(source) <= LARGEST, "too large")
    return json.loads(source.decode(), object_pairs_hook=unique, parse_constant=refuse)


def decode(text):
    raw = base64.b64decode(text, validate=True)
    require(base64.b64encode(raw).decode() == text, "base64 with unused bits")
    return raw


def statement(path, public):
    """Verify a bundle and give the statement in it. No signature covers a bundle's own fields, so
    only those of the format may stand there."""
    name, found = path.name, read(path.read_bytes())
    require(set(found) == {"mediaType", "verificationMaterial", "dsseEnvelope"}, name)
    material, envelope = found["verificationMaterial"], found["dsseEnvelope"]
    require(found["mediaType"] == MEDIA, f"{name}: media type")
    require({"publicKey"} <= set(material) <= {"publicKey", "tlogEntries"}, f"{name}: material")
    require(material.get("tlogEntries") in (None, []), f"{name}: a log")
    require({"hint", "rawBytes"} & set(material["publicKey"]), f"{name}: no key is named")
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    hint = material["publicKey"].get("hint")
    require(hint in (None, "", hashlib.sha256(pem).hexdigest()), f"{name}: another key")
    require(set(envelope) == {"payload", "payloadType", "signatures"}, f"{name}: envelope")
    require(envelope["payloadType"] == KIND.decode(), f"{name}: payload type")
    (signature,) = envelope["signatures"]
    require({"sig"} <= set(signature) <= {"sig", "keyid"}, f"{name}: signature")
    require(signature.get("keyid") in (None, ""), f"{name}: keyid")
    payload = decode(envelope["payload"])
    signed = b" ".join([b"DSSEv1", b"%d" % len(KIND), KIND, b"%d" % len(payload), payload])
    try:
        public.verify(decode(signature["sig"]), signed, ec.ECDSA(HASHES[public.curve.name]))
    except InvalidSignature:
        raise WrongError(f"{name}: signature") from None
    found = read(payload)
    require(found["_type"] == "https://in-toto.io/Statement/v1", f"{name}: statement type")
    return found


def canonical(name):
    """Whether a name means one file, the same everywhere."""
    odd = any(unicodedata.category(character) in {"Cc", "Cs"} for character in name)
    parts = set(name.split("/"))
    return not (odd or "\\" in name or parts & {"", ".", ".."})


def files(folder, prefix=""):
    """SHA-256 of every file, by name, without what no release holds."""
    found = {}
    for entry in sorted((folder / prefix).iterdir()):
        name = f"{prefix}{entry.name}"
        if name in OUTSIDE or name == ".cache/huggingface":
            continue
        mode = entry.lstat().st_mode
        if stat.S_ISDIR(mode):
            found |= files(folder, f"{name}/")
            continue
        require(stat.S_ISREG(mode), f"{name}: a link, or no file")
        require(canonical(name), f"{name!a}: no name for a file")
        with entry.open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def decides_behaviour(name):
    """Weights and configuration: all but evidence and documents."""
    base = name.rpartition("/")[2]
    document = base.endswith((".md", *IMAGES)) or base.startswith(("LICENSE", "NOTICE"))
    weights = base.rpartition(".")[2].lower() in WEIGHTS
    return (weights or not document) and not name.startswith(".release-guard/")


def root(digests):
    """SHA-256 over raw digests in the order of names."""
    return hashlib.sha256(
        b"".join(bytes.fromhex(digests[name]) for name in sorted(digests))
    ).hexdigest()


def signed_files(model):
    """What `model.sig` lists: digest by name."""
    predicate = model["predicate"]
    require(model["predicateType"] == MODEL, "model.sig: predicate type")
    require(set(predicate) == {"resources", "serialization"}, "model.sig: unknown fields")
    serialized = predicate["serialization"]
    fields = {"method", "hash_type", "allow_symlinks", "ignore_paths"}
    require(set(serialized) <= fields, "model.sig: unknown fields")
    require(
        (serialized["method"], serialized["hash_type"]) == ("files", "sha256"), "model.sig: method"
    )
    resources = predicate["resources"]
    names = [resource["name"] for resource in resources]
    require(names and len(set(names)) == len(names), "model.sig: no names, or doubled ones")
    by_parts = sorted(names, key=lambda name: name.split("/"))
    require(names in (sorted(names), by_parts), "model.sig: not sorted")
    require(all(map(canonical, names)), "model.sig: no name for a file")
    require({resource["algorithm"] for resource in resources} == {"sha256"}, "model.sig: digests")
    signed = {resource["name"]: resource["digest"] for resource in resources}
    (subject,) = model["subject"]
    order = b"".join(bytes.fromhex(signed[name]) for name in names)
    require(subject["digest"]["sha256"] == hashlib.sha256(order).hexdigest(), "model.sig: root")
    return signed


def verify(folder, key, policy=None, now=None):
    """Raise one of FAULTS unless the release is intact."""
    public = serialization.load_pem_public_key(Path(key).read_bytes())
    signed = signed_files(statement(folder / "model.sig", public))
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
    check_claims(predicates, found, policy, now or datetime.now(UTC))
    check_evidence(folder, predicates["resistance"], payload)


def check_claims(predicates, found, policy, now):
    """Raise WrongError unless the three agree, on these files, and still hold."""
    resistance, result = predicates["resistance"], predicates["test-result"]
    policies = {resistance["policy"]["digest"]["sha256"], found[".release-guard/policy.toml"]}
    policies |= {entry["digest"]["sha256"] for entry in result["configuration"]}
    require(policies == {policy or found[".release-guard/policy.toml"]}, "policy")
    report = resistance["report"]["digest"]["sha256"]
    require(report == found[".release-guard/evidence.jsonl"], "evidence")
    until = datetime.fromisoformat(resistance["validUntil"])
    require(now < until, "expired")
    require(resistance["suite"]["version"].partition(".")[0] == SUITE, "another suite")
    require((resistance["verdict"], result["result"]) == ("PASS", "PASSED"), "verdict")
    properties = predicates["svr"]["properties"]
    require(properties and isinstance(properties, list), "svr: no property")


def check_evidence(folder, resistance, payload):
    """Raise WrongError unless the evidence's header names this policy and this payload."""
    first = (folder / ".release-guard/evidence.jsonl").read_bytes().split(b"\n", 1)[0]
    header = read(first)["header"]
    require(header["policy"] == resistance["policy"]["digest"]["sha256"], "evidence: other policy")
    require(header["schema_version"] in {1, 2, 3}, "evidence: unknown schema")
    artefacts = resistance.get("artefacts")
    if not header.get("artefacts"):  # before schema 3: one set of weights, however rounded
        require(not artefacts and header["immunized"] == root(payload), "evidence: other weights")
        return
    check_artefacts(artefacts, header["artefacts"], payload)
    fp32 = header["artefacts"].get("fp32", header["immunized"])
    require(fp32 == header["immunized"], "evidence: other weights in fp32")


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
            name.removeprefix(prefix): digest
            for name, digest in payload.items()
            if name.startswith(prefix) and not (prefix == "" and name.startswith(others))
        }
        where = each["folder"] or "top"
        require(mine and root(mine) == each["digest"]["sha256"], f"{where}: other weights")
        require(root(mine) == attacked[each["precision"]], f"{where}: not what was attacked")


def main():
    try:
        verify(Path(sys.argv[1]), *sys.argv[2:4])
    except FAULTS as error:
        sys.stdout.write(f"not intact: {error}\n")
        return 4
    sys.stdout.write("intact\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
