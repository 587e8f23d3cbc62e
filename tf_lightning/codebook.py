"""Which codes of a VQ are in use, and new places for those that are not.

A quantiser moves only the codes that it picks; the others stay where they began, far from what the
encoder says, for ever. So a code that was long idle is put where the encoder is (random restarts:
Jukebox, Dhariwal 2020, Sec. 3.1). At the start all are: the codebook begins with the first batch.
"""

import torch
from torch import Tensor, nn


class CodebookUse(nn.Module):
    """Steps since each code was last picked; a buffer, so that a resumed run knows them.

    Args:
        num_codes: of the codebook.
        dead_after: steps without use after which a code is dead.
    """

    def __init__(self, num_codes: int, dead_after: int):
        super().__init__()
        self.dead_after = dead_after
        self.register_buffer("idle", torch.full((num_codes,), dead_after))

    @property
    def dead(self) -> Tensor:
        """Which codes are dead, (num_codes,) bool."""
        return self.idle >= self.dead_after

    def count(self, counts: Tensor) -> None:
        """One step more, in which the codes were picked so often, (num_codes,), on all ranks."""
        self.idle.copy_(torch.where(counts > 0, 0, self.idle + 1))

    @torch.no_grad()
    def restart(self, codebook: Tensor, vectors: Tensor, generator: torch.Generator) -> None:
        """Puts the dead codes where randomly chosen vectors are, in place.

        Args:
            codebook: (num_codes, D).
            vectors: what the encoder says, (N, D); may be fewer than dead codes.
            generator: of the choice, on the CPU.
        """
        places = self.dead.nonzero().flatten()
        if not len(places):
            return
        rounds = -(-len(places) // len(vectors))  # each vector as often as any other, or once more
        order = torch.cat(
            [torch.randperm(len(vectors), generator=generator) for _ in range(rounds)]
        )
        chosen = vectors[order[: len(places)].to(vectors.device)]
        codebook[places] = chosen.to(codebook.dtype)
