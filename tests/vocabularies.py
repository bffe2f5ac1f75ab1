"""Small tokenizers of every kind that checkpoints come with, trained while the tests run."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What do llamas eat? Llamas eat grass, hay and leaves!",
    "def main(argument):\n    for i in range(10):\n        print('hello', i)  # done\n\treturn None",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "User: hello\nAnswer: hello world Instruct: Output: ### Instruction: ### Response: [INST] <<SYS>> [/INST] system user assistant",
    "naïve café, über, 日本語 и немного текста, 😀 emoji 👩‍👩‍👧‍👦 flags 🇩🇪",
] * 20
TURNS = (
    "<|im_start|> <|im_end|> <|im_sep|> <start_of_turn> <end_of_turn> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> "
    "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|> <｜User｜> <｜Assistant｜> <｜end▁of▁sentence｜> "
    "<|SYSTEM|> <|USER|> <|ASSISTANT|>"
).split()
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte_level", "prepended", "metaspace", "sentencepiece")


def write(folder: Path, kind: str, turns: bool = True, **settings) -> Path:
    """Write the files of a tokenizer into a folder.

    Args:
        folder: The folder, which is made.
        kind: `byte_level` (GPT-2, Llama 3, Qwen), `prepended` (Llama 2's tokenizer.json), `metaspace` (a unigram model with byte
            fallback) or `sentencepiece` (Llama 2's tokenizer.model).
        turns: Whether it has special tokens for turns.
        **settings: What `tokenizer_config.json` says besides the names of BOS and EOS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(trained_model(TURNS if turns else []))
    else:
        processor = globals()[f"train_{kind}"]()
        processor.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (TURNS if turns else [])])
        processor.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in named.items() if value is not None}))
    return folder


def train_byte_level() -> FastTokenizer:
    processor = FastTokenizer(models.BPE())
    processor.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    processor.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    processor.train_from_iterator(CORPUS, trainer)
    return processor


def train_prepended() -> FastTokenizer:
    processor = FastTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    processor.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    processor.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES, limit_alphabet=60, show_progress=False)
    processor.train_from_iterator(CORPUS, trainer)
    return without_added_bytes(processor)


def train_metaspace() -> FastTokenizer:
    processor = FastTokenizer(models.Unigram([("<unk>", 0.0)], unk_id=0, byte_fallback=True))
    processor.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    processor.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)])
    words = [" ".join(line.split()) for line in CORPUS]
    letters = sorted({letter for line in words for letter in line if letter.isascii()} - {" "})
    pieces = {piece for line in words for word in line.split() for piece in ("▁" + word, word) if word.isascii()}
    pieces = sorted(pieces - set(letters), key=lambda piece: (-len(piece), piece))
    vocabulary = [(token, 0.0) for token in SPECIAL] + [(byte, -20.0) for byte in BYTES] + [("▁", -3.0), ("▁▁", -4.0), ("\ufffd", -9.0)]
    vocabulary += [(piece, -4.0 - index / 1000) for index, piece in enumerate(pieces)] + [(letter, -8.0) for letter in letters]
    processor.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
    processor.add_special_tokens(SPECIAL)
    return processor


def without_added_bytes(processor: FastTokenizer) -> FastTokenizer:
    """Bytes had to be named to the trainer as special tokens, but are ordinary ones."""
    written = json.loads(processor.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] in SPECIAL]
    return FastTokenizer.from_str(json.dumps(written))


def with_bos(processor: FastTokenizer) -> FastTokenizer:
    """Let the post-processor put a BOS in front."""
    processor.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", processor.token_to_id("<s>"))])
    return processor


def trained_model(turns: list[str]) -> bytes:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=560,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        control_symbols=turns,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return written.getvalue()
