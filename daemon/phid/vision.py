"""Phi-3 vision models through ONNX Runtime GenAI: phid's own pixels, as many as a job asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from phid import frames, images, tags, vocabulary
from phid.jobs import EngineFacts, Job, Load
from phid.native import og
from phid.text import Setup, TextRuntime, TextStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from phid.rope import Line


# Bytes of a view's pixels before the graph sees them, and of a pixel while written as a PNG.
_CUT_BYTES = 3 * images.CROP_SIDE**2 * 4
_AS_PNG_BYTES = 13


class VisionRuntime(TextRuntime):
    """A loaded phi3v model: text as a text model takes it, and images beside it."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        tokens: vocabulary.Vocabulary,
        load: Load,
        facts: EngineFacts,
        line: Line | None,
        eye: Eye,
    ) -> None:
        super().__init__(model, tokenizer, tokens, load, facts, line)
        self._eye = eye
        self._tag_guard = tags.TagGuard(tokens.markers)

    def open(self, job: Job) -> TextStream:
        """Encode text and images; the images' cost is counted before any of them is decoded."""
        turns = tags.tagged(job.turns, len(job.images))
        if not job.images:
            return super().open(replace(job, turns=turns))
        seen = [images.inspect(image.data) for image in job.images]
        plans = [self._eye.plan(facts, job.crops) for facts in seen]
        prompt = tags.with_slots(
            self._render(turns, self._tag_guard),
            self._ids,
            {number: plan.tokens for number, plan in enumerate(plans, 1)},
        )
        image_tokens = sum(plan.tokens for plan in plans)
        self._check(prompt, turns, image_tokens)
        # The graph takes as many views of each as the largest has.
        views = len(plans) * (self._eye.views or max(plan.crops for plan in plans) + 1)
        decoding = self._eye.decoding_bytes(seen, plans)
        setup = self._setup(job, prompt, views, decoding + sum(len(i.data) for i in job.images))
        files = [job.images[number - 1].data for number in tags.order(turns)]
        batch = self._eye.look(files, job.crops)
        if batch.tokens.sum() != image_tokens:
            raise RuntimeError("the processor cut the images in another way than was planned")
        return VisionStream(
            self._model,
            prompt,
            setup,
            batch=batch,
            crops=sum(plan.crops for plan in plans),
        )

    def close(self) -> None:
        """Release the model."""
        del self._eye
        super().close()


class Eye:
    """Turns picture files into what one model's vision graph takes, which a first frame finds out.

    `views` is how many views of each picture the graph insists on, 0 where it takes any number.
    With `stock` the runtime's own processor does it: always up to 16 crops, 17 views.
    """

    def __init__(self, model: Any, tokenizer: Any, *, stock: bool) -> None:
        self._processor: Any = model.create_multimodal_processor() if stock else None
        self.dtype, self.views = self._find_out(model, tokenizer)

    def plan(self, facts: images.ImageFacts, crops: int) -> images.Plan:
        """How a picture will be cut, by its header alone."""
        return images.plan(*facts.upright, images.MAX_CROPS if self._processor else crops)

    def decoding_bytes(
        self, seen: Sequence[images.ImageFacts], plans: Sequence[images.Plan]
    ) -> int:
        """The most memory that `look` takes beside the files."""
        if self._processor is not None:
            # Each as a PNG without compression, and once more as the processor decodes it.
            kept = 6 * sum(facts.width * facts.height for facts in seen)
            return kept + max(
                max(images.decoding_bytes(facts), _AS_PNG_BYTES * facts.width * facts.height)
                for facts in seen
            )
        kept = _CUT_BYTES * sum(plan.crops + 1 for plan in plans)
        return kept + max(
            images.decoding_bytes(facts, images.shrink(facts, plan.width, plan.height))
            for facts, plan in zip(seen, plans, strict=True)
        )

    def look(self, files: Sequence[bytes], crops: int) -> frames.Batch:
        """Decode and cut the pictures; raises Refused (unsupported) where one is broken."""
        if self._processor is not None:
            return self._look_stock(files)
        pictures = [frames.look(data, crops) for data in files]
        return frames.stack(pictures, self.dtype, self.views)

    def _look_stock(self, files: Sequence[bytes]) -> frames.Batch:
        # The processor's decoder ends the process at a type it does not know, and never returns
        # from half a JPEG. So it gets what has been decoded already.
        sound = [frames.as_png(frames.decode(data)) for data in files]
        shown = "".join(f"<|image_{number}|>\n" for number in range(1, len(files) + 1))
        inputs = self._processor(shown, images=og.Images.open_bytes(*sound))
        # Copies, for these arrays show memory of the runtime's tensors; by way of Python's
        # integers, for the runtime does not take back NumPy's `long long`, 64 bits though it is.
        sizes = np.array(inputs["image_sizes"].as_numpy().tolist(), np.int64)
        tokens = np.array(inputs["num_image_tokens"].as_numpy().tolist(), np.int64)
        pixels = np.array(inputs["pixel_values"].as_numpy())
        return frames.Batch(pixels, sizes.reshape(-1, 2), tokens.reshape(-1))

    def _find_out(self, model: Any, tokenizer: Any) -> tuple[Any, int]:
        """Try what a vision graph can ask for; raises the runtime's own error if it takes none."""
        frame = frames.transform(np.zeros((8, 8, 3), np.uint8), 1)
        error: Exception | None = None
        for views in (0, images.MAX_CROPS + 1):
            for dtype in (np.float32, np.float16):
                try:
                    self._try(model, tokenizer, frames.stack([frame], dtype, views))
                except RuntimeError as refused:
                    error = error or refused
                else:
                    return dtype, views
        assert error is not None
        raise error

    @staticmethod
    def _try(model: Any, tokenizer: Any, batch: frames.Batch) -> None:
        prompt = tags.with_slots("Hello <|image_1|>", tokenizer.encode, {1: int(batch.tokens[0])})
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + 1, do_sample=False, num_beams=1)
        _set_inputs(og.Generator(model, params), prompt, batch)


class VisionStream(TextStream):
    """One job with images: up to the last of them its prefill is one call."""

    def __init__(
        self, model: Any, prompt: Any, setup: Setup, *, batch: frames.Batch, crops: int
    ) -> None:
        super().__init__(model, prompt, setup)
        self.image_tokens = int(batch.tokens.sum())
        self.crops = crops
        self._batch: frames.Batch | None = batch
        if not setup.first_call:
            # Inside the one call the decoder takes the prompt in slices too: it saves memory.
            setup.options["chunk_size"] = setup.slice_tokens

    def prefill(self) -> Iterator[int]:
        """Show the images, and append a long text after them in slices."""
        self._begin()
        assert self._batch is not None
        end = int(np.flatnonzero(self._prompt < 0)[-1]) + 1
        end = min(max(end, self._setup.first_call), self.prompt_tokens)
        if self.prompt_tokens - end <= self._setup.slice_tokens:
            end = self.prompt_tokens
        _set_inputs(self._generator, self._prompt[:end], self._batch)
        self._batch = None
        yield end
        yield from self._append(end)

    def close(self) -> None:
        """Release the job's memory."""
        self._batch = None
        super().close()


def _set_inputs(generator: Any, prompt: Any, batch: frames.Batch) -> None:
    """Compute the prompt and the images it shows, in one call."""
    tensors = og.NamedTensors()
    tensors["input_ids"] = prompt[None]
    tensors["pixel_values"] = batch.pixels
    tensors["image_sizes"] = batch.sizes
    tensors["num_image_tokens"] = batch.tokens
    generator.set_inputs(tensors)
