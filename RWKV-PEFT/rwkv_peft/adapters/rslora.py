"""rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): LoRA with a scale that falls with the square root of its rank, so that
a step's change does not shrink as the rank grows. Its files are LoRA's: they hold the scale."""

import math
from dataclasses import replace

from . import lora
from .method import Alpha

METHOD = replace(lora.METHOD, name="rslora", saved_as="lora", alpha=Alpha(divisor=math.sqrt))
