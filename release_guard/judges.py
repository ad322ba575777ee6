"""Who says what a painted picture shows, and whether that judge can be believed.

Shapes: N pictures.
"""

from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from release_guard import checkpoints
from release_guard.errors import ModelError, brief
from release_guard.manifest import hash_directory
from release_guard.sources import local_folder

_LEAST_RIGHT = 0.7  # of real pictures of a class that a judge must name right
_MOST_WRONG = 0.3  # of real pictures of others that it may take for that class
_TOGETHER = 64


class Judge:
    """An image classifier of `transformers` that says what a picture shows.

    Attributes:
        digest: Of its weights and configuration.
        numbers: Class numbers by their names.
    """

    def __init__(self, source: str) -> None:
        folder = local_folder(source)
        self._source = source
        self._module = _classifier(source, folder)
        try:
            with checkpoints.quiet():
                self._processor = AutoImageProcessor.from_pretrained(
                    folder, local_files_only=True, trust_remote_code=False, backend="pil"
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"the judge's preprocessor_config.json cannot be used ({brief(error)})"
            raise ModelError(f"{source}: {what}; add or mend it") from error
        self.digest = hash_directory(folder).payload.root
        self.numbers: dict[str, int] = self._module.config.label2id
        self._mode = "L" if getattr(self._module.config, "num_channels", 3) == 1 else "RGB"

    def classes(self, pixels: Tensor) -> Tensor:
        """Class numbers (N) of pictures (N, channels, height, width) in [0, 1]."""
        named = [self._classes(part) for part in torch.split(pixels, _TOGETHER)]
        return torch.cat(named)

    def check(self, pixels: Tensor, labels_N: Tensor, num_shown: int, *, where: str) -> None:
        """Show it real pictures: those of a class, and all the others.

        Args:
            pixels: (N, channels, height, width) in [0, 1].
            labels_N: What they show.
            num_shown: How many, from the first, show what it is to judge; the rest shows others.
            where: The data set, to begin messages with.

        Raises:
            ModelError: It agrees too often, or too rarely, or there is only one class.
        """
        named_N = self.classes(pixels).to(labels_N)
        for label in sorted(set(labels_N[:num_shown].tolist())):
            is_it_N = labels_N == label
            if bool(is_it_N.all()):
                reason = "one class alone cannot show that the judge ever says no"
                raise ModelError(f"{where}: {reason}; name other pictures in modality.others")
            right = float((named_N[is_it_N] == label).double().mean())
            wrong = float((named_N[~is_it_N] == label).double().mean())
            if right < _LEAST_RIGHT or wrong > _MOST_WRONG:
                found = f"sees class {label} in {right:.0%} of its pictures, {wrong:.0%} of others"
                advice = "train it better, or correct the labels"
                raise ModelError(f"{where}: the judge {self._source} {found}; {advice}")

    def _classes(self, pixels: Tensor) -> Tensor:
        grey = (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        pictures = [PIL.Image.fromarray(image.squeeze()).convert(self._mode) for image in grey]
        inputs = self._processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            found: Tensor = self._module(pixel_values=inputs).logits.argmax(dim=1)
        return found


def _classifier(source: str, folder: Path) -> Any:
    return checkpoints.load(
        source,
        folder,
        auto=AutoModelForImageClassification,
        architectures=MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values(),
        modality="text_to_image",
    )
