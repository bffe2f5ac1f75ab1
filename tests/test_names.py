"""Every name that LitGPT's users know: kept, planned, or dropped for a reason. Nothing is forgotten silently.

The lists are LitGPT 0.5.13's commands, flags and their defaults (which are its recipes' keys and values too), and Python names.
A name is either present, or in `LATER` (which only shrinks: what is present has no business there), or in `NOT_KEPT` with the
reason. A flag whose help begins with "Not supported yet" counts as missing. Defaults are LitGPT's or stand in `CHANGED`.
"""

import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentError, ArgumentParser

from litgpt import cli

ROOT = Path(__file__).parents[1]
NEEDED = object()  # in place of a default: the argument is positional and required

# Commands and flags (page 1.1 and 1.3)

SAMPLING = {"max_new_tokens": 50, "top_k": 50, "top_p": 1.0, "temperature": 0.8}
HARDWARE = {"quantize": None, "precision": None}
GENERATE = {
    "checkpoint_dir": NEEDED,
    "prompt": "What food do llamas eat?",
    "sys_prompt": None,
    "num_samples": 1,
    **SAMPLING,
    **HARDWARE,
    "compile": False,
}
GENERATE_TUNED = {
    "checkpoint_dir": NEEDED,
    "prompt": "What food do llamas eat?",
    "input": "",
    "sys_prompt": None,
    **SAMPLING,
    "max_new_tokens": 100,
    **HARDWARE,
}
TRAIN = {
    "train.save_interval": 1000,
    "train.log_interval": 1,
    "train.global_batch_size": 16,
    "train.micro_batch_size": 1,
    "train.lr_warmup_steps": 100,
    "train.lr_warmup_fraction": None,
    "train.epochs": 5,
    "train.max_tokens": None,
    "train.max_steps": None,
    "train.max_time": None,
    "train.max_seq_length": None,
    "train.tie_embeddings": None,
    "train.max_norm": None,
    "train.min_lr": 6e-5,
}
EVAL = {
    "eval.interval": 100,
    "eval.max_new_tokens": 100,
    "eval.max_iters": 100,
    "eval.initial_validation": False,
    "eval.final_validation": True,
    "eval.evaluate_example": "first",
}
LOG = {
    "log.project": None,
    "log.run": None,
    "log.group": None,
    "log.teamspace": None,
    "log.metadata": None,
    "log.checkpoint_name": None,
    "log.log_model": False,
    "log.save_logs": True,
}
OPTIMIZER = {  # what "AdamW" alone means in LitGPT are torch's defaults
    "optimizer": "AdamW",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 0.01,
    "optimizer.betas": (0.9, 0.999),
}
FINETUNE = {
    "checkpoint_dir": NEEDED,
    "out_dir": "out/finetune/full",
    "precision": None,
    "devices": 1,
    "num_nodes": 1,
    "data": None,
    **TRAIN,
    **EVAL,
    **LOG,
    **OPTIMIZER,
    "logger_name": "csv",
    "seed": 1337,
    "access_token": None,
}
FINETUNE_LORA = {
    **FINETUNE,
    "out_dir": "out/finetune/lora",
    "quantize": None,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_query": True,
    "lora_key": False,
    "lora_value": True,
    "lora_projection": False,
    "lora_mlp": False,
    "lora_head": False,
}
COMMANDS: dict[str, dict[str, Any]] = {
    "download": {
        "repo_id": NEEDED,
        "access_token": None,
        "tokenizer_only": False,
        "convert_checkpoint": True,
        "dtype": None,
        "checkpoint_dir": "checkpoints",
        "model_name": None,
    },
    "chat": {"checkpoint_dir": NEEDED, **SAMPLING, **HARDWARE, "compile": False, "multiline": False, "access_token": None},
    "finetune": FINETUNE_LORA,
    "finetune_lora": FINETUNE_LORA,
    "finetune_full": {**FINETUNE, "resume": False, "eval.interval": 600},
    "finetune_adapter": {**FINETUNE, "out_dir": "out/finetune/adapter", "quantize": None},
    "finetune_adapter_v2": {**FINETUNE, "out_dir": "out/finetune/adapter-v2", "quantize": None, "resume": False},
    "pretrain": {
        "model_name": NEEDED,
        "model_config": None,
        "out_dir": "out/pretrain",
        "precision": None,
        "initial_checkpoint_dir": None,
        "resume": False,
        "data": None,
        **TRAIN,
        "train.global_batch_size": 512,
        "train.micro_batch_size": 4,
        "train.lr_warmup_steps": 2000,
        "train.epochs": None,
        "train.max_tokens": 3_000_000_000_000,
        "train.max_norm": 1.0,
        "train.min_lr": 4e-5,
        "train.tie_embeddings": False,
        **EVAL,
        "eval.interval": 1000,
        "eval.max_new_tokens": None,
        **LOG,
        **OPTIMIZER,
        "devices": "auto",
        "num_nodes": 1,
        "tokenizer_dir": None,
        "logger_name": "tensorboard",
        "seed": 42,
    },
    "generate": GENERATE,
    "generate_full": {**GENERATE_TUNED, "finetuned_path": "out/full/alpaca/lit_model_finetuned.pth"},
    "generate_adapter": {**GENERATE_TUNED, "adapter_path": "out/finetune/adapter/final/lit_model.pth.adapter"},
    "generate_adapter_v2": {**GENERATE_TUNED, "adapter_path": "out/finetune/adapter-v2/final/lit_model.pth.adapter_v2"},
    "generate_sequentially": GENERATE,
    "generate_speculatively": {
        "draft_model_checkpoint_dir": NEEDED,
        "target_model_checkpoint_dir": NEEDED,
        **{name: default for name, default in GENERATE.items() if name != "checkpoint_dir"},
        "speculative_k": 3,
    },
    "generate_tp": GENERATE,
    "convert_to_litgpt": {"checkpoint_dir": NEEDED, "model_name": None, "dtype": None, "debug_mode": False},
    "convert_from_litgpt": {"checkpoint_dir": NEEDED, "output_dir": NEEDED},
    "convert_pretrained_checkpoint": {"checkpoint_dir": NEEDED, "output_dir": NEEDED},
    "merge_lora": {"checkpoint_dir": NEEDED, "pretrained_checkpoint_dir": None, "precision": None},
    "evaluate": {
        "checkpoint_dir": NEEDED,
        "tasks": None,
        "out_dir": None,
        "force_conversion": False,
        "num_fewshot": None,
        "batch_size": 1,
        "device": None,
        "dtype": None,
        "limit": None,
        "seed": 1234,
        "save_filepath": None,
        "access_token": None,
    },
    "serve": {
        "checkpoint_dir": NEEDED,
        "quantize": None,
        "precision": None,
        **SAMPLING,
        "devices": 1,
        "accelerator": "auto",
        "port": 8000,
        "stream": False,
        "openai_spec": False,
        "access_token": None,
        "api_path": "/predict",
        "timeout": 30,
        "generate_strategy": None,
    },
    "validate": {"checkpoint_dir": NEEDED, "model_filename": "lit_model.pth", "dtype": "float32", "training": False},
}
OLDER_RECIPES = (
    "optimizer.class_path",
    "optimizer.init_args.lr",
    *(f"train.{name}" for name in ("learning_rate", "weight_decay", "beta1", "beta2")),
)
BNB = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq")
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow", "litlogger")
VALUES: dict[str, tuple[str, ...]] = {  # what a flag accepts, where that is a list
    "quantize": (*BNB, "bnb.int8"),
    "finetune quantize": (*BNB, "bnb.int8-training"),
    "generate_sequentially quantize": BNB,
    "generate_tp quantize": BNB,
    "logger_name": LOGGERS,
    "precision": ("bf16-true", "bf16-mixed", "32-true", "16-true", "16-mixed"),
    "pretrain precision": ("bf16-true", "bf16-mixed", "32-true"),
    "finetune precision": ("bf16-true", "bf16-mixed", "32-true", "16-mixed"),
    "devices": ("1", "auto", "-1"),
    "serve devices": ("1",),
    "resume": ("true", "false", "auto", "some/dir"),
    "finetune_adapter_v2 resume": ("true", "false"),
    "eval.evaluate_example": ("first", "random", "3"),
    "generate_strategy": ("sequential", "tensor_parallel"),
    "top_k": ("1", "null"),
    "serve top_k": ("1",),
    "batch_size": ("1", "auto"),
    "tasks": ("a,b",),
    "dtype": ("bfloat16", "float16", "float32"),
}
SCRIPTS = {  # run by their path
    "litgpt/data/prepare_slimpajama.py",
    "litgpt/data/prepare_starcoder.py",
    "extensions/thunder/pretrain.py",
    "extensions/xla/generate/base.py",
    "extensions/xla/generate/adapter.py",
    "extensions/xla/finetune/adapter.py",
    "extensions/xla/scripts/prepare_alpaca.py",
}

# Python names (page 3 and 6.1)

LAYERS = "GPT Config Block CausalSelfAttention"
MLPS = "GptNeoxMLP LLaMAMLP GemmaMLP LLaMAMoE"
MODULES = {
    "litgpt": "LLM GPT Config PromptStyle Tokenizer CheckpointValidationResult validate_checkpoint estimate_model_memory",
    "litgpt.data": "Alpaca Alpaca2k AlpacaGPT4 Deita FLAN JSON LIMA LitData DataModule LongForm OpenWebText SFTDataset TextFiles TinyLlama "
    "TinyStories MicroLlama get_sft_collate_fn",
    "litgpt.data.base": "DataModule SFTDataset get_sft_collate_fn",
    "litgpt.data.alpaca": "download_if_missing",
    "litgpt.data.json_data": "load_split",
    "litgpt.model": f"{LAYERS} {MLPS} MultiheadLatentAttention GroupedTopkRouter RMSNorm KVCache build_rope_cache build_mask_cache "
    "apply_rope apply_rope_interleave do_softcapping batched_index_select batched_index_copy_ yarn_get_mscale",
    "litgpt.config": "Config configs name_to_config find_multiple check_indicator_and_length",
    "litgpt.lora": f"{LAYERS} {MLPS} LoRALayer LoRALinear LoRAQKVLinear create_lora_linear mark_only_lora_as_trainable lora_filter "
    "merge_lora_weights",
    "litgpt.adapter": f"{LAYERS} mark_only_adapter_as_trainable adapter_filter",
    "litgpt.adapter_v2": f"{LAYERS} {MLPS} AdapterV2Linear mark_only_adapter_v2_as_trainable adapter_filter",
    "litgpt.generate.base": "generate generate_fn batched_generate_fn next_token batched_next_token sample batched_sample sample_top_p "
    "multinomial_num_samples_1 main",
    "litgpt.generate.sequentially": "sequential chunk_sizes layer_to_device replace_device move_block_input move_block_output",
    "litgpt.generate.tp": "tensor_parallel tensor_parallel_linear tensor_parallel_mlp tensor_parallel_attn all_reduce_output",
    "litgpt.generate.speculative_decoding": "sample speculative_decoding generate setup_model load_model",
    "litgpt.chat.base": "generate process_prompt interact main",
    "litgpt.utils": "init_out_dir find_resume_path num_parameters reset_parameters check_valid_checkpoint_dir incremental_save lazy_load "
    "chunked_cross_entropy map_old_state_dict_weights get_default_supported_precision load_checkpoint load_checkpoint_update "
    "load_from_full_model_state_dict flops_per_param estimate_flops CycleIterator copy_config_files CLI capture_hparams save_config "
    "parse_devices choose_logger get_argument_names instantiate_bnb_optimizer instantiate_torch_optimizer extend_checkpoint_dir "
    "check_file_size_on_cpu_and_warn auto_download_checkpoint check_nvlink_connectivity fix_and_load_json "
    "create_finetuning_performance_report select_sft_generate_example kill_process_tree _RunIf CheckpointValidationResult "
    "validate_checkpoint estimate_model_memory",
    "litgpt.parser_config": "save_hyperparameters parser_commands",
    "litgpt.types": "LoggerChoice",
    "litgpt.constants": "",
    "litgpt.args": "TrainArgs EvalArgs LogArgs",
    "litgpt.prompts": "PromptStyle prompt_styles model_name_to_prompt_style save_prompt_style load_prompt_style has_prompt_style "
    "Alpaca FLAN Longform StableLMAlpha StableLMZephyr Falcon Falcon3 Llama2FunctionCalling Llama2 FreeWilly2 Platypus StableCode "
    "CodeLlama Phi1 Phi2 Phi3 Phi4 Phi4Reasoning Phi4Mini Phi4MiniReasoning TinyLlama Gemma Llama3 OLMo ChatML Qwen2_5 Qwen2_5_Math "
    "QwQ Qwen3 SmolLM2 Salamandra R1Base Default",
    "litgpt.tokenizer": "Tokenizer",
    "litgpt.api": "LLM Preprocessor calculate_number_of_devices benchmark_dict_to_markdown_table pull_request_benchmark_util",
    # the functions behind the commands, at their module paths
    "litgpt.__main__": "main",
    "litgpt.pretrain": "setup",
    "litgpt.finetune.lora": "setup",
    "litgpt.finetune.full": "setup",
    "litgpt.finetune.adapter": "setup",
    "litgpt.finetune.adapter_v2": "setup",
    "litgpt.generate.full": "main",
    "litgpt.generate.adapter": "main",
    "litgpt.generate.adapter_v2": "main",
    "litgpt.scripts.download": "download_from_hub",
    "litgpt.scripts.convert_hf_checkpoint": "convert_hf_checkpoint",
    "litgpt.scripts.convert_lit_checkpoint": "convert_lit_checkpoint",
    "litgpt.scripts.convert_pretrained_checkpoint": "",
    "litgpt.scripts.merge_lora": "merge_lora",
    "litgpt.eval.evaluate": "",
    "litgpt.deploy.serve": "",
}
MEMBERS = {  # attributes and methods of classes
    "litgpt.api.LLM": "model preprocessor prompt_style devices config checkpoint_dir fabric generate_strategy kv_cache_initialized "
    "fixed_kv_cache_size prev_generated_seq_length tokenizer state_dict load_state_dict load distribute generate forward trainer_setup "
    "save benchmark",
    "litgpt.api.Preprocessor": "tokenizer device encode decode",
    "litgpt.model.GPT": "from_name forward config max_seq_length rope_cache rope_cache_length set_kv_cache clear_kv_cache reset_parameters "
    "_init_weights",
    "litgpt.config.Config": "from_name from_file from_checkpoint mlp_class norm_class",
    "litgpt.tokenizer.Tokenizer": "encode decode decode_stream vocab_size token_to_id model_name bos_id eos_id use_bos backend",
    "litgpt.prompts.PromptStyle": "apply stop_tokens from_name from_config",
    "litgpt.args.TrainArgs": "batch_size gradient_accumulation_iters warmup_iters",
    "litgpt.data.DataModule": "connect prepare_data setup train_dataloader val_dataloader",
}
CALLS: dict[str, dict[str, Any]] = {  # the arguments of functions, with their defaults
    "litgpt.api.LLM.load": {"model": NEEDED, "init": "pretrained", "tokenizer_dir": None, "access_token": None, "distribute": "auto"},
    "litgpt.api.LLM.distribute": {
        "accelerator": "auto",
        "devices": "auto",
        "precision": None,
        "quantize": None,
        "generate_strategy": None,
        "fixed_kv_cache_size": None,
    },
    "litgpt.api.LLM.generate": {
        "prompt": NEEDED,
        "sys_prompt": None,
        "max_new_tokens": 50,
        "temperature": 1.0,
        "top_k": None,
        "top_p": 1.0,
        "return_as_token_ids": False,
        "stream": False,
    },
    "litgpt.api.LLM.forward": {"input_ids": NEEDED, "target_ids": None, "loss_fn": None},
    "litgpt.api.LLM.trainer_setup": {"trainer_ckpt": None},
    "litgpt.api.LLM.save": {"out_dir": NEEDED, "prompt_style": None},
    "litgpt.api.LLM.benchmark": {"num_iterations": 1},
    "litgpt.api.Preprocessor": {"tokenizer": NEEDED, "device": NEEDED},
    "litgpt.model.GPT": {"config": NEEDED},
    "litgpt.model.GPT.from_name": {"name": NEEDED},
    "litgpt.model.GPT.forward": {"idx": NEEDED, "input_pos": None, "input_pos_maxp1": None, "lm_head_chunk_size": 0},
    "litgpt.config.Config.from_name": {"name": NEEDED},
    "litgpt.config.Config.from_file": {"path": NEEDED},
    "litgpt.config.Config.from_checkpoint": {"path": NEEDED},
    "litgpt.tokenizer.Tokenizer": {"checkpoint_dir": NEEDED},
    "litgpt.tokenizer.Tokenizer.encode": {"string": NEEDED, "device": None, "bos": None, "eos": False, "max_length": -1},
    "litgpt.tokenizer.Tokenizer.decode": {"tensor": NEEDED},
    "litgpt.tokenizer.Tokenizer.decode_stream": {"device": None},
    "litgpt.prompts.PromptStyle.apply": {"prompt": NEEDED, "sys_prompt": None},
    "litgpt.prompts.PromptStyle.stop_tokens": {"tokenizer": NEEDED},
    "litgpt.lora.mark_only_lora_as_trainable": {"model": NEEDED, "bias": "none"},
    "litgpt.lora.lora_filter": {"key": NEEDED, "value": NEEDED},
    "litgpt.lora.merge_lora_weights": {"model": NEEDED},
    "litgpt.args.TrainArgs": {name.removeprefix("train."): default for name, default in TRAIN.items()}
    | {"global_batch_size": 64, "micro_batch_size": 4, "epochs": None},
    "litgpt.args.EvalArgs": {name.removeprefix("eval."): default for name, default in EVAL.items()}
    | {"interval": 600, "max_new_tokens": None},
    "litgpt.args.LogArgs": {name.removeprefix("log."): default for name, default in LOG.items()},
    "litgpt.data.SFTDataset": {
        "data": NEEDED,
        "tokenizer": NEEDED,
        "prompt_style": NEEDED,
        "max_seq_length": -1,
        "mask_prompt": True,
        "ignore_index": -100,
        "transform": None,
    },
    "litgpt.adapter.Config": {"adapter_prompt_length": 10, "adapter_start_layer": 2},
}

# What becomes of those that are not there, or not the same

LATER = {  # what stands here speaks for its parts too: a command for its flags, a module for its names
    # commands
    "generate_sequentially",
    "generate_speculatively",
    "generate_tp",
    "convert_pretrained_checkpoint",
    # their modules
    "litgpt.generate.sequentially",
    "litgpt.generate.tp",
    "litgpt.generate.speculative_decoding",
    "litgpt.scripts.convert_pretrained_checkpoint",
    "serve generate_strategy",
    # layers of further families
    "litgpt.model.MultiheadLatentAttention",
    "litgpt.model.GroupedTopkRouter",
    "litgpt.model.do_softcapping",
    # data sets
    "litgpt.data.LitData",
    "litgpt.data.OpenWebText",
    "litgpt.data.TinyLlama",
    "litgpt.data.TinyStories",
    "litgpt.data.MicroLlama",
    # scripts
    "litgpt/data/prepare_slimpajama.py",
    "litgpt/data/prepare_starcoder.py",
    "extensions/thunder/pretrain.py",
    "extensions/xla/generate/base.py",
    "extensions/xla/generate/adapter.py",
    "extensions/xla/finetune/adapter.py",
    "extensions/xla/scripts/prepare_alpaca.py",
}
WRAPPED = "LoRA and Adapter V2 wrap the layers of the one model, whose classes are in litgpt.model"
ONE_CACHE = "litgpt.cache owns what layers remember: GPT.new_cache makes one"
ONE_ROPE = "litgpt.rope has the tables of a call and turns by them"
STEPS = "both training scripts count optimizer steps, so that nothing is left to convert"
NO_STATE = "a model holds no state of a call: the length is that of its input or its cache"
NOT_KEPT = {
    "litgpt.utils": "functions live with their subject: checkpoint, launch, optim, metrics, loss",
    "litgpt.parser_config": "training commands receive their resolved arguments and nothing re-reads sys.argv",
    "litgpt.types": "the type stands in the one signature that uses it",
    "litgpt.constants": "which packages are there is asked where they are used",
    **{f"litgpt.lora.{name}": WRAPPED for name in ("Block", "CausalSelfAttention", "GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE")},
    **{f"litgpt.adapter_v2.{name}": WRAPPED for name in ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE")},
    **{f"litgpt.lora.{name}": WRAPPED for name in ("LoRALayer", "LoRAQKVLinear", "create_lora_linear")},
    "litgpt.model.KVCache": ONE_CACHE,
    "litgpt.model.batched_index_select": ONE_CACHE,
    "litgpt.model.batched_index_copy_": ONE_CACHE,
    "litgpt.model.build_mask_cache": "masks follow from positions inside a call and are not stored",
    "litgpt.model.build_rope_cache": ONE_ROPE,
    "litgpt.model.apply_rope": ONE_ROPE,
    "litgpt.model.apply_rope_interleave": ONE_ROPE,
    "litgpt.model.yarn_get_mscale": ONE_ROPE,
    "litgpt.model.GPT.set_kv_cache": ONE_CACHE,
    "litgpt.model.GPT.clear_kv_cache": ONE_CACHE,
    "litgpt.model.GPT.max_seq_length": NO_STATE,
    "litgpt.model.GPT.rope_cache": NO_STATE,
    "litgpt.model.GPT.rope_cache_length": NO_STATE,
    "litgpt.model.GPT.reset_parameters": "no buffer is left to fill: rotary tables are made in each call",
    "litgpt.model.GPT._init_weights": "new parameters are drawn from their name and the seed",
    "litgpt.model.GPT.forward(input_pos)": "a cache brings the positions; without one they are `positions`",
    "litgpt.model.GPT.forward(input_pos_maxp1)": "the cache knows its live length",
    "litgpt.model.GPT.forward(lm_head_chunk_size)": "with `targets` the loss never holds all logits",
    "litgpt.config.Config.mlp_class": "the model picks its layers from its own tables, and config imports no torch",
    "litgpt.config.Config.norm_class": "the model picks its layers from its own tables, and config imports no torch",
    "litgpt.config.check_indicator_and_length": "Config checks its own fields when it is made",
    "litgpt.generate.base.next_token": "generate.decode has the one loop, over rows with a cache",
    "litgpt.generate.base.batched_next_token": "generate.decode has the one loop, over rows with a cache",
    "litgpt.generate.base.batched_sample": "generate.decode.sample draws for many rows at once",
    "litgpt.prompts.model_name_to_prompt_style": "no code looks for a substring in a model's name: find_prompt_style asks the checkpoint",
    "litgpt.api.pull_request_benchmark_util": "benchmarks/ has the scripts that measure",
    "litgpt.api.LLM.fabric": "one device needs no Fabric, and in training the caller's applies",
    "litgpt.api.LLM.prev_generated_seq_length": ONE_CACHE,
    **{f"litgpt.args.TrainArgs.{name}": STEPS for name in ("batch_size", "gradient_accumulation_iters", "warmup_iters")},
}
TUNING = ("finetune", "finetune_lora", "finetune_full", "finetune_adapter", "finetune_adapter_v2")
TRAINING = (*TUNING, "pretrain")
WARM_UP = "null means the smaller of 100 and a tenth of the steps, so that short runs reach their peak"
END = "null means a tenth of the peak, whatever the peak is"
FOLDER = "a run writes a folder, and LitGPT's default names a file that none of its scripts writes"
CLIPPED = "gradients are clipped unless one says null"
CHANGED: dict[str, tuple[Any, str]] = {  # our default, and why
    "download convert_checkpoint": (None, "a checkpoint is read as it is: the flag is accepted with a notice"),
    "chat max_new_tokens": (512, "an answer of 50 tokens breaks off in the middle"),
    **{f"{command} train.lr_warmup_steps": (None, WARM_UP) for command in TRAINING},
    **{f"{command} train.min_lr": (None, END) for command in TRAINING},
    **{f"{command} train.max_norm": (1.0, CLIPPED) for command in TUNING},
    **{f"{command} optimizer.lr": (2e-4, "torch's 1e-3 is too fast for LoRA") for command in TUNING[:2]},
    "finetune_full optimizer.lr": (2e-5, "torch's 1e-3 destroys a pretrained model"),
    "pretrain optimizer.lr": (None, "null means a rate that follows from the model's width"),
    **{f"{command} optimizer.weight_decay": (0.0, "LitGPT's own recipes for LoRA set 0") for command in TUNING},
    "pretrain optimizer.weight_decay": (0.1, "LitGPT's own recipes set 0.1"),
    **{f"{command} optimizer.betas": ((0.9, 0.95), "LitGPT's own recipes set these") for command in TRAINING},
    "pretrain train.global_batch_size": (None, "null means a size that follows from the amount of data"),
    "pretrain train.max_tokens": (None, "null means once through the data, not three trillion tokens"),
    "pretrain train.tie_embeddings": (None, "null means as the architecture is"),
    "litgpt.args.TrainArgs(lr_warmup_steps)": (None, WARM_UP),
    "litgpt.args.TrainArgs(max_norm)": (1.0, CLIPPED),
    "litgpt.args.TrainArgs(min_lr)": (None, END),
    "generate_full finetuned_path": ("out/finetune/full/final", FOLDER),
    "generate_adapter adapter_path": ("out/finetune/adapter/final", FOLDER),
    "generate_adapter_v2 adapter_path": ("out/finetune/adapter-v2/final", FOLDER),
    "litgpt.api.Preprocessor(device)": ("cpu", "it may be left out where there is one device"),
}


def names() -> Iterator[tuple[str, Any]]:
    """Yield every name of LitGPT's, with its default where it has one."""
    for command, flags in COMMANDS.items():
        yield command, NEEDED
        for flag, default in flags.items():
            yield f"{command} {flag}", default
            values = VALUES.get(f"{command} {flag}") or VALUES.get(f"{command.split('_')[0]} {flag}") or VALUES.get(flag, ())
            yield from ((f"{command} {flag} {value}", NEEDED) for value in values)
        if "optimizer" in flags:
            yield from ((f"{command} {flag}", NEEDED) for flag in OLDER_RECIPES)
    yield from ((script, NEEDED) for script in sorted(SCRIPTS))
    for module, inside in MODULES.items():
        yield module, NEEDED
        yield from ((f"{module}.{name}", NEEDED) for name in inside.split())
    for owner, members in MEMBERS.items():
        yield from ((f"{owner}.{name}", NEEDED) for name in members.split())
    for function, arguments in CALLS.items():
        yield from ((f"{function}({name})", default) for name, default in arguments.items())


NAMES = dict(names())


@cache
def parser_of(command: str) -> tuple[ArgumentParser, cli.Options] | None:
    if command not in cli.COMMANDS:
        return None
    module, function = cli.COMMANDS[command][0].split(":")
    parser = cli.make_parser(getattr(import_module(module), function), command)
    return parser, cli.Options(parser, command)


def has_flag(command: str, flag: str, value: str | None) -> bool:
    parser, options = parser_of(command)
    known = {action.dest: action for action in parser._actions}
    if flag in known and (known[flag].help or "").startswith("Not supported yet"):
        return False
    if value is None:
        return flag in options.names | options.groups or flag.rpartition(".")[0] in options.names
    try:
        needed = [f"--{name}=x" for name in options.positionals if name != flag]
        parser.parse_args(cli.rewritten(options, [*needed, f"--{flag}={value}"], {}))
    except ArgumentError:
        return False
    return True


def find(name: str) -> Any:
    """Return the Python object of a dotted name, or raise `AttributeError`."""
    parts = name.split(".")
    for n_parts in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:n_parts]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("litgpt"):
                raise
            continue
        for part in parts[n_parts:]:
            if isinstance(found, type) and not hasattr(found, part) and f"self.{part}" in inspect.getsource(found):
                return None  # set by the constructor
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def present(name: str) -> bool:
    """Whether we have it."""
    if name in SCRIPTS:
        return (ROOT / name).is_file()
    if not name.startswith("litgpt"):
        command, *rest = name.split()
        return parser_of(command) is not None and (not rest or has_flag(command, rest[0], rest[1] if rest[1:] else None))
    try:
        owner, _, argument = name.rstrip(")").partition("(")
        found = find(owner)
        return not argument or argument in inspect.signature(found).parameters
    except AttributeError:
        return False


def default_of(name: str) -> Any:
    """Our default of a flag or an argument, as LitGPT would write it."""
    if "(" in name:
        owner, _, argument = name.rstrip(")").partition("(")
        value = inspect.signature(find(owner)).parameters[argument].default
        return NEEDED if value is inspect.Parameter.empty else value
    command, flag = name.split()
    parser, options = parser_of(command)
    if flag in options.positionals:
        return NEEDED
    value = parser.get_defaults()
    for part in [*flag.split("."), *(["name"] if flag == "optimizer" else [])]:
        value = value[part]
    return str(value) if isinstance(value, Path) else value


def covered(name: str, table: set[str] | dict[str, Any]) -> str | None:
    """Return the entry of a table that speaks for a name: itself, or what it is a part of."""
    entry = name
    while entry not in table:
        shorter = entry.rpartition(" ")[0] or entry.rpartition("(")[0] or (entry.rpartition(".")[0] if entry.startswith("litgpt") else "")
        if not shorter or "/" in entry:
            return None
        entry = shorter
    return entry


def test_every_name_is_present_or_planned_or_dropped_for_a_reason():
    missing = [name for name in NAMES if not present(name) and not covered(name, LATER) and not covered(name, NOT_KEPT)]
    assert not missing, "neither present, nor in LATER, nor in NOT_KEPT"


def test_what_is_present_is_neither_planned_nor_dropped():
    assert not [name for name in sorted(LATER) if present(name)], "present now: delete these lines of LATER"
    assert not [name for name in NOT_KEPT if present(name)], "present after all: delete these lines of NOT_KEPT"


def test_the_tables_speak_of_names_that_exist_and_only_once():
    assert not [entry for entry in {*LATER, *NOT_KEPT, *CHANGED} if entry not in NAMES]
    assert not LATER & set(NOT_KEPT)
    assert all(len(reason.split()) > 2 for reason in [*NOT_KEPT.values(), *(reason for _, reason in CHANGED.values())])


def test_defaults_are_those_of_litgpt_or_changed_for_a_reason():
    asked = {name: default for name, default in NAMES.items() if (" " in name or "(" in name) and len(name.split()) < 3}
    asked = {name: default for name, default in asked.items() if present(name) and name.partition(" ")[2] not in OLDER_RECIPES}
    ours = {name: default_of(name) for name in asked}
    wrong = {name: (ours[name], "LitGPT:", default) for name, default in asked.items() if name not in CHANGED and ours[name] != default}
    assert not wrong, "another default than LitGPT's, and not in CHANGED"
    stale = [name for name, (value, _) in CHANGED.items() if name in ours and (ours[name] != value or value == asked[name])]
    assert not stale, "CHANGED says something else than the code"


def test_commands_stand_in_the_order_of_the_help_text():
    known = [name for name in COMMANDS if name in cli.COMMANDS]
    assert list(cli.COMMANDS)[: len(known)] == known, "LitGPT's come first, then those that it does not have"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_flag_of_every_command_has_a_help_text(command):
    parser, options = parser_of(command)
    undocumented = [action.dest for action in parser._actions if action.dest in options.names and not action.help]
    assert not undocumented
