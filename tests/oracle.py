"""Random transformers models, and ours with the same weights."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from litgpt.checkpoint import assemble, read_weights
from litgpt.config import Config
from litgpt.model import GPT


def their_config(config: Config) -> PreTrainedConfig:
    """What transformers makes of our config; without its padding token, which may lie outside a tiny vocabulary."""
    return AutoConfig.for_model(**config.to_hf() | dict(pad_token_id=None))


def their_model(config: Config, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A transformers model of our config, with random weights large enough that every one of them matters."""
    theirs = AutoModelForCausalLM.from_config(their_config(config), dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            scales = "norm" in name and parameter.ndim == 1 and name.endswith("weight") and not config.norm_add_unit_offset
            torch.nn.init.normal_(parameter, 1.0 if scales else 0.0, 0.2)
    theirs.tie_weights()
    return theirs


def our_model(theirs: torch.nn.Module, config: Config) -> GPT:
    """Our model with the weights of theirs, as they are stored."""
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        weights = {name: tensor.clone() for name, tensor in read_weights(Path(folder), config)}
    return assemble(config, weights, "the oracle")


def pair(config: Config, dtype: torch.dtype = torch.float32) -> tuple[GPT, torch.nn.Module]:
    """Ours and theirs, with equal weights."""
    theirs = their_model(config, dtype)
    return our_model(theirs, config), theirs
