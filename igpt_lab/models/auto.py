"""The classes of this package behind the Auto classes of transformers, for a user who has it."""

from igpt_lab.core.arguments import checked
from igpt_lab.core.joining import join
from igpt_lab.images.processor import ImageGPTImageProcessor, ImageGPTImageProcessorPil
from igpt_lab.models.config import ImageGPTConfig
from igpt_lab.models.imagegpt import ImageGPTForImageClassification, ImageGPTModel


@checked
def register_auto_classes() -> None:
    """From here on transformers' Auto classes give this package's classes for checkpoints of ImageGPT.

    These are `AutoConfig`, `AutoModel`, `AutoModelForImageClassification` and `AutoImageProcessor`, and with them
    `pipeline`. Raises ImportError where transformers is not installed.
    """
    import transformers
    from transformers.image_processing_utils import BaseImageProcessor  # noqa: F401  # so that `join` finds it

    join()
    transformers.AutoConfig.register(ImageGPTConfig.model_type, ImageGPTConfig, exist_ok=True)
    transformers.AutoModel.register(ImageGPTConfig, ImageGPTModel, exist_ok=True)
    transformers.AutoModelForImageClassification.register(ImageGPTConfig, ImageGPTForImageClassification, exist_ok=True)
    processors: dict[str, type] = {"pil": ImageGPTImageProcessorPil, "torchvision": ImageGPTImageProcessor}
    transformers.AutoImageProcessor.register(ImageGPTConfig, image_processor_classes=processors, exist_ok=True)
