"""The generation loop: text until <boi>, an image, <eoi>, text again (Transfusion Sec. 3).

A prompt is a Document, and so is the output. Each turn: one pass for all text sequences, one for
all images being denoised. An image of discrete codes (Chameleon) is written token by token
among the text of other sequences: N codes follow <boi>, then <eoi>; codes stand nowhere else.

The KV cache keeps the keys and values of all processed positions, so none is computed twice. An
output depends on its prompt, seed and options, and not on the other sequences of the batch.

Shapes: n sequences, N positions of an image, V vocabulary (codes last), latents C x h x w.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import compress

import torch
from torch import Tensor

from tf_lightning.batch import Document, is_image, num_patches
from tf_lightning.diffusion.sampler import DenoisingState
from tf_lightning.errors import UserError, not_a_number
from tf_lightning.generation.kv_cache import DecodeAttention, KeyValueCache, PrefillAttention
from tf_lightning.generation.requests import (
    DenoisingBatch,
    Event,
    GenerationModel,
    GenerationPlan,
    GuidanceBranch,
    SequenceState,
    pack_prompts,
    rows_by_branch,
)
from tf_lightning.generation.token_sampling import find_stop, sample_tokens
from tf_lightning.progress import progress_bar


def generate(
    model: GenerationModel,
    prompts: Sequence[Document],
    seeds: Sequence[int],
    plan: GenerationPlan,
    *,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[Event]:
    """Generate an output for each prompt; yield its tokens and images as they are finished.

    The images of a prompt are clean: the network reads them at t = 0.

    Args:
        model: the network with its tokenizer and sizes.
        prompts: token ids and latents; an empty prompt is continued from <bos>.
        seeds: one for each prompt; all randomness of its output follows from it.
        plan: the checked sampling options.
        batch_size: sequences at once; the next prompt starts when a sequence ends.
        progress: show a progress bar.

    Yields:
        (index of the prompt, token id | image (C, h, w) | None at the end of its output); the
        events of one prompt are in order.

    Raises:
        UserError: a prompt leaves no room for its output, or the network's output is NaN.
    """
    if prompts:
        yield from _Engine(model, prompts, seeds, plan, batch_size).run(progress)


class _Engine:
    """Advances sequences through their phases; sequences in the same phase advance together."""

    def __init__(
        self,
        model: GenerationModel,
        prompts: Sequence[Document],
        seeds: Sequence[int],
        plan: GenerationPlan,
        batch_size: int,
    ):
        self.model, self.plan, self.sampling = model, plan, plan.sampling
        self.tokenizer = model.tokenizer
        self.waiting = deque(enumerate(zip(prompts, seeds, strict=True)))
        # Row = branch * slots + slot: the rows of a branch are adjacent and select as a slice.
        self.slots = min(batch_size, len(prompts))
        self.free = list(range(self.slots))
        weight = next(model.net.parameters())
        self.device = weight.device
        self.cache = KeyValueCache(
            model.net.transformer.config,
            rows=self.slots * len(plan.branches),
            capacity=max(model.capacity(prompt, plan) for prompt in prompts),
            like=weight,
        )
        self.writing: list[SequenceState] = []
        self.denoising: list[DenoisingBatch] = []

    @torch.inference_mode()
    def run(self, progress: bool) -> Iterator[Event]:
        """Generate all outputs."""
        total = len(self.waiting) * self.plan.max_steps
        with progress_bar(
            total=total, desc="Generating", unit="step", disable=not progress
        ) as self.bar:
            while self.waiting or self.writing or self.denoising:
                if self.waiting and self.free:
                    yield from self._begin()
                if self.writing:
                    yield from self._write()
                if self.denoising:
                    yield from self._denoise()

    def _advance(self, sequence: SequenceState, steps: int) -> None:
        """Move the progress bar."""
        steps = min(steps, sequence.steps_left)
        sequence.steps_left -= steps
        self.bar.update(steps)

    # ---------------------------------------------------------------- prompts

    def _begin(self) -> Iterator[Event]:
        """Read as many waiting prompts as there are free rows."""
        sequences, documents = [], []
        while self.waiting and self.free:
            index, (prompt, seed) = self.waiting.popleft()
            slot = self.free.pop(0)
            branches = [
                GuidanceBranch(branch * self.slots + slot, *reads)
                for branch, reads in enumerate(self.plan.branches)
            ]
            generator = torch.Generator().manual_seed(seed)
            shape = self.model.output_shape(prompt, self.plan)
            sequences.append(SequenceState(index, branches, generator, self.plan.max_steps, shape))
            documents.append(prompt)
        logits = self._prefill(sequences, documents)
        if self.plan.output_modality == "image":
            for sequence in sequences:
                sequence.token = self.tokenizer.boi_id
            self.writing += sequences
        else:
            yield from self._add_tokens(sequences, logits)

    def _prefill(self, sequences: list[SequenceState], documents: list[Document]) -> Tensor:
        """Read prompts into the cache; return the logits (n, V) of the token after each."""
        model, branches = self.model, rows_by_branch(sequences)
        parts = [
            [part for part in document if reads[is_image(part)]]
            for reads in self.plan.branches
            for document in documents
        ]
        batch = pack_prompts(
            parts, self.tokenizer, model.patch_size, self.device, model.net.time_token
        )
        lengths = batch.row_tokens - 1  # pack appends <eos>; its position is overwritten later
        for branch, length in zip(branches, lengths.tolist(), strict=True):
            branch.length = length
        starts = torch.arange(len(sequences), device=self.device) * batch.input_ids.shape[1]
        last = starts + lengths[: len(sequences)] - 1
        batch = replace(batch, target_index=last, code_index=batch.code_index[:0])
        rows = [branch.row for branch in branches]
        attend = PrefillAttention(self.cache, rows, batch, model.causal)
        with model.autocast():
            return model.net(batch, batch.latents, batch.t, attend)[0]

    # ---------------------------------------------------------------- text

    def _write(self) -> Iterator[Event]:
        """Read the current token of every writing sequence and sample its next one."""
        sequences, self.writing = self.writing, []
        read = [(sequence, sequence.branches[0]) for sequence in sequences]
        read += [(s, b) for s in sequences for b in s.branches[1:] if self._reads(s, b)]
        branches = [branch for _, branch in read]
        tokens = torch.tensor([[sequence.token] for sequence, _ in read], device=self.device)
        attend = self._decode_attention(branches, 1)
        with self.model.autocast():
            logits = self.model.net.next_logits(tokens, attend.positions, attend)[:, 0]
        for branch in branches:
            branch.length += 1
        in_text = [i for i, sequence in enumerate(sequences) if not self._in_image(sequence)]
        in_image = [sequence for sequence in sequences if self._in_image(sequence)]
        if in_text:
            yield from self._add_tokens([sequences[i] for i in in_text], logits[in_text])
        if in_image and self.model.net.num_codes:
            place = {branch.row: i for i, branch in enumerate(branches)}
            by_branch = zip(*(sequence.branches for sequence in in_image), strict=True)
            outputs = [logits[[place[branch.row] for branch in group]] for group in by_branch]
            yield from self._add_codes(in_image, outputs)
        elif in_image:
            self._start_denoising(in_image)

    def _in_image(self, sequence: SequenceState) -> bool:
        """Return whether the token that a sequence reads next is <boi> or a code."""
        return sequence.token == self.tokenizer.boi_id or bool(sequence.codes)

    def _reads(self, sequence: SequenceState, branch: GuidanceBranch) -> bool:
        """Return whether a guidance branch reads the sequence's next token."""
        if self._in_image(sequence):
            return True
        is_eoi = sequence.token == self.tokenizer.eoi_id
        return branch.reads_images if is_eoi else branch.reads_text

    def _add_tokens(self, sequences: list[SequenceState], logits: Tensor) -> Iterator[Event]:
        """Sample the next token of each sequence from its logits (n, V)."""
        logits = logits.float().cpu()
        if not logits.isfinite().all():
            raise UserError(not_a_number("a text token"))
        logits = logits[:, : self.model.net.text_vocab_size]
        if self.model.net.num_codes:  # <eoi> is trained only after codes
            logits[:, self.tokenizer.eoi_id] = -torch.inf
        tokens = sample_tokens(
            logits,
            [sequence.generator for sequence in sequences],
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
        )
        ends = (self.tokenizer.eos_id, self.tokenizer.boi_id)
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.token = token
            if token == self.tokenizer.boi_id and self._may_make_image(sequence):
                self.writing.append(sequence)
            elif token in ends or not self._fits(sequence, 1):
                yield self._end(sequence)
            else:
                yield from self._add_text_token(sequence, token)

    def _add_text_token(self, sequence: SequenceState, token: int) -> Iterator[Event]:
        yield sequence.index, token
        sequence.text.append(token)
        sequence.num_text_tokens += 1
        self._advance(sequence, 1)
        full = sequence.num_text_tokens == self.sampling.max_new_tokens
        if full or self._is_stopped(sequence.text):
            yield self._end(sequence)
        else:
            self.writing.append(sequence)

    def _is_stopped(self, text: list[int]) -> bool:
        stop = self.sampling.stop
        return bool(stop) and find_stop(self.tokenizer.decode(text), stop) is not None

    def _may_make_image(self, sequence: SequenceState) -> bool:
        if self.plan.output_modality != "any" or sequence.num_images == self.plan.max_images:
            return False
        return self._fits(sequence, self.model.num_patches(sequence.latent_shape) + 2)

    def _fits(self, sequence: SequenceState, count: int) -> bool:
        """Return whether the model was trained on rows with that many more positions."""
        limit = self.model.max_length
        return limit is None or sequence.branches[0].length + count < limit

    def _end(self, sequence: SequenceState) -> Event:
        self._advance(sequence, sequence.steps_left)
        self.free.append(sequence.branches[0].row)
        self.free.sort()
        return sequence.index, None

    # ---------------------------------------------------------------- images of codes

    def _add_codes(self, sequences: list[SequenceState], outputs: list[Tensor]) -> Iterator[Event]:
        """Sample the next code of each image, or end the image after its last code.

        Args:
            sequences: their last token was <boi> or a code.
            outputs: logits (n, V) of each guidance branch.
        """
        for sequence, code in zip(sequences, self._next_codes(sequences, outputs), strict=True):
            image = None
            if code is None:
                self._leave_code_image(sequence)
            else:
                image = self._add_code(sequence, code)
                self._advance(sequence, 1)
            if image is not None:
                yield sequence.index, image
                sequence.num_images += 1
            if image is not None and self.plan.output_modality != "any":
                yield self._end(sequence)
            else:
                self.writing.append(sequence)

    def _next_codes(
        self, sequences: list[SequenceState], outputs: list[Tensor]
    ) -> list[int | None]:
        """Sample a code for each sequence from the guided logits; None if its image is complete."""
        net = self.model.net
        parts = [logits[:, net.text_vocab_size :].float() for logits in outputs]
        logits = self.plan.guidance.combine(parts, net.num_codes).cpu()
        if not logits.isfinite().all():
            raise UserError(not_a_number("an image's code"))
        count = self.model.num_patches
        goes_on = [len(sequence.codes) < count(sequence.latent_shape) for sequence in sequences]
        if not any(goes_on):
            return [None] * len(sequences)
        codes = sample_tokens(
            logits[torch.tensor(goes_on)],
            [sequence.generator for sequence in compress(sequences, goes_on)],
            temperature=self.sampling.code_temperature,
            top_k=self.sampling.code_top_k,
            top_p=self.sampling.code_top_p,
        )
        remaining = iter(codes)
        return [next(remaining) if more else None for more in goes_on]

    def _add_code(self, sequence: SequenceState, code: int) -> Tensor | None:
        """Append a code; return the image (1, h, w) if it is complete."""
        sequence.codes.append(code)
        sequence.token = self.model.net.text_vocab_size + code
        complete = len(sequence.codes) == self.model.num_patches(sequence.latent_shape)
        return torch.tensor(sequence.codes).view(sequence.latent_shape) if complete else None

    def _leave_code_image(self, sequence: SequenceState) -> None:
        """Make <eoi> the next token; branches that read no images drop <boi> and the codes."""
        for branch in sequence.branches:
            branch.length -= 0 if branch.reads_images else len(sequence.codes) + 1
        sequence.codes, sequence.text, sequence.token = [], [], self.tokenizer.eoi_id

    # ---------------------------------------------------------------- images of latents

    def _start_denoising(self, sequences: list[SequenceState]) -> None:
        """Start the images of sequences that have read <boi> from noise."""
        for shape in dict.fromkeys(sequence.latent_shape for sequence in sequences):
            alike = [sequence for sequence in sequences if sequence.latent_shape == shape]
            generators = [sequence.generator for sequence in alike]
            noise = torch.stack([torch.randn(shape, generator=random) for random in generators])
            steps = self.sampling.num_inference_steps
            state = DenoisingState(noise.to(self.device), self.plan.scheduler, steps, generators)
            self.denoising.append(DenoisingBatch(alike, state))

    def _denoise(self) -> Iterator[Event]:
        """Make one denoising step of every image; one forward pass for each shape."""
        for shape in dict.fromkeys(batch.latent_shape for batch in self.denoising):
            self._denoise_alike([b for b in self.denoising if b.latent_shape == shape])
        finished = [batch for batch in self.denoising if batch.state.finished]
        self.denoising = [batch for batch in self.denoising if not batch.state.finished]
        for batch in finished:
            yield from self._finish_images(batch)

    def _denoise_alike(self, batches: list[DenoisingBatch]) -> None:
        """Make one denoising step of images of one shape, all guidance branches together."""
        guidance = self.plan.guidance
        counts = [  # guidance branches that this noise level needs
            len(self.plan.branches) if guidance.acts_at(batch.state.t) else 1 for batch in batches
        ]
        latents, t, rows = [], [], []
        for batch, count in zip(batches, counts, strict=True):
            latents += [batch.state.x_t] * count
            t += [batch.state.t] * count * len(batch.sequences)
            rows += rows_by_branch(batch.sequences)[: count * len(batch.sequences)]
        output = self._denoiser_output(torch.cat(latents), t, rows)
        sizes = [len(b.sequences) * n for b, n in zip(batches, counts, strict=True)]
        for batch, count, part in zip(batches, counts, output.split(sizes), strict=True):
            channels = batch.latent_shape[0]
            batch.state.step(guidance.combine(list(part.chunk(count)), channels))
            for sequence in batch.sequences:
                self._advance(sequence, 1)

    def _finish_images(self, batch: DenoisingBatch) -> Iterator[Event]:
        """Yield finished images; with 'any', cache them clean."""
        images = batch.state.x_t
        if not images.isfinite().all():
            raise UserError(not_a_number("an image"))
        goes_on = self.plan.output_modality == "any"
        if goes_on:
            self._cache_clean_images(batch.sequences, images)
        for sequence, image in zip(batch.sequences, images.cpu(), strict=True):
            yield sequence.index, image
            sequence.num_images += 1
            sequence.text = []
            sequence.token = self.tokenizer.eoi_id
            if goes_on:
                self.writing.append(sequence)
            else:
                yield self._end(sequence)

    def _cache_clean_images(self, sequences: list[SequenceState], images: Tensor) -> None:
        """Write clean images into the branches that read images; the others drop their <boi>."""
        rows = rows_by_branch(sequences)
        reading = [row for row in rows if row.reads_images]
        copies = images.repeat(len(reading) // len(sequences), 1, 1, 1)
        self._denoiser_output(copies, [0.0] * len(reading), reading)
        for row in rows:
            row.length += self._num_patches(images) if row.reads_images else -1

    def _denoiser_output(
        self, latents: Tensor, t: list[float], rows: list[GuidanceBranch]
    ) -> Tensor:
        """Run the denoiser on latents (n, C, h, w) after the prefix of each cache row."""
        times = torch.tensor(t, device=self.device)
        attend = self._decode_attention(rows, self._num_patches(latents), image=True)
        with self.model.autocast():
            output = self.model.net.denoise(latents, times, attend.positions, attend)
        return output.type_as(latents)  # schedulers compute in fp32 under autocast too

    def _num_patches(self, latents: Tensor) -> int:
        """Count the positions of an image of latents (..., h, w)."""
        return num_patches(latents, self.model.patch_size, self.model.net.time_token)

    def _decode_attention(
        self, rows: list[GuidanceBranch], num_new: int, image: bool = False
    ) -> DecodeAttention:
        numbers, lengths = zip(*((row.row, row.length) for row in rows), strict=True)
        causal = self.model.causal
        return DecodeAttention(self.cache, list(numbers), list(lengths), num_new, causal, image)
