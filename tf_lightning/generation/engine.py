"""Text until <boi>, n patches of noise denoised in place, <eoi>, text again (Transfusion Sec. 3).

A prompt is a Document and so is the answer. Sequences in different phases advance together: each
turn writes one token of all that write, in one forward, and makes one denoising step of all that
draw, in another. Codes of images are tokens written among others' text: see code_images.py.
Nothing is read twice: see cache.py. An answer depends on its own seed, prompt and settings, not on
its batch mates.

Shapes: n sequences, N patches an image, V vocabulary, C x h x w latents.

Images made of codes, token by token, and the grammar by which each is whole (Chameleon).

Behind <boi> come N codes and then <eoi>; nothing else stands inside, and no code outside.

Shapes: n sequences, N codes an image, V vocabulary, of which the last are codes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor
from tqdm import tqdm

from tf_lightning.batch import Document, is_image
from tf_lightning.diffusion.sampler import Trajectory
from tf_lightning.errors import UserError, not_a_number
from tf_lightning.generation.kv_cache import AppendAttention, KeyValueCache, ReadAttention
from tf_lightning.generation.requests import (
    Branch,
    Drawing,
    Event,
    Reply,
    Settings,
    Speaker,
    by_kind,
    pack_prompts,
)
from tf_lightning.generation.token_sampling import choose, find_stop


def in_image(reply: Reply, boi_id: int) -> bool:
    """Whether the token that a sequence reads next is <boi> or a code."""
    return reply.token == boi_id or bool(reply.codes)


def text_logits(logits: Tensor, speaker: Speaker) -> Tensor:
    """Of logits (n, V) those of text; <eoi> is learnt behind codes alone, so it is none here."""
    logits = logits[:, : speaker.net.text_vocab_size]
    if speaker.net.num_codes:
        logits[:, speaker.tokenizer.eoi_id] = -torch.inf
    return logits


def next_codes(
    replies: Sequence[Reply], outputs: list[Tensor], speaker: Speaker, settings: Settings
) -> list[int | None]:
    """Each image's next code, drawn by guided logits; None where it is whole.

    Args:
        replies: sequences that have read <boi> or a code.
        outputs: their logits, (n, V) for each kind of branch.
        speaker: the network.
        settings: how codes are drawn.
    """
    parts = [logits[:, speaker.net.text_vocab_size :].float() for logits in outputs]
    logits = settings.guidance.combine(parts, speaker.net.num_codes).cpu()
    if not logits.isfinite().all():
        raise UserError(not_a_number("a picture's code"))
    goes_on = [len(reply.codes) < speaker.num_patches for reply in replies]
    if not any(goes_on):
        return [None] * len(replies)
    generators = [reply.generator for reply in compress(replies, goes_on)]
    chosen = iter(choose(logits[torch.tensor(goes_on)], settings.codes, generators))
    return [next(chosen) if more else None for more in goes_on]


def add_code(reply: Reply, code: int, speaker: Speaker) -> Tensor | None:
    """Write a code; the image (1, h, w) if it was the last."""
    reply.codes.append(code)
    reply.token = speaker.net.text_vocab_size + code
    whole = len(reply.codes) == speaker.num_patches
    return torch.tensor(reply.codes).view(speaker.latent_shape) if whole else None


def leave_image(reply: Reply, eoi_id: int) -> None:
    """<eoi> is next; rows that read no images forget the one that they helped to draw."""
    for branch in reply.branches:
        branch.length -= 0 if branch.reads_images else len(reply.codes) + 1  # <boi> too
    reply.codes, reply.text, reply.token = [], [], eoi_id


def generate(
    speaker: Speaker,
    prompts: Sequence[Document],
    seeds: Sequence[int],
    settings: Settings,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Event]:
    """Answer each prompt; events come as they happen, those of one prompt in order.

    Images of a prompt are clean: they enter at t = 0.

    Args:
        speaker: the network.
        prompts: token ids and latents; an empty one is continued from <bos>.
        seeds: of all that is random in each answer.
        settings: what to answer, and how.
        batch_size: sequences at once; the others wait until one ends.
        progress: show a progress bar.

    Raises:
        UserError: a prompt leaves no room for its answer, or the network's output is NaN.
    """
    if prompts:
        yield from _Engine(speaker, prompts, seeds, settings, batch_size).run(progress)


class _Engine:
    """Advances sequences through their phases, those in the same phase together."""

    def __init__(
        self,
        speaker: Speaker,
        prompts: Sequence[Document],
        seeds: Sequence[int],
        settings: Settings,
        batch_size: int,
    ):
        self.speaker, self.settings = speaker, settings
        self.waiting = deque(enumerate(zip(prompts, seeds, strict=True)))
        # Row = branch * slots + slot: the rows of a branch stand together and select as a slice.
        self.slots = min(batch_size, len(prompts))
        self.free = list(range(self.slots))
        weight = next(speaker.net.parameters())
        self.device = weight.device
        self.cache = KeyValueCache(
            speaker.net.transformer.config,
            rows=self.slots * len(settings.branches),
            capacity=max(speaker.capacity(prompt, settings) for prompt in prompts),
            like=weight,
        )
        self.writing: list[Reply] = []
        self.drawings: list[Drawing] = []

    @torch.inference_mode()
    def run(self, progress: bool) -> Iterator[Event]:
        """All answers."""
        total = len(self.waiting) * self.settings.num_turns
        with tqdm(total=total, desc="Generating", unit="step", disable=not progress) as self.bar:
            while self.waiting or self.writing or self.drawings:
                if self.waiting and self.free:
                    yield from self._begin()
                if self.writing:
                    yield from self._write()
                if self.drawings:
                    yield from self._draw()

    def _advance(self, reply: Reply, turns: int) -> None:
        """Move the progress bar."""
        turns = min(turns, reply.turns_left)
        reply.turns_left -= turns
        self.bar.update(turns)

    # ---------------------------------------------------------------- prompts

    def _begin(self) -> Iterator[Event]:
        """Read as many waiting prompts as there is room for."""
        replies, documents = [], []
        while self.waiting and self.free:
            number, (prompt, seed) = self.waiting.popleft()
            slot = self.free.pop(0)
            branches = [
                Branch(kind * self.slots + slot, *reads)
                for kind, reads in enumerate(self.settings.branches)
            ]
            generator = torch.Generator().manual_seed(seed)
            replies.append(Reply(number, branches, generator, self.settings.num_turns))
            documents.append(prompt)
        logits = self._read(replies, documents)
        if self.settings.answer == "image":
            for reply in replies:
                reply.token = self.speaker.tokenizer.boi_id
            self.writing += replies
        else:
            yield from self._take(replies, logits)

    def _read(self, replies: list[Reply], documents: list[Document]) -> Tensor:
        """Prompts into the cache, with the forward of training; logits (n, V) that follow them."""
        branches = by_kind(replies)
        parts = [
            [part for part in document if reads[is_image(part)]]
            for reads in self.settings.branches
            for document in documents
        ]
        speaker = self.speaker
        batch = pack_prompts(
            parts, speaker.tokenizer, speaker.patch_size, self.device, speaker.net.time_token
        )
        lengths = batch.row_tokens - 1  # <eos>, which pack adds, is read and then overwritten
        for branch, length in zip(branches, lengths.tolist(), strict=True):
            branch.length = length
        last = torch.arange(len(replies), device=self.device) * batch.input_ids.shape[1]
        ends = last + lengths[: len(replies)] - 1
        batch = replace(batch, target_index=ends, code_index=batch.code_index[:0])
        rows = [branch.row for branch in branches]
        attend = ReadAttention(self.cache, rows, batch, self.speaker.causal)
        return self.speaker.net(batch, batch.latents, batch.t, attend)[0]

    # ---------------------------------------------------------------- text

    def _write(self) -> Iterator[Event]:
        """One token of every sequence that writes: read it, choose the next."""
        replies, self.writing = self.writing, []
        read = [(reply, reply.branches[0]) for reply in replies]
        read += [(r, b) for r in replies for b in r.branches[1:] if self._reads(r, b)]
        branches = [branch for _, branch in read]
        tokens = torch.tensor([[reply.token] for reply, _ in read], device=self.device)
        attend = self._append(branches, 1)
        logits = self.speaker.net.next_logits(tokens, attend.positions, attend)[:, 0]
        for branch in branches:
            branch.length += 1
        boi_id = self.speaker.tokenizer.boi_id
        inside = [reply for reply in replies if in_image(reply, boi_id)]
        going_on = [i for i, reply in enumerate(replies) if not in_image(reply, boi_id)]
        if going_on:
            yield from self._take([replies[i] for i in going_on], logits[going_on])
        if inside and self.speaker.net.num_codes:
            place = {branch.row: i for i, branch in enumerate(branches)}
            kinds = zip(*(reply.branches for reply in inside), strict=True)
            outputs = [logits[[place[branch.row] for branch in kind]] for kind in kinds]
            yield from self._take_codes(inside, outputs)
        elif inside:
            self._start_drawing(inside)

    def _reads(self, reply: Reply, branch: Branch) -> bool:
        """Whether a branch reads the token that its sequence reads next."""
        tokenizer = self.speaker.tokenizer
        if in_image(reply, tokenizer.boi_id):
            return True
        return branch.reads_images if reply.token == tokenizer.eoi_id else branch.reads_text

    def _take(self, replies: list[Reply], logits: Tensor) -> Iterator[Event]:
        """Choose the token that follows each sequence."""
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise UserError(not_a_number("a text token"))
        logits = text_logits(logits, self.speaker)
        tokens = choose(logits, self.settings.text, [reply.generator for reply in replies])
        ends = (self.speaker.tokenizer.eos_id, self.speaker.tokenizer.boi_id)
        for reply, token in zip(replies, tokens, strict=True):
            reply.token = token
            if token == self.speaker.tokenizer.boi_id and self._may_draw(reply):
                self.writing.append(reply)
            elif token in ends or not self._fits(reply, 1):
                yield self._end(reply)
            else:
                yield from self._took(reply, token)

    def _took(self, reply: Reply, token: int) -> Iterator[Event]:
        """A token of the answer."""
        yield reply.number, token
        reply.text.append(token)
        reply.num_tokens += 1
        self._advance(reply, 1)
        if reply.num_tokens == self.settings.text.max_new_tokens or self._stops(reply.text):
            yield self._end(reply)
        else:
            self.writing.append(reply)

    def _stops(self, text: list[int]) -> bool:
        stop = self.settings.text.stop
        return bool(stop) and find_stop(self.speaker.tokenizer.decode(text), stop) is not None

    def _may_draw(self, reply: Reply) -> bool:
        if self.settings.answer != "any" or reply.num_images == self.settings.max_images:
            return False
        return self._fits(reply, self.speaker.num_patches + 2)

    def _fits(self, reply: Reply, count: int) -> bool:
        """Whether the model was trained on documents with that many more positions."""
        limit = self.speaker.max_length
        return limit is None or reply.branches[0].length + count < limit

    def _end(self, reply: Reply) -> Event:
        self._advance(reply, reply.turns_left)
        self.free.append(reply.branches[0].row)
        self.free.sort()
        return reply.number, None

    # ---------------------------------------------------------------- images of codes

    def _take_codes(self, replies: list[Reply], outputs: list[Tensor]) -> Iterator[Event]:
        """Choose what follows in images of codes: outputs are (n, V) for each kind of branch."""
        codes = next_codes(replies, outputs, self.speaker, self.settings)
        for reply, code in zip(replies, codes, strict=True):
            image = None
            if code is None:
                leave_image(reply, self.speaker.tokenizer.eoi_id)
            else:
                image = add_code(reply, code, self.speaker)
                self._advance(reply, 1)
            if image is not None:
                yield reply.number, image
                reply.num_images += 1
            if image is not None and self.settings.answer != "any":
                yield self._end(reply)
            else:
                self.writing.append(reply)

    # ---------------------------------------------------------------- images of latents

    def _start_drawing(self, replies: list[Reply]) -> None:
        """Noise in the places after <boi>."""
        shape = self.speaker.latent_shape
        noise = torch.stack([torch.randn(shape, generator=reply.generator) for reply in replies])
        trajectory = Trajectory(
            noise.to(self.device),
            self.settings.scheduler,
            self.settings.num_inference_steps,
            [reply.generator for reply in replies],
        )
        self.drawings.append(Drawing(replies, trajectory))

    def _draw(self) -> Iterator[Event]:
        """One denoising step of every image, conditional and unconditional in one forward."""
        guidance = self.settings.guidance
        kinds = [
            len(self.settings.branches) if guidance.acts_at(drawing.trajectory.t) else 1
            for drawing in self.drawings
        ]
        latents, t, branches = [], [], []
        for drawing, count in zip(self.drawings, kinds, strict=True):
            latents += [drawing.trajectory.x_t] * count
            t += [drawing.trajectory.t] * count * len(drawing.replies)
            branches += by_kind(drawing.replies)[: count * len(drawing.replies)]
        output = self._denoise(torch.cat(latents), t, branches)
        sizes = [len(d.replies) * count for d, count in zip(self.drawings, kinds, strict=True)]
        outputs = output.split(sizes)
        for drawing, count, part in zip(self.drawings, kinds, outputs, strict=True):
            channels = self.speaker.latent_shape[0]
            drawing.trajectory.step(guidance.combine(list(part.chunk(count)), channels))
            for reply in drawing.replies:
                self._advance(reply, 1)
        finished = [drawing for drawing in self.drawings if drawing.trajectory.finished]
        self.drawings = [d for d in self.drawings if not d.trajectory.finished]
        for drawing in finished:
            yield from self._finish(drawing)

    def _finish(self, drawing: Drawing) -> Iterator[Event]:
        """Hand over the images; read them, clean, where the answer goes on behind them."""
        images = drawing.trajectory.x_t
        if not images.isfinite().all():
            raise UserError(not_a_number("an image"))
        goes_on = self.settings.answer == "any"
        if goes_on:
            self._keep(drawing.replies, images)
        for reply, image in zip(drawing.replies, images.cpu(), strict=True):
            yield reply.number, image
            reply.num_images += 1
            reply.text = []
            reply.token = self.speaker.tokenizer.eoi_id
            if goes_on:
                self.writing.append(reply)
            else:
                yield self._end(reply)

    def _keep(self, replies: list[Reply], images: Tensor) -> None:
        """Write clean images into the rows that read images; the others forget their <boi>."""
        branches = by_kind(replies)
        keeping = [branch for branch in branches if branch.reads_images]
        copies = images.repeat(len(keeping) // len(replies), 1, 1, 1)
        self._denoise(copies, [0.0] * len(keeping), keeping)
        for branch in branches:
            branch.length += self.speaker.num_patches if branch.reads_images else -1

    def _denoise(self, latents: Tensor, t: list[float], branches: list[Branch]) -> Tensor:
        times = torch.tensor(t, device=self.device)
        attend = self._append(branches, self.speaker.num_patches, image=True)
        output = self.speaker.net.denoise(latents, times, attend.positions, attend)
        return output.type_as(latents)  # the schedulers compute in fp32 under autocast too

    def _append(self, branches: list[Branch], num_new: int, image: bool = False) -> AppendAttention:
        rows, lengths = zip(*((branch.row, branch.length) for branch in branches), strict=True)
        causal = self.speaker.causal
        return AppendAttention(self.cache, list(rows), list(lengths), num_new, causal, image)
