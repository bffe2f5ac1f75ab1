"""Every file name of a checkpoint directory, once."""

CHECKPOINTS = "checkpoints"  # where downloads go, and where names are looked up

# Hugging Face's files
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
BIN = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
VOCAB = "vocab.json"
MERGES = "merges.txt"
CHAT_TEMPLATE = "chat_template.jinja"

# Hugging Face's files of what makes the input of other parts than the text model
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "chat_template.json")

# PEFT's files
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

# LitGPT's files
LIT_CONFIG = "model_config.yaml"
LIT_WEIGHTS = "lit_model.pth"
LIT_LORA = "lit_model.pth.lora"
LIT_ADAPTER = "lit_model.pth.adapter"
LIT_ADAPTER_V2 = "lit_model.pth.adapter_v2"
PROMPT_STYLE = "prompt_style.yaml"
HYPERPARAMETERS = "hyperparameters.yaml"

# Our files of Adapter and Adapter v2: what was trained, and beside which model
OWN_ADAPTER = "adapter.safetensors"
OWN_ADAPTER_BASE = "adapter.yaml"

SOURCE = "source.json"  # which file or package a folder was imported from

# Folders of a training run
STEP = "step-{:06d}"
FINAL = "final"
BEST = "best"  # a link to the step with the lowest validation loss
REPORT = "report.html"
LAST = "last"  # a link to the step that was saved last
ADAPTER = "adapter"
RUN_STATE = "run_state"
STATE = "state.json"
PARTIAL = ".tmp"  # ends the name of what is still being written

DTYPES = ("bfloat16", "float16", "float32")  # what `--dtype` may say of weights

TOKENIZER_FILES = (TOKENIZER_JSON, TOKENIZER_MODEL, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS, VOCAB, MERGES, CHAT_TEMPLATE)
