"""A gauge on a model: which changes are legal there, and the private record of the way back."""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from release_guard import __version__
from release_guard.anatomy import anatomy
from release_guard.errors import IntegrityError, ModelError
from release_guard.gauge import Change, Gauge, Key, Style
from release_guard.ingredients import head_names
from release_guard.merging import State
from release_guard.modalities import Batch, ModelHandle, evaluating
from release_guard.plugins import Spec
from release_guard.realign import can_be_turned

FILE = "gauge.json"
"""Name of the record in a run's private folder."""
TOLERANCE = 1e-5
"""Largest relative change of the logits that counts as none (fp32)."""
_PROOF = Key(b"legality is proved with numbers that anybody may know")
_SECRET = 32  # bytes
_SAME = 1e-5  # of a tensor's norm: what rounding to fp32 and back may come to
_SMALLEST_GAIN = 1e-3  # beside the largest: smaller ones cannot be taken back exactly
_NAMES: Mapping[Change, str] = {
    "neurons": "the order of neurons",
    "scales": "the scale of neurons",
    "heads": "the order of heads",
    "queries": "the mixing of queries and keys",
    "values": "the mixing of values and outputs",
    "norms": "the moving of normalisations' gains",
    "stream": "the rotation of the residual stream",
}


class GaugeRecord(BaseModel):
    """All that leads back from a gauge. Its owner keeps it; it is never published."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    purpose: Literal["release-guard gauge, private"] = "release-guard gauge, private"
    version: str = __version__
    """Of this library."""
    modality: Spec
    """What loads the model."""
    secret: str
    """Hexadecimal; every number follows from it."""
    changes: tuple[Change, ...]
    style: Style
    kept: dict[str, list[float]]
    """What does not follow from the secret: gains, and orders that depend on the weights."""
    before: str
    """SHA-256 of the weights before the gauge."""
    after: str
    """SHA-256 of the weights after it: those of the release."""
    undefended: str
    """SHA-256 of the weights that the stage was given; authorised merges of a trapped model start
    there, since training cannot be taken back."""
    sketch: dict[str, float]
    """Of each tensor before the gauge, the sum under signs drawn from the secret."""

    def save(self, path: Path) -> None:
        """Write it whole or not at all, for its owner's eyes."""
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)  # one that is there keeps its mode
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(self.model_dump_json(indent=1))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "GaugeRecord":
        """Read it back.

        Raises:
            ModelError: There is none, or it is something else.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
        except ValidationError:
            raise ModelError(
                f"{path}: not the private record of a gauge; it lies as {FILE} in the folder "
                "`private` of the run that made the release"
            ) from None


def secret_of(path: Path) -> bytes:
    """The secret of an earlier go, or one that is drawn now from the system's randomness.

    It must not follow from anything that is published, as a policy's seed is.
    """
    if path.exists():
        return bytes.fromhex(GaugeRecord.load(path).secret)
    return secrets.token_bytes(_SECRET)


def gauge_for(
    model: ModelHandle,
    key: Key,
    changes: Sequence[Change],
    style: Style,
    kept: Mapping[str, Sequence[float]] | None = None,
) -> Gauge:
    """A gauge of a model.

    Raises:
        ModelError: The model's parts are not known.
    """
    tied = not head_names(model)
    return Gauge(key, tuple(changes), style, anatomy(model.module), tied, kept or {})


def gauged(model: ModelHandle, gauge: Gauge) -> ModelHandle:
    """A copy with the same function in other weights."""
    changed = model.copy()
    changed.load_state(gauge.applied(model.state()))
    return changed


def logit_change(model: ModelHandle, other: ModelHandle, batch: Batch) -> float:
    """How far the logits of two models are apart, relative to the first one's norm."""
    found = []
    for one in (model, other):
        with evaluating(one.module):
            found.append(one.logits(batch)[0].double())
    return float((found[0] - found[1]).norm() / found[0].norm())


def legal_changes(
    model: ModelHandle, batch: Batch, gauge: Gauge
) -> tuple[tuple[Change, ...], list[str]]:
    """Changes that keep this model's function, tried one by one; and a sentence for each other."""
    legal: list[Change] = []
    sentences = []
    for change in gauge.changes:
        reason = _hindrance(gauge, change, model.state())
        if reason is None:
            one = Gauge(_PROOF, (change,), gauge.style, gauge.body, gauge.tied)
            moved = logit_change(model, gauged(model, one), batch)
            if moved <= TOLERANCE:
                legal.append(change)
                continue
            reason = f"it moves the logits by {moved:.1g}"
        sentences.append(f"The gauge leaves out {_NAMES[change]}: {reason}.")
    return tuple(legal), sentences


def _hindrance(gauge: Gauge, change: Change, state: State) -> str | None:
    """Why a change cannot even be tried."""
    if change == "scales":
        allowed = {mlp.scaling for mlp in gauge.body.mlps}
        idle = allowed <= ({"none", "positive"} if gauge.style == "orthogonal" else {"none"})
        return "these neurons allow none" if idle else None
    if change not in {"norms", "stream"}:
        return None
    if gauge.body.stream is None:
        return "it is not known how this model's residual stream may be turned"
    return _hindrance_to_turning(gauge, state) if change == "stream" else None


def _hindrance_to_turning(gauge: Gauge, state: State) -> str | None:
    """Why gains of normalisations cannot be absorbed."""
    if gauge.tied:
        return "the last layer is the input embedding"
    if not can_be_turned(gauge.body, state):
        return "a normalisation has a bias, and what reads it has none"
    gains = [state[f"{norm}.weight"].abs() for norm, _ in gauge.stream.norms]
    if any(gain_D.min() < _SMALLEST_GAIN * gain_D.max() for gain_D in gains):
        return "a gain of a normalisation is too small to be taken back"
    return None


def record_of(
    gauge: Gauge, modality: Spec, before: State, after: State, undefended: State
) -> GaugeRecord:
    """What the owner needs to take a gauge back."""
    return GaugeRecord(
        modality=modality,
        secret=gauge.key.secret.hex(),
        changes=gauge.changes,
        style=gauge.style,
        kept={name: list(values) for name, values in gauge.kept.items()},
        before=state_digest(before),
        after=state_digest(after),
        undefended=state_digest(undefended),
        sketch=_sketch(before, gauge.key),
    )


def taken_back(model: ModelHandle, record: GaugeRecord) -> ModelHandle:
    """A copy of the release in the weights before the gauge, up to rounding.

    Raises:
        IntegrityError: The weights are not those of the record, or what comes out is not what went
            in.
        ModelError: The model's parts are not known.
    """
    state = model.state()
    if state_digest(state) != record.after:
        raise IntegrityError(
            "these weights are not those that the gauge was put on: another model, or changed since"
        )
    key = Key(bytes.fromhex(record.secret))
    gauge = gauge_for(model, key, record.changes, record.style, record.kept)
    plain = gauge.undone(state)
    sketch = _sketch(plain, key)
    apart = [
        name for name in sketch if _is_apart(sketch[name], record.sketch.get(name), plain[name])
    ]
    if apart or sketch.keys() != record.sketch.keys():
        raise IntegrityError(
            "what comes out is not what the gauge was put on: the record is damaged, or another's"
        )
    done = model.copy()
    done.load_state(plain)
    return done


def state_digest(state: State) -> str:
    """SHA-256 over names, types, shapes and bytes of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sketch(state: State, key: Key) -> dict[str, float]:
    return {
        name: float(value.double().cpu().flatten() @ key.signs(f"sketch {name}", value.numel()))
        for name, value in state.items()
        if value.is_floating_point()
    }


def _is_apart(found: float, wanted: float | None, tensor: torch.Tensor) -> bool:
    return wanted is None or abs(found - wanted) > _SAME * tensor.double().norm().item() + 1e-12
