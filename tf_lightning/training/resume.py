"""The hyper-parameters that a resumed run may change."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from tf_lightning.checkpoint import plain_hparams
from tf_lightning.errors import UserError


def check_resumed(
    hparams: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    changeable: set[str],
    switches: set[str] = frozenset(),
) -> None:
    """Refuse to resume with another value of a hyper-parameter that weights or state depend on.

    Allowed changes are printed. Hyper-parameters that only one side has belong to another version
    and are not compared.

    Args:
        hparams: hyper-parameters of the module that resumes.
        checkpoint: the checkpoint.
        changeable: names of hyper-parameters that take effect when a run resumes.
        switches: changeable ones that add weights if they are not 0, so that 0 must stay 0.

    Raises:
        UserError: another one differs, or the checkpoint has no state of the optimizer.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError(
            "the checkpoint holds weights only (save_weights_only), and a run resumes with the "
            "state of its optimizer; give another checkpoint, or start a new run with the callback "
            "callbacks.init_from.InitFrom"
        )
    saved = plain_hparams(checkpoint["hyper_parameters"])
    changed = []
    for name, value, old in differences(plain_hparams(hparams), saved):
        if name not in changeable or (name in switches and bool(value) != bool(old)):
            raise UserError(
                f"{name}={value} differs from the checkpoint's {old}, and a resumed run cannot "
                "change it; give the checkpoint's value, or start a new run with the callback "
                "callbacks.init_from.InitFrom"
            )
        changed.append(f"{name}={value} (the checkpoint has {old})")
    if changed:
        rank_zero_info(f"The run goes on with {', '.join(changed)}.")


def differences(
    new: Mapping[str, Any], old: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted name and both values of each difference."""
    for name in sorted(new.keys() & old.keys()):
        value, before = new[name], old[name]
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            yield from differences(value, before, f"{prefix}{name}.")
        elif as_list(value) != as_list(before):
            yield f"{prefix}{name}", value, before


def as_list(value: Any) -> Any:
    """Return a tuple as a list, as YAML and checkpoints may hold either."""
    return list(value) if isinstance(value, tuple) else value
