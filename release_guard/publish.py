"""The producer's flow: policy -> immunize -> red-team -> gate -> sign -> push -> verify."""

from collections.abc import Callable
from pathlib import Path

from release_guard.card import Publication
from release_guard.changes import Changes, require_known
from release_guard.deliver import (
    Delivery,
    Packed,
    Published,
    check_credentials,
    deliver,
    foresee,
    open_candidate,
    plugins,
)
from release_guard.errors import ReleaseGuardError
from release_guard.hubs import Hub
from release_guard.judging import judge
from release_guard.preflight import Order
from release_guard.run import Run
from release_guard.session import Session
from release_guard.signers import Signer
from release_guard.sources import fetch_all, hub_id


def publish(
    order: Order,
    output: Path,
    session: Session,
    agree: Callable[[Changes], None] = require_known,
) -> Published:
    """Immunize a model and push it if, and only if, it passes the policy's gate.

    Credentials stay in this process; models, data and attacks are in another, which has none.

    Args:
        order: What is published, and where.
        output: Folder of the run.
        session: Workers, a clock, somebody to tell.
        agree: Shown what will change before anything is sent; raises to stop it.
    """
    hub, signer = plugins(order.policy)
    head = None if order.stops else check_credentials(hub, signer, order.repo)
    identity = "none (dry run)" if order.dry_run else signer.identity
    fetch_all(order.policy, order.source, order.base)
    base_model = hub_id(order.base or order.source)
    publication = Publication(order.repo, hub.address(order.repo), identity, base_model)
    candidate = session.apart(judge, order, output, publication)
    folder, root = Run(output).release, candidate.payload.root
    packed = open_candidate(folder, root=root, policy_digest=order.policy.digest)
    if not packed.candidate.verdict.passed or order.pack_only:
        return Published(packed)
    if head is None:
        return Published(packed, changes=_foreseen(packed, hub, signer, order, session))
    delivery = Delivery(
        order.repo, hub, signer, head, session.progress, session.now, agree, order.tag
    )
    return deliver(packed, delivery)


def _foreseen(
    packed: Packed, hub: Hub, signer: Signer, order: Order, session: Session
) -> Changes | None:
    """A dry run needs no credential: without one it cannot say what would change, that is all."""
    try:
        return foresee(packed, hub, signer, order.repo)
    except ReleaseGuardError as error:
        session.progress("publish", 0, 0, f"what would change there is not known: {error}")
        return None
