"""Three acts on a real model: unprotected it is refused, immunized it goes out, a byte changes.

Everything it makes stays in one folder for people to try things on.

    model/  policy.toml  data/  key.pem  key.pub  hub/OWNER/NAME/  tampered/  runs/
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from release_guard.deliver import Published
from release_guard.errors import IntegrityError, ModelError
from release_guard.manifest import DirectoryTree
from release_guard.policy import Policy
from release_guard.preflight import Order
from release_guard.publish import publish
from release_guard.run import folder_made_whole
from release_guard.session import Session
from release_guard.signers.key import Key, generate_key
from release_guard.verify import Trust, require_intact, verify

if TYPE_CHECKING:
    from release_guard.modalities import ModelHandle

REPO = "atelier/fashion-vit"
_STEPS, _BATCH, _RATE = 2_000, 64, 2e-3

Say = Callable[[str], None]


def run_demo(output: Path, session: Session, say: Say, *, policy_name: str = "policy") -> int:
    """Play the three acts; 0 if each went as it should, else the exit code of what did not.

    Args:
        output: Folder for everything.
        session: Workers and progress.
        say: What is told on the way.
        policy_name: Which of the example's policies.
    """
    _set_up(output, session, say, policy_name)
    policy = Policy.load(output / "policy.toml")

    say("Act 1. Publish the model as it is: nothing protects it.")
    order = Order(str(output / "model"), REPO, policy, as_is=True)
    unprotected = publish(order, output / "runs" / "unprotected", session)
    say(_told(unprotected))

    say("Act 2. Immunize it, attack the result, judge it by the same policy.")
    order = Order(str(output / "model"), REPO, policy)
    immunized = publish(order, output / "runs" / "immunized", session)
    say(_told(immunized))
    if unprotected.receipt is not None or immunized.receipt is None:
        return 3

    say("Act 3. Change one byte of the weights that were pushed, and verify.")
    noticed = _tamper(output, policy, session)
    say(noticed or "The change was NOT noticed.")
    return 0 if noticed else 1


def _set_up(output: Path, session: Session, say: Say, policy_name: str) -> None:
    example = example_folder()
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "data").is_dir():
        with folder_made_whole(output / "data") as folder:
            for name in ("retained.parquet", "restricted.parquet"):
                shutil.copyfile(example / name, folder / name)
    shutil.copyfile(example / f"{policy_name}.toml", output / "policy.toml")
    if not (output / "key.pem").exists():
        generate_key(output, password=None)
    if not (output / "model").is_dir():
        say("Set-up. Train a small vision transformer on five kinds of clothes.")
        with folder_made_whole(output / "model") as folder:
            train(output, session).save(folder)


def example_folder() -> Path:
    """Data and policy of the demo: inside the installed package, or beside it in a checkout.

    Raises:
        ModelError: They are in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / "_demo", package.parent / "examples" / "fashion_mnist"):
        if (folder / "policy.toml").is_file():
            return folder
    raise ModelError("the demo's data are not installed; run it from a clone of the repository")


def train(output: Path, session: Session) -> "ModelHandle":
    """The model to protect: a ViT of 140,000 weights, trained on the retained classes alone."""
    import torch  # noqa: PLC0415
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil  # noqa: PLC0415

    from release_guard.checkpoints import quiet  # noqa: PLC0415
    from release_guard.modalities import Modality  # noqa: PLC0415

    policy = Policy.load(output / "policy.toml")
    names = ("t-shirt", "trouser", "pullover", "dress", "coat")
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(policy.seed)
        untrained = ViTForImageClassification(config)
    with folder_made_whole(output / "untrained") as folder, quiet():
        untrained.save_pretrained(folder)
        ViTImageProcessorPil(
            size={"height": 28, "width": 28}, image_mean=[0.286], image_std=[0.353]
        ).save_pretrained(folder)
    model = Modality.build(policy.modality).load(str(output / "untrained"))
    shutil.rmtree(output / "untrained")
    return _fit(model, policy, session)


def _fit(model: "ModelHandle", policy: Policy, session: Session) -> "ModelHandle":
    import torch  # noqa: PLC0415

    from release_guard.modalities import settle_threads  # noqa: PLC0415

    settle_threads(model, session.workers)
    model.module.train()
    chance = torch.Generator().manual_seed(policy.seed)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    batches = model.batches(policy.retain.dataset, "retain", size=_BATCH, seed=policy.seed)
    for step in range(_STEPS):
        batch = next(batches)
        pixels = batch["pixels"]
        mirrored_N = torch.rand(len(pixels), generator=chance).round().bool()
        pixels[mirrored_N] = pixels[mirrored_N].flip(-1)
        loss = model.loss(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
        schedule.step()
        session.progress("train the demo's model", step + 1, _STEPS, f"loss {loss.item():.3f}")
    model.module.eval()
    return model


def _told(published: Published) -> str:
    lines = [f"  verdict: {published.verdict.result.upper()}. {published.verdict.claim}"]
    for strength in published.verdict.strengths:
        kappa = strength.kappa
        if kappa.estimate is not None and kappa.lower is not None:
            sign = "at least " if kappa.censored else ""
            lines.append(f"  kappa: {sign}{kappa.estimate:.2f}, lower 95 % bound {kappa.lower:.2f}")
    receipt = published.receipt
    lines.append(f"  pushed: {receipt.url}" if receipt else "  nothing was pushed (exit code 3)")
    return "\n".join(lines)


def _tamper(output: Path, policy: Policy, session: Session) -> str | None:
    """Verify a copy of the head with one byte changed; what `verify` says, None: nothing."""
    copy = output / "tampered"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(output / "hub" / REPO, copy)
    weights = copy / "model.safetensors"
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    trust = Trust(Key(public=output / "key.pub"), policy.digest)
    with contextlib.suppress(FileNotFoundError):
        try:
            require_intact(verify(DirectoryTree(copy), trust, now=session.now()))
        except IntegrityError as error:
            return f"  refused (exit code {error.exit_code}): {error}"
    return None
