"""Speculative decoding of many requests at once: models, KV cache, drafting, verification, sampling.

Knows torch and transformers, and no service. `load_pair` loads a target with its draft, `Engine` decodes,
`StepResult` is what each step gives back.
"""

from .adaptive import Drafter
from .config import EngineConfig, EngineRequest, SamplingConfig, StoppingConfig
from .costs import StepCosts
from .engine import Engine
from .errors import EngineError, InvalidRequestError, ModelError, NoFreeSlotError, UnknownRequestError
from .loading import ModelPair, load_pair
from .parallel import Group
from .results import FinishReason, KvUsage, StepResult, TokenLogprob

__all__ = [
    "Drafter",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineRequest",
    "FinishReason",
    "Group",
    "InvalidRequestError",
    "KvUsage",
    "ModelError",
    "ModelPair",
    "NoFreeSlotError",
    "SamplingConfig",
    "StepCosts",
    "StepResult",
    "StoppingConfig",
    "TokenLogprob",
    "UnknownRequestError",
    "load_pair",
]
