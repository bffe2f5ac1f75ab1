"""Random transformers models, and ours with the same weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from litgpt.checkpoint import assemble
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.translate import translate


def their_model(config: Config, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A transformers model of our config, with random weights large enough that every one of them matters."""
    described = config.to_hf()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**described), dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.2)
    theirs.tie_weights()
    return theirs


def our_model(theirs: torch.nn.Module, config: Config) -> GPT:
    """Our model with the weights of theirs."""
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    return assemble(config, dict(translate(weights.items(), config.rules, config, to_ours=True)), "the oracle")


def pair(config: Config, dtype: torch.dtype = torch.float32) -> tuple[GPT, torch.nn.Module]:
    """Ours and theirs, with equal weights."""
    theirs = their_model(config, dtype)
    return our_model(theirs, config), theirs
